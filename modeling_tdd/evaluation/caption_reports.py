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
from .captioners import caption_with, encode_images, load_captioner
from .claims import PAPER_CLIP_SCORES
from .figures import save_figure
from .statistics import paired_bootstrap
from .tables import markdown_table, mean_and_spread
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
    "ar": "the autoregressive decoder's captions",
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


def caption_images(data: "Dataset", checkpoints: dict[str, list[Path]]) -> dict[str, list[list[str]]]:
    """The captions that the checkpoints of each name, one for each seed, give the images of a data set."""
    captions: dict[str, list[list[str]]] = {name: [] for name in checkpoints}
    for name, folders in checkpoints.items():
        for folder in folders:
            model, processor = load_captioner(folder)
            tokens = caption_with(model, encode_images(model, processor, data))
            captions[name].append(processor.batch_decode(tokens, skip_special_tokens=True))
    return captions


def score_captions(data: "Dataset", captions: dict[str, list[list[str]]], clip: str | None) -> dict[str, Any]:
    r"""
    Table 3: scores of the first true caption of each image, of those of other images, and of models.

    Args:
        data (`Dataset`): Rows with `image` and `captions`.
        captions (`dict[str, list[list[str]]]`):
            The captions of the models of each name, one list for each seed. There are three shuffles, too.
        clip (`str`, *optional*): A CLIP, by folder or model id. `None`: no CLIP scores.

    Returns:
        `dict`: for each kind of captions the `exact_match` and `token_f1` of each seed, and with a CLIP the
        `clip_score` of each seed, the 95 % interval `low` to `high` of their mean over seeds and images, and
        `less_mdd`, the same of the difference to MDD's captions with the difference itself before it.
    """
    images, references = [to_rgb(image) for image in data["image"]], list(data["captions"])
    true = [texts[0] for texts in references]
    kinds = {"true": [true], "shuffled": [shuffled(true, seed) for seed in range(NUM_SHUFFLES)], **captions}
    metric, match = load_metric("clip_score"), load_metric("caption_match")
    results: dict[str, dict[str, Any]] = {}
    scores: dict[str, np.ndarray] = {}
    for name, versions in kinds.items():
        agreements = [match.compute(predictions=version, references=references) for version in versions]
        results[name] = {key: [agreement[key] for agreement in agreements] for key in ("exact_match", "token_f1")}
        if clip is None:
            continue
        computed = [metric.compute(predictions=version, references=images, model=clip) for version in versions]
        scores[name] = np.array([one["clip_scores"] for one in computed])
        _, low, high = paired_bootstrap(scores[name], np.zeros_like(scores[name]))
        results[name] |= {"clip_score": scores[name].mean(1).tolist(), "low": low, "high": high}
    if "tdd" in scores:
        results["tdd"]["less_mdd"] = paired_bootstrap(scores["tdd"], scores["mdd"])
    return results


def write_table3(results: dict[str, dict[str, Any]], about: dict[str, Any], command: str, report_dir: Path) -> str:
    """Writes `table3.json` and `table3.md` of the results of each split, and returns the latter. `about` is what is to
    be known of the CLIP and of the models."""
    header = ["split", "captions", "CLIP score (95 %)", "less MDD's (95 %)", "exact match, %", "token F1, %"]
    header.append("paper (COCO)")
    rows = []
    for split, kinds in results.items():
        for name, values in kinds.items():
            score = less = ""
            if "clip_score" in values:
                score = f"{np.mean(values['clip_score']):.3f} ({values['low']:.3f} to {values['high']:.3f})"
            if "less_mdd" in values:
                mean, low, high = values["less_mdd"]
                less = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
            match = [mean_and_spread(values[metric]) for metric in ("exact_match", "token_f1")]
            paper = PAPER_CLIP_SCORES.get(name) if score else None
            rows.append([split, LABELS[name], score, less, *match, "" if paper is None else f"{paper:.2f}"])
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


def plot_examples(data: "Dataset", captions: dict[str, list[str]]) -> "Figure":
    """Fig. 7: pictures with their true caption and those of the models."""
    texts = []
    for row, true in enumerate(data["captions"]):
        named = {"true": true[0], **{name.upper(): given[row] for name, given in captions.items()}}
        lines = [textwrap.wrap(f"{name}: {text}", 44, subsequent_indent="      ") for name, text in named.items()]
        texts.append("\n".join(line for wrapped in lines for line in wrapped))
    return plot_pictures(data["image"], texts, columns=2)


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
    elements: Sequence[str], data: "Dataset", checkpoints: dict[str, list[Path]], report_dir: Path
) -> None:
    """Writes those of `fig7`, `fig9` and `fig10` that are wanted, of pictures drawn at random and the first checkpoint
    of each name. The drafts are those of the last name."""
    data = data.select(example_rows(data))
    if "fig7" in elements:
        captions = caption_images(data, {name: folders[:1] for name, folders in checkpoints.items()})
        first = {name: versions[0] for name, versions in captions.items()}
        save_figure(plot_examples(data, first), report_dir / "fig7")
    if not {"fig9", "fig10"} & {*elements}:
        return
    model, processor = cast(tuple[TDDForCaptioning, TDDProcessor], load_captioner([*checkpoints.values()][-1][0]))
    if "fig9" in elements:
        save_figure(plot_drafts(model, processor, data[:3]["image"]), report_dir / "fig9")
    if "fig10" in elements:
        save_figure(plot_tokens(model, processor, data[0]["image"]), report_dir / "fig10")
