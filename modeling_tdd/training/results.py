# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Saves results and models, each completely or not at all, and formats tables of results."""

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor


def write_json(path: Path, content: Any) -> None:
    """Writes JSON to a temporary file beside `path` and then moves it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def training_folder(folder: Path) -> Path:
    """The folder of a run's checkpoints and logs. It is beside `folder`, that of the final model, which is replaced as
    a whole."""
    return folder.with_name(f"{folder.name}-training")


def save_checkpoint(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """Saves model and processor to a temporary folder beside `folder` and then moves it to `folder`. If saving fails,
    `folder` stays as it was."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def mean_and_spread(values: Iterable[float]) -> str:
    """`"97.53 ± 0.21"`: mean and standard deviation over seeds in percent. A single value has no deviation."""
    percents = [100 * value for value in values]
    mean = f"{statistics.fmean(percents):.2f}"
    return mean if len(percents) == 1 else f"{mean} ± {statistics.stdev(percents):.2f}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
