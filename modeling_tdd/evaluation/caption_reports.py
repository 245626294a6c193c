# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Reports of the paper's Table 3 and Figs. 7, 9 and 10: captions of MDD and TDD, CLIP scores and drafts."""

import json
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image
from torch import Tensor

from ..images_tdd import to_rgb
from ..modeling_tdd import TDDForCaptioning
from ..processing_tdd import TDDProcessor
from . import load_metric
from .claims import PAPER_CLIP_SCORES
from .figures import save_figure
from .scoring import load_checkpoint, predict
from .tables import markdown_table
from .trajectories import denoising_frames, plot_token_trajectories


if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure

NUM_SHUFFLES = 3
NUM_EXAMPLES = 6
LABELS = {
    "true": "true captions",
    "shuffled": "shuffled captions",
    "mdd": "MDD's captions",
    "tdd": "TDD's captions",
    "shipped": "the shipped TDD's captions",
}


def shuffled(captions: Sequence[str], seed: int) -> list[str]:
    """The captions of other pictures: a random order in which no picture has its own caption or an equal one."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(captions))
    for place in range(len(captions)):
        if captions[order[place]] == captions[place]:  # exchange it with one that fits at both places
            for other in generator.permutation(len(captions)):
                if captions[order[other]] != captions[place] and captions[order[place]] != captions[other]:
                    order[[place, other]] = order[[other, place]]
                    break
    return [captions[index] for index in order]


def bootstrap_mean(scores: Sequence[float], num_draws: int = 2_000, seed: int = 0) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the mean over images that are drawn anew."""
    values, generator = np.asarray(scores), np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(num_draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def caption_images(data: "Dataset", checkpoints: dict[str, str | Path], num_steps: int = 10) -> dict[str, list[str]]:
    """The captions that each checkpoint, by its name, gives the images of a data set."""
    captions: dict[str, Any] = {}
    for name, checkpoint in checkpoints.items():
        model, processor = load_checkpoint(checkpoint)
        captions[name] = predict(model, processor, data, batch_size=64, num_inference_steps=num_steps)
    return captions


def score_captions(data: "Dataset", captions: dict[str, list[str]], clip: str) -> dict[str, Any]:
    r"""
    Table 3: the CLIP scores of the first true caption of each image, of those of other images, and of models.

    Args:
        data (`Dataset`): Rows with `image` and `captions`.
        captions (`dict[str, list[str]]`): The captions of each model, by its name.
        clip (`str`): A CLIP, by folder or model id.

    Returns:
        `dict`: for each kind of captions `clip_score`, its 95 % interval `low` and `high` over images, and
        `exact_match` and `token_f1`. The score of shuffled captions is the mean of three shuffles.
    """
    images, references = [to_rgb(image) for image in data["image"]], list(data["captions"])
    true = [texts[0] for texts in references]
    kinds = {"true": [true], "shuffled": [shuffled(true, seed) for seed in range(NUM_SHUFFLES)]}
    kinds |= {name: [texts] for name, texts in captions.items()}
    score, match, results = load_metric("clip_score"), load_metric("caption_match"), {}
    for name, versions in kinds.items():
        scores = [score.compute(predictions=v, references=images, model=clip)["clip_scores"] for v in versions]
        low, high = bootstrap_mean(np.mean(scores, axis=0))
        agreement = match.compute(predictions=versions[0], references=references)
        results[name] = {"clip_score": float(np.mean(scores)), "low": low, "high": high}
        results[name] |= {metric: agreement[metric] for metric in ("exact_match", "token_f1")}
    return results


def write_table3(results: dict[str, dict[str, Any]], about: dict[str, Any], command: str, report_dir: Path) -> str:
    """Writes `table3.json` and `table3.md` of the results of each split, and returns the latter. `about` is what is to
    be known of the CLIP and of the models."""
    header = ["split", "captions", "CLIP score (95 %)", "exact match, %", "token F1, %", "paper (COCO)"]
    rows = []
    for split, kinds in results.items():
        for name, values in kinds.items():
            score = f"{values['clip_score']:.3f} ({values['low']:.3f} to {values['high']:.3f})"
            match = [f"{100 * values[metric]:.1f}" for metric in ("exact_match", "token_f1")]
            paper = PAPER_CLIP_SCORES.get(name)
            rows.append([split, LABELS[name], score, *match, "" if paper is None else f"{paper:.2f}"])
    facts = "\n".join(f"- {name}: {json.dumps(value)}" for name, value in about.items())
    report = f"# Table 3\n\nPlain cosines. `{command}`\n\n{markdown_table(header, rows)}\n\n{facts}\n"
    report_dir.mkdir(parents=True, exist_ok=True)
    (report_dir / "table3.md").write_text(report)
    content = {"command": command, "about": about, "results": results}
    (report_dir / "table3.json").write_text(json.dumps(content, indent=1) + "\n")
    return report


def example_rows(data: "Dataset", seed: int = 0) -> list[int]:
    """Rows drawn at random, so that nobody has picked them."""
    return np.random.default_rng(seed).permutation(len(data))[:NUM_EXAMPLES].tolist()


def plot_examples(data: "Dataset", captions: dict[str, list[str]], rows: Sequence[int]) -> "Figure":
    """Fig. 7: pictures with their true caption and those of the models."""
    texts = []
    for row in rows:
        named = {"true": data[row]["captions"][0], **{name.upper(): texts[row] for name, texts in captions.items()}}
        lines = [textwrap.wrap(f"{name}: {text}", 44, subsequent_indent="      ") for name, text in named.items()]
        texts.append("\n".join(line for wrapped in lines for line in wrapped))
    return plot_pictures([data[row]["image"] for row in rows], texts, columns=2)


def plot_drafts(model: TDDForCaptioning, processor: TDDProcessor, images: Sequence[Image.Image]) -> "Figure":
    """Fig. 9: what the loop has at each step, for each image."""
    decode, texts = partial(processor.decode, skip_special_tokens=True), []
    for image in images:
        frames = denoising_frames(run_loop(model, processor, image), model.config, decode)
        lines = [f"t = {frame.timestep:4d}   {textwrap.shorten(frame.caption, 90)}" for frame in frames]
        texts.append("\n".join(lines))
    return plot_pictures(images, texts, columns=1)


def plot_pictures(images: Sequence[Image.Image], texts: Sequence[str], columns: int) -> "Figure":
    """Pictures with a text at the right of each."""
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    figure = Figure(figsize=(9.5, 1.5 * rows), layout="constrained")
    ratios = (1, 6 / columns) * columns
    grid = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=ratios)
    for axes in grid.flat:
        axes.axis("off")
    for (left, right), image, text in zip(grid.reshape(-1, 2), images, texts):
        left.imshow(to_rgb(image))
        left.set_anchor("N")
        right.text(0, 1, text, va="top", family="monospace", fontsize=8, transform=right.transAxes)
    return figure


def plot_tokens(model: TDDForCaptioning, processor: TDDProcessor, image: Image.Image) -> "Figure":
    """Fig. 10: the likeliest tokens of each place at each step."""
    outputs = run_loop(model, processor, image)

    def decode(tokens: Tensor) -> str:
        return processor.decode(tokens, skip_special_tokens=False).strip()

    num_places = int((outputs.sequences[0] != model.config.pad_token_id).sum())
    return plot_token_trajectories(outputs, decode, range(max(1, num_places)))


def run_loop(model: TDDForCaptioning, processor: TDDProcessor, image: Image.Image) -> Any:
    inputs = processor(images=to_rgb(image), return_tensors="pt")
    return model.generate(**inputs, num_inference_steps=10, return_dict_in_generate=True, output_trajectory=True)


def write_caption_figures(
    elements: Sequence[str], data: "Dataset", captions: dict[str, list[str]], tdd: str | Path, report_dir: Path
) -> None:
    """Writes those of `fig7`, `fig9` and `fig10` that are wanted, of pictures drawn at random."""
    rows = example_rows(data)
    model, processor = cast(tuple[TDDForCaptioning, TDDProcessor], load_checkpoint(tdd))
    if "fig7" in elements:
        save_figure(plot_examples(data, captions, rows), report_dir / "fig7")
    if "fig9" in elements:
        save_figure(plot_drafts(model, processor, [data[row]["image"] for row in rows[:3]]), report_dir / "fig9")
    if "fig10" in elements:
        save_figure(plot_tokens(model, processor, data[rows[0]]["image"]), report_dir / "fig10")
