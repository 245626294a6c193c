# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The cost of a training step. PyTorch counts it on tensors that have shapes but no memory."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..loss_tdd import diffusion_loss
from ..modeling_tdd import TDDForCaptioning, TDDForImageClassification


Model = TDDForImageClassification | TDDForCaptioning

# Bytes per parameter in float32. The optimiser keeps AdamW's two moments and the moving average.
WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 4, 4, 12

PARTS = ("encoder", "connector", "denoiser and head")


@dataclass(frozen=True)
class StepCost:
    r"""
    What one training step of a model costs. A multiplication and an addition are two operations.

    Args:
        parameters (`dict[str, int]`): Parameters of the `PARTS` of the model.
        trainable (`int`): Parameters that are trained.
        per_image (`dict[str, int]`): Operations per image of the forward pass of the `PARTS`, the denoiser's at all
            timesteps of an image, and of the `"backward"` pass.
        per_batch (`int`): Operations per device batch, whatever its size: those of the projected noise's factor.
        kept_per_image (`int`): Bytes per image that the forward pass keeps for the backward pass.
        kept_per_batch (`int`): Bytes per device batch, whatever its size: mostly weights cast to half precision.
    """

    parameters: dict[str, int]
    trainable: int
    per_image: dict[str, int]
    per_batch: int
    kept_per_image: int
    kept_per_batch: int

    def operations(self, images: int) -> int:
        """Operations of the forward and the backward pass of a device batch of `images`."""
        return images * sum(self.per_image.values()) + self.per_batch

    def memory(self, images: int, shards: int = 1) -> dict[str, int]:
        """Bytes per device for device batches of `images`: replicated (DDP), or over several `shards` (FSDP2). Buffers
        of the communication, such as the layer that FSDP2 has gathered, come on top."""
        return {
            "weights": WEIGHT_BYTES * sum(self.parameters.values()) // shards,
            "gradients": GRADIENT_BYTES * self.trainable // shards,
            "optimiser": OPTIMIZER_BYTES * self.trainable // shards,
            "activations": images * self.kept_per_image + self.kept_per_batch,
        }


def training_cost(model: Model, image_size: tuple[int, int], dtype: torch.dtype = torch.float32) -> StepCost:
    r"""
    Counts operations and memory of a training step. The features of a frozen encoder count as cached.

    Args:
        model ([`TDDForImageClassification`] or [`TDDForCaptioning`]): The model, which may be on the meta device.
        image_size (`tuple[int, int]`): Height and width of the training views.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): That of autocast, for the activations' memory.
    """
    with torch.device("meta"):
        copy = type(model)(deepcopy(model.config)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        copy.to_empty(device="cpu")
        copy.set_attn_implementation("eager")  # PyTorch does not count the operations of the CPU's fused attention
        one, two = (_count_step(copy, image_size, images, dtype)[0] for images in (1, 2))
        copy.set_attn_implementation("sdpa")
        kept_by_one, kept_by_two = (_count_step(copy, image_size, images, dtype)[1] for images in (1, 2))
    parameters = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = name.split(".")[1]
        parameters[part if part in PARTS else PARTS[-1]] += parameter.numel()
    return StepCost(
        parameters=parameters,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        per_image={name: two[name] - one[name] for name in one},
        per_batch=2 * sum(one.values()) - sum(two.values()),
        kept_per_image=kept_by_two - kept_by_one,
        kept_per_batch=max(0, 2 * kept_by_one - kept_by_two),
    )


def _count_step(model: Model, size: tuple[int, int], images: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Operations of the passes of a training step, and the bytes that are kept between them. It calls what the model's
    `forward` calls, which itself would check the values of its arguments: here are none."""
    network, head = model.model, model.get_output_embeddings()
    pixels = torch.empty(images, network.encoder_layout.num_channels, *size)
    labels = torch.zeros(images, model.config.max_position_embeddings, dtype=torch.long)
    kept = {}
    counters = {name: FlopCounterMode(display=False) for name in (*PARTS, "backward")}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda kept: kept), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with counters["encoder"]:
            prefix = network.get_image_features(pixels, return_dict=True).pooler_output
        with counters["connector"]:
            prefix = prefix if network.connector is None else network.connector(prefix)
        with counters["denoiser and head"]:
            if network.denoiser is None:
                loss = nn.functional.cross_entropy(head(prefix[:, 0]).float(), labels[:, 0])
            else:
                loss = diffusion_loss(network.denoiser, head, prefix, labels).loss
    with counters["backward"]:
        loss.backward()
    operations = {name: counter.get_total_flops() for name, counter in counters.items()}
    if model.config.freeze_encoder:
        operations["encoder"] = 0  # training reads the features from disk
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return operations, sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
