# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Tables and the plot of what `constraints.py` measures: means and standard deviations over seeds."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .constraints import COVERAGES, NUM_CANDIDATES
from .figures import Panel, plot_panels, save_figure
from .tables import markdown_table, mean_and_spread


if TYPE_CHECKING:
    from datasets import Dataset

Results = dict[str, list[dict[str, Any]]]
TABLES = {
    "Gaps filled exactly, %": {
        "one filling": lambda split: split["infilling"]["exact_match"],
        f"best of {NUM_CANDIDATES}": lambda split: split["infilling"][f"exact_match_of_{NUM_CANDIDATES}"],
        "1 token": lambda split: split["infilling"]["exact_match_by_length"]["1"],
        "5 tokens": lambda split: split["infilling"]["exact_match_by_length"]["5"],
    },
    "Choices": {
        "right, %": lambda split: split["choices"]["top1"],
        "ECE with the temperature, %": lambda split: split["choices"]["ece"],
        "ECE without, %": lambda split: split["choices"]["ece_without_temperature"],
    },
    "Captions": {
        "exact match, %": lambda split: split["captions"]["exact_match"],
        f"best of {NUM_CANDIDATES}, %": lambda split: split["captions"][f"exact_match_of_{NUM_CANDIDATES}"],
        "of the surest half, %": lambda split: split["captions"]["coverage"]["0.5"],
        "of the surest tenth, %": lambda split: split["captions"]["coverage"]["0.1"],
        "ECE of the confidence, %": lambda split: split["captions"]["confidence_ece"],
    },
}


def group_by_method(results: dict[str, dict[str, Any]]) -> Results:
    """The results of all seeds of each method, by the names of their folders: `tdd-seed0` is one of `tdd`."""
    groups: Results = defaultdict(list)
    for name, result in results.items():
        groups[re.sub(r"-seed\d+$", "", name)].append(result)
    return dict(groups)


def read_measured(file: Path, measured: dict[str, Any], splits: "dict[str, Dataset]") -> dict[str, Any]:
    r"""
    Reads what [`measure_captioner`] measured before.

    Args:
        file (`Path`): A JSON file of it, with what it was measured on as `"measured"`.
        measured (`dict`): What it has to have been measured on: folder, data, splits and number of images.
        splits (`dict[str, Dataset]`): The images of each split. Their number is all that can be compared in a file of
            an earlier version, which has no `"measured"`.

    Returns:
        `dict`: the result, without `"measured"`.

    Raises:
        `ValueError`: if it was measured on something else.
    """
    result = json.loads(file.read_text())
    wanted, found = measured, result.pop("measured", None)
    if found is None:
        wanted = {name: len(rows) for name, rows in splits.items()}
        found = {name: value["images"] for name, value in result.items() if isinstance(value, dict)}
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        differences = "; ".join(f"{name} was {found.get(name)}, is {wanted.get(name)}" for name in names)
        raise ValueError(f"{file} was measured on something else: {differences}. Use another --output-dir.")
    return result


def write_reports(results: dict[str, dict[str, Any]], output_dir: Path) -> str:
    r"""
    Writes `constraints.md` and the plot `coverage`, exact match by the share of the surest captions.

    Args:
        results (`dict[str, dict]`): By the name of a folder, what [`measure_captioner`] measured.
        output_dir (`Path`): Where to write.

    Returns:
        `str`: the tables.
    """
    groups = group_by_method(results)
    splits = [name for name, value in next(iter(results.values())).items() if isinstance(value, dict)]
    parts = []
    for title, columns in TABLES.items():
        rows = [
            [
                split,
                method,
                str(len(seeds)),
                *(mean_and_spread([read(seed[split]) for seed in seeds]) for read in columns.values()),
            ]
            for split in splits
            for method, seeds in groups.items()
        ]
        parts.append(f"## {title}\n\n{markdown_table(['split', 'method', 'seeds', *columns], rows)}")
    names = {"temperature": "choices, each seed", "confidence_temperature": "confidence, each seed"}
    temperatures = [
        [method, *(", ".join(f"{seed[name]:.2f}" for seed in seeds) for name in names)]
        for method, seeds in groups.items()
    ]
    parts.append(f"## Temperatures\n\n{markdown_table(['method', *names.values()], temperatures)}")
    text = "# Captioning under constraints\n\n" + "\n\n".join(parts) + "\n\n![coverage](coverage.png)\n"
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "constraints.md").write_text(text)
    save_figure(
        plot_panels([_coverage_panel(groups, split) for split in splits], list(groups), len(splits)),
        output_dir / "coverage",
    )
    return text


def _coverage_panel(groups: Results, split: str) -> Panel:
    panel = Panel(title=split, xlabel="surest captions, %", ylabel="exact match, %")
    for method, seeds in groups.items():
        values = [[100 * seed[split]["captions"]["coverage"][str(share)] for share in COVERAGES] for seed in seeds]
        panel.lines[method] = ([100 * share for share in COVERAGES], np.array(values))
    return panel
