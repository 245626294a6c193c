# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Splits as shards, read row by row whatever their format. A broken shard is named, and the next one follows."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import datasets
from datasets import Dataset, Features, Image, load_dataset_builder
from datasets.fingerprint import Hasher
from transformers.utils import logging

from .examples import Row, name_problems
from .recipe import CaptionDataRecipe, DataRecipe


logger = logging.get_logger(__name__)

# Data that are a table to `datasets`, of single images on disc or of a few in memory: shards are made of its rows
TABLES = ("digits", "imagefolder", "coco")
NUM_TABLE_SHARDS = 1024


class ShardedRows(NamedTuple):
    """The rows of one split, a shard at a time: `image`, not decoded, and one more column."""

    shards: datasets.IterableDataset
    shard_names: list[str]
    columns: dict[str, str]  # name here: name in the data
    feature: Any  # of the column that is not the image
    num_examples: int | None
    fingerprint: str

    def rows(self, shard: int) -> Iterator[Row]:
        """The rows of a shard; raises whatever its reader raises where it is broken."""
        # `iter` and not `__iter__`, which in a worker process would shard once more
        for batch in self.shards.shard(num_shards=self.shards.num_shards, index=shard).iter(batch_size=1):
            yield {name: _look_up(batch, source) for name, source in self.columns.items()}


def _look_up(batch: dict[str, list[Any]], column: str) -> Any:
    """The only value of a column, which may be the key of a dictionary: `json.caption`."""
    if column in batch:
        return batch[column][0]
    parent, _, key = column.partition(".")
    value = batch[parent][0]
    return None if value is None else value.get(key)


def open_shards(recipe: DataRecipe | CaptionDataRecipe, split: str, column: str) -> ShardedRows:
    r"""
    Opens a split that `datasets` can stream: parquet, WebDataset, a data set of the Hub.

    Args:
        recipe ([`DataRecipe`] or [`CaptionDataRecipe`]): Where the data are.
        split (`str`): Name of the split.
        column (`str`): `"label"` or `"captions"`, what is wanted beside the image.

    Raises:
        `ValueError`: if the split or a column is missing.
    """
    source = recipe.label_column if column == "label" else recipe.caption_column
    columns = {"image": recipe.image_column, column: source}
    features = _readable_features(recipe) if recipe.path == "webdataset" else None
    builder = load_dataset_builder(
        recipe.path, data_files=recipe.data_files, data_dir=recipe.data_dir, features=features
    )
    streams = builder.as_streaming_dataset()
    if split not in streams:
        raise ValueError(f"`{recipe.path}` has no split {split!r}; it has {', '.join(streams)}.")
    stream = streams[split]
    check_columns(recipe.path, split, stream.features, columns)
    files = (builder.config.data_files or {}).get(split, [])
    info = (builder.info.splits or {}).get(split)
    return ShardedRows(
        stream.select_columns(sorted({_top_level(stream.features, name) for name in columns.values()})).cast_column(
            recipe.image_column, Image(decode=False)
        ),
        # Formats with a shard a file can name it; others split files, or have no files
        list(files) if len(files) == stream.num_shards else [f"shard {i}" for i in range(stream.num_shards)],
        columns,
        find_feature(stream.features, source),
        None if info is None else info.num_examples,
        Hasher.hash([builder.cache_dir, split, columns]),
    )


def shards_of_table(data: Dataset, column: str) -> ShardedRows:
    """A table of paths, as of a folder of images, in a fixed random order: folders list images class by class."""
    num_shards = min(len(data), NUM_TABLE_SHARDS)
    table = data.cast_column("image", Image(decode=False)).shuffle(seed=0).flatten_indices()
    return ShardedRows(
        table.to_iterable_dataset(num_shards=num_shards),
        [f"part {index} of {num_shards}" for index in range(num_shards)],
        {name: name for name in ("image", column)},
        data.features[column],
        len(data),
        data._fingerprint,
    )


def read_whole(rows: ShardedRows, column: str, num_examples: int | None = None, with_image: bool = True) -> Dataset:
    r"""
    A split as a table on disc, kept by `datasets`; what follows the break in a broken shard is left out and named.

    Args:
        rows ([`ShardedRows`]): The split.
        column (`str`): `"label"` or `"captions"`.
        num_examples (`int`, *optional*): How many of the first rows to take. By default all.
        with_image (`bool`, *optional*, defaults to `True`): Whether to keep the images, undecoded.
    """
    features = {"image": Image(decode=False)} if with_image else {}
    features[column] = rows.feature

    def generate() -> Iterator[Row]:
        for _, row in islice(unbroken_rows(rows, range(len(rows.shard_names)), logger.warning), num_examples):
            yield {name: row[name] for name in features}

    fingerprint = Hasher.hash([rows.fingerprint, num_examples, with_image])
    return Dataset.from_generator(generate, features=Features(features), fingerprint=fingerprint)


def check_columns(path: str, split: str, features: Features, columns: dict[str, str]) -> None:
    """Raises a `ValueError` that names a missing column and those that there are."""
    for column in columns.values():
        if find_feature(features, column) is None:
            raise ValueError(f"`{path}` has no column {column!r} in {split!r}; it has {', '.join(features)}.")


def find_feature(features: Features, column: str) -> Any:
    """The type of a column or of a key of it, `None` where there is no such column."""
    if column in features:
        return features[column]
    parent, _, key = column.partition(".")
    parent_feature = features.get(parent)
    return parent_feature.get(key) if isinstance(parent_feature, dict) else None


def _top_level(features: Features, column: str) -> str:
    return column if column in features else column.partition(".")[0]


def _readable_features(recipe: DataRecipe | CaptionDataRecipe) -> Features | None:
    """The columns of the first WebDataset shard that can be read: `datasets` looks at one, which may be broken."""
    given = load_dataset_builder(recipe.path, data_files=recipe.data_files, data_dir=recipe.data_dir)
    errors = []
    for file in [file for files in given.config.data_files.values() for file in files]:
        try:
            one = load_dataset_builder("webdataset", data_files={"train": [file]})
            return one.as_streaming_dataset("train").features
        except Exception as error:  # a broken archive raises whatever its part does
            errors.append(f"{file}: {type(error).__name__}: {error}")
    raise ValueError(name_problems(errors, "of as many shards are broken"))


def unbroken_rows(
    rows: ShardedRows, shards: range | list[int], report: Callable[[str], None], position: tuple[int, int] = (0, 0)
) -> Iterator[tuple[tuple[int, int], Row]]:
    """The rows of some shards from a position on, each with its own (place in `shards`, row). Where a shard breaks,
    the next one follows."""
    for place in range(position[0], len(shards)):
        first, index = position[1] if place == position[0] else 0, -1
        try:
            for index, row in enumerate(rows.rows(shards[place])):
                if index >= first:
                    yield (place, index), row
        except Exception as error:  # a broken archive raises whatever its part does
            name = rows.shard_names[shards[place]]
            report(f"{name}: broken after {index + 1} examples ({type(error).__name__}: {error})")
