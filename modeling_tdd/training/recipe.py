# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Recipes: all settings of a training run, read from YAML."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .arguments import TDDTrainingArguments
from .batches import Augmentation
from .data import CaptionData, LabelData
from .lora import LoraRecipe


@dataclass
class EvaluationRecipe:
    """The settings of the final table: all pairs of a number of denoising steps and a guidance scale (1.0: none)."""

    num_inference_steps: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50])
    guidance_scale: list[float] = field(default_factory=lambda: [1.0])
    # Settings are chosen on the first split, so that only it needs all of them: the numbers of steps for the others
    test_inference_steps: list[int] | None = None

    def grid(self, is_first_split: bool) -> list[dict[str, Any]]:
        """The settings of each cell of a split's table, as arguments of the model."""
        counts = self.num_inference_steps if is_first_split else self.test_inference_steps or self.num_inference_steps
        return [{"num_inference_steps": n, "guidance_scale": scale} for scale in self.guidance_scale for n in counts]


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
        if self.feature_views != 1 and not self.model.get("freeze_encoder"):
            raise ValueError(f"`feature_views` needs `model.freeze_encoder`, got {self.feature_views}.")
        _check_keys("training", self.training, [f.name for f in fields(TDDTrainingArguments) if f.init])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# What `data` is for each task, and the sections that the task does not have
TASKS: dict[str, tuple[type, tuple[str, ...]]] = {
    "classification": (LabelData, ("tokenizer", "feature_views")),
    "captioning": (CaptionData, ()),
    "encoder": (CaptionData, ("checkpoint", "encoder", "tokenizer", "feature_views", "lora", "evaluation")),
}


YAML_1_2 = YAML(typ="safe", pure=True)  # in which 1e-4 is a number, `no` a word, and a key twice an error


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
        `ValueError`: for an unknown task, section or key, a missing section or key, an override that is not
            `key=value`, a missing file, or a recipe that is its own base. The message says what is allowed.
    """
    path = Path(path)
    tree = _load_tree(path, ())
    for override in overrides or []:
        _apply_override(tree, override)
    _anchor_files(tree, Path.cwd())
    task = tree.get("task", "classification")
    if task not in TASKS:
        raise ValueError(f"`task` of {path} must be one of {', '.join(TASKS)}, got {task!r}.")
    data_type, excluded = TASKS[task]
    _check_keys("recipe", tree, [f.name for f in fields(Recipe) if f.name not in ("name", *excluded)])
    if "data" not in tree:
        raise ValueError(f"{path} lacks the section `data`.")
    types = {"data": data_type, "lora": LoraRecipe, "augmentation": Augmentation, "evaluation": EvaluationRecipe}
    return Recipe(name=path.stem, **{name: _read(name, values, types.get(name)) for name, values in tree.items()})


def _load_tree(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    """Reads a recipe file and merges it into its base, which may have a base too. `derived` are the files that led
    here."""
    path = path.resolve()
    if path in derived:
        raise ValueError(f"Recipes are each other's base: {' -> '.join(map(str, (*derived, path)))}.")
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}" + (f", the base of {derived[-1]}." if derived else "."))
    try:
        tree = YAML_1_2.load(path) or {}
    except YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    _anchor_files(tree, path.parent)
    base = tree.pop("base", None)
    return tree if base is None else _merge(_load_tree(path.parent / base, (*derived, path)), tree)


def _anchor_files(tree: dict[str, Any], folder: Path) -> None:
    """Makes the relative paths of a recipe's data start at `folder`."""

    def anchor(file: str) -> str:
        return file if "://" in file else str((folder / file).resolve())

    data = tree.get("data") or {}
    if data.get("data_files"):
        data["data_files"] = {split: anchor(file) for split, file in data["data_files"].items()}
    if data.get("data_dir"):
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
        tree = tree.setdefault(parent, {})
    tree[last] = YAML_1_2.load(value)


def _read(name: str, values: Any, section_type: type | None) -> Any:
    """Makes a section's dataclass. Plain values and dictionaries are returned as they are."""
    if not is_dataclass(section_type) or values is None:
        return values
    _check_keys(name, values, [f.name for f in fields(section_type)])
    try:
        return section_type(**values)
    except TypeError as error:  # a required key is missing
        raise ValueError(f"Section `{name}`: {error}.") from error


def _check_keys(where: str, given: dict[str, Any], allowed: list[str]) -> None:
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise ValueError(f"Unknown keys in `{where}`: {', '.join(unknown)}. Allowed: {', '.join(allowed)}.")
