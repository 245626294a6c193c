# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""A moving average of the weights for `Trainer`, which then evaluates, saves and publishes the average."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


TRAINING_WEIGHTS_NAME = "training_weights.safetensors"


class EMACallback(TrainerCallback):
    r"""
    Keeps a moving average of the weights that train, and puts it into the model for evaluations and checkpoints.

    - Evaluations, `load_best_model_at_end` and each checkpoint's `model.safetensors` (or adapter) use the average. So
      `from_pretrained` and the Hub get the average from any checkpoint.
    - The training weights are saved beside it as `training_weights.safetensors`. A resumed run ends with the same
      weights and the same average, bit for bit, as an unbroken one.
    - After `Trainer.train` the model holds the average: `evaluate`, `save_model` and `push_to_hub` need nothing more.

    Trainable parameters and floating-point buffers, such as those of batch norms, are averaged. Frozen weights are not
    copied, so LoRA needs no second base model. A callback that asks for evaluations or checkpoints must come before
    this one.

    Args:
        decay (`float`, *optional*, defaults to 0.9999):
            Decay of the average, in [0, 1).
        warmup (`bool`, *optional*, defaults to `True`):
            Whether the decay grows up to `decay` with the steps taken, as in timm, so that the average follows a
            short run too (ours). `False` keeps it constant, as in the paper (equation 2).

    Raises:
        `ValueError`: for a decay out of [0, 1), weights in half precision, sharded weights (FSDP, DeepSpeed),
            `enable_jit_checkpoint`, or a checkpoint to resume from that was saved without this callback.

    Example:

    ```python
    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[EMACallback(decay=0.999)])
    >>> trainer.train()
    >>> trainer.save_model("published")  # saves the average
    ```"""

    def __init__(self, decay: float = 0.9999, warmup: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay!r}.")
        self.decay = decay
        self.warmup = warmup
        self._forget()

    def _forget(self) -> None:
        self.names: list[str] = []
        self.own: nn.ParameterList | None = None  # the tensors of the model itself, not copies
        self.ema: ModelEmaV3 | None = None
        self.is_swapped = False  # True while the model holds the average and `ema` holds the training weights
        self.saved_step: int | None = None

    # ---- Events

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        self._forget()
        tensors = averaged_tensors(model)
        check_support(args, tensors)
        self.names = list(tensors)
        self.own = nn.ParameterList(tensors.values())
        self.ema = ModelEmaV3(self.own, decay=self.decay, use_warmup=self.warmup)
        if state.global_step > 0:
            self._resume(args, state)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._hold_average(False)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._hold_average(False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        update_average(self.ema, self.own, state.global_step)
        self._prepare(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._prepare(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if not self.is_swapped:
            raise ValueError(
                "A checkpoint was saved without `EMACallback` having prepared it. Callbacks that set "
                "`control.should_save` must come before it in `callbacks`."
            )
        self._save(args, state)  # `save_strategy="best"` decides to save only after the evaluation

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        has_loaded_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if not has_loaded_best:  # the best model already is an average
            self._hold_average(True)
        self._forget()

    # ---- Swapping and saving

    def _prepare(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Puts the average into the model where `Trainer` is about to evaluate or save it."""
        if control.should_evaluate or control.should_save:
            self._hold_average(True)
        if control.should_save:
            # `Trainer` writes trainer_state.json later: a checkpoint that has it has these weights too.
            self._save(args, state)

    @torch.no_grad()
    def _hold_average(self, wanted: bool) -> None:
        """Makes the model hold the average if `wanted`, else the training weights. They are exchanged in place."""
        if self.is_swapped == wanted:
            return
        for own, other in zip(self.own, self.ema.module):
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)
        self.is_swapped = wanted

    def _save(self, args: TrainingArguments, state: TrainerState) -> None:
        """Writes the training weights, which `ema` holds by now. The file is written completely or not at all."""
        if self.saved_step == state.global_step:
            return
        self.saved_step = state.global_step
        if not args.should_save or args.save_only_model:
            return
        folder = checkpoint_folder(args, state)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{TRAINING_WEIGHTS_NAME}.tmp"
        save_file({name: tensor.detach() for name, tensor in zip(self.names, self.ema.module)}, temporary)
        os.replace(temporary, folder / TRAINING_WEIGHTS_NAME)

    @torch.no_grad()
    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """Loads the training weights into `ema`. `Trainer` has loaded the average into the model, and the first step
        begins by exchanging the two."""
        given = args.resume_from_checkpoint
        folder = Path(given) if given and Path(given).is_dir() else checkpoint_folder(args, state)
        state_file = folder / TRAINER_STATE_NAME
        if not state_file.exists() or TrainerState.load_from_json(state_file).log_history != state.log_history:
            raise ValueError(
                f"`EMACallback` looked for the checkpoint of step {state.global_step} in {folder}, which is not the "
                "one that `Trainer` resumes from. Give it in `TrainingArguments(resume_from_checkpoint=...)` too."
            )
        file = folder / TRAINING_WEIGHTS_NAME
        if not file.exists():
            raise ValueError(f"{folder} lacks {TRAINING_WEIGHTS_NAME}: it was saved without `EMACallback`.")
        saved = load_file(file)
        if saved.keys() != set(self.names):
            different = sorted(saved.keys() ^ set(self.names))
            raise ValueError(f"{file} does not hold the weights that train now. The names differ in {different[:5]}.")
        for name, other in zip(self.names, self.ema.module):
            other.copy_(saved[name])
        self.is_swapped = True


def update_average(ema: ModelEmaV3, model: nn.Module | SimpleNamespace, step: int) -> None:
    r"""
    One step of a moving average.

    Args:
        ema (`ModelEmaV3`): The average.
        model (`nn.Module`): What is averaged, or anything that has its `state_dict()`.
        step (`int`): The number of steps taken, this one included.
    """
    # Given a step, timm's first update is a copy. Without warm-up the decay is constant from the first step on, as in
    # the paper (appendix A.3, Algorithm 2).
    ema.update(model, step=step if ema.use_warmup else None)


def averaged_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trainable parameters and floating-point buffers by name: everything that training changes except counters."""
    tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return tensors | {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def check_support(args: TrainingArguments, tensors: dict[str, torch.Tensor]) -> None:
    """Raises a `ValueError` for settings that [`EMACallback`] does not support."""
    if args.enable_jit_checkpoint:
        raise ValueError(
            "`EMACallback` needs `enable_jit_checkpoint=False`: callbacks do not learn of such checkpoints."
        )
    if AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError("`EMACallback` needs all weights on each device: use neither FSDP nor DeepSpeed.")
    half = sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.dtype.itemsize < 4})
    if half:
        raise ValueError(
            f"`EMACallback` needs float32 weights, got {', '.join(half)}: half precision rounds small steps away. "
            "Load the model with `dtype=torch.float32` and train with `bf16=True`."
        )


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder to which `Trainer` saves the checkpoint of the current step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


__all__ = ["EMACallback"]
