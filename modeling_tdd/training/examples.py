# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Reads rows of a data set as training examples, and says why a row was rejected."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from PIL import Image as PILImage
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)

Row = dict[str, Any]  # an undecoded `image`, and a `label` or `captions`
Example = dict[str, Any]  # the same, checked, with a PIL image or with `image_features`
Batch = dict[str, Tensor]
ReadExample = Callable[[Row], Example]
MAX_NAMED = 10  # number of bad examples that are named; others are counted


class BadExample(ValueError):
    """Why a row was rejected. It is skipped, counted and reported."""


def read_image(image: Row | None) -> PILImage.Image:
    """Decodes the whole image of an undecoded cell of `datasets.Image`, from its bytes or its path."""
    if not image or (image.get("bytes") is None and image.get("path") is None):
        raise BadExample("no image")
    try:
        picture = Image().decode_example(image)
        picture.load()  # opening reads only the header: decoding shows whether the file is truncated
        return picture
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise BadExample(f"unreadable image ({type(error).__name__})") from error


@dataclass(frozen=True)
class ReadLabelled:
    """Makes an example of a row with a `label`. Raises [`BadExample`]."""

    num_labels: int

    def __call__(self, row: Row) -> Example:
        if row["label"] is None or not 0 <= row["label"] < self.num_labels:
            raise BadExample(f"the label must be in 0 ... {self.num_labels - 1}, got {row['label']}")
        return {"image": read_image(row["image"]), "label": row["label"]}


@dataclass(frozen=True)
class ReadCaptioned:
    """Makes an example of a row with `captions`, a string or a list. Raises [`BadExample`]."""

    lower_case: bool = False

    def __call__(self, row: Row) -> Example:
        image, captions = read_image(row["image"]), self.clean(row["captions"])
        if not captions:
            raise BadExample("no caption")
        return {"image": image, "captions": captions}

    def clean(self, captions: str | list[str | None] | None) -> list[str]:
        """The captions that are not empty, with single spaces."""
        captions = [captions] if isinstance(captions, str) else captions or []
        captions = [" ".join((caption or "").split()) for caption in captions]
        return [caption.lower() if self.lower_case else caption for caption in captions if caption]


def name_problems(problems: list[str], total: str) -> str:
    """`"2 of 9 examples are bad: row 3: no caption; row 5: no image."`, which names at most [`MAX_NAMED`] of them."""
    message = f"{len(problems)} {total}: {'; '.join(problems[:MAX_NAMED])}"
    return message + (f"; and {len(problems) - MAX_NAMED} more." if len(problems) > MAX_NAMED else ".")


def name_place(place: str, row: Row) -> str:
    """`"row 3 (cat.png)"`, with the name of the image's file if it is known."""
    path = (row["image"] or {}).get("path")
    return f"{place} ({path})" if path else place


def drop_bad_examples(
    data: Dataset, read: ReadExample, split: str, on_bad_example: str = "skip", num_proc: int | None = None
) -> Dataset:
    """Leaves out and reports the rows that `read` rejects, and replaces `label` or `captions` by what it returns.

    All rows are checked once, before training. So row numbers are stable, as cached features need, all processes see
    the same rows, and `datasets` caches the result. Raises a `ValueError` if all rows are rejected or, with
    `on_bad_example="raise"`, at least one is.
    """
    (column,) = set(data.column_names) - {"image"}
    feature = List(Value("string")) if column == "captions" else data.features[column]
    checked = data.map(
        _check_row,
        with_indices=True,
        fn_kwargs={"read": read, "column": column},
        remove_columns=data.column_names,
        num_proc=num_proc,
        desc=f"checking {split}",
        features=Features({column: feature, "problem": Value("string")}),
    )
    data = concatenate_datasets([data.select_columns("image"), checked.select_columns(column)], axis=1)
    problems = checked["problem"][:]
    bad = [problem for problem in problems if problem]
    if bad:
        message = name_problems(bad, f"of {len(data)} examples of {split!r} are bad")
        if on_bad_example == "raise" or len(bad) == len(data):
            raise ValueError(message)
        logger.warning(f"{message} They are skipped.")
        data = data.select([index for index, problem in enumerate(problems) if not problem])
    return data.cast_column("image", Image())


def _check_row(row: Row, index: int, read: ReadExample, column: str) -> Row:
    """What `read` returns for a row's other column, and why the row was rejected, if it was."""
    try:
        return {column: read(row)[column], "problem": ""}
    except BadExample as error:
        return {column: None, "problem": f"{name_place(f'row {index}', row)}: {error}"}
