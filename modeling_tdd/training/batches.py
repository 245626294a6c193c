# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Batches: their order, augmentation and collation. What is drawn at random depends only on seed, epoch and place."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from PIL import Image
from timm.data import Mixup, create_transform
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from ..images_tdd import to_rgb
from ..processing_tdd import TDDProcessor
from ..settings_tdd import check, integer, number


Example = dict[str, Any]  # a PIL `image` or `image_features`, and a `label` or `captions`
Batch = dict[str, Tensor]
Transform = Callable[[Image.Image], Tensor]

# The purposes of draws. They are part of the seed, so that no two purposes draw the same numbers.
ORDER, DATA, MODEL = range(3)


def seed_for(*key: int) -> int:
    """A 32-bit seed made of several numbers. Keys of one length that differ in a number give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class TrainingRows(Dataset):
    """The rows of an epoch in the order of training, for a loader that reads them from the first to the last. The
    seeds of Python, NumPy and PyTorch are set before each batch. So what reading and collating draw (crops, one of
    several captions) depends only on `seed`, epoch and the batch's place in the epoch, with any number of data
    workers. `multiple_of` is the number of images of an optimiser step over all processes. An incomplete last step is
    left out. Raises a `ValueError` if there are fewer rows than one step needs."""

    def __init__(self, rows: Sequence[Example], seed: int, multiple_of: int):
        if len(rows) < multiple_of:
            raise ValueError(f"The batch size is {multiple_of}, but there are only {len(rows)} images.")
        self.rows, self.seed = rows, seed
        self.length = len(rows) // multiple_of * multiple_of
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # persistent data workers see both
        self.order = torch.zeros(len(rows), dtype=torch.long).share_memory_()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        generator = torch.Generator().manual_seed(seed_for(self.seed, ORDER, epoch))
        self.order.copy_(torch.randperm(len(self.rows), generator=generator))

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> list[Example]:
        numbers = self.order[indices].tolist()
        set_seed(seed_for(self.seed, DATA, int(self.epoch), indices[0]))
        many = hasattr(self.rows, "__getitems__")
        return self.rows.__getitems__(numbers) if many else [self.rows[number] for number in numbers]


@dataclass
class Augmentation:
    """Arguments of timm's `create_transform` and `Mixup`, with their names there. By default all are off."""

    size: int | None = None  # height and width of the training views; by default those of the image processor
    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.0
    auto_augment: str | None = None
    re_prob: float = 0.0
    re_mode: str = "pixel"
    re_count: int = 1
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: str = "batch"

    def __post_init__(self):
        for name in ("hflip", "re_prob", "prob", "switch_prob"):
            check(f"augmentation.{name}", getattr(self, name), number(0, 1))
        for name in ("mixup_alpha", "cutmix_alpha"):
            check(f"augmentation.{name}", getattr(self, name), number(0, 1000))
        for name, low in (("size", 1), ("re_count", 1)):
            if getattr(self, name) is not None:
                check(f"augmentation.{name}", getattr(self, name), integer(low, 2**16))
        for name in ("scale", "ratio"):
            for value in getattr(self, name):
                check(f"augmentation.{name}", value, number(0, 100, above=True))


MIXUP_FIELDS = ("mixup_alpha", "cutmix_alpha", "prob", "switch_prob", "mode")


def build_train_transform(augmentation: Augmentation, image_processor: BaseImageProcessor) -> Transform:
    """timm's training transform for a PIL image in RGB, with the size and range of what the image processor makes.
    Without any augmentation it is the image processor itself. Raises a `ValueError` as in [`read_settings`]."""
    if augmentation == Augmentation():
        return partial(_process, image_processor=image_processor)
    size, mean, std = read_settings(image_processor, augmentation.size)
    arguments = {name: value for name, value in asdict(augmentation).items() if name not in ("size", *MIXUP_FIELDS)}
    arguments |= {"mean": mean, "std": std, "is_training": True, "color_jitter": None, "interpolation": "bicubic"}
    return create_transform((3, *size), **arguments)


def read_settings(
    image_processor: BaseImageProcessor, size: int | None = None
) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...]]:
    """Height and width, mean and standard deviation of the images that an image processor makes, measured on pictures
    of one colour: its settings have many names, and some take others out of effect. `size` replaces the height and
    width. Raises a `ValueError` if it makes anything but scaled RGB images, or, without `size`, several sizes."""
    name, colors = type(image_processor).__name__, ((0, 0, 0), (255, 255, 255), (51, 102, 204))
    try:
        pictures = [[{"image": Image.new("RGB", (side, side), color)} for color in colors] for side in (64, 777)]
        pixels, larger = (pixels_of(picture, image_processor, None).float() for picture in pictures)
        black, white, color = pixels[..., 0, 0]
        scale = white - black
        is_plain = torch.allclose(pixels, pixels[..., :1, :1], atol=0.01) and pixels.ndim == 4
        is_scaled = is_plain and torch.allclose((color - black) / scale, torch.tensor([0.2, 0.4, 0.8]), atol=0.01)
    except Exception:  # such as one that makes patches, or takes pairs of images
        is_scaled = False
    if not is_scaled:
        raise ValueError(f"Augmentation needs an image processor that makes RGB images without borders, not {name}.")
    if size is None and larger.shape != pixels.shape:
        raise ValueError(f"Give `augmentation.size`: {name} makes images of several sizes.")
    mean, std = ([float(f"{value:.6g}") for value in values.tolist()] for values in (-black / scale, 1 / scale))
    return (size, size) if size else tuple(pixels.shape[2:]), tuple(mean), tuple(std)


def _process(image: Image.Image, image_processor: BaseImageProcessor) -> Tensor:
    return image_processor(image, return_tensors="pt")["pixel_values"][0]


def build_mixup(augmentation: Augmentation, num_labels: int) -> Mixup | None:
    """timm's Mixup and CutMix, or `None` where both are off. The model does the label smoothing."""
    if augmentation.mixup_alpha == 0 and augmentation.cutmix_alpha == 0:
        return None
    settings = {name: getattr(augmentation, name) for name in MIXUP_FIELDS}
    return Mixup(**settings, label_smoothing=0.0, num_classes=num_labels)


def pixels_of(examples: list[Example], image_processor: BaseImageProcessor, transform: Transform | None) -> Tensor:
    """Makes `pixel_values` by the transform, a training augmentation, or without one by the image processor."""
    images = [to_rgb(example["image"]) for example in examples]
    if transform is not None:
        return torch.stack([transform(image) for image in images])
    return image_processor(images, return_tensors="pt")["pixel_values"]


@dataclass
class ImageCollator:
    """Makes batches of `pixel_values` and `labels`, which are probabilities where `mixup` mixes the images. Cached
    features take the place of pixels, see `read_features`."""

    image_processor: BaseImageProcessor
    transform: Transform | None = None
    mixup: Mixup | None = None

    def __call__(self, examples: list[Example]) -> Batch:
        labels = torch.tensor([example["label"] for example in examples])
        if "image_features" in examples[0]:
            features = np.stack([example["image_features"] for example in examples])
            return {"pixel_values": torch.from_numpy(features).float(), "labels": labels}
        pixel_values = pixels_of(examples, self.image_processor, self.transform)
        if self.mixup is not None:
            pixel_values, labels = self.mixup(pixel_values, labels)
        return {"pixel_values": pixel_values, "labels": labels}


@dataclass
class CaptionCollator:
    """Makes batches of `labels`, padded to the tokenizer's `model_max_length`, and `image_features` or `pixel_values`.
    With a `transform`, as in training, one of an image's captions and one of the views of its features are drawn at
    random. Without it, as in evaluation, the first are taken."""

    processor: TDDProcessor
    transform: Transform | None = None

    def __call__(self, examples: list[Example]) -> Batch:
        tokenizer = self.processor.tokenizer
        captions = [self._choose(example["captions"]) for example in examples]
        labels = self.processor(captions=captions, return_tensors="pt")["labels"]
        padding = (0, tokenizer.model_max_length - labels.shape[1])
        labels = nn.functional.pad(labels, padding, value=tokenizer.pad_token_id)
        if "image" in examples[0]:
            pixel_values = pixels_of(examples, self.processor.image_processor, self.transform)
            return {"pixel_values": pixel_values, "labels": labels}
        features = [example["image_features"] for example in examples]
        features = [self._choose(views) if views.ndim == 3 else views for views in features]
        return {"image_features": torch.from_numpy(np.stack(features)), "labels": labels}

    def _choose(self, candidates: Sequence) -> str | np.ndarray:
        return candidates[0 if self.transform is None else int(torch.randint(len(candidates), ()))]


@dataclass
class WordCollator:
    """Makes batches of `pixel_values` and multi-hot `labels`: which of the words occur in an image's captions."""

    image_processor: BaseImageProcessor
    words: Sequence[str]
    transform: Transform | None = None

    def __post_init__(self):
        self.index = {word: index for index, word in enumerate(self.words)}

    def __call__(self, examples: list[Example]) -> Batch:
        labels = torch.zeros(len(examples), len(self.index))
        for row, example in zip(labels, examples):
            row[[self.index[word] for word in words_of(example["captions"]) if word in self.index]] = 1
        return {"pixel_values": pixels_of(examples, self.image_processor, self.transform), "labels": labels}


def words_of(captions: Sequence[str]) -> set[str]:
    """The words of captions without punctuation. A hyphenated word such as "medium-light" is one word."""
    return set(re.findall(r"\w+(?:[-'’]\w+)*", " ".join(captions).lower()))


def count_words(captions: Iterable[Sequence[str]], min_count: int) -> dict[str, int]:
    """For each word that is not rare: the number of images in whose captions it occurs. Frequent words are first."""
    counts = Counter(word for texts in captions for word in words_of(texts))
    return {word: count for word, count in counts.most_common() if count >= min_count}
