# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Reads rows of a data set as training examples, and says why a row was rejected."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, List, Value, concatenate_datasets
from PIL import Image as PILImage
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)

Example = dict[str, Any]
Batch = dict[str, Tensor]
Row = dict[str, Any]

MAX_NAMED = 10  # number of bad examples that a message names

_IMAGE = Image()


class BadExample(ValueError):
    """Why a row was rejected. It is skipped, counted and reported."""


def read_image(image: dict[str, Any] | None) -> PILImage.Image:
    """Decodes the whole image of an undecoded cell of `datasets.Image`, from its bytes or its path."""
    if not image or (image.get("bytes") is None and image.get("path") is None):
        raise BadExample("no image")
    try:
        picture = _IMAGE.decode_example(image)
        picture.load()  # opening reads only the header: decoding shows whether the file is truncated
        return picture
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise BadExample(f"unreadable image ({type(error).__name__})") from error


@dataclass(frozen=True)
class ReadLabelled:
    """Makes an example of a row with an undecoded `image` and a `label`. Raises [`BadExample`]."""

    num_labels: int

    def __call__(self, row: Row) -> Example:
        label = row["label"]
        if label is None or not 0 <= label < self.num_labels:
            raise BadExample(f"the label must be in 0 ... {self.num_labels - 1}, got {label}")
        return {"image": read_image(row["image"]), "label": label}


@dataclass(frozen=True)
class ReadCaptioned:
    """Makes an example of a row with an undecoded `image` and `captions`, a string or a list. The example has at least
    one caption, and its captions have single spaces. Raises [`BadExample`]."""

    lower_case: bool = False

    def __call__(self, row: Row) -> Example:
        image = read_image(row["image"])
        captions = row["captions"] or []
        captions = [captions] if isinstance(captions, str) else captions
        captions = [" ".join((c.lower() if self.lower_case else c).split()) for c in captions if c]
        captions = [caption for caption in captions if caption]
        if not captions:
            raise BadExample("no caption")
        return {"image": image, "captions": captions}


ReadExample = Callable[[Row], Example]


def check_caption_type(column: str, feature: Any) -> None:
    """Raises a `ValueError` unless a column holds strings or lists of strings."""
    if getattr(feature, "feature", feature) not in (Value("string"), Value("large_string"), Value("null")):
        raise ValueError(f"The column {column!r} must hold strings or lists of strings, got {feature}.")


def label_names(column: str, feature: Any, num_labels: int | None) -> list[str]:
    """The names of a column's labels. The names of plain integers, which need `num_labels`, are the numbers."""
    if isinstance(feature, ClassLabel):
        return feature.names
    if num_labels is None or getattr(feature, "dtype", None) not in ("int8", "int16", "int32", "int64", "uint8"):
        raise ValueError(
            f"The column {column!r} must be a `datasets.ClassLabel`, or hold integers with `data.num_labels` given; "
            f"it is {feature}."
        )
    return [str(label) for label in range(num_labels)]


def name_problems(problems: list[str], total: str) -> str:
    """`"2 of 9 examples are bad: row 3: no caption; row 5: no image."`, which names at most [`MAX_NAMED`] of them."""
    message = f"{len(problems)} {total}: {'; '.join(problems[:MAX_NAMED])}"
    return message + (f"; and {len(problems) - MAX_NAMED} more." if len(problems) > MAX_NAMED else ".")


def drop_bad_examples(
    data: Dataset, read: ReadExample, split: str, on_bad_example: str = "skip", num_proc: int | None = None
) -> Dataset:
    r"""
    Leaves out the rows that `read` rejects, and reports them.

    All rows are checked once, before training. So row numbers are stable, as cached features need, all processes see
    the same rows, and `datasets` caches the result.

    Args:
        data (`Dataset`): A data set with an undecoded `image` and one more column, `label` or `captions`.
        read ([`ReadLabelled`] or [`ReadCaptioned`]):
            Decides which rows are rejected. The other column is replaced by what it returns.
        split (`str`): Name of the split, for messages.
        on_bad_example (`str`, *optional*, defaults to `"skip"`): `"skip"`, or `"raise"` to raise an error.
        num_proc (`int`, *optional*): Number of processes that decode the images.

    Returns:
        `Dataset`: the remaining rows, with decoded images.

    Raises:
        `ValueError`: if all rows are rejected or, with `on_bad_example="raise"`, at least one is.
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
    problems = [problem for problem in checked["problem"] if problem]
    data = concatenate_datasets([data.select_columns("image"), checked.select_columns(column)], axis=1)
    if problems:
        message = name_problems(problems, f"of {len(data)} examples of {split!r} are bad")
        if on_bad_example == "raise" or len(problems) == len(data):
            raise ValueError(message)
        logger.warning(f"{message} They are skipped.")
        data = data.select([index for index, problem in enumerate(checked["problem"]) if not problem])
    return data.cast_column("image", Image())


def _check_row(row: Row, index: int, read: ReadExample, column: str) -> dict[str, Any]:
    """What `read` returns for a row's other column, and why the row was rejected, if it was."""
    try:
        return {column: read(row)[column], "problem": ""}
    except BadExample as error:
        path = (row["image"] or {}).get("path")
        return {column: None, "problem": f"row {index}{f' ({path})' if path else ''}: {error}"}
