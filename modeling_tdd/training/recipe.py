# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""A recipe: everything that decides a training run, read from YAML."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml


@dataclass
class DataRecipe:
    r"""
    Which images and labels to learn from. Anything that `datasets.load_dataset` reads, or scikit-learn's digits.

    Args:
        path (`str`): `"digits"`, or the first argument of `load_dataset`: `"parquet"`, `"imagefolder"`, an id.
        data_files (`dict`, *optional*): Files of each split; relative paths start at the recipe's folder.
        data_dir (`str`, *optional*): Folder of the data; likewise.
        train_split, eval_split (`str`): Names of the splits.
        image_column, label_column (`str`): Names of the columns.
    """

    path: str
    data_files: dict[str, str] | None = None
    data_dir: str | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    image_column: str = "image"
    label_column: str = "label"


@dataclass
class AugmentationRecipe:
    """Arguments of `timm.data.create_transform` and `timm.data.Mixup`, under their names there. All off by default."""

    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    re_prob: float = 0.0
    re_mode: str = "pixel"
    re_count: int = 1
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: str = "batch"


@dataclass
class TrainingRecipe:
    r"""
    The optimisation.

    Args:
        epochs (`int`): Passes over the training data.
        batch_size (`int`): Images an optimiser step, over all processes and accumulation steps.
        device_batch_size (`int`, *optional*): Images that fit a device at once; the rest is gradient accumulation.
        learning_rate, weight_decay, adam_beta2 (`float`): AdamW's; norms and biases do not decay.
        warmup_epochs (`float`): Linear warm-up, then a cosine to zero.
        max_grad_norm (`float`): Global norm to clip at.
        ema_decay (`float`): Decay of the weights' moving average, which is what is evaluated and saved.
        mixed_precision (`str`): `"no"`, `"bf16"`, `"fp16"`, or `"auto"`: bf16 where the hardware is fast at it.
        num_workers (`int`): Processes that load data.
        cpu_threads (`int`, *optional*): Threads of each process on the CPU. A small network is fastest on one.
        eval_every (`int`): Epochs between evaluations.
    """

    epochs: int
    batch_size: int
    device_batch_size: int | None = None
    learning_rate: float = 1e-4
    weight_decay: float = 0.3
    adam_beta2: float = 0.999
    warmup_epochs: float = 0.0
    max_grad_norm: float = 3.0
    ema_decay: float = 0.9999
    mixed_precision: str = "auto"
    num_workers: int = 0
    cpu_threads: int | None = None
    eval_every: int = 10

    def __post_init__(self):
        for name in ("epochs", "batch_size", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"`training.{name}` must be at least 1, got {getattr(self, name)}.")
        if self.mixed_precision not in ("auto", "no", "bf16", "fp16"):
            raise ValueError(
                f"`training.mixed_precision` must be 'auto', 'no', 'bf16' or 'fp16', got {self.mixed_precision!r}."
            )


@dataclass
class EvaluationRecipe:
    """The grid of the final table: denoising steps by guidance scales. Guidance 1.0 is none."""

    num_inference_steps: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50])
    guidance_scale: list[float] = field(default_factory=lambda: [1.0, 1.5])


@dataclass
class Recipe:
    r"""
    Everything that decides a training run.

    Args:
        name (`str`): Of the recipe's file, less its ending.
        model (`dict`): Fields of [`TDDConfig`].
        image_processor (`dict`): Arguments of `ViTImageProcessor`.
        data, augmentation, training, evaluation: see their classes.
    """

    name: str
    model: dict[str, Any]
    image_processor: dict[str, Any]
    data: DataRecipe
    training: TrainingRecipe
    augmentation: AugmentationRecipe = field(default_factory=AugmentationRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SECTIONS = {
    "data": DataRecipe,
    "augmentation": AugmentationRecipe,
    "training": TrainingRecipe,
    "evaluation": EvaluationRecipe,
}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    r"""
    Reads a recipe.

    Args:
        path (`str` or `Path`):
            A YAML file with the sections of [`Recipe`].
        overrides (`list[str]`, *optional*):
            Changes such as `"training.epochs=5"` or `"model.vision_config.num_hidden_layers=2"`; values are YAML.

    Raises:
        `ValueError`: for an unknown section or key, a missing one, or an override that is not `key=value`. The message
            says what is allowed.
    """
    path = Path(path)
    tree = yaml.safe_load(path.read_text())
    for override in overrides or []:
        _apply_override(tree, override)
    _check_keys("recipe", tree, [f.name for f in fields(Recipe) if f.name != "name"])
    sections = {}
    for name, section_class in SECTIONS.items():
        if name in tree:
            _check_keys(name, tree[name], [f.name for f in fields(section_class)])
            try:
                sections[name] = section_class(**tree[name])
            except TypeError as error:  # a required key is missing
                raise ValueError(f"Section `{name}` of {path}: {error}.") from error
    for name in ("model", "image_processor", "data", "training"):
        if name not in tree:
            raise ValueError(f"{path} lacks the section `{name}`.")
    data = sections["data"]
    if data.data_files:
        data.data_files = {split: _from_folder(path.parent, file) for split, file in data.data_files.items()}
    if data.data_dir:
        data.data_dir = _from_folder(path.parent, data.data_dir)
    return Recipe(name=path.stem, model=tree["model"], image_processor=tree["image_processor"], **sections)


def _check_keys(where: str, given: dict[str, Any], allowed: list[str]) -> None:
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise ValueError(f"Unknown keys in `{where}`: {', '.join(unknown)}. Allowed: {', '.join(allowed)}.")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"An override must read `section.key=value`, got {override!r}.")
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = yaml.safe_load(value)


def _from_folder(folder: Path, file: str) -> str:
    return file if "://" in file else str((folder / file).resolve())
