# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Reads splits of any format as shards, row by row. A broken shard is reported, and reading continues with the
next."""

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

# Data that `datasets` reads as a table, whose images are single files or few enough for memory. Shards are made of the
# rows of the table.
TABLES = ("digits", "imagefolder", "coco")
NUM_TABLE_SHARDS = 1024


class ShardedRows(NamedTuple):
    """The rows of one split, read one shard at a time. A row has an `image`, not decoded, and one more column."""

    shards: datasets.IterableDataset
    shard_names: list[str]
    columns: dict[str, str]  # from the column's name in a row to its name in the data
    feature: Any  # the type of the column that is not the image
    num_examples: int | None
    fingerprint: str

    def rows(self, shard: int) -> Iterator[Row]:
        """Yields the rows of a shard. Where the shard is broken, the errors of its reader pass through."""
        # `iter` is used because in a worker process `__iter__` would shard the data once more.
        for batch in self.shards.shard(num_shards=self.shards.num_shards, index=shard).iter(batch_size=1):
            yield {name: _look_up(batch, source) for name, source in self.columns.items()}


def _look_up(batch: dict[str, list[Any]], column: str) -> Any:
    """The only value of a column of a batch. `json.caption` is the key `caption` of the column `json`."""
    if column in batch:
        return batch[column][0]
    parent, _, key = column.partition(".")
    value = batch[parent][0]
    return None if value is None else value.get(key)


def open_shards(recipe: DataRecipe | CaptionDataRecipe, split: str, column: str) -> ShardedRows:
    r"""
    Opens a split that `datasets` can stream: parquet, WebDataset, or a data set of the Hub.

    Args:
        recipe ([`DataRecipe`] or [`CaptionDataRecipe`]): The data's location and columns.
        split (`str`): Name of the split.
        column (`str`): `"label"` or `"captions"`, the column that is read beside the image.

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
        # Formats with one file per shard give shards the names of files. Others split files, or have no files.
        list(files) if len(files) == stream.num_shards else [f"shard {i}" for i in range(stream.num_shards)],
        columns,
        find_feature(stream.features, source),
        None if info is None else info.num_examples,
        Hasher.hash([builder.cache_dir, split, columns]),
    )


def shards_of_table(data: Dataset, column: str) -> ShardedRows:
    """Makes shards of a table of paths, such as that of a folder of images. The rows have a fixed random order, since
    folders list images class by class."""
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
    Reads a split into a table on disk, which `datasets` caches. Of a broken shard, the rows before the break are kept,
    and the break is reported.

    Args:
        rows ([`ShardedRows`]): The split.
        column (`str`): `"label"` or `"captions"`.
        num_examples (`int`, *optional*): Number of rows to read, from the first. By default all.
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
    """Raises a `ValueError` if a column is missing. It names this column and the existing ones."""
    for column in columns.values():
        if find_feature(features, column) is None:
            raise ValueError(f"`{path}` has no column {column!r} in {split!r}; it has {', '.join(features)}.")


def find_feature(features: Features, column: str) -> Any:
    """The type of a column, or of a key of a column. `None` if there is no such column."""
    if column in features:
        return features[column]
    parent, _, key = column.partition(".")
    parent_feature = features.get(parent)
    return parent_feature.get(key) if isinstance(parent_feature, dict) else None


def _top_level(features: Features, column: str) -> str:
    return column if column in features else column.partition(".")[0]


def _readable_features(recipe: DataRecipe | CaptionDataRecipe) -> Features | None:
    """The columns of the first WebDataset shard that can be read. `datasets` itself only tries the first shard, which
    may be broken."""
    given = load_dataset_builder(recipe.path, data_files=recipe.data_files, data_dir=recipe.data_dir)
    errors = []
    for file in [file for files in given.config.data_files.values() for file in files]:
        try:
            one = load_dataset_builder("webdataset", data_files={"train": [file]})
            return one.as_streaming_dataset("train").features
        except Exception as error:  # broken archives raise errors of many types
            errors.append(f"{file}: {type(error).__name__}: {error}")
    raise ValueError(name_problems(errors, f"of {len(errors)} shards are broken"))


def unbroken_rows(
    rows: ShardedRows, shards: range | list[int], report: Callable[[str], None], position: tuple[int, int] = (0, 0)
) -> Iterator[tuple[tuple[int, int], Row]]:
    """Yields the rows of some shards from a position on, each with its own position: its shard's index in `shards`,
    and its index in the shard. After a broken shard has been reported, reading continues with the next."""
    for place in range(position[0], len(shards)):
        first, index = position[1] if place == position[0] else 0, -1
        try:
            for index, row in enumerate(rows.rows(shards[place])):
                if index >= first:
                    yield (place, index), row
        except Exception as error:  # broken archives raise errors of many types
            name = rows.shard_names[shards[place]]
            report(f"{name}: broken after {index + 1} examples ({type(error).__name__}: {error})")
