# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Data sets of images and captions, and their batches: any data that `datasets` reads, and COCO 2017 as published."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_dataset
from torch import Tensor, nn
from transformers.tokenization_utils_base import LARGE_INTEGER

from ..processing_tdd import TDDProcessor
from .data import two_columns
from .examples import Batch, Example, ReadCaptioned, check_caption_type, drop_bad_examples
from .recipe import CaptionDataRecipe
from .shards import TABLES, ShardedRows, open_shards, read_whole, shards_of_table


# The number of streamed examples on which the tokenizer is trained, and from which the pairs of neighbouring tokens
# for the metric `fluent` come. To read all examples would take too long.
NUM_SAMPLED_CAPTIONS = 100_000


def load_caption_data(recipe: CaptionDataRecipe) -> DatasetDict:
    r"""
    Loads the evaluation splits and, unless it is streamed, the training split. There is one row per image. Bad
    examples are dropped, see [`drop_bad_examples`].

    Returns:
        `DatasetDict`: each split with the columns `image` and `captions`, a list of at least one string.

    Raises:
        `ValueError`: if a split or a column is missing, if captions are neither strings nor lists of strings, if a
            split has no valid example, or, with `on_bad_example="raise"`, if there is a bad one. The message names it.
    """
    splits = recipe.eval_splits if recipe.streaming else [recipe.train_split, *recipe.eval_splits]
    read = ReadCaptioned(recipe.lower_case)
    return DatasetDict(
        {
            split: drop_bad_examples(_load_split(recipe, split), read, split, recipe.on_bad_example, recipe.num_proc)
            for split in splits
        }
    )


def open_caption_shards(recipe: CaptionDataRecipe) -> ShardedRows:
    """Opens the training split for [`make_stream_loader`], with the columns `image` and `captions`."""
    if recipe.path in TABLES:
        return shards_of_table(_load_split(recipe, recipe.train_split), "captions")
    rows = open_shards(recipe, recipe.train_split, "captions")
    check_caption_type(recipe.caption_column, rows.feature)
    return rows


def sample_captions(recipe: CaptionDataRecipe, rows: ShardedRows) -> list[str]:
    """The captions of the first examples of a streamed split. They are read once, and `datasets` caches them."""
    table = read_whole(rows, "captions", NUM_SAMPLED_CAPTIONS, with_image=False)
    lists = [[captions] if isinstance(captions, str) else captions or [] for captions in table["captions"]]
    captions = [" ".join(caption.split()) for captions in lists for caption in captions if caption]
    return [caption.lower() if recipe.lower_case else caption for caption in captions if caption]


def _load_split(recipe: CaptionDataRecipe, split: str) -> Dataset:
    """Loads the columns `image`, not decoded, and `captions` of a split."""
    if recipe.path == "coco":
        if recipe.data_dir is None:
            raise ValueError("`data.path: coco` needs `data.data_dir`, the folder that holds `annotations/`.")
        return _load_coco_split(Path(recipe.data_dir), split)
    if recipe.streaming and recipe.path not in TABLES:
        rows = open_shards(recipe, split, "captions")
        check_caption_type(recipe.caption_column, rows.feature)
        return read_whole(rows, "captions")
    data = load_dataset(recipe.path, data_files=recipe.data_files, data_dir=recipe.data_dir)
    if split not in data:
        raise ValueError(f"`{recipe.path}` has no split {split!r}; it has {', '.join(data)}.")
    columns = {"image": recipe.image_column, "captions": recipe.caption_column}
    data = two_columns(recipe.path, split, data[split], columns)
    check_caption_type(recipe.caption_column, data.features["captions"])
    return data


def _load_coco_split(folder: Path, split: str) -> Dataset:
    file = folder / f"annotations/captions_{split}.json"
    if not file.exists():
        known = sorted(path.stem.removeprefix("captions_") for path in file.parent.glob("captions_*.json"))
        raise ValueError(f"COCO has no split {split!r} in {folder}; it has {', '.join(known) or 'none'}.")
    # `datasets` caches a generator's rows, and which of them are bad, by the generator's arguments. The times are
    # among them so that changed files are read again.
    # They are a tuple because `datasets` would split a list into shards.
    times = tuple(path.stat().st_mtime_ns for path in (file, folder / split))
    rows = {"file": file, "images": folder / split, "times": times}
    features = Features({"image": Image(decode=False), "captions": List(Value("string"))})
    return Dataset.from_generator(_coco_rows, features=features, gen_kwargs=rows)


def _coco_rows(file: Path, images: Path, times: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    content = json.loads(file.read_text())
    captions: dict[int, list[str]] = defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    for image in content["images"]:
        yield {"image": str(images / image["file_name"]), "captions": captions[image["id"]]}


class CaptionCollator:
    r"""
    Makes batches of `labels` with `image_features` or `pixel_values`. The label of an image is one of its captions,
    drawn at random and padded to the tokenizer's `model_max_length`.

    Args:
        processor ([`TDDProcessor`]): The model's processor.
        transform (`Callable`, *optional*):
            Augmentation: a function from a PIL image to pixels that takes the place of the image processor.

    Raises:
        `ValueError`: if the tokenizer has no `model_max_length`.
    """

    def __init__(self, processor: TDDProcessor, transform: Callable[..., Tensor] | None = None):
        self.length = processor.tokenizer.model_max_length
        if self.length > LARGE_INTEGER:
            raise ValueError("Set `tokenizer.model_max_length` to the model's `max_position_embeddings`.")
        self.processor = processor
        self.transform = transform

    def __call__(self, examples: list[Example]) -> Batch:
        captions = [e["captions"][int(torch.randint(len(e["captions"]), ()))] for e in examples]
        labels = self.processor(captions=captions, return_tensors="pt")["labels"]
        padding = (0, self.length - labels.shape[1])
        labels = nn.functional.pad(labels, padding, value=self.processor.tokenizer.pad_token_id)
        return {**self.encode_images(examples), "labels": labels}

    def encode_images(self, examples: list[Example]) -> Batch:
        if "image_features" in examples[0]:
            return {"image_features": torch.stack([example["image_features"] for example in examples])}
        images = [example["image"].convert("RGB") for example in examples]
        if self.transform is not None:
            return {"pixel_values": torch.stack([self.transform(image) for image in images])}
        return {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}
