# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Training state on disc, to go on from: written whole or not at all, by all processes together, the last few kept."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from torch import nn

from .results import write_json


@dataclass
class Progress:
    r"""
    How far a run is.

    Args:
        step (`int`): Optimiser steps, skipped ones too.
        epoch (`int`): The epoch that is under way, from 0.
        step_in_epoch (`int`): Steps of it.
        skipped_steps (`int`): Steps that left the weights as they were, since something was not finite.
        skipped_in_a_row (`int`): Those among them since the last step that did not.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is true in any process. All processes must call it."""
    flags = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(flags, reduction="sum").item() > 0)


class Checkpoints:
    r"""
    The checkpoints of a run, in `checkpoints/step-XXXXXXXX` of its folder.

    A checkpoint is what `Accelerator.save_state` writes (model, optimiser, schedule, scaler, random states), the
    moving average as `ema.safetensors`, and `progress.json`. Some of Accelerate's files are pickles, and it reads them
    with `weights_only=True`: tensors and numbers, no code.

    Args:
        accelerator (`Accelerator`): Its `project_dir` is the folder; on several machines all must see it.
        ema (`nn.Module`): The moving average, whole in each process.
        keep (`int`): How many to keep, at least 1.
        settings (`dict`): What the run must have in common with a checkpoint that it goes on from.
    """

    def __init__(self, accelerator: Accelerator, ema: nn.Module, keep: int, settings: dict[str, Any]):
        self.accelerator = accelerator
        self.ema = ema
        self.keep = keep
        self.settings = json.loads(json.dumps(settings))  # as they are read back: a tuple is a list
        self.folder = Path(accelerator.project_dir) / "checkpoints"

    def saved(self) -> list[Path]:
        """The complete checkpoints, the last one last."""
        return sorted(self.folder.glob("step-*"))

    def describe_last(self) -> str:
        saved = self.saved()
        return f"The last good checkpoint is {saved[-1]}" if saved else "There is no earlier checkpoint"

    def resume(self, resume: str) -> tuple[Progress, dict[str, Any] | None]:
        r"""
        Loads a checkpoint into everything that the accelerator has prepared, and removes later ones of the run.

        Args:
            resume (`str`): `"auto"`: the last checkpoint, if there is one. `"none"`: start anew. Or a checkpoint.

        Returns:
            `tuple`: How far the run is, and this process's position in a stream of data, if one was saved.

        Raises:
            `ValueError`: if a path is no checkpoint, or one of a run with other settings. The message names them.
        """
        source = None if resume == "none" else Path(resume)
        if resume == "auto":
            source = self.saved()[-1] if self.saved() else None
        progress, stream = Progress(), None
        if source is not None:
            progress = self._read_progress(source)
            self.accelerator.load_state(source)
            load_model(self.ema, source / "ema.safetensors")
            stream_file = source / f"stream-{self.accelerator.process_index}.json"
            stream = json.loads(stream_file.read_text()) if stream_file.exists() else None
            self.accelerator.print(f"Going on from {source}: step {progress.step}, epoch {progress.epoch + 1}.")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for path in self.saved():
                if path.name > f"step-{progress.step:08d}" or source is None:
                    shutil.rmtree(path)
        self.accelerator.wait_for_everyone()
        return progress, stream

    def _read_progress(self, source: Path) -> Progress:
        if not (source / "progress.json").exists():
            raise ValueError(f"`resume` must be 'auto', 'none' or a checkpoint's folder, got {str(source)!r}.")
        content = json.loads((source / "progress.json").read_text())
        names = {*content["settings"], *self.settings}
        differences = [
            f"{name} was {content['settings'].get(name)}, is {self.settings.get(name)}"
            for name in sorted(names)
            if content["settings"].get(name) != self.settings.get(name)
        ]
        if differences:
            raise ValueError(
                f"{source} is of a run with other settings: {'; '.join(differences)}. Go on with those, or start anew "
                "with `--resume none`, which removes the run's checkpoints."
            )
        return Progress(**content["progress"])

    def save(self, progress: Progress, stream: dict[str, Any] | None = None) -> Path:
        r"""
        Writes a checkpoint to a temporary folder and moves it into place; then removes the oldest ones.

        Args:
            progress ([`Progress`]): How far the run is.
            stream (`dict`, *optional*): This process's position in a stream of data.

        Raises:
            `OSError`: in all processes, if any of them could not write. Earlier checkpoints are left as they are.
        """
        folder = self.folder / f"step-{progress.step:08d}"
        if folder.exists():
            return folder  # a run that is stopped just after it was resumed
        partial = self.folder / ".partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        error = None
        try:
            self._write(partial, progress, stream)
        except Exception as failure:  # safetensors, PyTorch and Python each raise their own on a full disc
            error = failure
        if any_process(self.accelerator, error is not None):
            free = shutil.disk_usage(self.folder).free / 2**20
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"The checkpoint of step {progress.step} could not be written to {self.folder}, where {free:.1f} MiB "
                f"were free: {error or 'another process failed'}. {self.describe_last()}."
            ) from error
        if self.accelerator.is_main_process:
            os.replace(partial, folder)
            for path in self.saved()[: -self.keep]:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()
        return folder

    def _write(self, folder: Path, progress: Progress, stream: dict[str, Any] | None) -> None:
        self.accelerator.save_state(folder)
        if stream is not None:
            write_json(folder / f"stream-{self.accelerator.process_index}.json", stream)
        if self.accelerator.is_main_process:
            save_model(self.ema, folder / "ema.safetensors")
            write_json(folder / "progress.json", {"progress": asdict(progress), "settings": self.settings})
