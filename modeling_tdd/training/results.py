# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Results and models on disk, each written whole or not at all, and the tables made of them."""

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
    """Writes to a temporary file beside `path` and moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def training_folder(folder: Path) -> Path:
    """Of the checkpoints and logs of a run: beside `folder`, the run's model, which is replaced whole."""
    return folder.with_name(f"{folder.name}-training")


def save_checkpoint(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """Saves model and processor to a temporary folder beside `folder` and moves it there, whole or not at all."""
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
    """`"97.53 ± 0.21"`: mean and standard deviation over seeds, in percent; a single value stands alone."""
    percents = [100 * value for value in values]
    mean = f"{statistics.fmean(percents):.2f}"
    return mean if len(percents) == 1 else f"{mean} ± {statistics.stdev(percents):.2f}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up in plain text too."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
