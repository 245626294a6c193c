# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The device batches of an epoch, starting where an interrupted run stopped."""

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset

from .checkpoints import Progress, any_process
from .data import Batch


def count_steps(accelerator: Accelerator, loader: DataLoader, steps_per_epoch: int | None) -> int:
    """The number of whole optimiser steps in an epoch: `steps_per_epoch` if given, else by the loader's length."""
    if steps_per_epoch is not None:
        return steps_per_epoch
    try:
        return len(loader) // accelerator.gradient_accumulation_steps
    except TypeError as error:
        raise ValueError("`steps_per_epoch` must be given for a loader without a length.") from error


def stream_position(loader: DataLoader) -> dict[str, Any] | None:
    """This process's position in a stream after the last batch that the loader gave. `None` for other data."""
    return loader.dataset.state_dict() if isinstance(loader.dataset, IterableDataset) else None


def epoch_batches(
    accelerator: Accelerator,
    loader: DataLoader,
    progress: Progress,
    steps_per_epoch: int,
    stream: dict[str, Any] | None,
) -> Iterator[tuple[list[Batch], float]]:
    r"""
    Yields the device batches of each step of an epoch from `progress.step_in_epoch` on, and the seconds spent waiting
    for them.

    An epoch of a stream ends for all processes as soon as one of them has no more data.

    Args:
        accelerator (`Accelerator`): The accelerator of the run.
        loader (`DataLoader`): The loader of this process's device batches.
        progress ([`Progress`]): How far the run has come.
        steps_per_epoch (`int`): The largest number of steps in an epoch.
        stream (`dict`, *optional*): The position in a stream from which to resume.
    """
    steps = accelerator.gradient_accumulation_steps
    is_stream = isinstance(loader.dataset, IterableDataset)
    (loader.dataset if is_stream else loader).set_epoch(progress.epoch)
    if stream is not None:
        loader.dataset.load_state_dict(stream)
    elif progress.step_in_epoch > 0 and not is_stream:
        loader = accelerator.skip_first_batches(loader, progress.step_in_epoch * steps)
    batches = iter(loader)
    for _ in range(progress.step_in_epoch, steps_per_epoch):
        start = time.perf_counter()
        group = [send_to_device(batch, accelerator.device) for batch in islice(batches, steps)]
        if is_stream and any_process(accelerator, len(group) < steps):
            return
        yield group, time.perf_counter() - start
