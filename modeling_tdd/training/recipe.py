# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Recipes: all settings of a training run, read from YAML."""

import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from .arguments import TDDTrainingArguments
from .batches import Augmentation
from .data import CaptionData, LabelData
from .lora import LoraRecipe


@dataclass
class EvaluationRecipe:
    r"""
    The settings of the final table: all pairs of a number of denoising steps and a guidance scale.

    Args:
        num_inference_steps (`list[int]`): Numbers of steps to compare.
        guidance_scale (`list[float]`): Guidance scales to compare. 1.0 means no guidance.
        test_inference_steps (`list[int]`, *optional*):
            Numbers of steps for all splits but the first. Settings are chosen on the first split, so that only it
            needs all of them. By default these are `num_inference_steps` too.
    """

    num_inference_steps: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50])
    guidance_scale: list[float] = field(default_factory=lambda: [1.0])
    test_inference_steps: list[int] | None = None

    def grid(self, is_first_split: bool = True) -> list[dict[str, Any]]:
        """The settings of each cell of a split's table, as arguments of the model."""
        test_steps = None if is_first_split else self.test_inference_steps
        return [
            {"num_inference_steps": steps, "guidance_scale": scale}
            for scale in self.guidance_scale
            for steps in test_steps or self.num_inference_steps
        ]


@dataclass
class Recipe:
    r"""
    All settings of a training run.

    Args:
        name (`str`): The name of the recipe's file without its ending.
        data ([`LabelData`] or [`CaptionData`]): Which images to learn from.
        task (`str`): `"classification"`, `"captioning"`, or `"encoder"`: an image encoder that learns the words of
            captions.
        model (`dict`): Fields of [`TDDConfig`].
        checkpoint (`str`, *optional*): Id or folder of a TDD model to start from. It brings its processor.
        encoder (`str`, *optional*): Id or folder of a pretrained vision model to start from. It brings its image
            processor. With `model.freeze_encoder` a captioner's features are computed once.
        image_processor (`dict`): Arguments of `ViTImageProcessor`, where neither a checkpoint nor an encoder has one.
        tokenizer (`dict`): Arguments of [`train_tokenizer`], for a captioner without a checkpoint.
        feature_views (`int`): For a captioner with a frozen encoder: number of augmented views of each training
            picture whose features are cached.
        lora ([`LoraRecipe`], *optional*): Trains adapters instead of all weights.
        augmentation ([`Augmentation`]): How training views differ from the images.
        training (`dict`): Fields of [`TDDTrainingArguments`].
        evaluation ([`EvaluationRecipe`]): The settings of the final table.
    """

    name: str
    data: LabelData | CaptionData
    task: str = "classification"
    model: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    encoder: str | None = None
    image_processor: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    feature_views: int = 1
    lora: LoraRecipe | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    def __post_init__(self):
        if self.checkpoint is not None and self.encoder is not None:
            raise ValueError(f"Give `checkpoint` or `encoder`, got {self.checkpoint} and {self.encoder}.")
        if self.image_processor and (self.checkpoint or self.encoder):
            raise ValueError("`image_processor` must be empty: the checkpoint or the encoder brings its own.")
        if self.checkpoint is not None and self.tokenizer:
            raise ValueError("`tokenizer` must be empty: the checkpoint brings its own.")
        frozen = self.task == "captioning" and self.model.get("freeze_encoder", False)
        if self.feature_views != 1 and not frozen:
            raise ValueError(f"`feature_views` needs `model.freeze_encoder` of a captioner, got {self.feature_views}.")
        if self.task == "encoder" and (self.data.streaming or self.lora or self.checkpoint or self.encoder):
            raise ValueError("An encoder learns from nothing: no `streaming`, `lora`, `checkpoint` or `encoder`.")
        _check_keys("training", self.training, [f.name for f in fields(TDDTrainingArguments) if f.init])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# The type of `data` and the sections that a task does not have
TASKS: dict[str, tuple[type, tuple[str, ...]]] = {
    "classification": (LabelData, ("tokenizer", "feature_views")),
    "captioning": (CaptionData, ()),
    "encoder": (CaptionData, ("tokenizer", "feature_views", "lora", "checkpoint", "encoder", "evaluation")),
}


class _Loader(yaml.SafeLoader):
    """The safe loader with the numbers of YAML 1.2: PyYAML reads 1e-4 as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    r"""
    Reads a recipe.

    Args:
        path (`str` or `Path`):
            A YAML file with the sections of [`Recipe`]. Its key `base` names another recipe, whose sections it changes
            key by key; a relative path starts at the recipe's folder, as do relative paths of data.
        overrides (`list[str]`, *optional*):
            Changes such as `"training.num_train_epochs=5"` or `"model.vision_config.num_hidden_layers=2"`. Values are
            YAML.

    Raises:
        `ValueError`: for an unknown task, section or key, a missing section or key, an override that is not
            `key=value`, a missing file, or a recipe that is its own base. The message says what is allowed.
    """
    path = Path(path)
    tree = _load_tree(path, ())
    for override in overrides or []:
        _apply_override(tree, override)
    # Paths of overrides start at the working directory.
    _anchor_files(tree, Path.cwd())
    task = tree.get("task", "classification")
    if task not in TASKS:
        raise ValueError(f"`task` of {path} must be one of {', '.join(TASKS)}, got {task!r}.")
    data_type, excluded = TASKS[task]
    _check_keys("recipe", tree, [f.name for f in fields(Recipe) if f.name not in ("name", *excluded)])
    if "data" not in tree:
        raise ValueError(f"{path} lacks the section `data`.")
    types = {**get_type_hints(Recipe), "data": data_type, "lora": LoraRecipe}
    sections = {name: _read_section(path, name, values, types[name]) for name, values in tree.items()}
    return Recipe(name=path.stem, **sections)


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
    """Makes a section's dataclass. A section that is a plain value or dictionary is returned as it is."""
    if not is_dataclass(section_type) or values is None:
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
