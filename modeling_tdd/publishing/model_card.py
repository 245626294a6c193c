# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Makes the model card of a run: data, recipe, scores over seeds with their plot, limits and citation."""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.step_curves import metrics_of, read_results, score_tables, splits_of


TEMPLATE = Path(__file__).with_name("card_template.md")
CARD_FILE, PLOT_FILE = "README.md", "steps.png"
TASKS = {"TDDForImageClassification": "image-classification", "TDDForCaptioning": "image-text-to-text"}
METHODS = {
    "gaussian": "Tweedie discrete diffusion (TDD)",
    "mask": "masked discrete diffusion (MDD), the baseline of TDD",
    "uniform": "discrete diffusion with random tokens in place of noise (D3PM), a baseline of TDD",
}
HUB_METRICS = {"top1": "accuracy", "token_f1": "f1"}  # metrics with another name on the Hub
GLOSSARY = {
    "image-classification": "`top1`: the likeliest label is right.",
    "image-text-to-text": (
        "`exact_match`: the whole caption is right; `token_f1`: overlap of its words with those of the reference; "
        "`stutter`: share of captions with the same token twice in succession; `fluent`: share of captions whose "
        "pairs of neighbouring words all occur in training captions."
    ),
}
CITATION = """```bibtex
@article{li2025tdd,
  title   = {In-Situ Tweedie Discrete Diffusion Models},
  author  = {Li, Xiao and Zhang, Jiaqi and Zhang, Shuxiang and Chen, Tianshui and Lin, Liang and Wang, Guangrun},
  journal = {arXiv preprint arXiv:2510.01047},
  year    = {2025}
}
```"""

# "https://user:password@host/file?token=x", also within another text, such as "zip://a.jpg::https://..."
URL = re.compile(r"(?P<scheme>\w+://)(?:[^/\s]*@)?(?P<place>[^\s?#:]*(?::\d+[^\s?#:]*)?)(?:[?#][^\s:]*)?")

Result = dict[str, Any]


def read_runs(folder: Path, others: list[Path] | None = None) -> list[Result]:
    r"""
    Reads the results of a run and of the runs to show beside it.

    Args:
        folder (`Path`): The folder of a run, such as `outputs/emoji/tdd-seed0`.
        others (`list[Path]`, *optional*):
            Folders of runs with other seeds and of baselines. By default those in the same folder as the run's.

    Returns:
        `list[Result]`: the results, that of the run itself first.

    Raises:
        `ValueError`: if a folder has no result.json, or if the runs have different recipes.
    """
    if others is None:
        others = [file.parent for file in sorted(folder.resolve().parent.glob("*-seed*/result.json"))]
    others = [other for other in others if other.resolve() != folder.resolve()]
    results = read_results([folder, *others])
    for other, result in zip(others, results[1:]):
        if result["recipe"] != results[0]["recipe"]:
            raise ValueError(f"{other} was trained by another recipe than {folder}: their scores are not comparable.")
    return results


def make_card(
    results: list[Result],
    config: dict[str, Any],
    num_parameters: int,
    repo_id: str,
    num_steps: int,
    data_readme: str | None = None,
) -> ModelCard:
    r"""
    Makes the model card of a run.

    Args:
        results (`list[Result]`): Results of [`read_runs`].
        config (`dict`): The content of the model's config.json.
        num_parameters (`int`): Number of the model's parameters.
        repo_id (`str`): The model's name on the Hub, or its folder.
        num_steps (`int`): Number of denoising steps that the model takes by default.
        data_readme (`str`, *optional*): A text about the data in Markdown, such as their licence.

    Returns:
        `ModelCard`: the card.
    """
    own, recipe = results[0], results[0]["recipe"]
    task = TASKS[config["architectures"][0]]
    name = f"{recipe['name']}-{own['method']}"
    seeds = sorted({result["seed"] for result in results if result["method"] == own["method"]})
    data_name, data_text = describe_data(recipe["data"], splits_of([own]))
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
            metrics=[HUB_METRICS.get(metric, metric) for metric in metrics_of(results)],
            eval_results=eval_results(own, task, data_name, num_steps),
        ),
        template_path=str(TEMPLATE),
        model_name=name,
        repo_id=repo_id,
        pipeline_tag=task,
        summary=_summary(config, task, num_parameters),
        call='pipe("image.png")' if task == "image-classification" else 'pipe("image.png", text="")',
        data=data_text,
        data_readme=None if data_readme is None else _as_section(data_readme),
        training=_training(recipe, own["seed"]),
        recipe=yaml.safe_dump(without_secrets(recipe), sort_keys=False, allow_unicode=True).strip(),
        seeds=f"Scores in %, {spread}.",
        glossary=GLOSSARY[task],
        tables=score_tables(results),
        plot=PLOT_FILE,
        limits=_limits(recipe, config, task, data_name),
        citation=CITATION,
    )


def eval_results(result: Result, task: str, data_name: str, num_steps: int) -> list[EvalResult]:
    """The scores of the published weights without guidance, at the number of steps nearest to the default. A method
    without a loop has neither."""
    unguided = [entry for entry in result["scores"] if entry.get("guidance_scale") in (None, 1)]
    chosen = []
    for split in dict.fromkeys(entry["split"] for entry in unguided):
        entries = [entry for entry in unguided if entry["split"] == split]
        entry = min(entries, key=lambda entry: abs(entry.get("num_inference_steps", num_steps) - num_steps))
        steps = entry.get("num_inference_steps")
        chosen += [
            EvalResult(
                task_type=task,
                dataset_type=data_name,
                dataset_name=data_name,
                dataset_split=split,
                metric_type=HUB_METRICS.get(metric, metric),
                metric_name=metric if steps is None else f"{metric}, {steps} denoising steps",
                metric_value=round(100 * entry[metric], 2),
            )
            for metric in metrics_of([result])
        ]
    return chosen


def describe_data(data: dict[str, Any], splits: list[str]) -> tuple[str, str]:
    """The name of the data set, and a sentence about it. `splits` are those that the run was scored on."""
    usage = f"Trained on `{data['train_split']}`, scored on {', '.join(f'`{split}`' for split in splits)}."
    if data["path"] == "digits":
        return "digits", f"scikit-learn's 8x8 handwritten digits (`load_digits`). {usage}"
    folder = data.get("data_dir")
    if file := next(iter((data.get("data_files") or {}).values()), None):
        folder = folder or without_secrets(file).rpartition("/")[0] or Path(file).parent.as_posix()
    elif without_secrets(data["path"]) != data["path"] or Path(data["path"]).exists():
        folder = folder or data["path"]
    if folder is None:
        return data["path"], f"[{data['path']}](https://huggingface.co/datasets/{data['path']}). {usage}"
    name = without_secrets(folder).rstrip("/").rpartition("/")[2]
    return name, f"`{name}`, read by `datasets` as {without_secrets(data['path'])}. {usage}"


def _as_section(text: str) -> str:
    """A text without its title, and with headings of a lower level than the card's."""
    lines = [line for line in text.splitlines() if not line.startswith("# ")]
    return "\n".join(f"##{line}" if line.startswith("#") else line for line in lines).strip()


def without_secrets(value: Any) -> Any:
    """A recipe for others to read: of a path that starts at a root or a home only the last part, and of a URL neither
    user, password nor query."""
    if isinstance(value, dict):
        return {without_secrets(key): without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    value = URL.sub(lambda url: f"{url['scheme']}{url['place']}", value)
    return "::".join(part if "://" in part else _last_part(part) for part in value.split("::"))


def _last_part(path: str) -> str:
    is_absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    return PureWindowsPath(path).name if is_absolute or path.startswith(("~", "..")) else path


def _summary(config: dict[str, Any], task: str, num_parameters: int) -> str:
    what = "An image classifier" if task == "image-classification" else "An image captioner"
    return (
        f"{what} by {METHODS[config['corruption']]}, [arXiv 2510.01047](https://arxiv.org/abs/2510.01047), with a "
        f"`{config['vision_config']['model_type']}` encoder and {num_parameters / 1e6:.2f} M parameters. "
        f"{_process(config)}"
    ).strip()


def _process(config: dict[str, Any]) -> str:
    """What is the paper's and what is ours in a TDD model's diffusion process."""
    if config["corruption"] == "mask":
        return ""
    departures = {
        "a timestep for each token": config["timestep_sampling"] == "per_token",
        "wrong tokens in training": config["mistaken_share"] > 0,
        "an input scaled by its signal share": config["input_weighting"] == "visibility",
        "the `projected` schedule": config["noise_schedule"] == "projected",
        # The default of `sampler`, which is no field of this configuration
        "a loop that settles the surest tokens first": config["timestep_sampling"] == "per_token",
        "the regression loss": config["prediction_type"] == "epsilon",
    }
    given = [name for name, departs in departures.items() if departs]
    if not given:
        return "Its diffusion process is the paper's."
    listed = " and ".join(filter(None, [", ".join(given[:-1]), given[-1]]))
    return f"It departs from the paper's diffusion process by {listed}."


def _training(recipe: dict[str, Any], seed: int) -> str:
    training = recipe["training"]
    rate = training.get("learning_rate") or training["base_learning_rate"] * training["batch_size"] / 256
    start = "from scratch"
    if recipe.get("checkpoint") is not None:
        start = f"from the checkpoint `{without_secrets(recipe['checkpoint'])}`"
    elif recipe.get("encoder") is not None:
        frozen = " frozen" if recipe["model"].get("freeze_encoder") else ""
        start = f"from the{frozen} encoder `{without_secrets(recipe['encoder'])}`"
    # A recipe leaves out what has the default of `TDDTrainingArguments`.
    return (
        f"{training.get('num_train_epochs', 3)} epochs of AdamW {start}: batch size {training['batch_size']}, "
        f"learning rate {rate:g}, weight decay {training.get('weight_decay', 0):g}, seed {seed}. The weights are the "
        f"moving average of decay {training.get('ema_decay', 0.9999):g}."
    )


def _limits(recipe: dict[str, Any], config: dict[str, Any], task: str, data_name: str) -> list[str]:
    limits = [f"It was trained on `{data_name}` alone. It also gives an answer to pictures of any other kind."]
    if task == "image-classification":
        limits.append(f"It knows {len(config['id2label'])} labels, and it answers with one of them in any case.")
    else:
        limits.append(
            f"It writes captions of at most {config['max_position_embeddings']} tokens from a vocabulary of "
            f"{config['vocab_size']}, in the style of its training captions."
        )
    if size := recipe["image_processor"].get("size"):
        pixels = " x ".join(map(str, size.values()))
        limits.append(f"Images are scaled to {pixels} pixels, so finer details are lost.")
    limits.append("It may have learned social biases from its data. Nobody has examined this.")
    return limits
