# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Shows the denoising of a caption: the caption at each step (Fig. 9), and each place's likeliest tokens (Fig. 10)."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modeling_tdd.generation_tdd import TDDGenerationOutput, pad_after_end
from modeling_tdd.modeling_tdd import TDDForCaptioning


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_COLUMNS = 4


def captions_at_each_step(
    model: TDDForCaptioning, outputs: TDDGenerationOutput, decode: Callable[[Tensor], str], row: int = 0
) -> list[tuple[int, str]]:
    r"""
    The captions that a denoising loop predicted, step by step.

    Args:
        model ([`TDDForCaptioning`]): The model that generated the output.
        outputs ([`TDDGenerationOutput`]): An output of `generate` with the trajectory.
        decode (`Callable`): A function from token ids to text.
        row (`int`, *optional*, defaults to 0): Index of the caption in the output.

    Returns:
        `list[tuple[int, str]]`: the timestep and the caption of each step, the largest timestep first.
    """
    trajectory = outputs.trajectory
    drafts = pad_after_end(trajectory.tokens[row], model.config)
    return [(timestep, decode(draft)) for timestep, draft in zip(trajectory.timesteps.tolist(), drafts)]


def token_trajectory(
    candidates: Tensor, candidate_log_probs: Tensor, num_candidates: int = 5
) -> tuple[list[int], Tensor]:
    r"""
    The probabilities of the likeliest tokens of one place at each step.

    Args:
        candidates (`torch.LongTensor` of shape `(num_steps, k)`): The k likeliest tokens at each step.
        candidate_log_probs (`torch.FloatTensor` of shape `(num_steps, k)`): Their log-probabilities.
        num_candidates (`int`, *optional*, defaults to 5): The largest number of tokens to return.

    Returns:
        `tuple`: the tokens and their probabilities of shape `(num_tokens, num_steps)`. The first token is the
        likeliest of the last step. The others are in the order of their total probability over all steps. A
        probability is NaN where the token was not among the step's k likeliest.
    """
    tokens, index = candidates.unique(return_inverse=True)
    steps = torch.arange(len(candidates))[:, None]
    probabilities = torch.full((len(tokens), len(candidates)), math.nan)
    probabilities[index, steps] = candidate_log_probs.exp()
    total = probabilities.nan_to_num(0.0).sum(dim=1)
    total[tokens == candidates[-1, 0]] = math.inf
    order = total.argsort(descending=True, stable=True)[:num_candidates]
    return tokens[order].tolist(), probabilities[order]


def plot_token_trajectories(
    outputs: TDDGenerationOutput, decode: Callable[[Tensor], str], num_places: int, row: int = 0
) -> "Figure":
    r"""
    Plots one heatmap per token of a caption: the probabilities of candidate tokens (rows) at each step (columns).

    Args:
        outputs ([`TDDGenerationOutput`]): An output of `generate` with the trajectory.
        decode (`Callable`): A function from token ids to text that keeps special tokens.
        num_places (`int`): Number of the caption's tokens to show, from the first.
        row (`int`, *optional*, defaults to 0): Index of the caption in the output.
    """
    from matplotlib.figure import Figure

    trajectory = outputs.trajectory
    timesteps = trajectory.timesteps.tolist()
    columns = min(NUM_COLUMNS, num_places)
    rows = math.ceil(num_places / columns)
    figure = Figure(figsize=(3.2 * columns, 1.7 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for place, axes in enumerate(grid.flat):
        if place >= num_places:
            axes.set_visible(False)
            continue
        tokens, probabilities = token_trajectory(
            trajectory.candidates[row, :, place].cpu(), trajectory.candidate_log_probs[row, :, place].cpu()
        )
        image = axes.imshow(
            probabilities.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest"
        )
        axes.set_title(f"{place + 1}: {decode(outputs.sequences[row, place : place + 1])}", fontsize=9)
        axes.set_yticks(range(len(tokens)), [decode(torch.tensor([token])) for token in tokens], fontsize=8)
        shown = range(0, len(timesteps), math.ceil(len(timesteps) / 6))
        axes.set_xticks(shown, [str(timesteps[step]) for step in shown], fontsize=7)
    figure.supxlabel("timestep t: noise on the left, the caption on the right", fontsize=9)
    figure.colorbar(image, ax=grid, label="probability (white: not among the step's best)", shrink=0.8)
    return figure
