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
NUM_SAMPLES = 8  # draws of the noise


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


def describe_classifier(
    model: TDDForImageClassification, batches: list[dict[str, Tensor]], num_steps: int = NUM_STEPS
) -> tuple[dict[str, Any], np.ndarray]:
    r"""
    Describes a classifier on a split: at each step of one loop, and with several draws of the noise.

    Args:
        model ([`TDDForImageClassification`]): A classifier of TDD or MDD. MDD has one step and no noise.
        batches (`list[dict[str, torch.Tensor]]`): Batches of `pixel_values` and `labels`.
        num_steps (`int`, *optional*, defaults to 20): Steps of the loop.

    Returns:
        `tuple`: a dictionary with the scores of [`~statistics.calibration`] of the last step, `selective`
        ([`~statistics.selective_accuracy`]), the same from several draws under `samples`, `softmax_top1` with
        sampling from the softmax, and `steps`: the mean `top1`, `entropy` in nats, `confidence` and five largest
        probabilities of each step; and whether each image was classified correctly.
    """
    has_steps = model.config.corruption == "gaussian"
    settings = {"num_inference_steps": num_steps, "num_noise_samples": 1} if has_steps else {}
    trajectory, labels = collect_probabilities(model, batches, **settings)
    report = _describe(trajectory[:, -1], labels)
    right = trajectory.argmax(-1) == labels[:, None]
    report["steps"] = {
        "top1": right.mean(0).tolist(),
        "entropy": entropy(trajectory).mean(0).tolist(),
        "confidence": trajectory.max(-1).mean(0).tolist(),
        "top5_probabilities": np.sort(trajectory, -1)[..., ::-1][..., :5].mean(0).tolist(),
    }
    if has_steps:
        sampled, _ = collect_probabilities(model, batches, **{**settings, "num_noise_samples": NUM_SAMPLES})
        report["samples"] = _describe(sampled[:, -1], labels)
    if has_steps and model.config.prediction_type == "sample":
        drawn, _ = collect_probabilities(model, batches, **settings, sampling_strategy="multinomial")
        report["softmax_top1"] = calibration(drawn[:, -1], labels)["top1"]
    return report, right[:, -1]


def _describe(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    correct = probabilities.argmax(1) == labels
    selective = selective_accuracy(probabilities.max(1), correct, SHARES)
    return {**calibration(probabilities, labels), "selective": dict(zip(map(str, SHARES), selective))}
