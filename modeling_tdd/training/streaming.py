# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Training data that are read shard by shard. Broken shards and bad examples are skipped and reported."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils import logging

from .batches import DATA, ORDER, Example, seed_for


logger = logging.get_logger(__name__)

Rows = datasets.IterableDataset
Row = dict[str, Any]  # an undecoded `image`, and a `label` or `captions`
ReadExample = Callable[[Row], tuple[Example, str]]  # an example, and why it is bad or ""
MAX_NAMED = 10  # number of bad examples that are named; others are counted
SHUFFLE_BUFFER = 1000  # number of examples, not yet decoded, that each reader shuffles together


class ImageStream(IterableDataset):
    """
    The training examples of one process, which its data workers read. Each worker of each process is a reader.

    If there are at least as many shards as readers, each shard has one reader in an epoch. Otherwise each reader takes
    every n-th example. A reader that has read its share before the end of the epoch starts it again, so that no
    process has to wait for another one. Which examples come, and what their augmentation draws, depends only on seed,
    epoch, process and worker: the seeds of Python, NumPy and PyTorch are set before the first example of each batch.

    `rows` are streamed by `datasets`: an `image`, not decoded, and a `label` or `captions`. Their shards have `names`,
    and their hash is `fingerprint`. `read` makes an example of a row, and says why it is bad, if it is.
    """

    def __init__(self, rows: Rows, names: list[str], fingerprint: str, read: ReadExample, num_examples: int):
        self.rows, self.names, self.fingerprint = rows, names, fingerprint
        self.read, self.num_examples = read, num_examples
        # In shared memory, since data workers read and write them
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self.skipped_by_worker = torch.zeros(1024, dtype=torch.long).share_memory_()
        self.configure(seed=0, batch_size=1, batches_per_epoch=num_examples)

    def configure(
        self, seed: int, batch_size: int, batches_per_epoch: int, process_index: int = 0, num_processes: int = 1
    ) -> None:
        """Sets the device batches of this process in an epoch, before a `DataLoader` is made. That needs the same
        `batch_size` and `drop_last=True`. Raises a `ValueError` if there is no batch."""
        if batches_per_epoch < 1:
            raise ValueError(f"There are only {self.num_examples} images, too few for the batch size.")
        self.seed, self.batch_size, self.batches_per_epoch = seed, batch_size, batches_per_epoch
        self.process_index, self.num_processes = process_index, num_processes

    @property
    def skipped(self) -> int:
        """`int`: how often a bad example or a broken shard has been met in this process, again in each epoch."""
        return int(self.skipped_by_worker.sum())

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.batches_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        self.worker, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, reader = int(self.epoch), self.process_index * num_workers + self.worker
        examples = self._examples(epoch, reader, self.num_processes * num_workers)
        for batch in range(self.worker, self.batches_per_epoch, num_workers):  # `DataLoader` asks its workers in turn
            set_seed(seed_for(self.seed, DATA, epoch, self.process_index, batch))
            yield from islice(examples, self.batch_size)

    def to_table(self, columns: list[str], num_rows: int | None = None) -> Dataset:
        """Reads columns of all rows, or of the first ones, into a table on disk, which `datasets` caches."""
        selected = self.rows.select_columns(columns)

        def generate() -> Iterator[Row]:
            rows = self._read(selected, range(len(self.names)), logger.warning)
            yield from (row for _, row in islice(rows, num_rows))

        fingerprint = Hasher.hash([self.fingerprint, columns, num_rows])
        return Dataset.from_generator(generate, features=selected.features, fingerprint=fingerprint)

    def _examples(self, epoch: int, reader: int, num_readers: int) -> Iterator[Example]:
        """The valid examples of a reader, again and again."""
        for reading in count():
            is_empty = True
            for place, row in self._shuffled(epoch, reading, reader, num_readers):
                example, problem = self.read(row)
                if problem:
                    self._report(f"{place}: {problem}")
                else:
                    is_empty = False
                    yield example
            if is_empty:
                raise ValueError(f"Reader {reader} of {num_readers} has found no valid example. The warnings say why.")

    def _shuffled(self, epoch: int, reading: int, reader: int, num_readers: int) -> Iterator[tuple[str, Row]]:
        """The rows of a reader. They go through a buffer, from which a random one is taken for each that is put in."""
        order = np.random.default_rng(seed_for(self.seed, ORDER, epoch)).permutation(len(self.names)).tolist()
        is_shared = len(order) < num_readers
        rows = self._read(self.rows, order if is_shared else order[reader::num_readers], self._report)
        rows = islice(rows, reader, None, num_readers) if is_shared else rows
        generator = np.random.default_rng(seed_for(self.seed, ORDER, epoch, reader + 1, reading))
        buffer = list(islice(rows, SHUFFLE_BUFFER))
        for row in rows:
            place = generator.integers(len(buffer))
            yield buffer[place]
            buffer[place] = row
        yield from (buffer[place] for place in generator.permutation(len(buffer)))

    def _read(self, rows: Rows, shards: Iterable[int], report: Callable[[str], None]) -> Iterator[tuple[str, Row]]:
        """Yields the rows of some shards and their places. After a broken shard is reported, the next one is read."""
        for shard in shards:
            name, index = self.names[shard], -1
            try:  # In a data worker `__iter__` would divide the rows once more; `iter` does not.
                for index, row in enumerate(rows.shard(len(self.names), shard).iter(batch_size=1)):
                    yield f"{name}, example {index}", {column: values[0] for column, values in row.items()}
            except Exception as error:  # broken archives raise errors of many types
                report(f"{name}: broken after {index + 1} examples ({type(error).__name__}: {error})")

    def _report(self, problem: str) -> None:
        self.skipped_by_worker[self.worker] += 1  # workers that add to the same number would lose counts
        if self.skipped_by_worker[self.worker] <= MAX_NAMED:
            logger.warning(f"Skipped: {problem}")
