"""A training run of a few seconds with `modeling_tdd.training.loop.train`, for tests that start and kill processes.

Everything that draws at random is on: augmentation by all three generators, dropout, condition dropout, and several
timesteps per image. Gradients are accumulated. `python tiny_training.py FOLDER '{"epochs": 2}'` runs it.
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
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import ViTConfig

from modeling_tdd import TDDConfig, TDDForImageClassification
from modeling_tdd.training.loop import make_accelerator, make_loader, train
from modeling_tdd.training.recipe import TrainingRecipe


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
        return torch.roll(self.pixels[index], random.randrange(4), dims=-1), self.labels[index]


class Stream(IterableDataset):
    """A stream of the images of one process, with a position to resume from."""

    def __init__(self, images: Images, process: int, num_processes: int, lengths: list[int]):
        self.images = images
        self.rows = range(process, len(images), num_processes)[: lengths[process]]
        self.epoch = self.position = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]

    def __iter__(self):
        while self.position < len(self.rows):
            index = self.rows[(self.position + self.epoch) % len(self.rows)]
            self.position += 1
            yield self.images.pixels[index], self.images.labels[index]


def collate(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    pixels = torch.stack([pixels for pixels, _ in examples])
    pixels = pixels * np.random.uniform(0.9, 1.1) + 0.1 * torch.randn_like(pixels)
    return {"pixel_values": pixels, "labels": torch.stack([label for _, label in examples])}


def collate_stream(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack(values) for name, values in zip(("pixel_values", "labels"), zip(*examples))}


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


class Disturbed(nn.Module):
    """The model with disturbances at given device batches."""

    def __init__(self, model: nn.Module, events: dict[str, Any], process: int):
        super().__init__()
        self.model = model
        self.events = {int(number): event for number, event in events.items()}
        self.process = process
        self.calls = 0

    def forward(self, **batch: Any) -> Any:
        event = self.events.get(self.calls) if self.training else None
        self.calls += self.training
        outputs = self.model(**batch)
        if event == "nan" and self.process == 0:
            outputs.loss = outputs.loss * float("nan")
        elif event == "inf" and self.process == 0:
            outputs.loss = outputs.loss + float("inf")
        elif event in ("SIGKILL", "SIGINT"):
            os.kill(os.getpid(), getattr(signal, event))
        elif event == "SIGTERM to one" and self.process == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        elif event == "SIGTERM to all":
            subprocess.run(["kill", "-TERM", "--", f"-{os.getpgid(0)}"])  # as a scheduler does
        return outputs


def evaluate(model: nn.Module) -> float:
    images = Images(8)
    with torch.inference_mode():
        logits = model(pixel_values=images.pixels, num_inference_steps=2).logits
    return (logits.argmax(-1) == images.labels).float().mean().item()


def use_fsdp(accelerator: Accelerator) -> None:
    """FSDP2 in processes on the CPU, for which Accelerate has plain DDP alone: what its `state` holds on GPUs."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )
    # Each new `AcceleratorState` copies the type from `PartialState`
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP


def run(folder: Path, **options: Any) -> None:
    """Trains, and writes the averaged final weights to `ema.safetensors`."""
    torch.set_num_threads(1)
    seed, resume, events = options.pop("seed", 0), options.pop("resume", "auto"), options.pop("events", None)
    stream, steps_per_epoch = options.pop("stream", None), options.pop("steps_per_epoch", None)
    fields = {
        "epochs": 5,
        "batch_size": BATCH_SIZE,
        "device_batch_size": DEVICE_BATCH_SIZE,
        "base_learning_rate": 1.6e-2,  # 1e-3 for this batch size
        "warmup_epochs": 1,
        "ema_decay": 0.9,
        "mixed_precision": "no",
        "checkpoint_every": 3,
        "log_every": 2,
        "eval_every": 2,
        "trackers": [],
    }
    fsdp = options.pop("fsdp", False)
    recipe = TrainingRecipe(**{**fields, **options})
    accelerator = make_accelerator(recipe, folder)
    if fsdp:
        use_fsdp(accelerator)
    if stream is None:
        loader = make_loader(accelerator, recipe, Images(), collate, shuffle=True, seed=seed)
    else:
        data = Stream(Images(), accelerator.process_index, accelerator.num_processes, stream)
        loader = DataLoader(data, DEVICE_BATCH_SIZE, collate_fn=collate_stream)
    model = make_model()
    if events is not None:
        model = Disturbed(model, events, accelerator.process_index)
    ema = train(accelerator, recipe, model, loader, evaluate, "tiny", seed, resume, steps_per_epoch)
    assert all(isinstance(parameter, DTensor) == fsdp for parameter in model.parameters())
    if accelerator.is_main_process:
        save_model(ema, str(folder / "ema.safetensors"))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run(Path(sys.argv[1]), **json.loads(sys.argv[2]))
