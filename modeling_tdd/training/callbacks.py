# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What [`TDDTrainer`] adds to Transformers' training loop."""

import os
import resource
import signal
import sys
import threading
import time
from typing import Any

import torch
from accelerate.utils import reduce, set_seed
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args
from transformers.trainer_callback import ExportableState

from .batches import MODEL, seed_for
from .checkpoints import describe_last_checkpoint


class SeedCallback(TrainerCallback):
    """Seeds what the model draws for a device batch by the run's seed and the batch's place in the run. So a resumed
    run draws what the unbroken one would have drawn, and with the same device batch any number of processes draw the
    same. It also tells the training data which epoch it is."""

    substep = 0

    def on_epoch_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        kwargs["train_dataloader"].dataset.set_epoch(int(state.epoch))

    def on_step_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.substep = 0
        self._seed(args, state)

    def on_substep_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.substep += 1
        self._seed(args, state)

    def _seed(self, args: Args, state: State) -> None:
        # The device batches of a step go to the processes in turn
        place = (state.global_step * args.gradient_accumulation_steps + self.substep) * args.world_size
        set_seed(seed_for(args.seed, MODEL, place + args.process_index))


class FiniteStepsCallback(TrainerCallback, ExportableState):
    """Skips a step whose gradient is not finite: no weight and no average changes, in any process. After more than
    `max_skipped_steps` in a row it raises a `FloatingPointError` that names the last checkpoint."""

    skipped = skipped_in_a_row = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}}

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, self.state())
        vars(self).update(saved["attributes"])

    def on_pre_optimizer_step(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        model: nn.Module = kwargs["model"]
        # Gradients are means over the processes, so all decide alike. Weights without a gradient stay as they are.
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm):
            self.skipped_in_a_row = 0
            return
        model.zero_grad(set_to_none=True)
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row > args.max_skipped_steps:
            raise FloatingPointError(
                f"The loss or its gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step "
                f"{state.global_step + 1}. {describe_last_checkpoint(args.output_dir)}"
            )


class StopCallback(TrainerCallback):
    """After SIGTERM or SIGINT the run saves a checkpoint and ends at the end of a step, in all processes together.

    `signal` is then its number. The same signal again has its default effect. (Transformers' own
    `enable_jit_checkpoint` waits for seconds, and lets each process stop at a step of its own.)
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal: int | None = None
        self.previous: dict[int, Any] = {}

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.signal = None
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if reduce(torch.tensor(float(self.signal is not None), device=args.device), "sum") > 0:
            self.signal = self.signal or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, self.previous[number])


class MeterCallback(TrainerCallback):
    """Measures what a line of the log adds to Trainer's, see [`~TDDTrainer.log`]. [`TDDTrainer`] sets `start` when a
    step starts, and adds to `wait`, the seconds spent waiting for data, and to `losses`, the losses by timestep."""

    def __init__(self):
        self.start = 0.0
        self.clear()

    def clear(self) -> None:
        self.steps, self.seconds, self.wait = 0, 0.0, 0.0
        self.losses: list[torch.Tensor] = []

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.steps += 1
        self.seconds += time.perf_counter() - self.start

    def values(self, batch_size: int) -> dict[str, float]:
        """The values of a line of the log, and starts the next line. All processes must call it."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        values = {
            "images_per_second": self.steps * batch_size / max(self.seconds, 1e-9),
            "data_wait_share": self.wait / max(self.seconds, 1e-9),
            "memory_gib": (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory) / 2**30,
        }
        sums = reduce(torch.stack(self.losses).sum(0), "sum").tolist() if self.losses else []
        values |= {f"loss_by_timestep/{tenth}": loss / n for tenth, (loss, n) in enumerate(sums) if n > 0}
        self.clear()
        return values


class ShortProgressCallback(ProgressCallback):
    """The progress bar, whose lines leave out the losses by timestep: they are in the log and in the trackers."""

    def on_log(self, args: Args, state: State, control: Control, logs: Any = None, **kwargs: Any) -> None:
        logs = {name: value for name, value in logs.items() if not name.startswith("loss_by_timestep")}
        super().on_log(args, state, control, logs=logs, **kwargs)


def leave_signals_to_the_trainer(worker: int) -> None:
    """Makes a data worker ignore signals that go to all processes of a run, since its data are needed for the last
    step. It obeys only the SIGTERM of the trainer, which ends its workers so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_the_trainers_signal, daemon=True).start()


def _wait_for_the_trainers_signal() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
