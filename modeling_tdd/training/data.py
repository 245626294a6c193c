# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Data sets of images with labels or captions: any that `datasets` reads, scikit-learn's digits, and COCO 2017."""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from datasets.fingerprint import Hasher
from PIL import Image as PILImage

from .examples import ReadCaptioned, ReadExample, ReadLabelled, Row, drop_bad_examples
from .streaming import ImageStream, Shards


Rows = TypeVar("Rows", Dataset, datasets.IterableDataset)

# Data that are read as a table of paths or of few images. Shards are made of the table's rows.
TABLES = ("digits", "imagefolder", "coco")
NUM_TABLE_SHARDS = 1024

# Number of streamed examples whose captions are read to train a tokenizer on. To read all would take too long.
NUM_SAMPLED_CAPTIONS = 100_000


@dataclass
class ImageData:
    r"""
    The settings that data sets of labels and of captions share: which images to learn from, and how to read them.

    Args:
        path (`str`): The first argument of `load_dataset`: `"parquet"`, `"imagefolder"`, `"webdataset"` or an id.
        data_files (`dict`, *optional*): Files of each split. Relative paths start at the recipe's folder.
        data_dir (`str`, *optional*): Folder of the data, likewise.
        train_split (`str`): Name of the training split.
        eval_splits (`list[str]`): Names of the splits to evaluate on. The first is also evaluated during training.
        eval_share (`float`): Share of the training split to hold out as the only evaluation split, which is called
            `"validation"`. Each run holds out the same images.
        image_column (`str`): Name of the column of images.
        on_bad_example (`str`): What happens to an example with an unreadable image, a missing label or an empty
            caption: `"skip"` leaves it out and reports it, `"raise"` raises an error.
        num_proc (`int`, *optional*): Number of processes that look for bad examples in data that are not streamed.
        streaming (`bool`): Whether the training split is read shard by shard during training.
        num_examples (`int`, *optional*): Size of the training split, for a stream that does not know it and
            `scripts/estimate.py`.
        shuffle_buffer (`int`): Number of streamed examples, not yet decoded, that each worker shuffles together.
    """

    path: str
    data_files: dict[str, str] | None = None
    data_dir: str | None = None
    train_split: str = "train"
    eval_splits: list[str] = field(default_factory=lambda: ["validation"])
    eval_share: float = 0.0
    image_column: str = "image"
    on_bad_example: str = "skip"
    num_proc: int | None = None
    streaming: bool = False
    num_examples: int | None = None
    shuffle_buffer: int = 1000

    def __post_init__(self):
        if self.on_bad_example not in ("skip", "raise"):
            raise ValueError(f"`data.on_bad_example` must be 'skip' or 'raise', got {self.on_bad_example!r}.")
        for name in ("shuffle_buffer", "num_proc", "num_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`data.{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"`data.eval_share` must be in [0, 1), got {self.eval_share}.")
        if self.eval_share and (self.streaming or self.train_split == "validation"):
            raise ValueError("`data.eval_share` needs `data.streaming=false` and no `data.train_split=validation`.")


@dataclass
class LabelData(ImageData):
    r"""
    Images and labels. Besides, `path` may be `"digits"`, those of scikit-learn.

    Args:
        label_column (`str`): Name of the column of labels. `json.label` is the key `label` of a column `json`.
        num_labels (`int`, *optional*): Number of labels, for plain integers and `scripts/estimate.py`.
    """

    label_column: str = "label"
    num_labels: int | None = None


@dataclass
class CaptionData(ImageData):
    r"""
    Images and captions. Besides, `path` may be `"coco"`: COCO 2017 as published, with `annotations/` in `data_dir`.

    Args:
        caption_column (`str`): Name of the column of captions, a string or a list of strings per image. `json.caption`
            is the key `caption` of a column `json`.
        lower_case (`bool`): Whether to lower-case the captions.
    """

    caption_column: str = "caption"
    lower_case: bool = False


def load_labels(data: LabelData) -> tuple[dict[str, Dataset | ImageStream], list[str]]:
    r"""
    Loads the training split, which is first, and the evaluation splits, with the columns `image` and `label`. Bad
    examples are left out, see [`drop_bad_examples`]. With `data.streaming` the training split is an [`ImageStream`].

    Returns:
        `tuple`: the splits by their names, and the names of the labels. Those of plain integers are the numbers.

    Raises:
        `ValueError`: if a split or a column is missing, if neither the names nor the number of labels is known, if a
            split has no valid example, or, with `on_bad_example="raise"`, if there is a bad one. The message names it.
    """
    splits = _open_splits(data, data.label_column, "label")
    feature = splits[data.train_split].features["label"]
    names = feature.names if isinstance(feature, ClassLabel) else list(map(str, range(data.num_labels or 0)))
    if not names or "int" not in getattr(feature, "dtype", ""):
        raise ValueError(
            f"The column {data.label_column!r} must be a `datasets.ClassLabel`, or hold integers with "
            f"`data.num_labels` given; it is {feature}."
        )
    return _read_splits(data, splits, ReadLabelled(len(names))), names


def load_captions(data: CaptionData) -> dict[str, Dataset | ImageStream]:
    """As [`load_labels`], with the columns `image` and `captions`, a list of at least one string."""
    splits = _open_splits(data, data.caption_column, "captions")
    for rows in splits.values():
        feature = rows.features["captions"]
        if getattr(feature, "feature", feature) not in (Value("string"), Value("large_string"), Value("null")):
            raise ValueError(
                f"The column {data.caption_column!r} must hold strings or lists of strings, got {feature}."
            )
    return _read_splits(data, splits, ReadCaptioned(data.lower_case))


def caption_texts(rows: Dataset | ImageStream) -> list[str]:
    """All captions of a split of [`load_captions`]. Of a stream: those of the first examples, which are cached."""
    if isinstance(rows, Dataset):
        return [caption for captions in rows["captions"] for caption in captions]
    table = rows.shards.to_table(["captions"], NUM_SAMPLED_CAPTIONS)
    return [caption for captions in table["captions"] for caption in rows.read.clean(captions)]


def _open_splits(data: ImageData, source: str, column: str) -> dict[str, Dataset | Shards]:
    """Opens the splits with the columns `image`, not decoded, and `column`, which is called `source` in the data."""
    arguments = {"path": data.path, "data_files": data.data_files, "data_dir": data.data_dir}
    builder = None
    if data.path == "digits":
        found = load_digits_dataset()
    elif data.path == "coco":
        found = _load_coco(data.data_dir)
    elif data.streaming and data.path not in TABLES:
        builder = _open_builder(arguments)
        found = builder.as_streaming_dataset()
    else:
        found = datasets.load_dataset(**arguments)
    splits = {}
    for split in [data.train_split] if data.eval_share else [data.train_split, *data.eval_splits]:
        if split not in found:
            raise ValueError(f"`{data.path}` has no split {split!r}; it has {', '.join(found) or 'none'}.")
        for name in (data.image_column, source):
            if _find_feature(found[split], name) is None:
                columns = ", ".join(found[split].features)
                raise ValueError(f"`{data.path}` has no column {name!r} in {split!r}; it has {columns}.")
        rows = _two_columns(found[split], data.image_column, source, column)
        splits[split] = rows if builder is None else _shards_of_files(rows, split, builder)
    return splits


def _find_feature(rows: Rows, column: str) -> Any:
    """The type of a column. `json.caption` is the key `caption` of a column `json`."""
    parent, _, key = column.partition(".")
    nested = rows.features.get(parent)
    return rows.features.get(column, nested.get(key) if isinstance(nested, dict) else None)


def _two_columns(rows: Rows, image_column: str, source: str, column: str) -> Rows:
    rows = rows.cast_column(image_column, Image(decode=False))
    if source not in rows.features:
        features = Features({**rows.features, source: _find_feature(rows, source)})
        rows = rows.map(_copy_key, fn_kwargs={"source": source}, features=features)
    names = {name: new for name, new in ((image_column, "image"), (source, column)) if name != new}
    rows = rows.select_columns([image_column, source])
    return rows.rename_columns(names) if names else rows


def _copy_key(row: Row, source: str) -> Row:
    parent, _, key = source.partition(".")
    return {source: (row[parent] or {}).get(key)}


def _read_splits(data: ImageData, splits: dict[str, Dataset | Shards], read: ReadExample) -> dict[str, Any]:
    """Makes a stream of the training split, if it is to be one, and checks the rows of the others."""
    results = {}
    for split, rows in splits.items():
        if data.streaming and split == data.train_split:
            rows = _shards_of_table(rows) if isinstance(rows, Dataset) else rows
            results[split] = ImageStream(rows, read, data.num_examples, data.shuffle_buffer, data.on_bad_example)
        else:
            rows = rows if isinstance(rows, Dataset) else rows.to_table(list(rows.features))
            results[split] = drop_bad_examples(rows, read, split, data.on_bad_example, data.num_proc)
    if data.eval_share:
        parts = results[data.train_split].train_test_split(test_size=data.eval_share, seed=0)
        return {data.train_split: parts["train"], "validation": parts["test"]}
    return results


def _open_builder(arguments: dict[str, Any]) -> datasets.DatasetBuilder:
    builder = datasets.load_dataset_builder(**arguments)
    if arguments["path"] == "webdataset":  # which takes the columns from the first shard, even if that is broken
        for file in [file for files in builder.config.data_files.values() for file in files]:
            with suppress(Exception):  # broken archives raise errors of many types
                one = datasets.load_dataset_builder("webdataset", data_files={"train": [file]})
                features = one.as_streaming_dataset("train").features
                return datasets.load_dataset_builder(**arguments, features=features)
    return builder


def _shards_of_files(rows: datasets.IterableDataset, split: str, builder: datasets.DatasetBuilder) -> Shards:
    files = list((builder.config.data_files or {}).get(split, []))
    info = (builder.info.splits or {}).get(split)
    # Formats with one file per shard give shards the names of files. Others split files, or have no files.
    names = files if len(files) == rows.num_shards else [f"shard {index}" for index in range(rows.num_shards)]
    return Shards(rows, names, Hasher.hash([builder.cache_dir, split, rows.features]), info and info.num_examples)


def _shards_of_table(table: Dataset) -> Shards:
    names = [f"part {index}" for index in range(min(len(table), NUM_TABLE_SHARDS))]
    # Folders list images class by class
    rows = table.shuffle(seed=0).flatten_indices().to_iterable_dataset(num_shards=len(names))
    return Shards(rows, names, table._fingerprint, len(table))


def load_digits_dataset() -> DatasetDict:
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels. A fifth of each class is the split
    `validation`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype("uint8")
    columns = {"image": [PILImage.fromarray(image).convert("RGB") for image in images], "label": digits.target}
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    data = Dataset.from_dict(columns, features=features)
    train, validation = train_test_split(range(len(data)), test_size=0.2, random_state=0, stratify=digits.target)
    return DatasetDict(train=data.select(train), validation=data.select(validation))


def _load_coco(folder: str | None) -> dict[str, Dataset]:
    """The splits of COCO that `folder` holds, with the columns `image` and `caption`, a list."""
    if folder is None:
        raise ValueError("`data.path: coco` needs `data.data_dir`, the folder that holds `annotations/`.")
    features = Features({"image": Image(decode=False), "caption": List(Value("string"))})
    splits = {}
    for file in sorted(Path(folder).glob("annotations/captions_*.json")):
        images = Path(folder, file.stem.removeprefix("captions_"))
        if images.is_dir():
            # `datasets` caches a generator's rows by its arguments. The times are among them so that changed files are
            # read again. They are a tuple because `datasets` would split a list into shards.
            times = tuple(path.stat().st_mtime_ns for path in (file, images))
            arguments = {"file": file, "images": images, "times": times}
            splits[images.name] = Dataset.from_generator(_coco_rows, features=features, gen_kwargs=arguments)
    return splits


def _coco_rows(file: Path, images: Path, times: tuple[int, ...]) -> Iterator[Row]:
    content = json.loads(file.read_text())
    captions: dict[int, list[str]] = defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    for image in content["images"]:
        yield {"image": str(images / image["file_name"]), "caption": captions[image["id"]]}
