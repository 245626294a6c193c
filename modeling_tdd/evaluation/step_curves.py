# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Scores by the number of denoising steps: the results of several runs as a table and as a plot."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .tables import markdown_table, mean_and_deviation, mean_and_spread


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WEIGHTINGS = ("input_weighting", "loss_weighting")
SETTINGS = ("split", "num_inference_steps", "guidance_scale")  # all else in an entry of `scores` is a metric
PLOTTED = {"top1": "top-1, %", "exact_match": "exact match, %", "token_f1": "token F1, %"}
# Okabe and Ito's colours, which readers with any colour vision can distinguish. Black is left out, and so is yellow,
# which is too pale for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#666666"
LEVEL_STYLES = ("--", ":", "-.")
MAX_SHORT_LABEL = 24  # characters; two columns of such labels fit above a panel


class Line(NamedTuple):
    """What the runs of one line of the plot have in common: everything but the seed.

    `input_weighting` and `loss_weighting` are `None` where all runs that are shown together agree on them.
    """

    method: str
    noise_schedule: str | None
    input_weighting: str | None
    loss_weighting: str | None
    guidance_scale: float | None

    @property
    def label(self) -> str:
        parts = [self.method, self.noise_schedule]
        if self.input_weighting is not None:
            parts.append(f"input {self.input_weighting}")
        if self.loss_weighting is not None:
            parts.append(f"{'without' if self.loss_weighting == 'none' else 'with'} coefficient")
        if self.guidance_scale not in (None, 1):
            parts.append(f"guidance {self.guidance_scale:g}")
        return ", ".join(part for part in parts if part)


# The scores of one line: for each number of steps, those of all seeds. The key is `None` for methods without steps.
Scores = dict[int | None, list[float]]


def read_results(folders: Iterable[Path]) -> list[dict[str, Any]]:
    r"""
    Reads the results of several runs of one task.

    Args:
        folders (`Iterable[Path]`): Folders of runs. Each has a `result.json` and, unless its method has no model, a
            checkpoint.

    Returns:
        `list[dict]`: the result of each run. The fields `noise_schedule`, `input_weighting` and `loss_weighting` are
            those of the run's configuration. The schedule is `None` for methods that do not denoise; the weightings
            are TDD's alone, and `None` where all of its runs agree on them.

    Raises:
        `ValueError`: for a folder without a result, for a result without scores, or for two runs of the same method,
            schedule, weightings and seed.
    """
    results: list[dict[str, Any]] = []
    origin: dict[tuple, Path] = {}
    for folder in folders:
        if not (folder / "result.json").exists():
            raise ValueError(f"{folder} has no result.json: give folders of finished runs.")
        result = json.loads((folder / "result.json").read_text())
        if not result.get("scores"):
            raise ValueError(f"{folder / 'result.json'} has no `scores`; it has {', '.join(result)}.")
        # The recipe leaves defaults out, and they may have changed since.
        denoises = any("num_inference_steps" in entry for entry in result["scores"])
        config = json.loads((folder / "config.json").read_text()) if denoises else {}
        config = {"input_weighting": "visibility", **config}  # how it was before the field existed
        result["noise_schedule"] = config.get("noise_schedule")
        for name in WEIGHTINGS:
            result[name] = config.get(name) if result["method"] == "tdd" else None
        key = tuple(result[name] for name in ("method", "noise_schedule", *WEIGHTINGS, "seed"))
        if key in origin:
            raise ValueError(f"{origin[key]} and {folder} have the same method, schedule, weightings and seed: {key}.")
        origin[key] = folder
        results.append(result)
    for name in WEIGHTINGS:
        if len({result[name] for result in results if result["method"] == "tdd"}) == 1:
            results = [{**result, name: None} for result in results]
    return results


def splits_of(results: list[dict[str, Any]]) -> list[str]:
    """The splits that any result has scores for, in their order of appearance."""
    return list(dict.fromkeys(entry["split"] for result in results for entry in result["scores"]))


def metrics_of(results: list[dict[str, Any]]) -> list[str]:
    r"""
    The metrics that all entries have, in the order of the first one's.

    Raises:
        `ValueError`: if there is none, such as for runs of different tasks.
    """
    entries = [entry for result in results for entry in result["scores"]]
    metrics = [name for name in entries[0] if name not in SETTINGS and all(name in entry for entry in entries)]
    if not metrics:
        raise ValueError("The results have no metric in common: give runs of one task.")
    return metrics


def collect_scores(results: list[dict[str, Any]], split: str, metric: str) -> dict[Line, Scores]:
    """The scores of a metric on a split, by line and number of steps."""
    lines: dict[Line, Scores] = {}
    for result in results:
        for entry in (entry for entry in result["scores"] if entry["split"] == split):
            settings = [result[name] for name in ("method", "noise_schedule", *WEIGHTINGS)]
            line = Line._make([*settings, entry.get("guidance_scale")])
            lines.setdefault(line, {}).setdefault(entry.get("num_inference_steps"), []).append(entry[metric])
    return lines


def score_table(results: list[dict[str, Any]], split: str) -> str:
    """Scores in percent: one row per line and metric, and one column per number of steps. Another column shows what
    iteration adds: the score with the most steps less that with the fewest. A model that ignores its noisy tokens
    gains nothing there. Methods without steps, if any, have a last column of their own. The weightings have columns
    where runs differ in them."""
    metrics = metrics_of(results)
    lines = {metric: collect_scores(results, split, metric) for metric in metrics}
    counts = {count for scores in lines[metrics[0]].values() for count in scores}
    steps = sorted(counts - {None})
    weightings = [name for name in WEIGHTINGS if any(getattr(line, name) is not None for line in lines[metrics[0]])]
    header = ["method", "schedule", *(name.replace("_", " ") for name in weightings), "guidance", "metric"]
    header += [f"{count} step{'s' * (count > 1)}" for count in steps]
    header += [f"{steps[-1]} less {steps[0]}"] if len(steps) > 1 else []
    header += ["without steps"] if None in counts else []
    rows = []
    for line in lines[metrics[0]]:
        guidance = "" if line.guidance_scale is None else f"{line.guidance_scale:g}"
        for metric in metrics:
            scores = lines[metric][line]
            row = [line.method, line.noise_schedule or "", *(getattr(line, name) or "" for name in weightings)]
            row += [guidance, metric]
            columns = [scores.get(count, []) for count in steps]
            if len(steps) > 1:
                columns.append([last - first for last, first in zip(columns[-1], columns[0])])
            if None in counts:
                columns.append(scores.get(None, []))
            rows.append([*row, *map(mean_and_spread, columns)])
    return markdown_table(header, rows)


def score_tables(results: list[dict[str, Any]]) -> str:
    """The [`score_table`] of each split under a heading."""
    return "\n\n".join(f"### {split}\n\n{score_table(results, split)}" for split in splits_of(results))


def plot_scores(results: list[dict[str, Any]]) -> "Figure":
    """Top-1, or exact match and token F1, against the number of steps: one panel per split and metric, and in it one
    line per [`Line`], with its mean and the standard deviation over seeds. Methods without steps are level lines in
    grey.

    Raises:
        `ValueError`: if the results have none of these metrics in common.
    """
    from matplotlib.figure import Figure

    splits = splits_of(results)
    metrics = [metric for metric in metrics_of(results) if metric in PLOTTED]
    if not metrics:
        raise ValueError(f"The plot needs results with one of {', '.join(PLOTTED)} in common.")
    styles = _line_styles(results, splits)
    is_long = max(len(line.label) for line in styles) > MAX_SHORT_LABEL
    columns = min(len(splits) if is_long else 2 * len(splits), len(styles))
    legend_height = 0.2 * math.ceil(len(styles) / columns)
    figure = Figure(figsize=(3.5 * len(splits) + 0.4, 2.6 * len(metrics) + legend_height), layout="constrained")
    grid = figure.subplots(len(metrics), len(splits), squeeze=False)
    for panels, metric in zip(grid, metrics):
        panels[0].set_ylabel(PLOTTED[metric])
        for axes, split in zip(panels, splits):
            _plot_panel(axes, collect_scores(results, split, metric), styles)
    for axes, split in zip(grid[0], splits):
        axes.set_title(split, fontsize=11)
    for axes in grid[-1]:
        axes.set_xlabel("denoising steps")
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        fontsize=9 if is_long else None,
    )
    return figure


def _line_styles(results: list[dict[str, Any]], splits: list[str]) -> dict[Line, dict[str, Any]]:
    """The same look for a line in all panels, whether or not each panel has all lines."""
    metric = metrics_of(results)[0]
    lines = {
        line: None in scores for split in splits for line, scores in collect_scores(results, split, metric).items()
    }
    curves = [line for line, level in lines.items() if not level]
    levels = [line for line, level in lines.items() if level]
    rounds = len(COLORS)
    styles: dict[Line, dict[str, Any]] = {}
    for index, line in enumerate(curves):
        marker = MARKERS[(index + index // rounds) % len(MARKERS)]  # changes where a colour comes a second time
        styles[line] = {"color": COLORS[index % rounds], "marker": marker, "markersize": 5, "linewidth": 1.6}
    for index, line in enumerate(levels):
        styles[line] = {"color": GREY, "linestyle": LEVEL_STYLES[index % len(LEVEL_STYLES)], "linewidth": 1.3}
    return styles


def _plot_panel(axes: "Axes", lines: dict[Line, Scores], styles: dict[Line, dict[str, Any]]) -> None:
    for line, scores in lines.items():
        style = styles[line]
        if None in scores:
            mean, spread = mean_and_deviation(scores[None])
            axes.axhspan(mean - spread, mean + spread, color=style["color"], alpha=0.12, linewidth=0)
            axes.axhline(mean, label=line.label, **style)
            continue
        counts = sorted(scores)
        means, spreads = zip(*(mean_and_deviation(scores[count]) for count in counts))
        low, high = [m - s for m, s in zip(means, spreads)], [m + s for m, s in zip(means, spreads)]
        axes.fill_between(counts, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.plot(counts, means, label=line.label, **style)
    steps = sorted({count for scores in lines.values() for count in scores if count is not None})
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.minorticks_off()
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
