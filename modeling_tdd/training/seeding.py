# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Random draws that depend on the seed and on the place in training alone, and on no state carried along.

Every device batch has seeds of its own, from the run's seed, the epoch and its place in the epoch. So a resumed run
draws what the unbroken one would have drawn, whatever the number of data workers; and with the same
`device_batch_size` the device batches, and what they draw, are the same whatever the number of processes.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch.utils.data import Dataset, Sampler


# What the draws are for: the same place in training never draws the same numbers twice.
ORDER, DATA, MODEL = range(3)

Key = tuple[int, int, int]


def seed_for(*key: int) -> int:
    """A 32-bit seed from several numbers: seeds that differ in one of them have nothing to do with each other."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class EpochSampler(Sampler[Key]):
    r"""
    The rows of a data set in an order that depends on the seed and the epoch alone, for a [`SeededDataset`].

    Args:
        num_rows (`int`): Of the data set.
        batch_size (`int`): Over all processes and accumulation steps. The last rows that fill none are left out.
        seed (`int`): Of the run.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int):
        self.num_rows = num_rows
        self.length = num_rows // batch_size * batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Accelerate's loaders call it too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(seed_for(self.seed, ORDER, self.epoch))
        order = torch.randperm(self.num_rows, generator=generator)[: self.length]
        yield from ((self.epoch, place, row) for place, row in enumerate(order.tolist()))


class SeededDataset(Dataset):
    r"""
    A data set that is read a batch at a time, by the keys of an [`EpochSampler`]. It first sets the seeds of Python,
    NumPy and PyTorch, so that what reading and collating draw (crops, erased boxes, one of several captions) depends
    on the batch alone.

    Args:
        dataset (`Dataset`): With `__getitem__` and, if it has that, `__getitems__`.
        seed (`int`): Of the run.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        epoch, place, _ = keys[0]
        set_seed(seed_for(self.seed, DATA, epoch, place))
        rows = [row for _, _, row in keys]
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(rows)
        return [self.dataset[row] for row in rows]
