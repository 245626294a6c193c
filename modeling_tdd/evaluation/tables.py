# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Tables of scores in Markdown."""

import statistics
from collections.abc import Iterable


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds in percent. The deviation of a single value is 0."""
    percents = [100 * value for value in values]
    return statistics.fmean(percents), statistics.stdev(percents) if len(percents) > 1 else 0.0


def mean_and_spread(values: list[float]) -> str:
    """`"97.53 ± 0.21"`: [`mean_and_deviation`] as text. A single value has no deviation, and no value is empty."""
    if not values:
        return ""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {deviation:.2f}"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
