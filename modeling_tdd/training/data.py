# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Data sets of images and labels, their augmentation, and their batches."""

from collections.abc import Callable

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL import Image as PILImage
from timm.data import Mixup, create_transform
from torch import Tensor
from transformers import BaseImageProcessor

from .examples import Batch, Example, ReadLabelled, Row, drop_bad_examples, label_names
from .recipe import AugmentationRecipe, DataRecipe
from .shards import TABLES, ShardedRows, check_columns, find_feature, open_shards, read_whole, shards_of_table


def load_digits_dataset() -> DatasetDict:
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels. A fifth of each class is the split
    `validation`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype("uint8")
    order = range(len(images))
    train, validation = train_test_split(order, test_size=0.2, random_state=0, stratify=digits.target)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})

    def split(indices: list[int]) -> Dataset:
        pictures = [PILImage.fromarray(images[i]).convert("RGB") for i in indices]
        labels = [int(digits.target[i]) for i in indices]
        return Dataset.from_dict({"image": pictures, "label": labels}, features=features)

    return DatasetDict(train=split(train), validation=split(validation))


def load_classification_data(recipe: DataRecipe) -> tuple[Dataset | ShardedRows, Dataset, list[str]]:
    r"""
    Loads the training and the evaluation split. Bad examples of splits that are not streamed are dropped, see
    [`drop_bad_examples`].

    Returns:
        `tuple`: the training split (a [`ShardedRows`] with `data.streaming`), the evaluation split, and the names of
        the labels. The splits have the columns `image` and `label`.

    Raises:
        `ValueError`: if a split or a column is missing, if neither the names nor the number of labels is known, if a
            split has no valid example, or, with `on_bad_example="raise"`, if there is a bad one.
    """
    if recipe.streaming and recipe.path not in TABLES:
        train = open_shards(recipe, recipe.train_split, "label")
        held_out = read_whole(open_shards(recipe, recipe.eval_split, "label"), "label")
        names = label_names(recipe.label_column, train.feature, recipe.num_labels)
    else:
        train, held_out = (_load_split(recipe, split) for split in (recipe.train_split, recipe.eval_split))
        names = label_names(recipe.label_column, train.features["label"], recipe.num_labels)
        if recipe.streaming:
            train = shards_of_table(train, "label")
        else:
            train = _drop_bad(recipe, recipe.train_split, train, names)
    return train, _drop_bad(recipe, recipe.eval_split, held_out, names), names


def _load_split(recipe: DataRecipe, split: str) -> Dataset:
    """Loads the columns `image`, not decoded, and `label` of a split."""
    if recipe.path == "digits":
        data = load_digits_dataset()
    else:
        data = load_dataset(recipe.path, data_files=recipe.data_files, data_dir=recipe.data_dir)
    if split not in data:
        raise ValueError(f"`{recipe.path}` has no split {split!r}; it has {', '.join(data)}.")
    return two_columns(recipe.path, split, data[split], {"image": recipe.image_column, "label": recipe.label_column})


def two_columns(path: str, split: str, data: Dataset, columns: dict[str, str]) -> Dataset:
    """Selects the columns of `data` that are the values of `columns`, and renames them to the keys. Images are not
    decoded."""
    check_columns(path, split, data.features, columns)
    data = data.cast_column(columns["image"], Image(decode=False))
    for source in set(columns.values()) - set(data.features):  # such as `json.caption`, the key of a column
        parent, _, key = source.partition(".")
        features = Features({**data.features, source: find_feature(data.features, source)})
        data = data.map(_copy_key, fn_kwargs={"parent": parent, "key": key, "name": source}, features=features)
    data = data.select_columns(list(columns.values()))
    return data.rename_columns({source: name for name, source in columns.items()})


def _copy_key(row: Row, parent: str, key: str, name: str) -> Row:
    return {name: (row[parent] or {}).get(key)}


def _drop_bad(recipe: DataRecipe, split: str, data: Dataset, names: list[str]) -> Dataset:
    return drop_bad_examples(data, ReadLabelled(len(names)), split, recipe.on_bad_example, recipe.num_proc)


def build_train_transform(recipe: AugmentationRecipe, image_processor: BaseImageProcessor) -> Callable[..., Tensor]:
    """timm's training transform for a PIL image, with the normalisation of the image processor."""
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    height, width = (recipe.size, recipe.size) if recipe.size else (size["height"], size["width"])
    return create_transform(
        input_size=(3, height, width),
        is_training=True,
        scale=tuple(recipe.scale),
        ratio=tuple(recipe.ratio),
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter or None,
        auto_augment=recipe.auto_augment,
        re_prob=recipe.re_prob,
        re_mode=recipe.re_mode,
        re_count=recipe.re_count,
        interpolation="bicubic",
        mean=tuple(image_processor.image_mean),
        std=tuple(image_processor.image_std),
    )


def build_mixup(recipe: AugmentationRecipe, num_labels: int) -> Mixup | None:
    """timm's Mixup and CutMix, or `None` where both are off. The model does the label smoothing."""
    if recipe.mixup_alpha == 0 and recipe.cutmix_alpha == 0:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup_alpha,
        cutmix_alpha=recipe.cutmix_alpha,
        prob=recipe.prob,
        switch_prob=recipe.switch_prob,
        mode=recipe.mode,
        label_smoothing=0.0,
        num_classes=num_labels,
    )


class TrainCollator:
    """Makes augmented training batches of `pixel_values` and `labels`, which are probabilities where Mixup is on."""

    def __init__(self, transform: Callable[..., Tensor], mixup: Mixup | None = None):
        self.transform = transform
        self.mixup = mixup

    def __call__(self, examples: list[Example]) -> Batch:
        pixel_values = torch.stack([self.transform(example["image"].convert("RGB")) for example in examples])
        labels = torch.tensor([example["label"] for example in examples])
        if self.mixup is not None:
            pixel_values, labels = self.mixup(pixel_values, labels)
        return {"pixel_values": pixel_values, "labels": labels}


class EvalCollator:
    """Makes evaluation batches with the image processor that is saved with the model."""

    def __init__(self, image_processor: BaseImageProcessor):
        self.image_processor = image_processor

    def __call__(self, examples: list[Example]) -> Batch:
        images = [example["image"].convert("RGB") for example in examples]
        labels = torch.tensor([example["label"] for example in examples])
        return {"pixel_values": self.image_processor(images, return_tensors="pt")["pixel_values"], "labels": labels}
