# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Recipes: all settings of a training run, read from YAML."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from transformers import CONFIG_MAPPING, ViTImageProcessor, image_utils

from ..configuration_tdd import TDDConfig
from ..settings_tdd import SETTINGS, check, suggest
from .arguments import TDDTrainingArguments
from .batches import Augmentation
from .data import CaptionData, LabelData
from .lora import LoraRecipe
from .tokenization import train_tokenizer


@dataclass
class EvaluationRecipe:
    """The settings of the final table: all pairs of a number of denoising steps and a guidance scale (1.0: none)."""

    num_inference_steps: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50])
    guidance_scale: Sequence[float] = field(default_factory=lambda: [1.0])
    # Settings are chosen on the first split, so that only it needs all of them: the numbers of steps for the others
    test_inference_steps: list[int] | None = None

    def __post_init__(self):
        for steps in (*self.num_inference_steps, *(self.test_inference_steps or ())):
            check("evaluation.num_inference_steps", steps, SETTINGS["num_inference_steps"])
        for scale in self.guidance_scale:
            check("evaluation.guidance_scale", scale, SETTINGS["guidance_scale"])
        if not self.num_inference_steps or not self.guidance_scale:
            raise ValueError("`evaluation` needs at least one of `num_inference_steps` and one of `guidance_scale`.")

    def grid(self, is_first_split: bool) -> list[dict[str, Any]]:
        """The settings of each cell of a split's table, as arguments of the model."""
        counts = self.num_inference_steps if is_first_split else self.test_inference_steps or self.num_inference_steps
        return [{"num_inference_steps": n, "guidance_scale": scale} for scale in self.guidance_scale for n in counts]


OF_THE_COMMAND = ("output_dir", "seed")  # the arguments of `scripts/train.py`, which a recipe would override


@dataclass
class Recipe:
    """All settings of a training run. Ids are those of the Hub; folders start at the working directory."""

    name: str  # of the recipe's file, without its ending
    data: LabelData | CaptionData
    task: str = "classification"  # or "captioning", or "encoder": one that learns the words of captions
    model: dict[str, Any] = field(default_factory=dict)  # fields of `TDDConfig`
    checkpoint: str | None = None  # id or folder of a TDD model to start from, with its processor
    encoder: str | None = None  # id or folder of a pretrained vision model to start from, with its image processor
    image_processor: dict[str, Any] = field(default_factory=dict)  # arguments of `ViTImageProcessor`, if there is none
    tokenizer: dict[str, Any] = field(default_factory=dict)  # arguments of `train_tokenizer`, if there is none
    feature_views: int = 1  # with `model.freeze_encoder`: cached augmented views of each training picture
    lora: LoraRecipe | None = None  # trains adapters in place of all weights
    augmentation: Augmentation = field(default_factory=Augmentation)
    training: dict[str, Any] = field(default_factory=dict)  # fields of `TDDTrainingArguments`
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    def __post_init__(self):
        if self.checkpoint is not None and self.encoder is not None:
            raise ValueError(f"Give `checkpoint` or `encoder`, got {self.checkpoint} and {self.encoder}.")
        if self.image_processor and (self.checkpoint or self.encoder):
            raise ValueError("`image_processor` must be empty: the checkpoint or the encoder brings its own.")
        if self.tokenizer and self.checkpoint:
            raise ValueError("`tokenizer` must be empty: the checkpoint brings its own.")
        is_cached = self.model.get("freeze_encoder") and not self.data.streaming
        if self.feature_views < 1 or (self.feature_views > 1 and not is_cached):
            needed = "`model.freeze_encoder` and no `data.streaming`"
            raise ValueError(f"`feature_views` above 1 needs {needed}, got {self.feature_views}.")
        if self.task == "encoder" and self.data.streaming:
            raise ValueError("`data.streaming` must be false for an encoder, which counts the words of all captions.")
        if not self.data.eval_share and self.data.train_split in (self.data.eval_splits or [self.data.train_split]):
            needed = "other splits than `data.train_split`, unless `data.eval_share` holds out a share of that"
            raise ValueError(f"`data.eval_splits` must name {needed}, got {self.data.eval_splits}.")
        types = _types_of(TDDTrainingArguments)
        _check_values("training", self.training, {name: types[name] for name in types if name not in OF_THE_COMMAND})
        # The types of a configuration's fields are its own matter: it checks them when it is made.
        _check_values("model", self.model, {f.name: Any for f in fields(TDDConfig)})
        vision = self.model.get("vision_config") or {"model_type": "vit"}
        kind = vision.get("model_type", "vit") if isinstance(vision, dict) else vision
        if kind not in list(CONFIG_MAPPING):
            raise ValueError(f"`model.vision_config` must have a `model_type` that Transformers knows, got {kind!r}.")
        names = ["model_type", *CONFIG_MAPPING[kind].attribute_map, *(f.name for f in fields(CONFIG_MAPPING[kind]))]
        _check_values("model.vision_config", vision, dict.fromkeys(names, Any))
        arguments = get_type_hints(ViTImageProcessor.valid_kwargs, localns={**vars(image_utils), "torch": torch})
        _check_values("image_processor", self.image_processor, arguments)
        arguments = get_type_hints(train_tokenizer)
        _check_values("tokenizer", self.tokenizer, {name: arguments[name] for name in list(arguments)[1:-1]})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# What `data` is for each task, and the sections that the task does not have
TASKS: dict[str, tuple[type, tuple[str, ...]]] = {
    "classification": (LabelData, ("tokenizer", "feature_views")),
    "captioning": (CaptionData, ()),
    "encoder": (CaptionData, ("checkpoint", "encoder", "tokenizer", "feature_views", "lora", "evaluation")),
}


YAML_1_2 = YAML(typ="safe", pure=True)  # in which 1e-4 is a number, `no` a word, and a key twice an error
MAX_VALUES = 10_000  # of a recipe: aliases of aliases make billions of a small file


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    r"""
    Reads a recipe.

    Args:
        path (`str` or `Path`):
            A YAML file with the sections of [`Recipe`]. Its key `base` names another recipe, whose sections it changes
            key by key. Relative paths of the base and of the data start at the recipe's folder.
        overrides (`list[str]`, *optional*):
            Changes such as `"training.num_train_epochs=5"`. Values are YAML. Paths start at the working directory.

    Raises:
        `ValueError`: for an unknown task, section or key, a value of a wrong type, a missing section, key or file, an
            override that is not `key=value`, or a recipe that is its own base. The message says what is allowed.
    """
    path = Path(path)
    tree = _load_tree(path, ())
    for override in overrides or []:
        _apply_override(tree, override)
    _anchor_files(tree, Path.cwd())
    task = tree.get("task", "classification")
    if task not in list(TASKS):
        raise ValueError(f"`task` of {path} must be one of {', '.join(TASKS)}, got {task!r}.")
    data_type, excluded = TASKS[task]
    types = {name: hint for name, hint in _types_of(Recipe).items() if name not in ("name", *excluded)}
    _check_values("recipe", tree, dict.fromkeys(types, Any))
    tree = {name: values for name, values in tree.items() if values is not None}  # an empty section
    if "data" not in tree:
        raise ValueError(f"{path} lacks the section `data`.")
    sections = {"data": data_type, "lora": LoraRecipe, "augmentation": Augmentation, "evaluation": EvaluationRecipe}
    for name in sections.keys() & tree.keys():
        _check_values(name, tree[name], _types_of(sections[name]))
        try:
            tree[name] = sections[name](**tree[name])
        except TypeError as error:  # a required key is missing
            raise ValueError(f"Section `{name}`: {error}.") from error
    _check_values("recipe", tree, types)
    return Recipe(name=path.stem, **tree)


def _load_tree(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    """Reads a recipe file and merges it into its base, which may have a base too. `derived` are the files that led
    here."""
    path = path.resolve()
    if path in derived:
        raise ValueError(f"Recipes are each other's base: {' -> '.join(map(str, (*derived, path)))}.")
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}" + (f", the base of {derived[-1]}." if derived else "."))
    tree = _parse(str(path), path) or {}
    if not isinstance(tree, dict) or not isinstance(tree.get("base", ""), str):
        raise ValueError(f"{path} must hold sections, and its `base` must be a path.")
    _anchor_files(tree, path.parent)
    base = tree.pop("base", None)
    return tree if base is None else _merge(_load_tree(path.parent / base, (*derived, path)), tree)


def _parse(name: str, source: Path | str) -> Any:
    try:
        tree = YAML_1_2.load(source)
    except (YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{name} is not valid YAML: {error}") from error
    values = [tree]
    for index, value in enumerate(values):  # they become more on the way
        if index == MAX_VALUES:
            raise ValueError(f"{name} must have at most {MAX_VALUES} values, aliases included.")
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return tree


def _anchor_files(tree: dict[str, Any], folder: Path) -> None:
    """Makes the relative paths of a recipe's data start at `folder`. Values of a wrong type are refused later."""

    def anchor(file: Any) -> Any:
        is_path = isinstance(file, str) and file and "://" not in file
        return str((folder / Path(file).expanduser()).resolve()) if is_path else file

    data = tree.get("data")
    if isinstance(data, dict):
        if isinstance(data.get("data_files"), dict):
            data["data_files"] = {split: anchor(file) for split, file in data["data_files"].items()}
        if "data_dir" in data:
            data["data_dir"] = anchor(data["data_dir"])


def _merge(base: Any, changes: Any) -> Any:
    """Merges `changes` into `base`: dictionaries key by key; any other value is replaced."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return base | {key: _merge(base.get(key), value) for key, value in changes.items()}


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"An override must read `section.key=value`, got {override!r}.")
    *parents, last = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ValueError(f"`{key}` cannot be set: `{parent}` is no section, but {tree!r}.")
    tree[last] = _parse(override, value)


def _types_of(section_type: type) -> dict[str, Any]:
    hints = get_type_hints(section_type)
    return {f.name: hints[f.name] for f in fields(section_type) if f.init}


def _check_values(where: str, values: Any, types: dict[str, Any]) -> None:
    """Raises a `ValueError` for what is no mapping, an unknown name, or a value of a wrong type."""
    if not isinstance(values, dict):
        raise ValueError(f"`{where}` must be a mapping of names to values, got {values!r}.")
    if unknown := sorted(set(map(str, values)) - types.keys()):
        hint = suggest(unknown, types)
        raise ValueError(f"Unknown keys in `{where}`: {', '.join(unknown)}. Allowed: {', '.join(types)}.{hint}")
    for name, value in values.items():
        for given in (value, _as_float(value)):
            with suppress(TypeError):
                type_validator(name, given, types[name])
                break
        else:
            kind = types[name].__name__ if isinstance(types[name], type) else types[name]
            raise ValueError(f"`{where}.{name}` must be {kind}, got {value!r}.")


def _as_float(value: Any) -> Any:
    """A whole number may be given for a `float`, and a list for a `tuple`."""
    if type(value) is int:
        return float(value)
    return tuple(map(_as_float, value)) if isinstance(value, list) else value
