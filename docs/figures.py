# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Draws the two figures of how_it_works.md: a noisy label, and a classification step by step.

python docs/figures.py
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoImageProcessor

from modeling_tdd import TDDForImageClassification, to_rgb
from modeling_tdd.diffusion_tdd import add_noise, one_hot
from modeling_tdd.training.data import load_digits_dataset


IMAGES = Path(__file__).parent / "images"
CHECKPOINT = "checkpoints/digits"
LABELS = range(10)


def draw_noisy_label(model: TDDForImageClassification, label: int = 7) -> Figure:
    """The one-hot vector of a label under the noise of several timesteps."""
    schedule = model.model.denoiser.schedule_on(torch.device("cpu"))
    noise = torch.randn(len(LABELS), generator=torch.Generator().manual_seed(0))
    figure = Figure(figsize=(10, 2.2), layout="constrained")
    for axes, timestep in zip(figure.subplots(1, 5, sharey=True), (1, 250, 500, 750, 1000)):
        clean = one_hot(torch.tensor(label), len(LABELS))
        noisy = add_noise(clean, noise, schedule, torch.tensor(timestep))
        axes.bar(LABELS, noisy, color=["tab:orange" if digit == label else "tab:blue" for digit in LABELS])
        axes.set_title(f"t = {timestep}, signal {schedule.alpha_bar[timestep]:.2f}", fontsize=9)
        axes.set_xticks(LABELS)
    return figure


def draw_classification(model: TDDForImageClassification) -> Figure:
    """The held-out digit whose probabilities change most from the first step to the last, and these probabilities."""
    digits = load_digits_dataset()["validation"]
    inputs = AutoImageProcessor.from_pretrained(CHECKPOINT)(
        [to_rgb(image) for image in digits["image"]], return_tensors="pt"
    )
    with torch.no_grad():
        trajectories = model(**inputs, num_inference_steps=10, output_trajectory=True).trajectory
    chosen = (trajectories[:, -1] - trajectories[:, 0]).abs().sum(-1).argmax().item()
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    left.imshow(digits[chosen]["image"], cmap="gray")
    left.set_title(f"labelled {digits[chosen]['label']}", fontsize=9)
    left.set_axis_off()
    image = right.imshow(trajectories[chosen].T, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    right.set(xlabel="timestep", ylabel="label", yticks=LABELS)
    right.set_xticks(range(10), range(1000, 0, -100))
    figure.colorbar(image, label="probability")
    return figure


if __name__ == "__main__":
    model = TDDForImageClassification.from_pretrained(CHECKPOINT).eval()
    draw_noisy_label(model).savefig(IMAGES / "noise.png", dpi=90)
    draw_classification(model).savefig(IMAGES / "classification.png", dpi=90)
