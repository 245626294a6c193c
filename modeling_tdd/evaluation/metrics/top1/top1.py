# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Top-1 accuracy, in the format of the package `evaluate`."""

import datasets
import evaluate
import numpy as np


INPUTS = """
Args:
    predictions (`list[int]`): The predicted label of each image.
    references (`list[int]`): The right label of each image.

Returns:
    `dict`: `top1`, the share of images whose predicted label is the right one.
"""


class Top1(evaluate.Metric):
    """Top-1 accuracy."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Top-1 accuracy: the share of images whose predicted label is the right one, in [0, 1].",
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": label, "references": label}),
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        if not len(predictions):
            raise ValueError("`predictions` must have at least one label, got none.")
        return {"top1": float((predictions == references).mean())}
