# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Random draws that depend only on the seed and on the place in training. No random state is carried along.

Every device batch has its own seeds, made from the run's seed, the epoch and the batch's place in the epoch. So a
resumed run draws what the unbroken one would have drawn, with any number of data workers. With the same
`device_batch_size`, the device batches and what they draw are the same for any number of processes.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch.utils.data import Dataset, Sampler


# The purposes of draws. They are part of the seed, so that no two purposes draw the same numbers.
ORDER, DATA, MODEL = range(3)

Key = tuple[int, int, int]  # epoch, place in the epoch, row of the data set


def seed_for(*key: int) -> int:
    """A 32-bit seed made of several numbers. Keys that differ in one number give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class EpochSampler(Sampler[Key]):
    r"""
    Samples the rows of a [`SeededDataset`] in an order that depends only on the seed and the epoch.

    Args:
        num_rows (`int`): Number of rows of the data set.
        batch_size (`int`): Batch size over all processes and accumulation steps. An incomplete last batch is left out.
        seed (`int`): Seed of the run.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int):
        self.num_rows = num_rows
        self.length = num_rows // batch_size * batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch. Accelerate's loaders call it too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(seed_for(self.seed, ORDER, self.epoch))
        order = torch.randperm(self.num_rows, generator=generator)[: self.length]
        yield from ((self.epoch, place, row) for place, row in enumerate(order.tolist()))


class SeededDataset(Dataset):
    r"""
    A data set that is read one batch at a time, by the keys of an [`EpochSampler`]. Before each batch it sets the
    seeds of Python, NumPy and PyTorch. So what reading and collating draw (crops, erased boxes, one of several
    captions) depends only on the batch.

    Args:
        dataset (`Dataset`): A data set with `__getitem__`. Its `__getitems__` is used if there is one.
        seed (`int`): Seed of the run.
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
