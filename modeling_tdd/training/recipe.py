# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Recipes: all settings of a training run, read from YAML."""

import re
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml


@dataclass
class _ImageData:
    r"""
    The settings that data sets of labels and of captions share: which images to learn from, and how to read them.

    Args:
        path (`str`): The first argument of `load_dataset`: `"parquet"`, `"imagefolder"`, `"webdataset"` or an id.
        data_files (`dict`, *optional*): Files of each split. Relative paths start at the recipe's folder.
        data_dir (`str`, *optional*): Folder of the data. A relative path starts at the recipe's folder.
        train_split (`str`): Name of the training split.
        image_column (`str`): Name of the column of images.
        on_bad_example (`str`): What happens to an example with an unreadable image, a missing label or an empty
            caption: `"skip"` leaves it out and reports it, `"raise"` raises an error.
        num_proc (`int`, *optional*): Number of processes that look for bad examples in data that are not streamed.
        streaming (`bool`): Whether the training split is read shard by shard during training. The evaluation splits
            are read whole, and `datasets` caches them on disk.
        num_examples (`int`, *optional*): Size of the training split. It is needed for a stream that does not know its
            size, and by `scripts/estimate.py`, which reads no data.
        shuffle_buffer (`int`): Number of streamed examples, not yet decoded, that each worker shuffles together.
    """

    path: str
    data_files: dict[str, str] | None = None
    data_dir: str | None = None
    train_split: str = "train"
    image_column: str = "image"
    on_bad_example: str = "skip"
    num_proc: int | None = None
    streaming: bool = False
    num_examples: int | None = None
    shuffle_buffer: int = 1000

    def __post_init__(self):
        if self.on_bad_example not in ("skip", "raise"):
            raise ValueError(f"`data.on_bad_example` must be 'skip' or 'raise', got {self.on_bad_example!r}.")
        if self.shuffle_buffer < 1:
            raise ValueError(f"`data.shuffle_buffer` must be at least 1, got {self.shuffle_buffer}.")


@dataclass
class DataRecipe(_ImageData):
    r"""
    Which images and labels to learn from: anything that `datasets.load_dataset` reads, or scikit-learn's digits
    (`path` is `"digits"`).

    Args:
        eval_split (`str`): Name of the split to evaluate on.
        label_column (`str`): Name of the column of labels. `json.label` is the key `label` of a column `json`.
        num_labels (`int`, *optional*): Number of labels. It is needed where the column holds plain integers, and by
            `scripts/estimate.py`, which reads no data.
    """

    eval_split: str = "validation"
    label_column: str = "label"
    num_labels: int | None = None


@dataclass
class CaptionDataRecipe(_ImageData):
    r"""
    Which images and captions to learn from: anything that `datasets.load_dataset` reads, or COCO 2017 as published
    (`path` is `"coco"`, and `data_dir` is the folder that holds `annotations/`).

    Args:
        eval_splits (`list[str]`): Names of the splits to evaluate on. The first is also evaluated during training.
        caption_column (`str`): Name of the column of captions, which holds a string or a list of strings per image.
            `json.caption` is the key `caption` of a column `json`.
        lower_case (`bool`): Whether to lower-case the captions.
    """

    eval_splits: list[str] = field(default_factory=lambda: ["validation"])
    caption_column: str = "caption"
    lower_case: bool = False


@dataclass
class AugmentationRecipe:
    """Arguments of `timm.data.create_transform` and `timm.data.Mixup`, with their names there. By default all are off.

    `size` is the height and width of the training views; by default it is the image processor's.
    """

    size: int | None = None
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
    The settings of the optimisation.

    Args:
        epochs (`int`): Number of passes over the training data.
        batch_size (`int`): Images per optimiser step, over all processes and accumulation steps.
        device_batch_size (`int`, *optional*): Images that fit on a device at once. Gradient accumulation makes up the
            rest of the batch.
        base_learning_rate (`float`):
            The learning rate at a batch size of 256, above 0. It scales linearly with the batch size (Goyal et al.,
            2017), see [`~TrainingRecipe.learning_rate`].
        weight_decay, adam_beta2 (`float`): Settings of AdamW. The weights of norms and the biases do not decay.
        warmup_epochs (`float`): Epochs in which the learning rate rises linearly. Then it falls to 0 as a cosine.
        max_grad_norm (`float`): Gradients are clipped at this global norm.
        ema_decay (`float`): Decay of the weights' moving average, which is what is evaluated and saved.
        ema_warmup (`bool`): Whether the decay grows up to `ema_decay` with the steps taken, so that the average
            follows a short run too (ours). `False` keeps it constant, as in the paper (equation 2).
        mixed_precision (`str`): `"no"`, `"bf16"`, `"fp16"`, or `"auto"`, which is bf16 where the hardware is fast at
            it and `"no"` elsewhere.
        num_workers (`int`): Number of processes that load data.
        cpu_threads (`int`, *optional*): Threads of each process on the CPU. A small network is fastest with one.
        eval_every (`int`): Epochs between evaluations.
        checkpoint_every (`int`): Optimiser steps between checkpoints. The last step has one too.
        keep_checkpoints (`int`): Number of checkpoints that are kept.
        log_every (`int`): Optimiser steps per line of the log.
        trackers (`list[str]`, *optional*): Accelerate's trackers. By default TensorBoard, where it is installed.
        max_skipped_steps (`int`): Number of steps in a row that may be skipped because the loss or its gradient is
            not finite.
    """

    epochs: int
    batch_size: int
    device_batch_size: int | None = None
    base_learning_rate: float = 1e-4
    weight_decay: float = 0.3
    adam_beta2: float = 0.999
    warmup_epochs: float = 0.0
    max_grad_norm: float = 3.0
    ema_decay: float = 0.9999
    ema_warmup: bool = True
    mixed_precision: str = "auto"
    num_workers: int = 0
    cpu_threads: int | None = None
    eval_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 50
    trackers: list[str] | None = None
    max_skipped_steps: int = 10

    def __post_init__(self):
        for name in ("epochs", "batch_size", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"`training.{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.base_learning_rate > 0:
            raise ValueError(f"`training.base_learning_rate` must be above 0, got {self.base_learning_rate}.")
        if self.mixed_precision not in ("auto", "no", "bf16", "fp16"):
            raise ValueError(
                f"`training.mixed_precision` must be 'auto', 'no', 'bf16' or 'fp16', got {self.mixed_precision!r}."
            )

    @property
    def learning_rate(self) -> float:
        """`float`: AdamW's learning rate after the warm-up: `base_learning_rate * batch_size / 256`."""
        return self.base_learning_rate * self.batch_size / 256


@dataclass
class EvaluationRecipe:
    """The settings of the final table: all pairs of a number of denoising steps and a guidance scale (1.0: none)."""

    num_inference_steps: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50])
    guidance_scale: list[float] = field(default_factory=lambda: [1.0, 1.5])


@dataclass
class CaptionEvaluationRecipe:
    r"""
    The settings of the final table: all pairs of a number of denoising steps and a guidance scale.

    Args:
        num_inference_steps (`list[int]`): Numbers of steps to compare.
        guidance_scale (`list[float]`): Guidance scales to compare. 1.0 means no guidance.
        test_inference_steps (`list[int]`, *optional*):
            Numbers of steps for all splits but the first. Settings are chosen on the first split, so that only it
            needs all of them. By default these are `num_inference_steps` too.
    """

    num_inference_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 10, 20, 50])
    guidance_scale: list[float] = field(default_factory=lambda: [1.0])
    test_inference_steps: list[int] | None = None

    def grid(self, is_first_split: bool = True) -> list[dict[str, Any]]:
        """The arguments of `generate`, one dictionary per cell of a split's table."""
        test_steps = None if is_first_split else self.test_inference_steps
        return [
            {"num_inference_steps": steps, "guidance_scale": scale}
            for scale in self.guidance_scale
            for steps in test_steps or self.num_inference_steps
        ]


@dataclass
class WordsRecipe:
    r"""
    How words of captions serve as labels of images.

    Args:
        min_count (`int`): A word is a label if it occurs in at least so many training captions.
        threshold (`float`): A word counts as predicted from this probability on.
    """

    min_count: int = 2
    threshold: float = 0.5


@dataclass
class Recipe:
    r"""
    All settings of a classifier's training, and the sections that all recipes share.

    Args:
        name (`str`): The name of the recipe's file without its ending.
        model (`dict`): Fields of [`TDDConfig`].
        image_processor (`dict`): Arguments of `ViTImageProcessor`.
        data, augmentation, training, evaluation: See their classes.
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


@dataclass
class CaptionRecipe(Recipe):
    r"""
    All settings of a captioner's training.

    Args:
        tokenizer (`dict`): Arguments of [`train_tokenizer`].
        encoder (`str`, *optional*):
            Id or folder of a pretrained encoder. A relative path starts at the working directory. With
            `model.freeze_encoder` its features are computed once.
        model_checkpoint (`str`, *optional*):
            Id or folder of a captioner to start from, in place of `encoder` and `tokenizer`.
        feature_views (`int`): For a frozen encoder: number of augmented views per training picture whose features are
            cached.
    """

    data: CaptionDataRecipe
    evaluation: CaptionEvaluationRecipe = field(default_factory=CaptionEvaluationRecipe)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    encoder: str | None = None
    model_checkpoint: str | None = None
    feature_views: int = 1


@dataclass
class EncoderRecipe(Recipe):
    """All settings of the training of an image encoder on the words of captions."""

    data: CaptionDataRecipe
    evaluation: WordsRecipe = field(default_factory=WordsRecipe)

    def __post_init__(self):
        if self.data.streaming:
            raise ValueError(
                "`data.streaming` must be false for an encoder: the words of all captions are counted first."
            )


RECIPES: dict[str, type[Recipe]] = {
    "classification": Recipe,
    "captioning": CaptionRecipe,
    "encoder": EncoderRecipe,
}


class _Loader(yaml.SafeLoader):
    """The safe loader with the numbers of YAML 1.2: PyYAML reads 1e-4 as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_recipe(path: str | Path, overrides: list[str] | None = None, task: str | None = None) -> Recipe:
    r"""
    Reads a recipe.

    Args:
        path (`str` or `Path`):
            A YAML file with the sections of [`Recipe`], [`CaptionRecipe`] or [`EncoderRecipe`]. Its key `task`,
            `"classification"` by default, chooses between them. Its key `base` names another recipe, whose sections it
            changes key by key; a relative path starts at the recipe's folder.
        overrides (`list[str]`, *optional*):
            Changes such as `"training.epochs=5"` or `"model.vision_config.num_hidden_layers=2"`. Values are YAML.
        task (`str`, *optional*):
            The task that the recipe must have.

    Raises:
        `ValueError`: for an unknown task, section or key, a missing section or key, an override that is not
            `key=value`, a missing file, or a recipe that is its own base. The message says what is allowed.
    """
    path = Path(path)
    tree = _load_tree(path, ())
    for override in overrides or []:
        _apply_override(tree, override)
    _anchor_files(tree, path.parent)
    recipe_task = tree.pop("task", "classification")
    if recipe_task not in RECIPES:
        raise ValueError(f"`task` of {path} must be one of {', '.join(RECIPES)}, got {recipe_task!r}.")
    if task is not None and recipe_task != task:
        raise ValueError(f"{path} is a recipe for {recipe_task}; one for {task} is needed.")
    recipe_class = RECIPES[recipe_task]
    _check_keys("recipe", tree, [f.name for f in fields(recipe_class) if f.name != "name"])
    for section in fields(recipe_class):
        given = section.name in tree or section.name == "name"
        if not given and section.default is MISSING and section.default_factory is MISSING:
            raise ValueError(f"{path} lacks the section `{section.name}`.")
    types = get_type_hints(recipe_class)
    sections = {name: _read_section(path, name, values, types[name]) for name, values in tree.items()}
    return recipe_class(name=path.stem, **sections)


def _load_tree(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    """Reads a recipe file and merges it into its base, which may have a base too. `derived` are the files that led
    here."""
    path = path.resolve()
    if path in derived:
        raise ValueError(f"Recipes are each other's base: {' -> '.join(map(str, (*derived, path)))}.")
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}" + (f", the base of {derived[-1]}." if derived else "."))
    tree = yaml.load(path.read_text(), _Loader) or {}
    _anchor_files(tree, path.parent)
    base = tree.pop("base", None)
    return tree if base is None else _merge(_load_tree(path.parent / base, (*derived, path)), tree)


def _anchor_files(tree: dict[str, Any], folder: Path) -> None:
    """Makes the relative paths of a recipe's data start at `folder`."""
    data = tree.get("data") or {}
    if data.get("data_files"):
        data["data_files"] = {split: _from_folder(folder, file) for split, file in data["data_files"].items()}
    if data.get("data_dir"):
        data["data_dir"] = _from_folder(folder, data["data_dir"])


def _merge(base: Any, changes: Any) -> Any:
    """Merges `changes` into `base`: dictionaries key by key; any other value is replaced."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return base | {key: _merge(base.get(key), value) for key, value in changes.items()}


def _read_section(path: Path, name: str, values: Any, section_type: Any) -> Any:
    """Makes a section's dataclass. A section that is a plain dictionary is returned as it is."""
    if not is_dataclass(section_type):
        return values
    _check_keys(name, values, [f.name for f in fields(section_type)])
    try:
        return section_type(**values)
    except TypeError as error:  # a required key is missing
        raise ValueError(f"Section `{name}` of {path}: {error}.") from error


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
    tree[last] = yaml.load(value, _Loader)


def _from_folder(folder: Path, file: str) -> str:
    return file if "://" in file else str((folder / file).resolve())
