# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Five steps of training with FSDP2, for the test that starts two processes of it: `torchrun fsdp_probe.py FOLDER`.

Each model is sharded by the function that Accelerate's `prepare` calls on GPUs. (`Accelerator` itself takes processes
on the CPU for plain DDP, whatever it is told of FSDP.) With one process nothing is sharded: that is the reference.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, ViTConfig

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification


IMAGES, STEPS, PLACES = 4, 5, 6
CAPTIONS = {"vocab_size": 50, "max_position_embeddings": PLACES, "pooling": None, "pad_token_id": 0, "eos_token_id": 1}
MODELS: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "classifier": (TDDForImageClassification, {"num_labels": 40}),
    "captioner": (TDDForCaptioning, CAPTIONS),
    "tied": (TDDForCaptioning, {**CAPTIONS, "tie_word_embeddings": True}),
    "mask": (TDDForCaptioning, {**CAPTIONS, "corruption": "mask"}),
}


def make_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class, fields = MODELS[name]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    # A key's bias has a gradient of rounding alone, of which AdamW makes whole steps
    vision_config = ViTConfig(image_size=16, patch_size=8, qkv_bias=False, initializer_range=0.2, **sizes)
    return model_class(
        TDDConfig(
            vision_config=vision_config,
            initializer_range=0.2,
            num_timesteps=20,
            timesteps_per_image=3,
            condition_dropout=0.0,
            **sizes,
            **fields,
        )
    )


def make_batch(config: TDDConfig) -> dict[str, Tensor]:
    """All images of a step, with the draws of the loss, so that it matters to no one who computes which image."""
    generator = torch.Generator().manual_seed(1)
    places, repeats = config.max_position_embeddings, config.timesteps_per_image
    label_shape = (IMAGES,) if places == 1 else (IMAGES, places)
    return {
        "pixel_values": torch.randn(IMAGES, 3, 16, 16, generator=generator),
        "labels": torch.randint(2, config.num_categories, label_shape, generator=generator),
        "timesteps": torch.randint(1, config.num_timesteps + 1, (IMAGES, repeats), generator=generator),
        "noise": torch.rand(IMAGES, repeats, places, config.noise_width, generator=generator),
    }


def shard(model: PreTrainedModel, rank: int) -> None:
    """Shards in place, as Accelerate does, and asserts that it is so."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=rank == 0,
        device=torch.device("cpu"),
    )
    fsdp2_prepare_model(accelerator, model)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not sharded"
        assert parameter.to_local().numel() <= (parameter.numel() + 1) // 2 or parameter.shape[0] == 1, name
    units = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    denoiser = "model.denoiser.layers.0" if model.config.tie_word_embeddings else "model.denoiser"
    assert {"", denoiser, "model.denoiser.token_embedding", "model.encoder.layers.0"} <= units, units


def train(name: str, folder: Path) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = make_model(name).train()
    batch = make_batch(model.config)
    if processes > 1:
        shard(model, rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        own = {key: values.chunk(processes)[rank] for key, values in batch.items()}
        model(**own).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / f"{name}-{processes}", state_dict=weights)
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for model_name in MODELS:
        train(model_name, Path(sys.argv[1]))
    dist.destroy_process_group()
