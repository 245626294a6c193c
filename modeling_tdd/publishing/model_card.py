# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""A run folder's model card: its data, recipe, scores over seeds with their plot, limits and citation."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_tdd.training.results import markdown_table, mean_and_spread


if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("card_template.md")
CARD_FILE, PLOT_FILE = "README.md", "steps.png"
TASKS = {"TDDForImageClassification": "image-classification", "TDDForCaptioning": "image-text-to-text"}
METHODS = {"gaussian": "Tweedie discrete diffusion (TDD)", "mask": "masked discrete diffusion (MDD), TDD's rival"}
# A metric's key in result.json, its identifier on the Hub and its name in tables.
METRICS = {
    "top1": ("accuracy", "top-1 accuracy"),
    "exact_match": ("exact_match", "exact match"),
    "token_f1": ("f1", "token F1"),
    "fluent": ("fluent", "fluent captions"),
    "stutter": ("stutter", "captions with a stutter"),
}
PLOTTED = ("top1", "exact_match", "token_f1")
CITATION = """```bibtex
@article{li2025tdd,
  title   = {In-Situ Tweedie Discrete Diffusion Models},
  author  = {Li, Xiao and Zhang, Jiaqi and Zhang, Shuxiang and Chen, Tianshui and Lin, Liang and Wang, Guangrun},
  journal = {arXiv preprint arXiv:2510.01047},
  year    = {2025}
}
```"""

Result = dict[str, Any]


def read_results(folder: Path, others: list[Path] | None = None) -> list[Result]:
    r"""
    The results of a run and of those to show beside it, the run's own first.

    Args:
        folder (`Path`): A run folder, such as `outputs/emoji/tdd-seed0`.
        others (`list[Path]`, *optional*): Folders of its other seeds and of its rival. By default those beside it.

    Raises:
        `ValueError`: if a folder has no result.json, or the others' recipe is not the run's.
    """
    own = _read_result(folder)
    results = {(own["method"], own["seed"]): own}
    if others is None:
        others = [file.parent for file in sorted(folder.resolve().parent.glob("*-seed*/result.json"))]
    for other in others:
        result = _read_result(other)
        if result["recipe"] != own["recipe"]:
            raise ValueError(f"{other} was trained by another recipe than {folder}: their scores do not compare.")
        results.setdefault((result["method"], result["seed"]), result)
    return list(results.values())


def _read_result(folder: Path) -> Result:
    file = folder / "result.json"
    if not file.exists():
        raise ValueError(f"{folder} is no finished run: it has no result.json.")
    result = json.loads(file.read_text())
    if "accuracy" in result:  # a classifier's, of one split
        split = result["recipe"]["data"]["eval_split"]
        result["scores"] = [{"split": split, **entry} for entry in result.pop("accuracy")]
    return result


# ---- Scores


def metrics_of(results: list[Result]) -> list[str]:
    return [name for name in METRICS if name in results[0]["scores"][0]]


def splits_of(results: list[Result]) -> list[str]:
    return list(dict.fromkeys(entry["split"] for entry in results[0]["scores"]))


def collect_scores(results: list[Result], split: str, metric: str) -> dict[tuple[str, float], dict[int, list[float]]]:
    """By method and guidance scale, then by number of steps: the scores of the seeds."""
    rows: dict[tuple[str, float], dict[int, list[float]]] = {}
    for result in results:
        for entry in (entry for entry in result["scores"] if entry["split"] == split):
            row = rows.setdefault((result["method"], entry["guidance_scale"]), {})
            row.setdefault(entry["num_inference_steps"], []).append(entry[metric])
    return rows


def score_table(results: list[Result], split: str) -> str:
    """A split's scores in percent, mean ± standard deviation over the seeds, a column a number of steps."""
    scores = {metric: collect_scores(results, split, metric) for metric in metrics_of(results)}
    steps = sorted({count for rows in scores.values() for row in rows.values() for count in row})
    header = ["method", "guidance", "metric", *(f"{count} step{'s' if count > 1 else ''}" for count in steps)]
    rows = [
        [method, f"{scale:g}", METRICS[metric][1], *(mean_and_spread(row[n]) if n in row else "" for n in steps)]
        for metric, metric_rows in scores.items()
        for (method, scale), row in metric_rows.items()
    ]
    return markdown_table(header, rows)


def plot_steps(results: list[Result]) -> "Figure":
    """Scores by the number of steps, a panel a split and metric; bars are standard deviations over the seeds."""
    from matplotlib.figure import Figure

    splits = splits_of(results)
    metrics = [metric for metric in metrics_of(results) if metric in PLOTTED]
    figure = Figure(figsize=(4 * len(splits), 3 * len(metrics)), layout="constrained")
    grid = figure.subplots(len(metrics), len(splits), squeeze=False)
    for metric, panels in zip(metrics, grid):
        for split, axes in zip(splits, panels):
            for (method, scale), row in collect_scores(results, split, metric).items():
                steps = sorted(row)
                values = [[100 * value for value in row[count]] for count in steps]
                means = [sum(seeds) / len(seeds) for seeds in values]
                label = method if scale == 1 else f"{method}, guidance {scale:g}"
                deviations = [_deviation(seeds) for seeds in values]
                axes.errorbar(steps, means, deviations, marker="o", ms=4, capsize=3, label=label)
            axes.set_xscale("log")
            axes.set_xticks(steps_of(results), [str(count) for count in steps_of(results)], minor=False)
            axes.minorticks_off()
            axes.set_title(f"{split}: {METRICS[metric][1]}, %", fontsize=10)
            axes.grid(alpha=0.3)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    figure.supxlabel("denoising steps", fontsize=10)
    return figure


def steps_of(results: list[Result]) -> list[int]:
    return sorted({entry["num_inference_steps"] for result in results for entry in result["scores"]})


def _deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)) ** 0.5


# ---- The card


def make_card(
    results: list[Result], config: dict[str, Any], num_parameters: int, repo_id: str, num_steps: int
) -> ModelCard:
    r"""
    Args:
        results (`list[Result]`): As of [`read_results`].
        config (`dict`): The model's config.json.
        num_parameters (`int`): Of the model.
        repo_id (`str`): The model's name on the Hub, or its folder.
        num_steps (`int`): Denoising steps that the model takes by default.
    """
    own, recipe = results[0], results[0]["recipe"]
    task = TASKS[config["architectures"][0]]
    name = f"{recipe['name']}-{own['method']}"
    seeds = sorted({result["seed"] for result in results if result["method"] == own["method"]})
    data_name, data_text, data_readme = describe_data(recipe["data"])
    spread = f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "one seed"
    return ModelCard.from_template(
        ModelCardData(
            model_name=name,
            license="apache-2.0",
            library_name="transformers",
            pipeline_tag=task,
            language=None if task == "image-classification" else "en",
            tags=["tdd", "discrete-diffusion", "arxiv:2510.01047"],
            datasets=[data_name],
            metrics=[METRICS[metric][0] for metric in metrics_of(results)],
            eval_results=eval_results(own, task, data_name, num_steps),
        ),
        template_path=str(TEMPLATE),
        model_name=name,
        repo_id=repo_id,
        pipeline_tag=task,
        summary=_summary(config, task, num_parameters),
        call='pipe("image.png")' if task == "image-classification" else 'pipe("image.png", text="")',
        data=data_text,
        data_readme=data_readme,
        training=_training(recipe, own["seed"]),
        recipe=yaml.safe_dump(without_machine_paths(recipe), sort_keys=False, allow_unicode=True).strip(),
        seeds=f"Scores in %, {spread}.",
        tables="\n\n".join(f"### {split}\n\n{score_table(results, split)}" for split in splits_of(results)),
        plot=PLOT_FILE,
        limits=_limits(recipe, config, task, data_name),
        citation=CITATION,
    )


def eval_results(result: Result, task: str, data_name: str, num_steps: int) -> list[EvalResult]:
    """The published weights' own scores without guidance, at the number of steps nearest to the default's."""
    unguided = [entry for entry in result["scores"] if entry["guidance_scale"] == 1]
    chosen = []
    for split in dict.fromkeys(entry["split"] for entry in unguided):
        entries = [entry for entry in unguided if entry["split"] == split]
        entry = min(entries, key=lambda entry: abs(entry["num_inference_steps"] - num_steps))
        for metric, (identifier, label) in METRICS.items():
            if metric in entry:
                chosen.append(
                    EvalResult(
                        task_type=task,
                        dataset_type=data_name,
                        dataset_name=data_name,
                        dataset_split=split,
                        metric_type=identifier,
                        metric_name=f"{label}, {entry['num_inference_steps']} denoising steps",
                        metric_value=round(100 * entry[metric], 2),
                    )
                )
    return chosen


def describe_data(data: dict[str, Any]) -> tuple[str, str, str | None]:
    """The data set's name, a sentence on it, and its README.md where one lies beside its files."""
    splits = data.get("eval_splits") or [data["eval_split"]]
    usage = f"Trained on `{data['train_split']}`, scored on {', '.join(f'`{split}`' for split in splits)}."
    if data["path"] == "digits":
        return "digits", f"scikit-learn's 8x8 handwritten digits (`load_digits`). {usage}", None
    local = data["data_dir"] or next(iter((data["data_files"] or {}).values()), None)
    if local is None:
        return data["path"], f"[{data['path']}](https://huggingface.co/datasets/{data['path']}). {usage}", None
    folder = Path(local) if data["data_dir"] else Path(local).parent
    readme = folder / "README.md"
    text = None
    if readme.exists():  # less its title; its headings stand below the card's
        lines = [line for line in readme.read_text().splitlines() if not line.startswith("# ")]
        text = "\n".join(f"##{line}" if line.startswith("#") else line for line in lines).strip()
    return folder.name, f"`{folder.name}`, read by `datasets` as {data['path']}. {usage}", text


def without_machine_paths(value: Any) -> Any:
    """A recipe with the last two parts of each absolute path: the layout of the author's disc is no one's business."""
    if isinstance(value, dict):
        return {key: without_machine_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_machine_paths(item) for item in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return "/".join(Path(value).parts[-2:])
    return value


def _summary(config: dict[str, Any], task: str, num_parameters: int) -> str:
    what = "An image classifier" if task == "image-classification" else "An image captioner"
    return (
        f"{what} by {METHODS[config['corruption']]}, [arXiv 2510.01047](https://arxiv.org/abs/2510.01047), with a "
        f"`{config['vision_config']['model_type']}` encoder and {num_parameters / 1e6:.2f} M parameters."
    )


def _training(recipe: dict[str, Any], seed: int) -> str:
    training = recipe["training"]
    encoder = recipe.get("encoder")
    start = "from scratch"
    if encoder is not None:
        frozen = " frozen" if recipe["model"].get("freeze_encoder") else ""
        start = f"from the{frozen} encoder `{without_machine_paths(encoder)}`"
    return (
        f"{training['epochs']} epochs of AdamW {start}: batch size {training['batch_size']}, learning rate "
        f"{training['learning_rate']:g}, weight decay {training['weight_decay']:g}, seed {seed}. The weights are the "
        f"moving average of decay {training['ema_decay']:g}."
    )


def _limits(recipe: dict[str, Any], config: dict[str, Any], task: str, data_name: str) -> list[str]:
    limits = [f"It has learned from `{data_name}` alone; pictures of other kinds get an answer all the same."]
    if task == "image-classification":
        limits.append(f"It knows {len(config['id2label'])} labels and has no answer for anything else.")
    else:
        limits.append(
            f"It writes captions of at most {config['max_position_embeddings']} tokens out of {config['vocab_size']}, "
            "in the words and the form of its training captions."
        )
    if size := recipe["image_processor"].get("size"):
        pixels = " x ".join(map(str, size.values()))
        limits.append(f"Images are scaled to {pixels} pixels: finer detail is lost.")
    limits.append("Nobody has looked for social biases that it may have taken over from its data.")
    return limits
