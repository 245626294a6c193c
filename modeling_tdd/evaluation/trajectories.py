# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Shows the denoising of a caption: its draft at each step (Fig. 9), as an animation too, and each place's likeliest
tokens (Fig. 10)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modeling_tdd.configuration_tdd import TDDConfig
from modeling_tdd.fixed_tokens_tdd import end_tokens
from modeling_tdd.generation_tdd import TDDGenerationOutput

from .step_curves import COLORS, GREY


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_COLUMNS = 4
# By probability: orange and blue, which any colour vision tells apart, light enough for black text
COLORS_OF_CONFIDENCE = ((0.0, "#F5A623"), (0.8, "#FFFFFF"), (1.0, "#8CCBF2"))
MS_PER_STEP, MS_AT_END = 800, 3000


@dataclass(frozen=True)
class DenoisingFrame:
    r"""
    One step of the denoising of one caption.

    Args:
        timestep (`int`): The step's timestep.
        tokens (`list[tuple[str, float]]`):
            The draft's tokens before its end, as pieces of its text, each with its probability.
        entropy (`float`):
            Mean entropy in bits of the predictions of these tokens and the end. Of each, only the likeliest tokens are
            known: all others together count as one more, so the true entropy is at least as large.
    """

    timestep: int
    tokens: list[tuple[str, float]]
    entropy: float

    @property
    def caption(self) -> str:
        return "".join(piece for piece, _ in self.tokens)


def denoising_frames(
    outputs: TDDGenerationOutput, config: TDDConfig, decode: Callable[[Tensor], str], row: int = 0
) -> list[DenoisingFrame]:
    r"""
    What a denoising loop predicted, step by step.

    Args:
        outputs ([`TDDGenerationOutput`]): An output of `generate` with the trajectory.
        config ([`TDDConfig`]): The model's configuration, for its special tokens.
        decode (`Callable`): A function from token ids to text.
        row (`int`, *optional*, defaults to 0): Index of the caption in the output.

    Returns:
        `list[DenoisingFrame]`: a frame for each step, the largest timestep first.
    """
    trajectory = outputs.trajectory
    entropies = candidate_entropy(trajectory.candidate_log_probs[row])
    frames = []
    for step, timestep in enumerate(trajectory.timesteps.tolist()):
        draft = trajectory.tokens[row, step]
        length = caption_length(draft, config)
        texts = [decode(draft[:end]) for end in range(1, length + 1)]
        # A token's text may depend on those before it, so it is what the draft grows by
        pieces = [text[len(before) :] for before, text in zip(["", *texts], texts)]
        probabilities = trajectory.log_probs[row, step, :length].exp().tolist()
        entropy = entropies[step, : length + 1].mean().item()
        frames.append(DenoisingFrame(timestep, list(zip(pieces, probabilities)), entropy))
    return frames


def caption_length(tokens: Tensor, config: TDDConfig) -> int:
    """The number of tokens before the end."""
    is_end = torch.isin(tokens, torch.tensor(end_tokens(config), device=tokens.device))
    return int((is_end.cumsum(0) == 0).sum())


def candidate_entropy(candidate_log_probs: Tensor) -> Tensor:
    """Entropy in bits from the log-probabilities of the likeliest tokens, float of shape `(..., k)`. All other tokens
    together count as one."""
    probabilities = candidate_log_probs.exp()
    others = (1 - probabilities.sum(-1, keepdim=True)).clamp_min(0)
    return torch.special.entr(torch.cat([probabilities, others], dim=-1)).sum(-1) / math.log(2)


def confidence_color(probability: float) -> str:
    """The colour of a token of some probability, such as `"#8CCBF2"`: from orange by white to blue."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    return to_hex(LinearSegmentedColormap.from_list("confidence", COLORS_OF_CONFIDENCE)(probability)).upper()


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
    outputs: TDDGenerationOutput, decode: Callable[[Tensor], str], places: Sequence[int], row: int = 0
) -> "Figure":
    r"""
    Plots one heatmap per token of a caption: the probabilities of candidate tokens (rows) at each step (columns).

    Args:
        outputs ([`TDDGenerationOutput`]): An output of `generate` with the trajectory.
        decode (`Callable`): A function from token ids to text that keeps special tokens.
        places (`Sequence[int]`): Indices of the caption's tokens to show.
        row (`int`, *optional*, defaults to 0): Index of the caption in the output.
    """
    from matplotlib.figure import Figure

    trajectory = outputs.trajectory
    timesteps = trajectory.timesteps.tolist()
    columns = min(NUM_COLUMNS, len(places))
    rows = math.ceil(len(places) / columns)
    # The axis' and the scale's names need some room, also beside a single heatmap
    figure = Figure(figsize=(max(5.0, 3.2 * columns), max(3.0, 1.7 * rows + 0.6)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes in grid.flat[len(places) :]:
        axes.set_visible(False)
    for place, axes in zip(places, grid.flat):
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
    figure.colorbar(image, ax=grid, shrink=0.8).set_label("probability (white: not among the best)", fontsize=9)
    return figure


def save_animation(frames: Sequence[DenoisingFrame], picture: Image.Image, file: Path) -> None:
    r"""
    Saves the denoising of a caption as an animated GIF: the picture, the draft of each step with its tokens coloured
    by their probability, and the entropy so far. A token has a frame where the step before had another one.

    Args:
        frames (`Sequence[DenoisingFrame]`): The steps, see [`denoising_frames`].
        picture (`PIL.Image.Image`): The captioned picture.
        file (`Path`): The GIF's file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pages = []
    for step in range(len(frames)):
        figure = Figure(figsize=(8.3, 3.3), dpi=100)
        canvas = FigureCanvasAgg(figure)
        sides = {"left": 0.02, "right": 0.97, "bottom": 0.17, "top": 0.9, "wspace": 0.17, "hspace": 0.25}
        grid = figure.add_gridspec(2, 2, width_ratios=[1, 2.9], height_ratios=[1.7, 1], **sides)
        axes = figure.add_subplot(grid[:, 0])
        axes.imshow(picture, interpolation="lanczos")
        axes.set_axis_off()
        _draw_draft(figure.add_subplot(grid[0, 1]), frames, step)
        _draw_entropy(figure.add_subplot(grid[1, 1]), frames, step)
        canvas.draw()
        pages.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    # One palette for all pages, so that a colour is the same throughout
    width, height = pages[0].size
    strip = Image.new("RGB", (width, height * len(pages)))
    for step, page in enumerate(pages):
        strip.paste(page, (0, height * step))
    palette = strip.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    milliseconds = [MS_PER_STEP] * (len(pages) - 1) + [MS_AT_END]
    pages[0].save(file, save_all=True, append_images=pages[1:], duration=milliseconds, loop=0)


def _draw_draft(axes: "Axes", frames: Sequence[DenoisingFrame], step: int) -> None:
    """A draft as a paragraph of coloured words, with their probabilities below."""
    box = axes.get_window_extent()
    axes.set(xlim=(0, box.width), ylim=(box.height, 0))
    axes.set_axis_off()
    frame, before = frames[step], frames[step - 1].tokens if step else []
    axes.set_title(f"step {step + 1} of {len(frames)}, t = {frame.timestep}", loc="left", fontsize=12)
    axes.set_title("below: probability in %; framed: new in this step", loc="right", fontsize=9, color=GREY)
    x, y = 6.0, 22.0
    for place, (piece, probability) in enumerate(frame.tokens):
        is_new = step > 0 and [piece] != [text for text, _ in before[place : place + 1]]
        shape = {"boxstyle": "round,pad=0.2", "facecolor": confidence_color(probability), "linewidth": 1.5}
        word = axes.text(x, y, piece.strip(), fontsize=14, va="center", bbox=shape)
        word.get_bbox_patch().set_edgecolor("black" if is_new else "none")
        width = word.get_window_extent().width
        if x + width > box.width:
            x, y = 6.0, y + 46
            word.set_position((x, y))
        axes.text(x + width / 2, y + 21, f"{100 * probability:.0f}", fontsize=9, ha="center", va="center")
        x += width + 14


def _draw_entropy(axes: "Axes", frames: Sequence[DenoisingFrame], step: int) -> None:
    """The entropy of the steps so far, on the axes of all steps."""
    entropies = [frame.entropy for frame in frames]
    steps = range(1, len(frames) + 1)
    axes.plot(steps[: step + 1], entropies[: step + 1], color=COLORS[0], marker="o", markersize=4, clip_on=False)
    axes.set(xlim=(0.7, len(frames) + 0.3), ylim=(0, 1.1 * max(entropies) + 1e-6), xlabel="denoising step")
    axes.set_ylabel("entropy, bits", fontsize=9)
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
