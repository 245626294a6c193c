# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Panels of lines with their spread over seeds, in colours that readers with any colour vision can distinguish."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .step_curves import COLORS, MARKERS


if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_MARKED = 12  # points of a line; with more of them markers would hide it


@dataclass
class Panel:
    """Lines over a common axis. `lines` has the x values and an array of shape `(num_seeds, num_points)` by label."""

    title: str
    xlabel: str
    ylabel: str
    lines: dict[str, tuple[Sequence[float], np.ndarray]] = field(default_factory=dict)
    is_log: bool = False
    ticks: Sequence[float] | None = None


def plot_panels(panels: Sequence[Panel], labels: Sequence[str], columns: int = 2) -> "Figure":
    """Draws panels side by side: the mean of each line, and its standard deviation over seeds as a band. A label has
    the colour of its place in `labels`, which may have others too."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.45), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels):
        for label, (x, values) in panel.lines.items():
            index = labels.index(label)
            mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
            color = COLORS[index % len(COLORS)]
            marker = MARKERS[index % len(MARKERS)] if len(x) <= MAX_MARKED else None
            axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.18, linewidth=0)
            axes.plot(x, mean, label=label, color=color, marker=marker, markersize=4.5, linewidth=1.6)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.xlabel, fontsize=10)
        axes.set_ylabel(panel.ylabel, fontsize=10)
        if panel.is_log:
            axes.set_xscale("log")
        if panel.ticks is not None:
            axes.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
            axes.minorticks_off()
        elif not panel.is_log:  # epochs, steps and severities are whole numbers
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=1 + columns,
        frameon=False,
        fontsize=9 - (columns == 1),
    )
    return figure


def save_figure(figure: "Figure", stem: Path) -> None:
    """Saves a figure as PNG and SVG."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
