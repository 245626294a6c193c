"""A training run of a few seconds with `TDDTrainer`, for tests that start and kill processes.

Everything that draws at random is on: augmentation by all three generators, dropout, condition dropout, and several
timesteps per image. Gradients are accumulated. `python tiny_training.py FOLDER '{"num_train_epochs": 2}'` runs it.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, ViTConfig

from modeling_tdd import TDDConfig, TDDForImageClassification
from modeling_tdd.training.arguments import TDDTrainingArguments
from modeling_tdd.training.trainer import TDDTrainer


BATCH_SIZE = 16
DEVICE_BATCH_SIZE = 4


class Images(Dataset):
    """Images and labels for four batches of 16, and 12 more, which do not fill a batch."""

    def __init__(self, num_images: int = 4 * BATCH_SIZE + 12):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(num_images, 3, 16, 16, generator=generator)
        self.labels = torch.randint(5, (num_images,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pixels[index], self.labels[index]


def stack(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack(values) for name, values in zip(("pixel_values", "labels"), zip(*examples))}


def augment(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    batch = stack([(torch.roll(pixels, random.randrange(4), dims=-1), label) for pixels, label in examples])
    batch["pixel_values"] *= np.random.uniform(0.9, 1.1)
    batch["pixel_values"] += 0.1 * torch.randn_like(batch["pixel_values"])
    return batch


def make_model() -> TDDForImageClassification:
    torch.manual_seed(0)
    vision_config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.1,
        qkv_bias=False,  # a key's bias changes no output: AdamW would make steps of its gradient, which is rounding
        initializer_range=0.2,
    )
    return TDDForImageClassification(
        TDDConfig(
            vision_config=vision_config,
            num_labels=5,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            hidden_dropout_prob=0.1,
            condition_dropout=0.2,
            initializer_range=0.2,
            num_timesteps=20,
            timesteps_per_image=3,
        )
    )


def disturb(model: nn.Module, events: dict[str, Any], process: int) -> None:
    """Makes a model do something at given device batches, counted over the training."""
    events = {int(number): event for number, event in events.items()}
    calls = iter(range(sys.maxsize))

    def hook(module: nn.Module, args: Any, outputs: Any) -> Any:
        event = events.get(next(calls)) if module.training else None
        if event == "nan" and process == 0:
            outputs.loss = outputs.loss * float("nan")
        elif event == "inf" and process == 0:
            outputs.loss = outputs.loss + float("inf")
        elif event in ("SIGKILL", "SIGINT"):
            os.kill(os.getpid(), getattr(signal, event))
        elif event == "SIGTERM to one" and process == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        elif event == "SIGTERM to all":
            subprocess.run(["kill", "-TERM", "--", f"-{os.getpgid(0)}"])  # as a scheduler does
        return outputs

    model.register_forward_hook(hook)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"top1": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class ShardedTrainer(TDDTrainer):
    """FSDP2 in processes on the CPU, for which Accelerate has plain DDP alone: what its `state` holds on GPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        )
        # Each new `AcceleratorState` copies the type from `PartialState`
        for state in (self.accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


def run(folder: Path, **options: Any) -> None:
    """Trains, and writes the averaged final weights to `ema.safetensors`."""
    events, fsdp = options.pop("events", None), options.pop("fsdp", False)
    resume = options.pop("resume", True)
    fields = {
        "output_dir": str(folder),
        "num_train_epochs": 5,
        "batch_size": BATCH_SIZE,
        "device_batch_size": DEVICE_BATCH_SIZE,
        "base_learning_rate": 1.6e-2,  # 1e-3 for this batch size
        "warmup_steps": 0.2,
        "ema_decay": 0.9,
        "mixed_precision": "no",
        "cpu_threads": 1,
        "save_steps": 3,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 8,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = TDDTrainingArguments(**{**fields, **options})
    model = make_model()
    if events is not None:
        disturb(model, events, args.process_index)
    trainer = (ShardedTrainer if fsdp else TDDTrainer)(
        model,
        args,
        train_dataset=Images(),
        eval_dataset=Images(8),
        data_collator=augment,
        eval_collator=stack,
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.stop.signal:
        raise SystemExit(128 + trainer.stop.signal)
    parameters = list(trainer.model.parameters())
    averages = [trainer.optimizer.state[p]["other_weights"] for p in parameters]
    assert all(isinstance(tensor, DTensor) == fsdp for tensor in [*parameters, *averages])
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if args.process_index == 0:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "ema.safetensors")
        trainer.save_state()
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    run(Path(sys.argv[1]), **json.loads(sys.argv[2]))
