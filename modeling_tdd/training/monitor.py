# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The log of a training run: a JSON lines file, Accelerate's trackers, and a progress bar."""

import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from tqdm.auto import tqdm


@dataclass
class StepRecord:
    r"""
    The record of one optimiser step. The times are those of this process; the rest is over all processes.

    Args:
        loss (`float`): The mean loss.
        grad_norm (`float`): The gradient's norm before clipping.
        loss_sums (`list[list[float]]`, *optional*):
            `loss_by_timestep` of [`TDDImageClassifierOutput`], summed over the step.
        skipped (`bool`): Whether the step was skipped, so that the weights did not change.
        seconds (`float`): Duration of the step.
        wait_seconds (`float`): The part of `seconds` that was spent waiting for data.
    """

    loss: float
    grad_norm: float
    loss_sums: list[list[float]] | None
    skipped: bool
    seconds: float
    wait_seconds: float


def default_trackers() -> list[str]:
    """TensorBoard where it is installed, otherwise none."""
    return ["tensorboard"] if is_tensorboard_available() else []


def peak_memory_gib() -> float:
    """The largest amount of memory that this process has held: GPU memory on a GPU, resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Monitor:
    r"""
    Writes one line of means every `log_every` steps to `log.jsonl`, and the same to the trackers.

    A line holds `step`, `epoch`, `loss`, `learning_rate`, `grad_norm`, `images_per_second`, `data_wait_share`,
    `memory_gib`, `skipped_steps` (of the whole run) and, for a diffusion model, `loss_by_timestep`: the mean loss in
    each tenth of the timesteps, without the timestep's coefficient. It is `null` for a tenth in which no timestep was
    drawn. After an evaluation a line holds `step`, `epoch` and `eval`.

    Args:
        accelerator (`Accelerator`): Its `project_dir` is the folder.
        log_every (`int`): Steps per line.
        batch_size (`int`): Images per step.
        total_steps (`int`): Number of steps of the run.
        step (`int`): The step to resume from. Later lines of the file, of an interrupted run, are removed.
        description (`str`): Text of the progress bar.
    """

    def __init__(
        self, accelerator: Accelerator, log_every: int, batch_size: int, total_steps: int, step: int, description: str
    ):
        self.accelerator = accelerator
        self.log_every = log_every
        self.batch_size = batch_size
        self.file = Path(accelerator.project_dir) / "log.jsonl"
        self.records: list[StepRecord] = []
        if accelerator.is_main_process:
            self._drop_lines_after(step)
        accelerator.init_trackers("modeling_tdd", init_kwargs={"tensorboard": {"purge_step": step + 1}})
        disable = not accelerator.is_local_main_process
        self.bar = tqdm(total=total_steps, initial=step, desc=description, disable=disable)

    def _drop_lines_after(self, step: int) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() and step > 0 else []
        # A killed process may have left an incomplete last line.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self.file.write_text("".join(line + "\n" for line in kept))

    def record(self, record: StepRecord, step: int, epoch: int, learning_rate: float, skipped_steps: int) -> None:
        """Adds the record of one step, and writes a line when one is due."""
        self.records.append(record)
        self.bar.update()
        if step % self.log_every:
            return
        seconds = sum(r.seconds for r in self.records)
        taken = [r for r in self.records if not r.skipped]
        line = {
            "step": step,
            "epoch": epoch,
            "loss": _mean([r.loss for r in taken]),
            "learning_rate": learning_rate,
            "grad_norm": _mean([r.grad_norm for r in taken]),
            "images_per_second": len(self.records) * self.batch_size / seconds,
            "data_wait_share": sum(r.wait_seconds for r in self.records) / seconds,
            "memory_gib": peak_memory_gib(),
            "skipped_steps": skipped_steps,
        }
        sums = [r.loss_sums for r in taken if r.loss_sums is not None]
        if sums:
            line["loss_by_timestep"] = [
                loss / weight if weight > 0 else None for loss, weight in torch.tensor(sums).sum(0).tolist()
            ]
        self._write(line)
        self.bar.set_postfix(epoch=epoch, loss="none" if line["loss"] is None else f"{line['loss']:.3f}")
        self.records.clear()

    def evaluated(self, score: float, step: int, epoch: int) -> None:
        """Logs the score of an evaluation."""
        self._write({"step": step, "epoch": epoch, "eval": score})
        if not self.bar.disable:
            self.bar.write(f"epoch {epoch}: eval {score:.2%}")

    def _write(self, line: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        values = {f"loss_by_timestep/{i}": value for i, value in enumerate(line.get("loss_by_timestep", []))}
        values |= {name: value for name, value in line.items() if name not in ("step", "loss_by_timestep")}
        step = line["step"]
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        self.bar.close()
        for tracker in self.accelerator.trackers:  # `end_training` would also destroy the process group
            tracker.finish()


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
