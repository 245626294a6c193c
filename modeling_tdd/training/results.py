# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The settings that a run was started with, and the model that it saves."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from .folders import new_folder, write_json


# Fields of `training` that may differ between a run and its resumption, by how their names begin
FREE_SETTINGS = ("cpu_threads", "dataloader_", "eval_", "logging_", "max_skipped", "report_to", "save_")
FREE_KEYS = ("scores", *(f"recipe.training.{name}" for name in FREE_SETTINGS))


def check_same_run(file: Path, run: dict[str, Any]) -> None:
    """Writes a run's settings to `file` when it starts. Raises a `ValueError` if it is resumed with other ones, or if
    it has ended with other ones, which its result.json holds."""
    settings = json.loads(json.dumps(dict(_flatten(run))))  # as JSON reads them back: a tuple is a list
    if not file.exists():
        return write_json(file, settings)
    started = dict(_flatten(json.loads(file.read_text())))
    # Files of earlier versions lack the evaluation splits
    compared = started.keys() | {name for name in settings if not name.startswith("recipe.data.eval_")}
    names = sorted(name for name in compared if started.get(name) != settings.get(name))
    if names:
        differences = "; ".join(f"{name} was {started.get(name)}, is {settings.get(name)}" for name in names)
        way_out = "remove the folder" if file.name == "result.json" else "--restart, which removes the checkpoints"
        raise ValueError(
            f"{file.parent} is a run with other settings: {differences}. Use the same settings, another --output-dir, "
            f"or {way_out}."
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`("a.b", 1)` for `{"a": {"b": 1}}`, without the free settings and those of the final table."""
    for name, value in tree.items():
        if isinstance(value, dict) and name != "evaluation":
            yield from _flatten(value, f"{prefix}{name}.")
        elif name != "evaluation" and not f"{prefix}{name}".startswith(FREE_KEYS):
            yield f"{prefix}{name}", value


@contextmanager
def plain_class(model: nn.Module) -> Iterator[None]:
    """Gives a model its own class while it is saved, in place of the one that FSDP2 has put there."""
    sharded = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = sharded.__bases__[1]
    try:
        yield
    finally:
        model.__class__ = sharded


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    processor: BaseImageProcessor | ProcessorMixin,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Saves model and processor to `folder` as a whole, see [`new_folder`]. `state_dict` takes the place of the
    model's own weights, which may be sharded."""
    with new_folder(folder) as new:
        with plain_class(model):
            model.save_pretrained(new, state_dict=state_dict)
        processor.save_pretrained(new)
