# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The training loop. Accelerate moves data and synchronises processes, AdamW updates the weights, and timm keeps their
moving average."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from datasets import Dataset
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from .batches import count_steps, epoch_batches, stream_position
from .checkpoints import Checkpoints, Progress, any_process
from .data import Batch, Example
from .ema import update_average
from .interruption import StopRequest, leave_signals_to_the_trainer
from .monitor import Monitor, StepRecord, default_trackers
from .recipe import TrainingRecipe
from .seeding import MODEL, EpochSampler, SeededDataset, seed_for


# The settings of a recipe's `training` that may differ between a run and the checkpoint that it resumes from
FREE_SETTINGS = (
    "num_workers",
    "cpu_threads",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "trackers",
    "max_skipped_steps",
)


def fast_mixed_precision() -> str:
    """`"bf16"` where the hardware multiplies matrices faster in it, `"no"` elsewhere.

    CPUs with AMX do so 19 times as fast as in float32. On a CPU without AMX bf16 was over 100 times slower.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "no"


def make_accelerator(recipe: TrainingRecipe, folder: Path | None = None) -> Accelerator:
    r"""
    Makes an Accelerator that reaches the recipe's batch size by gradient accumulation, for any number of processes.

    Args:
        recipe ([`TrainingRecipe`]): The settings of the optimisation.
        folder (`Path`, *optional*): Folder for the checkpoints and logs of [`train`].

    Raises:
        `ValueError`: if the batch size is not a whole number of accumulated device batches.
    """
    if recipe.cpu_threads is not None:
        torch.set_num_threads(recipe.cpu_threads)
    precision = fast_mixed_precision() if recipe.mixed_precision == "auto" else recipe.mixed_precision
    # Without `cpu=True` Accelerate runs processes that have no GPU as separate trainings.
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=not torch.accelerator.is_available(),
        # An epoch has whole optimiser steps only, and the loader is one batch ahead of the loop.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        project_config=ProjectConfiguration(project_dir=folder, logging_dir=folder),
        log_with=[] if folder is None else default_trackers() if recipe.trackers is None else recipe.trackers,
        step_scheduler_with_optimizer=False,
    )
    device_batch_size = recipe.device_batch_size or recipe.batch_size // accelerator.num_processes
    steps, remainder = divmod(recipe.batch_size, max(1, device_batch_size) * accelerator.num_processes)
    if remainder or steps == 0:
        raise ValueError(
            f"`training.batch_size` must be a multiple of `device_batch_size` x processes, got {recipe.batch_size} "
            f"and {device_batch_size} x {accelerator.num_processes}."
        )
    accelerator.gradient_accumulation_steps = steps
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, precision {precision}: batch size "
        f"{recipe.batch_size} = {device_batch_size} x {accelerator.num_processes} x {steps} accumulation step(s)"
    )
    return accelerator


def make_loader(
    accelerator: Accelerator,
    recipe: TrainingRecipe,
    dataset: Dataset,
    collate: Callable[[list[Example]], Batch],
    shuffle: bool,
    seed: int = 0,
) -> DataLoader:
    r"""
    Makes a loader of device batches, which Accelerate shards over the processes.

    For training (`shuffle=True`), order and augmentation depend on the seed alone, see [`EpochSampler`] and
    [`SeededDataset`].
    """
    device_batch_size = recipe.batch_size // (accelerator.gradient_accumulation_steps * accelerator.num_processes)
    if shuffle and len(dataset) < recipe.batch_size:
        raise ValueError(f"`training.batch_size` is {recipe.batch_size}, but there are only {len(dataset)} images.")
    loader = DataLoader(
        SeededDataset(dataset, seed) if shuffle else dataset,
        batch_size=device_batch_size,
        sampler=EpochSampler(len(dataset), recipe.batch_size, seed) if shuffle else None,
        drop_last=shuffle,
        collate_fn=collate,
        num_workers=recipe.num_workers,
        persistent_workers=recipe.num_workers > 0,
        worker_init_fn=leave_signals_to_the_trainer,
    )
    return accelerator.prepare(loader)


@dataclass
class TrainingState:
    """What [`train`] trains, and how far it has come."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: ModelEmaV3
    seed: int
    progress: Progress


def prepare_training(
    accelerator: Accelerator, recipe: TrainingRecipe, model: nn.Module, steps_per_epoch: int, seed: int
) -> TrainingState:
    """Makes the optimiser, the learning-rate schedule and the moving average, and hands them to Accelerate."""
    accelerator.print(
        f"learning rate {_scientific(recipe.learning_rate)} = base {_scientific(recipe.base_learning_rate)} x batch "
        f"{recipe.batch_size} / 256"
    )
    # The average is made before Accelerate shards the model, so that it is whole in each process.
    ema = ModelEmaV3(model.to(accelerator.device), decay=recipe.ema_decay, use_warmup=recipe.ema_warmup)
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(model, recipe.weight_decay),
        lr=recipe.learning_rate,
        betas=(0.9, recipe.adam_beta2),
        fused=True,
    )
    scheduler = get_cosine_schedule_with_warmup(
        optimizer, round(recipe.warmup_epochs * steps_per_epoch), steps_per_epoch * recipe.epochs
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    return TrainingState(accelerator, model, optimizer, scheduler, ema, seed, Progress())


def _scientific(number: float) -> str:
    """`"1.6e-03"`: a number with no more digits than it has."""
    return np.format_float_scientific(number, precision=4, trim="-", exp_digits=2)


def update_ema(state: TrainingState) -> None:
    """One step of the moving average. All processes must call it, since weights that FSDP sharded are gathered."""
    weights = state.accelerator.unwrap_model(state.model).state_dict()
    weights = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}
    update_average(state.ema, SimpleNamespace(state_dict=lambda: weights), state.progress.step)


def take_step(state: TrainingState, batches: list[Batch], max_grad_norm: float) -> StepRecord:
    r"""
    Takes one optimiser step on this process's device batches.

    If the loss or the gradient is not finite in any process, no process changes its weights.
    """
    accelerator, progress = state.accelerator, state.progress
    start = time.perf_counter()
    sums = None
    for index, batch in enumerate(batches):
        # The place of this device batch in the epoch, whose device batches go to the processes in turn
        place = (progress.step_in_epoch * len(batches) + index) * accelerator.num_processes + accelerator.process_index
        set_seed(seed_for(state.seed, MODEL, progress.epoch, place))
        with accelerator.accumulate(state.model):
            outputs = state.model(**batch)
            accelerator.backward(outputs.loss)
        by_timestep = getattr(outputs, "loss_by_timestep", None)
        values = outputs.loss.detach().float()[None]
        if by_timestep is not None:
            values = torch.cat([values, by_timestep.float().flatten()])
        sums = values if sums is None else sums + values
    grad_norm = accelerator.clip_grad_norm_(state.model.parameters(), max_grad_norm)
    grad_norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
    loss, *by_timestep = accelerator.reduce(sums, reduction="sum").tolist()
    loss /= len(batches) * accelerator.num_processes
    is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if is_finite or accelerator.scaler is not None:  # the scaler lowers its scale when it sees an infinite gradient
        state.optimizer.step()
    skipped = not is_finite or accelerator.optimizer_step_was_skipped
    state.optimizer.zero_grad()
    state.scheduler.step()
    progress.step += 1
    progress.step_in_epoch += 1
    progress.skipped_steps += skipped
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
    if not skipped:
        update_ema(state)
    pairs = [by_timestep[i : i + 2] for i in range(0, len(by_timestep), 2)]
    return StepRecord(loss, grad_norm, pairs or None, skipped, time.perf_counter() - start, wait_seconds=0.0)


def train(
    accelerator: Accelerator,
    recipe: TrainingRecipe,
    model: PreTrainedModel,
    loader: DataLoader,
    evaluate: Callable[[PreTrainedModel], float],
    description: str = "training",
    seed: int = 0,
    resume: str = "auto",
    steps_per_epoch: int | None = None,
) -> PreTrainedModel:
    r"""
    Trains a model in place. Checkpoints and logs go to the accelerator's `project_dir`.

    Args:
        accelerator (`Accelerator`): An accelerator of [`make_accelerator`] with a folder.
        recipe ([`TrainingRecipe`]): The settings of the optimisation.
        model (`PreTrainedModel`): A model that returns a `loss` in training mode.
        loader (`DataLoader`):
            A loader of [`make_loader`], or the loader of an `IterableDataset` that yields the device batches of this
            process alone. Such a data set has `set_epoch(int)`, and `state_dict()` and `load_state_dict(dict)` for the
            position after the last batch that the loader gave. The position is numbers and strings, for JSON.
        evaluate (`Callable`): A function from a model to its score, which is logged during training.
        description (`str`, *optional*): Text of the progress bar.
        seed (`int`, *optional*, defaults to 0): Seed of everything that training draws at random.
        resume (`str`, *optional*, defaults to `"auto"`): As in [`Checkpoints.resume`].
        steps_per_epoch (`int`, *optional*):
            The largest number of optimiser steps in an epoch. By default it follows from the loader's length.

    Returns:
        `PreTrainedModel`: the moving average of the model in eval mode. This is the model to evaluate and to publish.

    Raises:
        `ValueError`: if the accelerator has no folder, if `steps_per_epoch` is missing for a loader without a length,
            or as in [`Checkpoints.resume`].
        `OSError`: if a checkpoint could not be written.
        `FloatingPointError`: after more than `max_skipped_steps` steps in a row that were not finite.
        `SystemExit`: after SIGTERM or SIGINT, once a checkpoint is saved. Its code is 128 plus the signal's number.
    """
    if accelerator.project_dir is None:
        raise ValueError("`train` needs a folder: `make_accelerator(recipe, folder)`.")
    steps_per_epoch = count_steps(accelerator, loader, steps_per_epoch)
    state = prepare_training(accelerator, recipe, model, steps_per_epoch, seed)
    settings = {name: value for name, value in asdict(recipe).items() if name not in FREE_SETTINGS}
    settings |= {"seed": seed, "steps_per_epoch": steps_per_epoch, "processes": accelerator.num_processes}
    checkpoints = Checkpoints(accelerator, state.ema.module, recipe.keep_checkpoints, settings)
    state.progress, stream = checkpoints.resume(resume)
    progress = state.progress
    total_steps = steps_per_epoch * recipe.epochs
    monitor = Monitor(accelerator, recipe.log_every, recipe.batch_size, total_steps, progress.step, description)
    with StopRequest() as stop:
        while progress.epoch < recipe.epochs:
            state.model.train()
            for batches, wait in epoch_batches(accelerator, loader, progress, steps_per_epoch, stream):
                learning_rate = state.scheduler.get_last_lr()[0]
                record = take_step(state, batches, recipe.max_grad_norm)
                record.seconds, record.wait_seconds = record.seconds + wait, wait
                monitor.record(record, progress.step, progress.epoch + 1, learning_rate, progress.skipped_steps)
                guard(state, checkpoints, recipe, loader, stop)
            stream = None
            if (progress.epoch + 1) % recipe.eval_every == 0 or progress.epoch + 1 == recipe.epochs:
                monitor.evaluated(evaluate(state.ema.module), progress.step, progress.epoch + 1)
            progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
    checkpoints.save(progress)
    monitor.close()
    accelerator.free_memory()
    return state.ema.module


def guard(
    state: TrainingState, checkpoints: Checkpoints, recipe: TrainingRecipe, loader: DataLoader, stop: StopRequest
) -> None:
    """After a step: stops a run whose loss is not finite, saves a checkpoint when one is due, and saves and exits when
    a signal has asked for it."""
    accelerator, progress = state.accelerator, state.progress
    if progress.skipped_in_a_row > recipe.max_skipped_steps:
        raise FloatingPointError(
            f"The loss or its gradient was not finite in {progress.skipped_in_a_row} steps in a row, up to step "
            f"{progress.step}. {checkpoints.describe_last()}."
        )
    must_stop = any_process(accelerator, stop.signal is not None)
    if must_stop or progress.step % recipe.checkpoint_every == 0:
        folder = checkpoints.save(progress, stream_position(loader))
    if must_stop:
        accelerator.print(f"Stopped by a signal. The same command resumes from {folder}.")
        raise SystemExit(128 + (stop.signal or StopRequest.SIGNALS[0]))
