# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""A recipe: everything that decides a training run, read from YAML."""

import re
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml


@dataclass
class _ImageData:
    r"""
    Which images to learn from, and how they are read: what data sets of labels and of captions share.

    Args:
        path (`str`): The first argument of `load_dataset`: `"parquet"`, `"imagefolder"`, `"webdataset"`, an id.
        data_files (`dict`, *optional*): Files of each split; relative paths start at the recipe's folder.
        data_dir (`str`, *optional*): Folder of the data; likewise.
        train_split (`str`): Name of the training split.
        image_column (`str`): Name of the column of images.
        on_bad_example (`str`): What an unreadable image, a missing label or an empty caption does: `"skip"` leaves it
            out and names it, `"raise"` stops.
        num_proc (`int`, *optional*): Processes that look for bad examples, once a data set that is not streamed.
        streaming (`bool`): Whether the training split is read shard by shard as training goes. The splits to evaluate
            on are read whole, and kept on disc by `datasets`.
        num_examples (`int`, *optional*): Size of a streamed training split, where it does not say so itself; and for
            `scripts/estimate.py`, which reads no data.
        shuffle_buffer (`int`): Streamed examples, not decoded, that each worker shuffles together.
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
    Which images and labels to learn from. Anything that `datasets.load_dataset` reads, or scikit-learn's digits, whose
    `path` is `"digits"`.

    Args:
        eval_split (`str`): Name of the split to evaluate on.
        label_column (`str`): Name of the column of labels. `json.label` is the key `label` of a column `json`.
        num_labels (`int`, *optional*): How many labels there are, where the column holds plain integers; and for
            `scripts/estimate.py`, which reads no data.
    """

    eval_split: str = "validation"
    label_column: str = "label"
    num_labels: int | None = None


@dataclass
class CaptionDataRecipe(_ImageData):
    r"""
    Which images and captions to learn from. Anything that `datasets.load_dataset` reads, or COCO 2017 as published,
    whose `path` is `"coco"` and whose `data_dir` is the folder that holds `annotations/`.

    Args:
        eval_splits (`list[str]`): Names of the splits to evaluate on; the first also shows progress.
        caption_column (`str`): Name of the column of captions: a string, or a list of strings, an image.
            `json.caption` is the key `caption` of a column `json`.
        lower_case (`bool`): Whether to lower-case the captions.
    """

    eval_splits: list[str] = field(default_factory=lambda: ["validation"])
    caption_column: str = "caption"
    lower_case: bool = False


@dataclass
class AugmentationRecipe:
    """Arguments of `timm.data.create_transform` and `timm.data.Mixup`, under their names there. All off by default.

    `size` is the height and width of the training views; by default the image processor's.
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
    The optimisation.

    Args:
        epochs (`int`): Passes over the training data.
        batch_size (`int`): Images an optimiser step, over all processes and accumulation steps.
        device_batch_size (`int`, *optional*): Images that fit a device at once; the rest is gradient accumulation.
        base_learning_rate (`float`):
            The learning rate at a batch size of 256, above 0. It scales linearly with the batch size (Goyal et al.,
            2017), see [`~TrainingRecipe.learning_rate`].
        weight_decay, adam_beta2 (`float`): Settings of AdamW. The weights of norms and the biases do not decay.
        warmup_epochs (`float`): Linear warm-up, then a cosine to zero.
        max_grad_norm (`float`): Global norm to clip at.
        ema_decay (`float`): Decay of the weights' moving average, which is what is evaluated and saved.
        ema_warmup (`bool`): Whether the decay grows up to `ema_decay` with the steps taken, so that the average
            follows a short run too (ours). `False` keeps it constant, as in the paper (equation 2).
        mixed_precision (`str`): `"no"`, `"bf16"`, `"fp16"`, or `"auto"`: bf16 where the hardware is fast at it.
        num_workers (`int`): Processes that load data.
        cpu_threads (`int`, *optional*): Threads of each process on the CPU. A small network is fastest on one.
        eval_every (`int`): Epochs between evaluations.
        checkpoint_every (`int`): Optimiser steps between checkpoints to resume from; there is one at the end too.
        keep_checkpoints (`int`): How many of them are kept.
        log_every (`int`): Optimiser steps a line of the log.
        trackers (`list[str]`, *optional*): Accelerate's trackers; by default TensorBoard where it is installed.
        max_skipped_steps (`int`): How many steps in a row may be skipped for a loss that is not finite.
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
    """The grid of the final table: denoising steps by guidance scales. Guidance 1.0 is none."""

    num_inference_steps: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50])
    guidance_scale: list[float] = field(default_factory=lambda: [1.0, 1.5])


@dataclass
class CaptionEvaluationRecipe:
    r"""
    The grid of the final table: denoising steps by guidance scales.

    Args:
        num_inference_steps (`list[int]`): Numbers of steps to compare.
        guidance_scale (`list[float]`): Guidance scales to compare. 1.0 is none.
        test_inference_steps (`list[int]`, *optional*):
            Numbers of steps for all splits but the first, which are compared where the choice is made.
    """

    num_inference_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 10, 20, 50])
    guidance_scale: list[float] = field(default_factory=lambda: [1.0])
    test_inference_steps: list[int] | None = None

    def grid(self, is_first_split: bool = True) -> list[dict[str, Any]]:
        """Arguments of `generate`, a dictionary a cell of a split's table."""
        test_steps = None if is_first_split else self.test_inference_steps
        return [
            {"num_inference_steps": steps, "guidance_scale": scale}
            for scale in self.guidance_scale
            for steps in test_steps or self.num_inference_steps
        ]


@dataclass
class WordsRecipe:
    r"""
    The words of captions as labels of images.

    Args:
        min_count (`int`): In how many training captions a word must be to be a label.
        threshold (`float`): Probability from which a word counts as predicted.
    """

    min_count: int = 2
    threshold: float = 0.5


@dataclass
class Recipe:
    r"""
    Everything that decides the training of a classifier, and what all recipes share.

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


@dataclass
class CaptionRecipe(Recipe):
    r"""
    Everything that decides the training of a captioner.

    Args:
        tokenizer (`dict`): Arguments of [`train_tokenizer`].
        encoder (`str`, *optional*):
            Id or folder of a pretrained encoder, a relative path starting at the working directory. With
            `model.freeze_encoder` its features are computed once.
        model_checkpoint (`str`, *optional*):
            Id or folder of a captioner to go on from, in place of `encoder` and `tokenizer`.
        feature_views (`int`): Augmented views of each training picture whose features are kept, for a frozen encoder.
    """

    data: CaptionDataRecipe
    evaluation: CaptionEvaluationRecipe = field(default_factory=CaptionEvaluationRecipe)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    encoder: str | None = None
    model_checkpoint: str | None = None
    feature_views: int = 1


@dataclass
class EncoderRecipe(Recipe):
    """Everything that decides the training of an image encoder on the words of captions."""

    data: CaptionDataRecipe
    evaluation: WordsRecipe = field(default_factory=WordsRecipe)

    def __post_init__(self):
        if self.data.streaming:
            raise ValueError(
                "`data.streaming` must be false for an encoder: it counts the words of all captions first."
            )


RECIPES: dict[str, type[Recipe]] = {
    "classification": Recipe,
    "captioning": CaptionRecipe,
    "encoder": EncoderRecipe,
}


class _Loader(yaml.SafeLoader):
    """Safe, and with YAML 1.2's numbers: to PyYAML 1e-4 is a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_recipe(path: str | Path, overrides: list[str] | None = None, task: str | None = None) -> Recipe:
    r"""
    Reads a recipe.

    Args:
        path (`str` or `Path`):
            A YAML file with the sections of [`Recipe`], [`CaptionRecipe`] or [`EncoderRecipe`]; its key `task` says
            which, `"classification"` by default. Its key `base` names another recipe, a relative path starting at the
            recipe's folder, whose sections it changes key by key.
        overrides (`list[str]`, *optional*):
            Changes such as `"training.epochs=5"` or `"model.vision_config.num_hidden_layers=2"`; values are YAML.
        task (`str`, *optional*):
            The task that the recipe must be for.

    Raises:
        `ValueError`: for an unknown task, section or key, a missing one, an override that is not `key=value`, a
            missing file, or a recipe that is its own base. The message says what is allowed.
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
    """A recipe file over its base, and that over its own. `derived` are the files that led here."""
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
    """Lets the relative paths of a recipe's data start at `folder`."""
    data = tree.get("data") or {}
    if data.get("data_files"):
        data["data_files"] = {split: _from_folder(folder, file) for split, file in data["data_files"].items()}
    if data.get("data_dir"):
        data["data_dir"] = _from_folder(folder, data["data_dir"])


def _merge(base: Any, changes: Any) -> Any:
    """`changes` over `base`: dictionaries key by key, all else replaced."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return base | {key: _merge(base.get(key), value) for key, value in changes.items()}


def _read_section(path: Path, name: str, values: Any, section_type: Any) -> Any:
    """A section as its dataclass, or as it stands where it is a plain dictionary."""
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
