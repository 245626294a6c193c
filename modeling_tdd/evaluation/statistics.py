# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Statistics of predictions: paired bootstrap, calibration, and accuracy on the surest images."""

from collections.abc import Sequence

import numpy as np


NUM_BINS = 15  # of the confidence, as in Guo et al., 2017


def paired_bootstrap(
    correct: np.ndarray, others: np.ndarray, num_draws: int = 2_000, seed: int = 0
) -> tuple[float, float, float]:
    r"""
    How much more often one method is right than another, on the same images. Both the seeds of the trainings and the
    images are drawn anew, so the interval is that of new trainings on new images.

    Args:
        correct (`np.ndarray` of shape `(num_seeds, num_images)`): Whether the method was right.
        others (`np.ndarray` of the same shape): The same of the other method; rows are paired by the seed.
        num_draws (`int`, *optional*, defaults to 2000): Number of bootstrap samples.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.

    Returns:
        `tuple[float, float, float]`: the mean difference, and the 2.5 and 97.5 percentiles of the samples.

    Raises:
        `ValueError`: if the shapes differ.
    """
    if correct.shape != others.shape or correct.ndim != 2:
        raise ValueError(
            f"`correct` and `others` must have one shape (num_seeds, num_images), got {correct.shape} and "
            f"{others.shape}."
        )
    difference = correct.astype(np.float64) - others
    num_seeds, num_images = difference.shape
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(num_draws):
        seeds = generator.integers(num_seeds, size=num_seeds)
        images = generator.integers(num_images, size=num_images)
        draws.append(difference[seeds].mean(0)[images].mean())
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    r"""
    How far the probabilities can be trusted.

    Args:
        probabilities (`np.ndarray` of shape `(num_images, num_labels)`): The probability of each label.
        labels (`np.ndarray` of shape `(num_images,)`): The right labels.

    Returns:
        `dict`: `top1`; `nll`, the mean negative log-likelihood of the right label in nats; and `ece`, the
        [`expected_calibration_error`].
    """
    right = probabilities[np.arange(len(labels)), labels]
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    return {
        "top1": float(correct.mean()),
        "nll": float(-np.log(np.maximum(right, 1e-12)).mean()),
        "ece": expected_calibration_error(confidence, correct),
    }


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    r"""
    How far the confidence is right: in 15 bins of equal width the distance of accuracy and mean confidence, a mean
    over the predictions.

    Args:
        confidence (`np.ndarray` of shape `(num_predictions,)`): The probability that a prediction is right.
        correct (`np.ndarray` of shape `(num_predictions,)`): Whether it is.
    """
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(correct))


def selective_accuracy(confidence: np.ndarray, correct: np.ndarray, shares: Sequence[float]) -> list[float]:
    r"""
    The accuracy on the share of images of which a method is surest. Of equally sure images all count alike.

    Args:
        confidence (`np.ndarray` of shape `(num_images,)`): How sure the method is.
        correct (`np.ndarray` of shape `(num_images,)`): Whether it is right.
        shares (`Sequence[float]`): Shares of images in (0, 1].

    Returns:
        `list[float]`: the accuracy for each share.
    """
    _, groups = np.unique(-confidence, return_inverse=True)  # the surest first
    right = np.bincount(groups, weights=correct) / np.bincount(groups)
    expected = np.sort(groups)  # group of each image in the order of confidence
    totals = right[expected].cumsum()
    counts = [max(1, round(share * len(correct))) for share in shares]
    return [float(totals[count - 1] / count) for count in counts]


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """The entropy in nats over the last axis."""
    return -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(-1)
