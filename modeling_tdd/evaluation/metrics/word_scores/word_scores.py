# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Scores of the words that an encoder finds in images, in the format of the package `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import average_precision_score, f1_score


DESCRIPTION = """
Mean average precision and micro F1 of words, where each word is an independent binary decision, in [0, 1]. Computed by
scikit-learn.
"""
INPUTS = """
Args:
    predictions (`np.ndarray` of shape `(num_images, num_words)`): The probability of each word.
    references (`np.ndarray` of shape `(num_images, num_words)`): 1 for the words of the image, 0 for others.
    threshold (`float`, *optional*, defaults to 0.5): The probability from which a word counts as found.

Returns:
    `dict`: `word_map`, the mean average precision over the words that occur in the references, and `word_f1`, the F1
    score of all decisions.
"""


class WordScores(evaluate.Metric):
    """Mean average precision and micro F1 of words."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions: Any, references: Any, threshold: float = 0.5) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        present = references.any(0)
        # scikit-learn reads column by column, and NumPy copies an array of another order whole for each
        columns = [np.ascontiguousarray(matrix[:, present]) for matrix in (references, predictions)]
        precision = average_precision_score(*columns)
        f1 = f1_score(references, predictions >= threshold, average="micro")
        return {"word_map": float(precision), "word_f1": float(f1)}
