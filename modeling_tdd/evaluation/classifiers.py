# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What a trained classifier says of images: its probabilities at each denoising step, and what follows from them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..modeling_tdd import TDDForImageClassification
from .statistics import calibration, entropy, selective_accuracy


SHARES = (0.5, 0.8, 0.9, 1.0)
NUM_STEPS = 20  # the paper's best number, Section 4.2.1
NUM_SAMPLES = 4  # draws of the noise


@torch.inference_mode()
def collect_probabilities(
    model: TDDForImageClassification, batches: Iterable[dict[str, Tensor]], **settings: Any
) -> tuple[np.ndarray, np.ndarray]:
    r"""
    Classifies images.

    Args:
        model ([`TDDForImageClassification`]): The model.
        batches (`Iterable[dict[str, torch.Tensor]]`): Batches of `pixel_values` and `labels`.
        settings: Arguments of the model, such as `num_inference_steps`.

    Returns:
        `tuple`: the probabilities at each step, of shape `(num_images, num_steps, num_labels)`, and the labels.
    """
    model.eval()
    trajectories, labels = [], []
    for batch in batches:
        outputs = model(batch["pixel_values"].to(model.device), output_trajectory=True, **settings)
        trajectories.append(outputs.trajectory.cpu().numpy())
        labels.append(batch["labels"].numpy())
    return np.concatenate(trajectories), np.concatenate(labels)


def describe_steps(
    model: TDDForImageClassification, batches: Iterable[dict[str, Tensor]], num_steps: int = NUM_STEPS
) -> tuple[dict[str, Any], np.ndarray]:
    r"""
    Describes each step of one denoising loop on a split.

    Args:
        model ([`TDDForImageClassification`]): A classifier of TDD or MDD. MDD has one step and no noise.
        batches (`Iterable[dict[str, torch.Tensor]]`): Batches of `pixel_values` and `labels`.
        num_steps (`int`, *optional*, defaults to 20): Steps of the loop.

    Returns:
        `tuple`: a dictionary with the scores of [`~statistics.calibration`] of the last step, `selective`
        ([`~statistics.selective_accuracy`]), and `steps`: the mean `top1`, `entropy` in nats and `confidence` of each
        step; and whether each image was classified correctly.
    """
    settings = {"num_inference_steps": num_steps, "num_noise_samples": 1} if denoises(model) else {}
    trajectory, labels = collect_probabilities(model, batches, **settings)
    right = trajectory.argmax(-1) == labels[:, None]
    steps = {
        "top1": right.mean(0).tolist(),
        "entropy": entropy(trajectory).mean(0).tolist(),
        "confidence": trajectory.max(-1).mean(0).tolist(),
    }
    return {**_describe(trajectory[:, -1], labels), "steps": steps}, right[:, -1]


def describe_draws(
    model: TDDForImageClassification, batches: Iterable[dict[str, Tensor]], num_steps: int = NUM_STEPS
) -> dict[str, Any]:
    """What other draws give: `samples`, as in [`describe_steps`] from four draws of the noise, and `softmax_top1`, by
    sampling from the softmax. Empty for MDD, and without the latter for regression. The batches are read twice."""
    if not denoises(model):
        return {}
    settings: dict[str, Any] = {"num_inference_steps": num_steps}
    sampled, labels = collect_probabilities(model, batches, **settings, num_noise_samples=NUM_SAMPLES)
    report: dict[str, Any] = {"samples": _describe(sampled[:, -1], labels)}
    if model.config.prediction_type == "sample":
        settings |= {"sampling_strategy": "multinomial", "num_noise_samples": 1}
        drawn, _ = collect_probabilities(model, batches, **settings)
        report["softmax_top1"] = calibration(drawn[:, -1], labels)["top1"]
    return report


def denoises(model: TDDForImageClassification) -> bool:
    """Whether it runs a loop, from noise or random labels: MDD of one token does not."""
    return model.config.corruption != "mask"


def _describe(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    correct = probabilities.argmax(1) == labels
    selective = selective_accuracy(probabilities.max(1), correct, SHARES)
    return {**calibration(probabilities, labels), "selective": dict(zip(map(str, SHARES), selective))}
