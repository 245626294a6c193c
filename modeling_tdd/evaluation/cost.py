# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The cost of a training step. PyTorch counts it on tensors that have shapes but no memory."""

import statistics
import time
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from ..loss_tdd import diffusion_loss
from ..modeling_tdd import TDDForCaptioning, TDDForImageClassification


Model = TDDForImageClassification | TDDForCaptioning


def training_cost(
    model: Model, images: int, size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[int, int]:
    r"""
    Counts what a training step with a device batch costs. The features of a frozen encoder count as cached.

    Args:
        model ([`TDDForImageClassification`] or [`TDDForCaptioning`]): The model, which may be on the meta device.
        images (`int`): Images of the device batch.
        size (`tuple[int, int]`): Height and width of the training views.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): That of autocast.

    Returns:
        `tuple[int, int]`: the operations, of which a multiplication and an addition are two, and the bytes that the
            forward pass keeps for the backward pass.
    """
    with torch.device("meta"):
        copy = type(model)(deepcopy(model.config)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        copy.to_empty(device="cpu")
        pixels = torch.empty(images, copy.model.encoder_layout.num_channels, *size)
        copy.set_attn_implementation("eager")  # PyTorch does not count the operations of the CPU's fused attention
        operations, _ = _count_step(copy, pixels, dtype)
        copy.set_attn_implementation("sdpa")
        _, activations = _count_step(copy, pixels, dtype)
    return operations, activations


def device_memory(model: Model, activations: int, shards: int = 1) -> int:
    """Bytes per device, replicated (DDP) or over several `shards` (FSDP2): weights, gradients, AdamW's two moments and
    the moving average in float32, and activations. Buffers of the communication come on top."""
    bytes_of_parameters = sum(p.numel() * (4 + 16 * p.requires_grad) for p in model.parameters())
    return bytes_of_parameters // shards + activations


def _count_step(model: Model, pixels: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """As `training_cost`. It calls what the model's `forward` calls, which itself would check the values of its
    arguments: here are none."""
    network, head = model.model, model.get_output_embeddings()
    labels = torch.zeros(len(pixels), model.config.max_position_embeddings, dtype=torch.long)
    kept = set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage())
        return tensor

    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", dtype, dtype != torch.float32):
            with FlopCounterMode(display=False) as encoder_counter:
                features = network.get_image_features(pixels, return_dict=True).pooler_output
            if network.denoiser is None:
                loss = nn.functional.cross_entropy(head(features[:, 0]).float(), labels[:, 0])
            else:
                loss = diffusion_loss(network.denoiser, head, network.connector(features), labels).loss
        loss.backward()
    operations = counter.get_total_flops()
    if model.config.freeze_encoder:  # training reads its features from disk
        operations -= encoder_counter.get_total_flops()
    kept -= {p.untyped_storage() for p in model.parameters()}
    return operations, sum(storage.nbytes() for storage in kept)


def measure_step(
    model: Model, images: int, size: tuple[int, int], optimizer_class: Callable[..., Optimizer], device: torch.device
) -> float:
    """Seconds of a training step with one device batch, in float32, of a new model that is configured as `model`."""
    config = model.config
    model = type(model)(config).to(device).train()
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], fused=True)
    shape = (images,) if config.vocab_size is None else (images, config.max_position_embeddings)
    batch = {"labels": torch.randint(config.num_categories, shape, device=device)}
    batch["pixel_values"] = torch.randn(images, model.model.encoder_layout.num_channels, *size, device=device)
    if config.freeze_encoder:  # training reads the features from disk
        features = model.model.get_image_features(batch["pixel_values"])
        model.model.get_image_features = lambda *_, **__: features
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
