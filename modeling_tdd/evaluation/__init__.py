# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Metrics, scores of checkpoints, baselines, and plots of the scores and of the denoising."""

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from evaluate import Metric


def load_metric(name: str) -> "Metric":
    r"""
    Loads a metric of this package by `evaluate.load`, which needs no network for it.

    Args:
        name (`str`): `"top1"`, `"caption_match"`, `"word_scores"`, `"coco_captions"` or `"clip_score"`, a folder in
            `metrics/`.

    Returns:
        `evaluate.Metric`: the metric. Its `inputs_description` says what `compute` takes and returns. It keeps its
        inputs in memory and not in a file, so several processes and instances do not disturb each other.

    Raises:
        `ValueError`: for another name.
    """
    import evaluate  # not at the top: it takes a second, and models and baselines do not need it

    folder = Path(__file__).with_name("metrics")
    names = sorted(path.stem for path in folder.glob("*/*.py"))
    if name not in names:
        raise ValueError(f"`name` must be one of {', '.join(names)}, got {name!r}.")
    return evaluate.load(str(folder / name), keep_in_memory=True)
