# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Training data that are read shard by shard: sharded once over processes and workers, shuffled by the seed, and
exactly resumable.

The assignment of shards, the order and the position are managed here, not by `datasets` or Accelerate. An epoch must
not see an image twice, and `datasets` loses the content of its shuffle buffer when it resumes.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.utils import logging

from .examples import MAX_NAMED, BadExample, Batch, Example, ReadExample, Row, name_problems
from .recipe import CaptionDataRecipe, DataRecipe, TrainingRecipe
from .seeding import seed_for
from .shards import ShardedRows, unbroken_rows


logger = logging.get_logger(__name__)

# The index of a shard in the reader's list, the index in this shard at which the current block starts, and the number
# of examples of the block that have been taken
Position = tuple[int, int, int]


class StreamBatch(NamedTuple):
    """A batch of a reader, `None` after its last one, with the reader's position and the problems since the previous
    batch."""

    slot: int
    batch: Batch | None
    position: Position
    problems: list[str]


class ImageStream(IterableDataset):
    r"""
    The batches of one process, which its workers make.

    Each worker of each process is a reader. If there are at least as many shards as readers, each shard has one
    reader. Otherwise each reader takes every n-th example of all shards. A reader shuffles blocks of `shuffle_buffer`
    rows and drops an incomplete last batch. Order and augmentation depend only on seed, epoch, reader and position. So
    a resumed run continues as if it had not stopped.

    Args:
        rows ([`ShardedRows`]): The training split.
        read ([`ReadLabelled`] or [`ReadCaptioned`]): Makes an example of a row, or says why the row is rejected.
        collate (`Callable`): Makes a batch of a list of examples.
        batch_size (`int`): Number of examples in a batch of this process.
        seed (`int`): Seed of order and augmentation.
        shuffle_buffer (`int`): Number of rows, not decoded, that a reader shuffles together.
        on_bad_example (`str`): `"skip"` or `"raise"`.
        process_index (`int`): Index of this process.
        num_processes (`int`): Number of processes.
    """

    def __init__(
        self,
        rows: ShardedRows,
        read: ReadExample,
        collate: Callable[[list[Example]], Batch],
        batch_size: int,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        on_bad_example: str = "skip",
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.rows, self.read, self.collate = rows, read, collate
        self.batch_size, self.seed, self.shuffle_buffer = batch_size, seed, shuffle_buffer
        self.on_bad_example = on_bad_example
        self.process_index, self.num_processes = process_index, num_processes
        self.epoch = 0
        self.next_slot = 0
        self.positions: dict[int, Position] = {}
        self.num_slots: int | None = None
        # The problems of this process in order of appearance. The dictionary serves as an ordered set.
        self.problems: dict[str, None] = {}
        self._new_problems: list[str] = []

    # ---- Position, in the main process

    def set_epoch(self, epoch: int) -> None:
        """Starts an epoch. If it is the current epoch, the position stays as it is."""
        if epoch != self.epoch:
            self.epoch, self.positions, self.next_slot = epoch, {}, 0

    def state_dict(self) -> dict[str, Any]:
        """The position of this process after the last batch that its loader gave. Each process has its own."""
        return {
            "epoch": self.epoch,
            "next_slot": self.next_slot,
            "positions": {str(slot): list(position) for slot, position in self.positions.items()},
            "readers": self._readers(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state of the same process.

        Raises:
            `ValueError`: if the number of processes or workers, the seed, the batch size, the shuffle buffer or the
                number of shards differs from that of the state.
        """
        if state["readers"] != self._readers():
            raise ValueError(
                f"A stream's position is only valid for the same readers: it was saved with {state['readers']}, but "
                f"this run has {self._readers()}. Resume with the same readers, or start a new epoch: `set_epoch`."
            )
        self.epoch, self.next_slot = state["epoch"], state["next_slot"]
        self.positions = {int(slot): tuple(position) for slot, position in state["positions"].items()}

    def _readers(self) -> dict[str, Any]:
        return {
            "process_index": self.process_index,
            "num_processes": self.num_processes,
            "num_workers": self.num_slots,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "shuffle_buffer": self.shuffle_buffer,
            "num_shards": len(self.rows.shard_names),
        }

    def note(self, item: StreamBatch) -> None:
        """Stores the position and the problems that come with a batch."""
        for problem in item.problems:
            if problem not in self.problems and len(self.problems) < MAX_NAMED:
                logger.warning(f"Skipped: {problem}")
            self.problems[problem] = None
        self.positions[item.slot] = tuple(item.position)  # collation has made a list of it
        self.next_slot = (item.slot + 1) % self.num_slots

    def end_epoch(self) -> None:
        """Moves on to the next epoch, after the last batch of all readers."""
        self.set_epoch(self.epoch + 1)

    # ---- Reading, in the workers

    def __iter__(self) -> Iterator[StreamBatch]:
        worker = get_worker_info()
        index, num_slots = (0, 1) if worker is None else (worker.id, worker.num_workers)
        slot = (index + self.next_slot) % num_slots  # a resumed run starts with the worker whose turn it was
        position = self.positions.get(slot, (0, 0, 0))
        for item in self._batches(slot, num_slots, position):
            position = item.position
            yield item
        yield StreamBatch(slot, None, position, self._take_problems())
        # If a worker ended, the moment at which it lost its turn, and with it the order, would depend on timing.
        while True:
            yield StreamBatch(slot, None, position, [])

    def _batches(self, slot: int, num_slots: int, start: Position) -> Iterator[StreamBatch]:
        reader, num_readers = self.process_index * num_slots + slot, self.num_processes * num_slots
        examples: list[Example] = []
        for position, row in self._shuffled(reader, num_readers, start):
            try:
                examples.append(self.read(row))
            except BadExample as error:
                self._report(f"{row['name']}: {error}")
                continue
            if len(examples) == self.batch_size:
                with seeded(self.seed, self.epoch, reader, *position):
                    batch = self.collate(examples)
                yield StreamBatch(slot, batch, position, self._take_problems())
                examples = []

    def _shuffled(self, reader: int, num_readers: int, position: Position) -> Iterator[tuple[Position, Row]]:
        """The reader's rows, shuffled one block at a time. Resuming has to read only one block again."""
        *start, taken = position
        rows = self._own_rows(reader, num_readers, tuple(start))
        while block := list(islice(rows, self.shuffle_buffer)):
            order = random_generator(self.seed, self.epoch, reader, *start).permutation(len(block))
            for index in range(taken, len(block)):
                yield (*start, index + 1), block[order[index]][1]
            (place, row), taken = block[-1][0], 0
            start = (place, row + 1)

    def _own_rows(
        self, reader: int, num_readers: int, start: tuple[int, int]
    ) -> Iterator[tuple[tuple[int, int], Row]]:
        names = self.rows.shard_names
        shards = random_generator(self.seed, self.epoch).permutation(len(names)).tolist()
        is_shared = len(shards) < num_readers
        if not is_shared:
            shards = shards[reader::num_readers]
        report = self._report if not is_shared or reader == 0 else _ignore  # a shared shard is reported once
        for (place, index), row in unbroken_rows(self.rows, shards, report, start):
            if is_shared and index % num_readers != reader:
                continue
            path = (row["image"] or {}).get("path")
            row["name"] = f"{names[shards[place]]}, example {index}{f' ({path})' if path else ''}"
            yield (place, index), row

    def _report(self, problem: str) -> None:
        if self.on_bad_example == "raise":
            raise ValueError(problem)
        self._new_problems.append(problem)

    def _take_problems(self) -> list[str]:
        problems, self._new_problems = self._new_problems, []
        return problems


def _ignore(problem: str) -> None:
    """Does nothing: another reader reports the problem."""


def random_generator(*key: int) -> np.random.Generator:
    """A generator of random numbers that depend only on the key."""
    return np.random.default_rng(np.random.SeedSequence(key))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """A context in which the global random generators, from which augmentations draw, depend only on the key.
    Afterwards they continue as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    set_seed(seed_for(*key))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


# ---- The loader


class StreamLoader(DataLoader):
    r"""
    The batches of a process on its device, in an order that does not depend on timing. `dataset` holds the position
    after the last batch that was given, no matter what the workers have read ahead. The length is the number of
    batches of an epoch of whole steps. A process may have more or fewer batches, depending on the size of its shards.

    Args:
        stream ([`ImageStream`]): The data of this process.
        num_workers (`int`): Number of processes that read and decode.
        device (`torch.device`): The device of the batches.
        num_batches (`int`): Number of batches of a process in an epoch.
    """

    def __init__(self, stream: ImageStream, num_workers: int, device: torch.device, num_batches: int):
        # The loader has its own generator: the state of the global one, from which the model's noise is drawn, must
        # not depend on whether the run was resumed.
        super().__init__(
            stream,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(stream.seed),
        )
        self.device, self.num_batches = device, num_batches
        stream.num_slots = max(1, num_workers)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        stream = self.dataset
        is_whole_epoch, is_empty = not stream.positions, True
        items = super().__iter__()
        ended: set[int] = set()
        while len(ended) < stream.num_slots:
            item = next(items)
            stream.note(item)
            if item.batch is None:
                ended.add(item.slot)
                continue
            is_empty = False
            yield send_to_device(item.batch, self.device, non_blocking=True)
        if is_whole_epoch and is_empty:
            problems = list(stream.problems)
            raise ValueError(
                f"Process {stream.process_index} cannot fill one batch of {stream.batch_size} valid examples per "
                "worker. " + (name_problems(problems, "problems") if problems else "There are too few examples.")
            )
        stream.end_epoch()


def make_stream_loader(
    accelerator: Accelerator,
    training: TrainingRecipe,
    data: DataRecipe | CaptionDataRecipe,
    rows: ShardedRows,
    read: ReadExample,
    collate: Callable[[list[Example]], Batch],
    seed: int = 0,
) -> StreamLoader:
    r"""
    Makes the loader of this process's training batches. Accelerate must not prepare it, since it would shard the data
    a second time.

    Raises:
        `ValueError`: if the size of the split is not known, or is smaller than the batch size.
    """
    num_examples = data.num_examples or rows.num_examples
    if num_examples is None:
        raise ValueError("`data.num_examples` must be given: this stream does not say how many examples it has.")
    if num_examples < training.batch_size:
        raise ValueError(f"`training.batch_size` is {training.batch_size}, but there are only {num_examples} images.")
    accumulation = accelerator.gradient_accumulation_steps
    stream = ImageStream(
        rows,
        read,
        collate,
        training.batch_size // (accumulation * accelerator.num_processes),
        seed,
        data.shuffle_buffer,
        data.on_bad_example,
        accelerator.process_index,
        accelerator.num_processes,
    )
    steps = num_examples // training.batch_size
    return StreamLoader(stream, training.num_workers, accelerator.device, steps * accumulation)


def report_problems(accelerator: Accelerator, loader: StreamLoader) -> list[str]:
    """Reports, at the end of a run, what all processes skipped, and returns it."""
    problems = sorted(set(gather_object(list(loader.dataset.problems))))
    if problems and accelerator.is_main_process:
        logger.warning(name_problems(problems, "broken shards and bad examples were skipped"))
    return problems
