# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Data sets of images and captions, any that `datasets` reads and COCO 2017 as it is published, and their batches."""

import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets, load_dataset
from PIL import Image as PILImage
from torch import Tensor, nn
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import logging

from ..processing_tdd import TDDProcessor
from .data import Batch, Example
from .recipe import CaptionDataRecipe


logger = logging.get_logger(__name__)

MAX_NAMED = 10  # bad examples that a message names


def load_caption_data(recipe: CaptionDataRecipe) -> DatasetDict:
    r"""
    Loads the training split and the evaluation splits, one row an image.

    Bad examples are looked for once and left out here, not while training: row numbers stay stable (features are
    cached by them), all processes see the same rows, and `datasets` remembers the result.

    Returns:
        `DatasetDict`: each split with the columns `image` and `captions`, a list of at least one string.

    Raises:
        `ValueError`: if a split or a column is missing, captions are neither strings nor lists of strings, a split has
            no good example, or, with `on_bad_example="raise"`, there is a bad one. The message names it.
    """
    splits = [recipe.train_split, *recipe.eval_splits]
    data = _load_coco(recipe, splits) if recipe.path == "coco" else _load_columns(recipe, splits)
    return DatasetDict({split: _drop_bad_examples(recipe, split, data[split]) for split in splits})


def _load_columns(recipe: CaptionDataRecipe, splits: list[str]) -> dict[str, Dataset]:
    """The columns `image` and `captions` of whatever `load_dataset` reads, the images not decoded."""
    data = load_dataset(recipe.path, data_files=recipe.data_files, data_dir=recipe.data_dir)
    for split in splits:
        if split not in data:
            raise ValueError(f"`{recipe.path}` has no split {split!r}; it has {', '.join(data)}.")
        for column in (recipe.image_column, recipe.caption_column):
            if column not in data[split].column_names:
                columns = ", ".join(data[split].column_names)
                raise ValueError(f"`{recipe.path}` has no column {column!r} in {split!r}; it has {columns}.")

    def tidy(split: Dataset) -> Dataset:
        split = split.select_columns([recipe.image_column, recipe.caption_column])
        split = split.rename_columns({recipe.image_column: "image", recipe.caption_column: "captions"})
        return split.cast_column("image", Image(decode=False))

    return {split: tidy(data[split]) for split in splits}


def _load_coco(recipe: CaptionDataRecipe, splits: list[str]) -> dict[str, Dataset]:
    """COCO 2017's folder: `annotations/captions_train2017.json` and `train2017/` for the split `train2017`."""
    if recipe.data_dir is None:
        raise ValueError("`data.path: coco` needs `data.data_dir`, the folder that holds `annotations/`.")
    return {split: _load_coco_split(Path(recipe.data_dir), split) for split in splits}


def _load_coco_split(folder: Path, split: str) -> Dataset:
    file = folder / f"annotations/captions_{split}.json"
    if not file.exists():
        known = sorted(path.stem.removeprefix("captions_") for path in file.parent.glob("captions_*.json"))
        raise ValueError(f"COCO has no split {split!r} in {folder}; it has {', '.join(known) or 'none'}.")
    # A generator's rows are kept on disc by its arguments, and with them what was found bad: the times are there so
    # that new files are read again.
    times = tuple(path.stat().st_mtime_ns for path in (file, folder / split))  # a list would be split into shards
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


def _drop_bad_examples(recipe: CaptionDataRecipe, split: str, data: Dataset) -> Dataset:
    feature = data.features["captions"]
    if getattr(feature, "feature", feature) not in (Value("string"), Value("large_string"), Value("null")):
        raise ValueError(f"The column {recipe.caption_column!r} must hold strings or lists of strings, got {feature}.")
    checked = data.map(
        _check_example,
        with_indices=True,
        fn_kwargs={"lower_case": recipe.lower_case},
        remove_columns=data.column_names,
        num_proc=recipe.num_proc,
        desc=f"checking {split}",
        features=Features({"captions": List(Value("string")), "problem": Value("string")}),
    )
    problems = [problem for problem in checked["problem"] if problem]
    data = concatenate_datasets([data.select_columns("image"), checked.select_columns("captions")], axis=1)
    if problems:
        message = f"{len(problems)} of {len(data)} examples of {split!r} are bad: {'; '.join(problems[:MAX_NAMED])}"
        message += f"; and {len(problems) - MAX_NAMED} more." if len(problems) > MAX_NAMED else "."
        if recipe.on_bad_example == "raise" or len(problems) == len(data):
            raise ValueError(message)
        logger.warning(f"{message} They are skipped.")
        data = data.select([index for index, problem in enumerate(checked["problem"]) if not problem])
    return data.cast_column("image", Image())


def _check_example(example: dict[str, Any], index: int, lower_case: bool) -> dict[str, Any]:
    """The example's captions with single spaces, less the empty ones, and what is wrong with it, if anything."""
    image, captions = example["image"] or {}, example["captions"] or []
    captions = [captions] if isinstance(captions, str) else captions
    captions = [" ".join((caption.lower() if lower_case else caption).split()) for caption in captions if caption]
    captions = [caption for caption in captions if caption]
    problem = "" if captions else "no caption"
    try:
        # Opening reads the header alone: only decoding shows that a file is cut short.
        PILImage.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]).load()
    except Exception as error:  # Pillow's decoders raise many kinds
        problem = f"unreadable image ({type(error).__name__})"
    file = f" ({image['path']})" if image.get("path") else ""
    return {"captions": captions, "problem": problem and f"row {index}{file}: {problem}"}


class CaptionCollator:
    r"""
    Batches of `labels`, one caption an image drawn at random and padded to the tokenizer's `model_max_length`, with
    `image_features` or `pixel_values`.

    Args:
        processor ([`TDDProcessor`]): The model's.
        transform (`Callable`, *optional*): Augmentation, from a PIL image to pixels, in place of the image processor.

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
