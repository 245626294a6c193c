# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""From a row of a data set to an example to learn from, and what is wrong with a row that is none."""

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

MAX_NAMED = 10  # bad examples that a message names

_IMAGE = Image()


class BadExample(ValueError):
    """What is wrong with a row; it is skipped, counted and named."""


def read_image(image: dict[str, Any] | None) -> PILImage.Image:
    """The picture of an undecoded cell of `datasets.Image`, from its bytes or its path, decoded to its last line."""
    if not image or (image.get("bytes") is None and image.get("path") is None):
        raise BadExample("no image")
    try:
        picture = _IMAGE.decode_example(image)
        picture.load()  # opening reads the header alone: only decoding shows that a file is cut short
        return picture
    except Exception as error:  # Pillow's decoders raise many kinds
        raise BadExample(f"unreadable image ({type(error).__name__})") from error


@dataclass(frozen=True)
class ReadLabelled:
    """From a row with an undecoded `image` and a `label` to an example; raises [`BadExample`]."""

    num_labels: int

    def __call__(self, row: Row) -> Example:
        label = row["label"]
        if label is None or not 0 <= label < self.num_labels:
            raise BadExample(f"no label in 0 ... {self.num_labels - 1}, but {label}")
        return {"image": read_image(row["image"]), "label": label}


@dataclass(frozen=True)
class ReadCaptioned:
    """From a row with an undecoded `image` and `captions`, a string or a list, to an example with at least one
    caption, with single spaces; raises [`BadExample`]."""

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
    """The names of a column's labels; of plain integers, of which there must be `num_labels`, their digits."""
    if isinstance(feature, ClassLabel):
        return feature.names
    if num_labels is None or getattr(feature, "dtype", None) not in ("int8", "int16", "int32", "int64", "uint8"):
        raise ValueError(
            f"The column {column!r} must be a `datasets.ClassLabel`, or hold integers with `data.num_labels` given; "
            f"it is {feature}."
        )
    return [str(label) for label in range(num_labels)]


def name_problems(problems: list[str], total: str) -> str:
    """`"2 of 9 examples are bad: row 3: no caption; row 5: no image."`, with at most [`MAX_NAMED`] named."""
    message = f"{len(problems)} {total}: {'; '.join(problems[:MAX_NAMED])}"
    return message + (f"; and {len(problems) - MAX_NAMED} more." if len(problems) > MAX_NAMED else ".")


def drop_bad_examples(
    data: Dataset, read: ReadExample, split: str, on_bad_example: str = "skip", num_proc: int | None = None
) -> Dataset:
    r"""
    Leaves out the rows that `read` calls bad, and names them.

    They are looked for once and not while training: row numbers stay stable (features are cached by them), all
    processes see the same rows, and `datasets` remembers the result.

    Args:
        data (`Dataset`): With an undecoded `image` and one more column, `label` or `captions`.
        read ([`ReadLabelled`] or [`ReadCaptioned`]): Its verdict counts, and what it makes of the other column.
        split (`str`): Name for messages.
        on_bad_example (`str`, *optional*, defaults to `"skip"`): `"skip"`, or `"raise"` to stop.
        num_proc (`int`, *optional*): Processes that decode the images.

    Raises:
        `ValueError`: if no example is good or, with `on_bad_example="raise"`, one is bad.
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
    """What `read` makes of a row's other column, and what is wrong with the row, if anything."""
    try:
        return {column: read(row)[column], "problem": ""}
    except BadExample as error:
        path = (row["image"] or {}).get("path")
        return {column: None, "problem": f"row {index}{f' ({path})' if path else ''}: {error}"}
