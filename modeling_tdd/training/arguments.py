# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The settings of a training run: Transformers' `TrainingArguments`, and a few that they lack."""

import timeit
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import is_tensorboard_available
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Of the output folder Trainer uploads whatever lies there, and writes its arguments with the token into checkpoints
NO_UPLOADS = (
    "`push_to_hub` and `hub_token` must not be given: training uploads nothing. `scripts/publish.py` and the model's "
    "own `push_to_hub` do, with the token of `hf auth login` or of the environment."
)


@dataclass
class TDDTrainingArguments(TrainingArguments):
    """The settings of [`TDDTrainer`]: all of `TrainingArguments`, some with another default, and these of ours. Raises
    a `ValueError` if `batch_size` is not a whole number of device batches, or a setting is out of its range."""

    lr_scheduler_type: SchedulerType | str = "cosine"
    max_grad_norm: float = 3.0
    per_device_eval_batch_size: int = 64
    logging_steps: float = 50
    save_total_limit: int | None = 2
    remove_unused_columns: bool | None = False  # the collators read images, which are no arguments of `forward`
    ddp_find_unused_parameters: bool | None = False
    report_to: None | str | list[str] = field(
        default_factory=lambda: "tensorboard" if is_tensorboard_available() else "none"
    )
    # Images per optimiser step, over all processes and accumulation steps. `per_device_train_batch_size` and
    # `gradient_accumulation_steps` follow from it, and from the number of images that fit on a device at once.
    batch_size: int | None = None
    device_batch_size: int | None = None
    # With `batch_size`: the learning rate at a batch size of 256, with which it scales (Goyal et al., 2017).
    base_learning_rate: float | None = None
    mixed_precision: str = "auto"  # "no", "bf16", "fp16", or "auto": bf16 where it is faster, see `fast_precision`
    # Decay of the moving average of the weights, which is evaluated and saved. 0 keeps none. Whether the decay grows
    # with the steps is ours, see `AveragedAdamW`; the paper's is constant.
    ema_decay: float = 0.9999
    ema_warmup: bool = True
    max_skipped_steps: int = 10  # in a row, because the loss or its gradient is not finite
    cpu_threads: int | None = None  # of each process; a small network is fastest with one

    def __post_init__(self):
        self._check()
        # Until `TDDTrainer` knows the network. The parent class sets `mixed_precision` to what it finds.
        self.is_precision_free = self.mixed_precision == "auto" and not (self.bf16 or self.fp16)
        for name, value in vars(self).items():
            if isinstance(value, Path):  # which Transformers writes to no file
                setattr(self, name, str(value))
        if self.cpu_threads is not None:
            torch.set_num_threads(self.cpu_threads)
        # Without `use_cpu` Accelerate runs processes that have no GPU as separate trainings.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if not (self.bf16 or self.fp16):
            precision = fast_precision() if self.mixed_precision == "auto" else self.mixed_precision
            self.bf16, self.fp16 = precision == "bf16", precision == "fp16"
        super().__post_init__()
        if self.n_gpu > 1:
            logger.warning(f"One of {self.n_gpu} GPUs is used. `accelerate launch` uses them all.")
            self._n_gpu = 1  # Trainer would use `nn.DataParallel`, which is slow and has one random state for all
        if self.batch_size is not None:
            self._divide_batch()

    def _check(self) -> None:
        if self.mixed_precision not in ("auto", "no", "bf16", "fp16"):
            raise ValueError(
                f"`mixed_precision` must be 'auto', 'no', 'bf16' or 'fp16', got {self.mixed_precision!r}."
            )
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        names = ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "max_skipped_steps", "seed")
        for name in (*names, "logging_steps", "save_steps", "dataloader_num_workers"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        names = ("batch_size", "device_batch_size", "cpu_threads", "num_train_epochs", "base_learning_rate")
        names += ("eval_steps", "save_total_limit", "per_device_train_batch_size", "per_device_eval_batch_size")
        for name in (*names, *(["max_steps"] if self.max_steps != -1 else [])):  # -1: as many as the epochs have
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")
        # They change the order of evaluations, or leave rows out, and training has its own order.
        if self.train_sampling_strategy != "random" or self.dataloader_drop_last:
            raise ValueError("`train_sampling_strategy` must be 'random', and `dataloader_drop_last` must be `False`.")
        if self.batch_size is None and (self.device_batch_size or self.base_learning_rate):
            raise ValueError("`device_batch_size` and `base_learning_rate` need `batch_size`.")
        if self.push_to_hub or self.hub_token is not None:
            raise ValueError(NO_UPLOADS)
        if self.label_smoothing_factor > 0:
            raise ValueError("Set the model's `label_smoothing`: that of Trainer would replace the diffusion loss.")

    def _divide_batch(self) -> None:
        """Sets the device batch, the accumulation and the learning rate, and prints them."""
        device_batch = self.device_batch_size or max(1, self.batch_size // self.world_size)
        steps, remainder = divmod(self.batch_size, device_batch * self.world_size)
        if remainder or steps == 0:
            raise ValueError(
                f"`batch_size` must be a multiple of `device_batch_size` x processes, got {self.batch_size} and "
                f"{device_batch} x {self.world_size}."
            )
        self.per_device_train_batch_size = device_batch
        self.gradient_accumulation_steps = steps
        if self.base_learning_rate is not None:
            self.learning_rate = self.base_learning_rate * self.batch_size / 256
        if self.process_index == 0:
            rate = np.format_float_scientific(self.learning_rate, precision=4, trim="-", exp_digits=2)
            precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "float32"
            print(
                f"{self.world_size} process(es) on {self.device.type}, {precision}: batch size {self.batch_size} = "
                f"{device_batch} x {self.world_size} x {steps} accumulation step(s), learning rate {rate}"
            )


def fast_precision(model: nn.Module | None = None) -> str:
    """`"bf16"` where the hardware multiplies matrices faster in it, `"no"` elsewhere.

    CPUs with AMX do so 19 times as fast as in float32, but 4 times slower in a tiny network, where the casts cost more
    than the products: given a model, a product with its median weight is timed. Without AMX bf16 is 100 times slower.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if not torch.cpu._is_amx_tile_supported():
        return "no"
    if model is None:
        return "bf16"
    matrices = sorted((p for p in model.parameters() if p.ndim == 2), key=torch.numel)
    weight = torch.ones_like(matrices[len(matrices) // 2], device="cpu", dtype=torch.float32)
    states = torch.ones(256, weight.shape[1])
    times = {
        dtype: min(timeit.repeat(lambda: states.to(dtype) @ weight.to(dtype).T, number=10))  # noqa: B023
        for dtype in (torch.float32, torch.bfloat16)
    }
    return "bf16" if times[torch.bfloat16] < times[torch.float32] else "no"
