# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of the training state. All processes write one together, completely or not at all, and the last few are
kept."""

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
    How far a run has come.

    Args:
        step (`int`): Number of optimiser steps, including skipped ones.
        epoch (`int`): The current epoch, counted from 0.
        step_in_epoch (`int`): Number of steps in the current epoch.
        skipped_steps (`int`): Number of steps that did not change the weights because the loss or its gradient was
            not finite.
        skipped_in_a_row (`int`): Number of skipped steps since the last step that was not skipped.
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

    A checkpoint holds what `Accelerator.save_state` writes (model, optimiser, schedule, scaler, random states), the
    moving average as `ema.safetensors`, and `progress.json`. Some of Accelerate's files are pickles. They are read
    with `weights_only=True`, which allows tensors and numbers but no code.

    Args:
        accelerator (`Accelerator`): Its `project_dir` is the folder. If there are several machines, all must see it.
        ema (`nn.Module`): The moving average, whole in each process.
        keep (`int`): Number of checkpoints to keep, at least 1.
        settings (`dict`): Settings that the run must share with a checkpoint that it resumes from.
    """

    def __init__(self, accelerator: Accelerator, ema: nn.Module, keep: int, settings: dict[str, Any]):
        self.accelerator = accelerator
        self.ema = ema
        self.keep = keep
        self.settings = json.loads(json.dumps(settings))  # as JSON reads them back: a tuple is a list
        self.folder = Path(accelerator.project_dir) / "checkpoints"

    def saved(self) -> list[Path]:
        """The complete checkpoints, in the order of their steps."""
        return sorted(self.folder.glob("step-*"))

    def describe_last(self) -> str:
        saved = self.saved()
        return f"The last good checkpoint is {saved[-1]}" if saved else "There is no earlier checkpoint"

    def resume(self, resume: str) -> tuple[Progress, dict[str, Any] | None]:
        r"""
        Loads a checkpoint into everything that the accelerator has prepared, and removes the run's later checkpoints.

        Args:
            resume (`str`):
                `"auto"` loads the last checkpoint, if there is one. `"none"` starts anew. Anything else is the folder
                of a checkpoint.

        Returns:
            `tuple`: how far the run has come, and this process's position in a stream of data, if one was saved.

        Raises:
            `ValueError`: if a path is not a checkpoint, or is that of a run with other settings, which the message
                names.
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
            self.accelerator.print(f"Resuming from {source}: step {progress.step}, epoch {progress.epoch + 1}.")
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
                f"{source} is a checkpoint of a run with other settings: {'; '.join(differences)}. Use the same "
                "settings, or start anew with `--resume none`, which removes the run's checkpoints."
            )
        return Progress(**content["progress"])

    def save(self, progress: Progress, stream: dict[str, Any] | None = None) -> Path:
        r"""
        Writes a checkpoint to a temporary folder, moves it into place, and removes the oldest ones.

        Args:
            progress ([`Progress`]): How far the run has come.
            stream (`dict`, *optional*): This process's position in a stream of data.

        Returns:
            `Path`: the checkpoint's folder.

        Raises:
            `OSError`: in all processes, if any of them could not write. Earlier checkpoints stay as they are.
        """
        folder = self.folder / f"step-{progress.step:08d}"
        if folder.exists():
            return folder  # the run was stopped just after it was resumed
        partial = self.folder / ".partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)  # what a killed process left behind
            self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        error = None
        try:
            self._write(partial, progress, stream)
        except Exception as failure:  # on a full disk safetensors, PyTorch and Python raise different errors
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
