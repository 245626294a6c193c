# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Transformers' `Trainer` for TDD and its rivals: from scratch and for fine-tuning, on one process or many."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import ProgressCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from ..processing_tdd import saveable_image_processor
from .arguments import NO_UPLOADS, TDDTrainingArguments, fast_precision
from .averaging import AveragedAdamW
from .batches import TrainingRows
from .callbacks import (
    FiniteStepsCallback,
    MeterCallback,
    SeedCallback,
    ShortProgressCallback,
    StopCallback,
    leave_signals_to_the_trainer,
)
from .checkpoints import (
    describe_last_checkpoint,
    find_damage,
    last_complete_checkpoint,
    remove_old_checkpoints,
    set_damaged_aside,
    write_checksums,
)
from .folders import make_hidden, put_in_place, remove
from .results import plain_class


class TDDTrainer(Trainer):
    r"""
    `Trainer` with what training a diffusion model on images needs beside it:

    - The moving average of the weights ([`AveragedAdamW`]) is evaluated and saved. After `train` the model
      holds it. Checkpoints have the weights that train too.
    - Order, augmentation and noise depend only on the seed and on the place in training. So a run that was killed and
      resumed ends with the same weights as an unbroken one, and one process with the same weights as two.
    - A step that is not finite is skipped and counted, SIGTERM and SIGINT save a checkpoint and end the run.
    - Captioners are evaluated by the captions that they generate, as in `Seq2SeqTrainer`.

    Args:
        args ([`TDDTrainingArguments`]): The settings.
        eval_collator (`Callable`, *optional*): Makes evaluation batches. By default `data_collator`, see `batches.py`.
        kwargs: As in `Trainer`. `train_dataset` may be an [`ImageStream`] too.

    Attributes:
        settings (`dict`): Arguments of the model in evaluations, such as `num_inference_steps`: of `generate` or, for
            a classifier, of `forward`.
        stop ([`StopCallback`]): Its `signal` is the signal that ended the run, or `None`.

    Raises:
        `ValueError`: for an averaged optimiser other than AdamW, or fewer training examples than a batch.
    """

    unfinished: Path | None = None  # where a checkpoint is being written

    def __init__(
        self,
        model: nn.Module,
        args: TDDTrainingArguments,
        eval_collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
        **kwargs: Any,
    ):
        if args.bf16 and args.is_precision_free:
            slower = torch.tensor(float(fast_precision(model) == "no"), device=args.device)
            if reduce(slower, "sum") > 0:  # in any process, since all need the same
                args.bf16, args.mixed_precision = False, "no"
        self.finite_steps, self.stop, self.meter = FiniteStepsCallback(), StopCallback(), MeterCallback()
        ours = [SeedCallback(), self.finite_steps, self.stop, self.meter]
        callbacks = [*(kwargs.pop("callbacks", None) or []), *ours]
        if args.ema_decay > 0:
            if args.optim not in ("adamw_torch", "adamw_torch_fused"):
                raise ValueError(f"`optim` must be 'adamw_torch' to average the weights, got {args.optim.value!r}.")
            _, settings = self.get_optimizer_cls_and_kwargs(args)
            settings |= {"average_decay": args.ema_decay, "average_warmup": args.ema_warmup}
            kwargs["optimizer_cls_and_kwargs"] = (AveragedAdamW, settings)
        kwargs["processing_class"] = saveable_image_processor(kwargs.get("processing_class"))
        super().__init__(model, args, callbacks=callbacks, **kwargs)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ShortProgressCallback)
        self.eval_collator = eval_collator or self.data_collator
        self.settings: dict[str, Any] = {}

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Raises a `ValueError`: whatever starts an upload in `Trainer` begins here."""
        raise ValueError(NO_UPLOADS)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All weights decay but biases and those of norms, as in timm."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    # ---- Data

    def get_train_dataloader(self) -> DataLoader:
        """Training batches, whose order is that of the data set: [`TrainingRows`] shuffles."""
        args, data = self.args, self.train_dataset
        step_size = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        is_stream = isinstance(data, IterableDataset)
        if is_stream:
            batches = data.num_examples // step_size * args.gradient_accumulation_steps
            data.configure(args.seed, self._train_batch_size, batches, args.process_index, args.world_size)
        else:
            data = TrainingRows(data, args.seed, step_size)
        loader = DataLoader(
            data,
            batch_size=self._train_batch_size,
            sampler=None if is_stream else SequentialSampler(data),
            drop_last=True,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=leave_signals_to_the_trainer,
        )
        # Each process has its own share of a stream, which Accelerate would divide once more.
        return loader if is_stream else self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        return self._with_eval_collator(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return self._with_eval_collator(super().get_test_dataloader, test_dataset)

    def _with_eval_collator(self, make: Callable[[Any], DataLoader], data: Any) -> DataLoader:
        collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return make(data)
        finally:
            self.data_collator = collator

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        self.meter.start = time.perf_counter()
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.meter.wait += time.perf_counter() - self.meter.start
        return samples

    # ---- Training

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """As in `Trainer`; `resume_from_checkpoint=True` resumes from the last checkpoint that is as it was saved, if
        there is one. Afterwards the model holds the average of its weights. Raises a `ValueError` if the checkpoint
        of `resume_from_checkpoint` is damaged."""
        if not isinstance(resume_from_checkpoint, (str, Path, bool, type(None))):
            raise TypeError(f"`resume_from_checkpoint` must be a folder or a boolean, got {resume_from_checkpoint!r}.")
        if resume_from_checkpoint is True:
            with self.args.main_process_first(desc="looking for the last checkpoint"):
                resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
                if self.args.should_save:
                    set_damaged_aside(self.args.output_dir, resume_from_checkpoint)
        elif resume_from_checkpoint and (problem := find_damage(Path(resume_from_checkpoint))):
            raise ValueError(f"{resume_from_checkpoint} is damaged: {problem}.")
        if resume_from_checkpoint:
            self.accelerator.print(f"Resuming from {resume_from_checkpoint}.")
        output = super().train(resume_from_checkpoint, **kwargs)
        self._hold_average()
        if self.stop.signal:
            last = last_complete_checkpoint(self.args.output_dir)
            self.accelerator.print(f"Stopped by a signal. The same command resumes from {last}.")
        return output

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            # The gradient of a loss that is not finite must not be finite either: it tells all processes.
            loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
            if getattr(outputs, "loss_by_timestep", None) is not None:
                self.meter.losses.append(outputs.loss_by_timestep.detach().float())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs Trainer's values and, with a training loss, `images_per_second`, `data_wait_share`, `memory_gib`,
        `skipped_steps` (of the whole run) and, for a diffusion model, `loss_by_timestep/0` to `/9`: the mean loss in
        each tenth of the timesteps, without the timestep's coefficient."""
        if "loss" in logs:
            step_size = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            logs |= self.meter.values(step_size) | {"skipped_steps": self.finite_steps.skipped}
            if hasattr(self.train_dataset, "skipped"):
                logs["skipped_examples"] = self.train_dataset.skipped
        try:
            super().log(logs, start_time)
        except OSError as error:  # TensorBoard's, on a full disk
            folder = self.args.output_dir
            message = f"The log in {folder} could not be written: {error}. {describe_last_checkpoint(folder)}"
            raise OSError(message) from error

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Saves the average of the weights. In a checkpoint the optimiser's state holds the weights that train."""
        self._hold_average()
        super().save_model(output_dir, _internal_call)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with plain_class(self.model):
            super()._save(*args, **kwargs)

    def _get_output_dir(self, trial: Any = None) -> str:
        return super()._get_output_dir(trial) if self.unfinished is None else str(self.unfinished)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint out of sight, and moves it into its place when all processes have written it."""
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        unfinished = folder.with_name(f".{folder.name}.new")
        try:
            if self.args.should_save:
                make_hidden(folder)
            self.accelerator.wait_for_everyone()
            self.unfinished = unfinished
            super()._save_checkpoint(model, trial)
            self.unfinished = None
            self.accelerator.wait_for_everyone()
            self._finish_checkpoint(unfinished / folder.name, folder)
        except Exception as error:  # on a full disk safetensors, PyTorch and Python raise different errors
            free = f"{shutil.disk_usage(folder.parent).free / 2**20:.1f} MiB were free"
            remove(unfinished)
            last = describe_last_checkpoint(folder.parent)
            raise OSError(f"{folder} could not be written, where {free}: {error}. {last}") from error
        finally:
            self.unfinished = None

    def _finish_checkpoint(self, new: Path, folder: Path) -> None:
        if self.state.best_model_checkpoint == str(new):
            self.state.best_model_checkpoint = str(folder)
        if self.args.should_save:
            self.state.save_to_json(str(new / TRAINER_STATE_NAME))
            write_checksums(new)
            put_in_place(new, folder)
            remove(new.parent)
            kept = {str(folder), self.state.best_model_checkpoint or str(folder)}
            remove_old_checkpoints(folder.parent, self.args.save_total_limit, kept)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.args.ema_decay == 0 and "holds_average" in self.optimizer.param_groups[0]:
            raise ValueError(f"{checkpoint} holds the average of the weights. Resume it with its `ema_decay`, got 0.")

    def _load_best_model(self) -> None:
        self._hold_average()  # the best weights are an average, and take the place of this one
        super()._load_best_model()

    def _hold_average(self) -> None:
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()

    # ---- Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`, which casts the model itself with `bf16_full_eval`: what is saved stays in float32."""
        modules = list(self.model.modules())
        is_cast = self.args.bf16_full_eval or self.args.fp16_full_eval
        groups = [group for module in modules for group in (module._parameters, module._buffers)] if is_cast else []
        kept = [(group, name, x, x.data) for group in groups for name, x in group.items() if x is not None]
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            for group, name, tensor, data in kept:
                tensor.data, group[name] = data, tensor
        # FSDP2 keeps weights that it has gathered for a forward. The next training step would use the average.
        for module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        # A `PeftModel` has `generate` whatever its base model is.
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if not callable(getattr(base, "generate", None)):
            return super().prediction_step(model, {**inputs, **self.settings}, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            if prediction_loss_only:
                return loss, None, None
            # Loss and captions come from one encoding of the images, where the model returns it.
            features = getattr(outputs, "encoder_last_hidden_state", None)
            images = {name: value for name, value in inputs.items() if name != "labels"}
            images = images if features is None else {"image_features": features}
            return loss, self.model.generate(**images, **self.settings), inputs["labels"]
