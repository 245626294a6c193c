# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Reports of the paper's tables and figures on classification: JSON, Markdown, PNG and SVG of evaluated trainings."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .claims import CLASSIFIER_ELEMENTS, PAPER_SOFTMAX, SETTINGS, VARIANTS
from .classifiers import NUM_SAMPLES
from .figures import Panel, plot_panels, save_figure
from .statistics import paired_bootstrap
from .tables import markdown_table, mean_and_spread


STEPS = 20  # the paper's best number of steps, by which settings are chosen and models compared
# Evaluations by setting, variant and seed, as `scripts/reproduce.py` writes them, with the `scores` of result.json
Evaluations = dict[str, dict[str, list[dict[str, Any]]]]


def read_evaluations(folders: Iterable[Path]) -> Evaluations:
    """Reads `<setting>-<variant>-seed<n>` folders, in their order. A folder without an evaluation is left out."""
    evaluations: Evaluations = {}
    for folder in folders:
        if (folder / "evaluation.json").exists():
            setting, variant, _ = folder.name.split("-")
            content = json.loads((folder / "evaluation.json").read_text())
            content["scores"] = json.loads((folder / "result.json").read_text())["scores"]
            if (folder / "corrupted.json").exists():
                content["corrupted"] = json.loads((folder / "corrupted.json").read_text())
            evaluations.setdefault(setting, {}).setdefault(variant, []).append(content)
    return evaluations


def score_at(run: dict[str, Any], split: str, steps: int, scale: float) -> float:
    """The top-1 of a run in its table. MDD has no steps. Raises a `ValueError` if the run was not scored like that."""
    rows = [row for row in run["scores"] if row["split"] == split]
    found = [(row.get("num_inference_steps"), row.get("guidance_scale")) for row in rows]
    if found == [(None, None)]:
        return rows[0]["top1"]
    if (steps, scale) not in found:
        raise ValueError(
            f"The scores must have {steps} steps and the guidance scale {scale:g} on {split!r}, got "
            f"{', '.join(f'{count} and {value}' for count, value in found) or 'none'}."
        )
    return rows[found.index((steps, scale))]["top1"]


def best_guidance(runs: list[dict[str, Any]]) -> float:
    """The guidance scale with the best mean over seeds on validation, at the paper's number of steps."""
    scales = sorted({row["guidance_scale"] for row in runs[0]["scores"] if "guidance_scale" in row}) or [1.0]
    return max(scales, key=lambda scale: np.mean([score_at(run, "validation", STEPS, scale) for run in runs]))


def correct(runs: list[dict[str, Any]], which: str) -> np.ndarray:
    """Whether each test image was classified correctly, of shape `(num_seeds, num_images)`."""
    return np.array([list(map(int, run[which]["correct"])) for run in runs])


def difference(runs: list[dict[str, Any]], others: list[dict[str, Any]], which: str) -> str:
    """The mean difference in points with its 95 % interval, over the seeds that both have."""
    count = min(len(runs), len(others))
    values = paired_bootstrap(correct(runs[:count], which), correct(others[:count], which))
    mean, low, high = (100 * value for value in values)
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def table1(evaluations: Evaluations) -> tuple[list[str], list[list[str]]]:
    """Each variant at the last epoch and at its best epoch on validation, and how far it is ahead of MDD."""
    header = ["setting", "method", "seeds", "last epoch", "best epoch", "which (epoch)", "less MDD, last (95 %)"]
    header += ["less MDD, best (95 %)", "paper (ImageNet)"]
    rows = []
    for setting, variants in evaluations.items():
        for variant, runs in variants.items():
            last, best = ([run[which]["top1"] for run in runs] for which in ("last", "best"))
            epochs = [run["epochs"]["epoch"][int(np.argmax(run["epochs"]["eval_top1"]))] for run in runs]
            ahead = ["", ""]
            if variant != "mdd" and "mdd" in variants:
                ahead = [difference(runs, variants["mdd"], which) for which in ("last", "best")]
            paper = VARIANTS[variant].paper_top1
            row = [setting, VARIANTS[variant].label, str(len(runs)), mean_and_spread(last), mean_and_spread(best)]
            rows.append([*row, f"{np.mean(epochs):.0f}", *ahead, "" if paper is None else f"{paper:.1f}"])
    return header, rows


def table2(evaluations: Evaluations) -> tuple[list[str], list[list[str]]]:
    """The ablations, each on the test split, which is the last one that a run was scored on, at 20 steps, with the
    guidance scale that is best on validation."""
    rows = []
    for setting, variants in evaluations.items():
        for variant, runs in variants.items():
            scale = best_guidance(runs)
            for label, guidance in {
                "guidance 1 (none)": 1.0,
                f"guidance {scale:g} (best on validation)": scale,
            }.items():
                if guidance != 1 or label.startswith("guidance 1 (none)"):
                    values = [score_at(run, run["scores"][-1]["split"], STEPS, guidance) for run in runs]
                    paper = VARIANTS[variant].paper_top1
                    rows.append(
                        [
                            setting,
                            VARIANTS[variant].label,
                            label,
                            str(len(runs)),
                            mean_and_spread(values),
                            f"{paper:.2f}",
                        ]
                    )
            softmax = [run["best"]["softmax_top1"] for run in runs if "softmax_top1" in run["best"]]
            if variant == "tdd" and softmax:
                label = "sampling with softmax"
                rows.append([setting, "TDD", label, str(len(runs)), mean_and_spread(softmax), f"{PAPER_SOFTMAX:.2f}"])
    return ["setting", "method", "inference", "seeds", "test top-1", "paper (ImageNet)"], rows


def calibration_table(evaluations: Evaluations) -> tuple[list[str], list[list[str]]]:
    """How far each variant's probabilities can be trusted, from one draw of the noise and from several."""
    header = [
        "setting",
        "method",
        "draws",
        "top-1",
        "NLL, nats",
        "ECE",
        "top-1 of the surest 50 %",
        "of the surest 80 %",
    ]
    rows = []
    for setting, variants in evaluations.items():
        for variant, runs in variants.items():
            kinds = {"1": [run["best"] for run in runs]}
            if "samples" in runs[0]["best"]:
                kinds[str(NUM_SAMPLES)] = [run["best"]["samples"] for run in runs]
            for draws, kind in kinds.items():
                nll = [scores["nll"] for scores in kind]
                spread = f"{np.mean(nll):.3f} ± {np.std(nll, ddof=1):.3f}" if len(nll) > 1 else f"{nll[0]:.3f}"
                cells = [mean_and_spread([scores[name] for scores in kind]) for name in ("top1", "ece")]
                surest = [mean_and_spread([scores["selective"][share] for scores in kind]) for share in ("0.5", "0.8")]
                draws = draws if variant != "mdd" else "no noise"
                rows.append([setting, VARIANTS[variant].label, draws, cells[0], spread, cells[1], *surest])
    return header, rows


def by_severity(setting: str, variants: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    """A panel for the mean over corruptions, and one for each of them."""
    runs = [run for runs in variants.values() for run in runs if "corrupted" in run]
    kinds = list(runs[0]["corrupted"]) if runs else []
    panels = []
    for kind in ["mean of all", *kinds] if runs else []:
        panel = Panel(f"{setting}: {kind}", "severity", "top-1 on 1,000 test images, %")
        for variant, runs in variants.items():
            found = [run["corrupted"] for run in runs if "corrupted" in run]
            values = [np.mean(list(c.values()), 0) if kind == "mean of all" else np.array(c[kind]) for c in found]
            if values:
                panel.lines[VARIANTS[variant].label] = (range(len(values[0])), 100 * np.array(values))
        panels.append(panel)
    return panels


def by_epoch(setting: str, variants: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    panel = Panel(setting, "epoch", "top-1 on validation, %")
    for variant, runs in variants.items():
        values = 100 * np.array([run["epochs"]["eval_top1"] for run in runs])
        panel.lines[VARIANTS[variant].label] = (runs[0]["epochs"]["epoch"], values)
    return [panel]


def by_number_of_steps(setting: str, variants: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    rows = [row for row in next(iter(variants.values()))[0]["scores"] if row["split"] == "validation"]
    steps = sorted({row["num_inference_steps"] for row in rows if "num_inference_steps" in row})
    panel = Panel(setting, "denoising steps", "top-1 on validation, %", is_log=True, ticks=steps)
    for variant, runs in variants.items():
        values = [[100 * score_at(run, "validation", count, 1.0) for count in steps] for run in runs]
        panel.lines[VARIANTS[variant].label] = (steps, np.array(values))
    return [panel]


def by_step(
    setting: str, variants: dict[str, list[dict[str, Any]]], names: Mapping[str, tuple[str, float]]
) -> list[Panel]:
    """A panel for each of the measured values of the steps of one loop, with their labels and scales."""
    panels = [Panel(setting, f"step of {STEPS}", label) for label, _ in names.values()]
    for panel, (name, (_, scale)) in zip(panels, names.items()):
        for variant, runs in variants.items():
            values = scale * np.array([run["best"]["steps"][name] for run in runs])
            panel.lines[VARIANTS[variant].label] = (range(1, values.shape[1] + 1), values)
    return panels


def panels_of(element: str, evaluations: Evaluations) -> list[Panel]:
    """The panels of a figure, for each setting."""
    panels = []
    for setting, variants in evaluations.items():
        if element == "fig3":
            panels += by_epoch(setting, variants)
        elif element == "fig5":
            panels += by_number_of_steps(setting, variants)
        elif element == "fig4":
            panels += by_step(setting, variants, {"top1": ("top-1 on test, %", 100)})
        elif element == "robustness":
            panels += by_severity(setting, variants)
        else:
            names = {"entropy": ("entropy of the output, nats", 1), "confidence": ("largest probability, %", 100)}
            panels += by_step(setting, variants, names)
    return [panel for panel in panels if len(panel.lines) > 1] or panels  # a single line compares nothing


def figure_table(panels: list[Panel]) -> tuple[list[str], list[list[str]]]:
    """What a figure shows, at its first, middle and last x and at the line's maximum."""
    rows = []
    for panel in panels:
        for label, (x, values) in panel.lines.items():
            at = [0, len(x) // 2, len(x) - 1]
            cells = [f"{x[i]:g}: {mean_and_spread((values[:, i] / 100).tolist())}" for i in at]
            top = int(values.mean(0).argmax())
            rows.append([panel.title, label, panel.ylabel, *cells, f"{x[top]:g}: {values[:, top].mean():.2f}"])
    return ["setting", "method", "value", "first", "middle", "last", "maximum"], rows


def write_classifier_report(element: str, data: str, folders: Iterable[Path], report_dir: Path) -> str:
    r"""
    Writes `<element>.json` and `<element>.md` and, for a figure, `<element>.png` and `<element>.svg`.

    Args:
        element (`str`): One of `claims.CLASSIFIER_ELEMENTS`.
        data (`str`): One of `claims.SETTINGS`.
        folders (`Iterable[Path]`): Folders of evaluated trainings, `<setting>-<variant>-seed<n>`.
        report_dir (`Path`): Where the files go.

    Returns:
        `str`: the report in Markdown.

    Raises:
        `ValueError`: if no training has been evaluated.
    """
    names = CLASSIFIER_ELEMENTS[element]
    evaluations = {
        setting: {name: variants[name] for name in names if name in variants}
        for setting, variants in read_evaluations(folders).items()
    }
    budget = " --budget gpu" if any(SETTINGS[data][setting].budget == "gpu" for setting in evaluations) else ""
    evaluations = {SETTINGS[data][setting].title: variants for setting, variants in evaluations.items() if variants}
    if not evaluations:
        raise ValueError(f"There is no evaluated training for {element} on {data}.")
    tables = {"table1": table1, "table2": table2, "calibration": calibration_table}
    panels: list[Panel] = []
    if element in tables:
        header, rows = tables[element](evaluations)
    else:
        panels = panels_of(element, evaluations)
        header, rows = figure_table(panels)
        labels = [variant.label for variant in VARIANTS.values()]
        save_figure(plot_panels(panels, labels), report_dir / element)
    command = f"python scripts/reproduce.py {element} --data {data}{budget}"
    report = f"# {element} on {data}\n\nTop-1 in %. `{command}`\n\n{markdown_table(header, rows)}\n"
    if panels:
        report += f"\n![{element}]({element}.png)\n"
    report_dir.mkdir(parents=True, exist_ok=True)
    (report_dir / f"{element}.md").write_text(report)
    lines = [{"title": p.title, "value": p.ylabel, "lines": p.lines} for p in panels]
    content = {"command": command, "header": header, "rows": rows, "panels": lines}
    (report_dir / f"{element}.json").write_text(json.dumps(content, indent=1, default=_as_list) + "\n")
    return report


def _as_list(value: Any) -> list[Any]:
    return np.round(value, 5).tolist() if isinstance(value, np.ndarray) else list(value)
