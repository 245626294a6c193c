# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Training data that are read shard by shard. Broken shards and bad examples are skipped and reported."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import NamedTuple

import datasets
import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset, Features
from datasets.fingerprint import Hasher
from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils import logging

from .batches import DATA, ORDER, seed_for
from .examples import MAX_NAMED, BadExample, Example, ReadExample, Row, name_place, name_problems


logger = logging.get_logger(__name__)

Place = tuple[int, int]  # a shard, and an example of it, or -1 for the whole shard


class Shards(NamedTuple):
    """A split that `datasets` streams: rows, names of the shards, a hash of both, and the size, if that is known."""

    rows: datasets.IterableDataset
    names: list[str]
    fingerprint: str
    num_examples: int | None

    @property
    def features(self) -> Features:
        return self.rows.features

    def read(self, shards: Iterable[int], report: Callable[[Place, str], None]) -> Iterator[tuple[Place, Row]]:
        """Yields the rows of some shards. After a broken shard has been reported, the next one is read."""
        for shard in shards:
            index = -1
            try:  # In a data worker `__iter__` would divide the rows once more; `iter` does not.
                rows = self.rows.shard(len(self.names), shard).iter(batch_size=1)
                for index, row in enumerate(rows):
                    yield (shard, index), {name: values[0] for name, values in row.items()}
            except Exception as error:  # broken archives raise errors of many types
                problem = f"broken after {index + 1} examples ({type(error).__name__}: {error})"
                report((shard, -1), f"{self.names[shard]}: {problem}")

    def to_table(self, columns: list[str], num_rows: int | None = None) -> Dataset:
        """Reads columns of all rows, or of the first ones, into a table on disk, which `datasets` caches."""
        selected = self._replace(rows=self.rows.select_columns(columns))

        def generate() -> Iterator[Row]:
            rows = selected.read(range(len(self.names)), lambda place, problem: logger.warning(problem))
            yield from (row for _, row in islice(rows, num_rows))

        fingerprint = Hasher.hash([self.fingerprint, columns, num_rows])
        return Dataset.from_generator(generate, features=selected.features, fingerprint=fingerprint)


class ImageStream(IterableDataset):
    r"""
    The training examples of one process, which its data workers read. Each worker of each process is a reader.

    If there are at least as many shards as readers, each shard has one reader in an epoch. Otherwise each reader takes
    every n-th example. A reader that has read its share before the end of the epoch starts it again, so that no
    process has to wait for another one. Which examples come, and what their augmentation draws, depends only on seed,
    epoch, process and worker: the seeds of Python, NumPy and PyTorch are set before the first example of each batch.

    Args:
        shards ([`Shards`]): The split, with the columns `image`, not decoded, and `label` or `captions`.
        read ([`ReadLabelled`] or [`ReadCaptioned`]): Makes an example of a row, or says why the row is rejected.
        num_examples (`int`, *optional*): Size of the split, where the shards do not say it.
        shuffle_buffer (`int`): Number of rows, not decoded, that a reader shuffles.
        on_bad_example (`str`): `"skip"`, or `"raise"` to raise an error.

    Raises:
        `ValueError`: if the size is not known; during reading, if all examples of a reader are bad or, with
            `on_bad_example="raise"`, at least one is.
    """

    def __init__(
        self,
        shards: Shards,
        read: ReadExample,
        num_examples: int | None = None,
        shuffle_buffer: int = 1000,
        on_bad_example: str = "skip",
    ):
        self.num_examples = num_examples or shards.num_examples
        if self.num_examples is None:
            raise ValueError("`data.num_examples` must be given: this stream does not say how many examples it has.")
        self.shards, self.read = shards, read
        self.shuffle_buffer, self.on_bad_example = shuffle_buffer, on_bad_example
        # In shared memory, since data workers read and write them
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self.is_bad = torch.zeros(1 << 22, dtype=torch.bool).share_memory_()  # by the hash of an example's place
        self.configure(seed=0, batch_size=1, batches_per_epoch=self.num_examples)

    def configure(
        self, seed: int, batch_size: int, batches_per_epoch: int, process_index: int = 0, num_processes: int = 1
    ) -> None:
        """Sets the number of device batches of this process in an epoch, and their size, before a `DataLoader` is
        made. That needs the same `batch_size` and `drop_last=True`. Raises a `ValueError` if there is no batch."""
        if batches_per_epoch < 1:
            raise ValueError(f"There are only {self.num_examples} images, too few for the batch size.")
        self.seed, self.batch_size, self.batches_per_epoch = seed, batch_size, batches_per_epoch
        self.process_index, self.num_processes = process_index, num_processes

    @property
    def skipped(self) -> int:
        """`int`: the number of bad examples and broken shards that this process and its workers have met so far."""
        return int(self.is_bad.sum())

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.batches_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        index, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch = int(self.epoch)
        examples = self._examples(epoch, self.process_index * num_workers + index, self.num_processes * num_workers)
        for batch in range(index, self.batches_per_epoch, num_workers):  # `DataLoader` asks its workers in turn
            set_seed(seed_for(self.seed, DATA, epoch, self.process_index, batch))
            yield from islice(examples, self.batch_size)

    def _examples(self, epoch: int, reader: int, num_readers: int) -> Iterator[Example]:
        """The valid examples of a reader, again and again."""
        for reading in count():
            is_empty, self.problems = True, []
            for (shard, index), row in self._shuffled(epoch, reading, reader, num_readers):
                try:
                    example = self.read(row)
                except BadExample as error:
                    name = name_place(f"{self.shards.names[shard]}, example {index}", row)
                    self._report((shard, index), f"{name}: {error}")
                    continue
                is_empty = False
                yield example
            if is_empty:
                reason = name_problems(self.problems, "problems") if self.problems else "There are too few examples."
                raise ValueError(f"Reader {reader} of {num_readers} has found no valid example. {reason}")

    def _shuffled(self, epoch: int, reading: int, reader: int, num_readers: int) -> Iterator[tuple[Place, Row]]:
        """The rows of a reader. They go through a buffer, from which a random one is taken for each that is put in."""
        order = np.random.default_rng(seed_for(self.seed, ORDER, epoch)).permutation(len(self.shards.names)).tolist()
        is_shared = len(order) < num_readers
        rows = self.shards.read(order if is_shared else order[reader::num_readers], self._report)
        rows = islice(rows, reader, None, num_readers) if is_shared else rows
        generator = np.random.default_rng(seed_for(self.seed, ORDER, epoch, reader + 1, reading))
        buffer = list(islice(rows, self.shuffle_buffer))
        for row in rows:
            place = generator.integers(len(buffer))
            yield buffer[place]
            buffer[place] = row
        yield from (buffer[place] for place in generator.permutation(len(buffer)))

    def _report(self, place: Place, problem: str) -> None:
        if self.on_bad_example == "raise":
            raise ValueError(problem)
        self.problems.append(problem)
        key = hash(place) % len(self.is_bad)
        if not self.is_bad[key]:  # it is met again in each epoch
            self.is_bad[key] = True
            if self.skipped <= MAX_NAMED:
                logger.warning(f"Skipped: {problem}")
