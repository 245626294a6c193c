# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The cost of a training step. PyTorch counts the operations one by one, on tensors with shapes but without memory."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..loss_tdd import diffusion_loss
from ..modeling_tdd import TDDForCaptioning, TDDForImageClassification


Model = TDDForImageClassification | TDDForCaptioning

# Bytes per parameter: float32 weights, gradients, AdamW's two moments, and the moving average. Then the bytes that one
# step reads and writes per trainable parameter for AdamW, and per parameter for the moving average.
WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES, EMA_BYTES = 4, 4, 8, 4
UPDATE_TRAFFIC, EMA_TRAFFIC = 4 * 7, 4 * 3


@dataclass(frozen=True)
class Operations:
    """Numbers of floating-point operations. A multiplication and an addition are two."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.forward + other.forward, self.backward + other.backward)

    def __sub__(self, other: "Operations") -> "Operations":
        return Operations(self.forward - other.forward, self.backward - other.backward)


@dataclass(frozen=True)
class StepCost:
    r"""
    What one training step of a model costs.

    Args:
        parameters (`int`): Parameters of the whole model.
        trainable (`int`): Parameters that are trained.
        encoder_parameters (`int`): Parameters of the encoder and its connector. A classifier without a denoiser counts
            as encoder as a whole.
        encoder ([`Operations`]): Operations per image of the encoder.
        prefix ([`Operations`]): Operations per image of the connector and of the prefix's keys and values.
        denoiser ([`Operations`]): Operations per image of the denoiser and its head, on all noisy versions
            (`timesteps_per_image`) of the image's tokens.
        noise ([`Operations`]): Operations per device batch, whatever its size, for the factor of the projected noise.
        activation_bytes (`int`): Bytes per image that the forward pass keeps for the backward pass.
        fixed_bytes (`int`): Bytes per device batch, whatever its size, for weights cast to half precision.
        largest_layer (`int`): Parameters of the largest layer, which FSDP gathers.
    """

    parameters: int
    trainable: int
    encoder_parameters: int
    encoder: Operations
    prefix: Operations
    denoiser: Operations
    noise: Operations
    activation_bytes: int
    fixed_bytes: int
    largest_layer: int

    @property
    def per_image(self) -> int:
        """`int`: operations per image of the forward and the backward pass."""
        return self.encoder.total + self.prefix.total + self.denoiser.total

    def operations(self, images: int) -> int:
        """Operations of the forward and the backward pass of one device batch with `images` images."""
        return images * self.per_image + self.noise.total

    def update_bytes(self) -> int:
        """Bytes that AdamW and the moving average read and write per step."""
        return self.trainable * UPDATE_TRAFFIC + self.parameters * EMA_TRAFFIC

    def memory(self, images: int, devices: int = 1, shard: bool = False) -> dict[str, int]:
        """Bytes per device for device batches of `images`, replicated (DDP) or sharded over `devices` (FSDP2)."""
        share = devices if shard else 1
        gathered = 2 * self.largest_layer * WEIGHT_BYTES if shard else 0  # one in use, one being fetched
        return {
            "weights": self.parameters * WEIGHT_BYTES // share + gathered,
            "gradients": self.trainable * GRADIENT_BYTES // share,
            "optimiser": self.trainable * OPTIMIZER_BYTES // share,
            "moving average": self.parameters * EMA_BYTES // share,
            "activations": images * self.activation_bytes + self.fixed_bytes,
        }


@dataclass(frozen=True)
class Machine:
    r"""
    A machine to train on.

    Args:
        name (`str`): Name of one device.
        devices (`int`): Number of devices that work together.
        operations_per_second (`float`): Operations that one device sustains in forward and backward passes.
        bytes_per_second (`float`): Bytes that one device sustains in elementwise updates.
        overhead (`float`): Seconds per device batch, whatever its size.
        precision (`str`): Precision of the passes.
        basis (`str`): Where the figures come from.
    """

    name: str
    devices: int
    operations_per_second: float
    bytes_per_second: float
    overhead: float = 0.0
    precision: str = "bf16"
    basis: str = ""

    def step_seconds(self, cost: StepCost, images: int, accumulation: int = 1) -> float:
        """Seconds of an optimiser step with `accumulation` device batches of `images`. Communication and waiting for
        data are not counted: on a balanced machine both overlap with the computation."""
        passes = accumulation * (cost.operations(images) / self.operations_per_second + self.overhead)
        return passes + cost.update_bytes() / self.bytes_per_second


# We assume that plain PyTorch reaches a third of the peak with ViTs in bf16, until someone measures it.
MACHINES = {
    "h100x8": Machine("H100 80 GB SXM", 8, 989e12 / 3, 2.3e12, basis="a third of 989 TFLOP/s in bf16 (assumed)"),
    "a100x8": Machine("A100 80 GB SXM", 8, 312e12 / 3, 1.4e12, basis="a third of 312 TFLOP/s in bf16 (assumed)"),
    "cpu2": Machine(
        "2 cores, AVX2", 1, 90e9, 10e9, precision="no", basis="two thirds of the 145 GFLOP/s measured in float32"
    ),
}


def training_cost(model: Model, image_size: tuple[int, int], precision: str = "no") -> StepCost:
    r"""
    Counts the operations and the memory of a training step. The weights are not read, so the model may be on the meta
    device.

    Args:
        model ([`TDDForImageClassification`] or [`TDDForCaptioning`]):
            The model. The features of a frozen encoder count as cached.
        image_size (`tuple[int, int]`): Height and width of the training views.
        precision (`str`, *optional*, defaults to `"no"`):
            `"no"`, `"bf16"` or `"fp16"`: the precision of the activations, for their memory.

    Returns:
        [`StepCost`]: the cost of the step.
    """
    with _fake_copy(model, "eager") as copy:  # on any device PyTorch counts the products of eager attention
        features = _features(copy, image_size, 1).detach().requires_grad_(not copy.config.freeze_encoder)
        encoder = _count(lambda: _features(copy, image_size, 1), copy.config.freeze_encoder)
        prefix = Operations()
        if copy.model.denoiser is not None:
            prefix = _count(lambda: _prefix_keys_and_values(copy, features))
        one, two = (_count(lambda rows=rows: _loss(copy, features.expand(rows, -1, -1))) for rows in (1, 2))
    with _fake_copy(model, "sdpa") as copy:
        kept = [_kept_bytes(copy, image_size, rows, precision) for rows in (1, 2)]
    names = ("model.denoiser.", "classifier.", "lm_head.") if model.model.denoiser is not None else ()
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return StepCost(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        encoder_parameters=sum(p.numel() for name, p in model.named_parameters() if not name.startswith(names)),
        encoder=encoder,
        prefix=prefix,
        denoiser=two - one - prefix,
        noise=one + one - two,
        activation_bytes=kept[1] - kept[0],
        fixed_bytes=max(0, 2 * kept[0] - kept[1]),
        largest_layer=max((sum(p.numel() for p in m.parameters()) for stack in stacks for m in stack), default=0),
    )


@contextmanager
def _fake_copy(model: Model, attention: str) -> Iterator[Model]:
    """A copy of a model whose tensors have shapes but no memory. It is in eval mode, without dropout."""
    with torch.device("meta"):
        copy = type(model)(deepcopy(model.config))
    copy.set_attn_implementation(attention)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield copy.to_empty(device="cpu").eval()


def _features(model: Model, image_size: tuple[int, int], rows: int) -> Tensor:
    channels = model.model.encoder_layout.num_channels
    return model.model.get_image_features(torch.empty(rows, channels, *image_size), return_dict=True).pooler_output


def _loss(model: Model, features: Tensor) -> Tensor:
    """The loss that `forward` computes from the encoder's features in training."""
    config, rows = model.config, len(features)
    targets = torch.zeros(rows, config.max_position_embeddings, dtype=torch.long)
    head = model.get_output_embeddings()
    if model.model.denoiser is None:
        return nn.functional.cross_entropy(head(features[:, 0]).float(), targets[:, 0])
    return diffusion_loss(model.model.denoiser, head, model.model.connector(features), targets).loss


def _prefix_keys_and_values(model: Model, features: Tensor) -> Tensor:
    """All that the denoiser computes once per image, flattened."""
    prefix = model.model.connector(features)
    states = []
    for layer in model.model.denoiser.layers:
        prefix, *key_value = layer.encode_prefix(prefix, None)
        states += key_value
    return torch.cat([tensor.flatten() for tensor in states])


def _count(run: Callable[[], Tensor], is_cached: bool = False) -> Operations:
    if is_cached:
        return Operations()
    with FlopCounterMode(display=False) as forward:
        output = run()
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return Operations(forward.get_total_flops(), backward.get_total_flops())


def _kept_bytes(model: Model, image_size: tuple[int, int], rows: int, precision: str) -> int:
    """Bytes that a forward pass keeps for the backward pass, without those of the weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    # The CPU's autocast lacks fp16; bf16 takes as much memory
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision != "no")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        _loss(model, _features(model, image_size, rows))
    return sum(storage.nbytes() for storage in kept.values())


# ---- Measured


def measure_machine(
    model: Model, batches: list[dict[str, Tensor]], cost: StepCost, clock: Callable[[], float]
) -> Machine:
    r"""
    Measures this machine with the passes and updates of a model.

    Args:
        model ([`TDDForImageClassification`] or [`TDDForCaptioning`]): The model on its device. Its weights change.
        batches (`list`): Two batches of different sizes, each a dictionary of `forward`'s arguments.
        cost ([`StepCost`]): The cost of a step of the model.
        clock (`Callable`): A clock in seconds. It is that of the wall, or of this process alone where other processes
            share the machine.
    """
    small, large = (len(next(iter(batch.values()))) for batch in batches)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    average = ModelEmaV3(model)

    def update() -> None:
        optimizer.step()
        average.update(model)

    seconds = [median_seconds(lambda batch=batch: model(**batch).loss.backward(), clock) for batch in batches]
    rate = (cost.operations(large) - cost.operations(small)) / max(seconds[1] - seconds[0], 1e-9)
    overhead = max(0.0, seconds[0] - cost.operations(small) / rate)
    traffic = cost.update_bytes() / median_seconds(update, clock)
    return Machine("this machine", 1, rate, traffic, overhead, precision="no", basis="measured now")


def median_seconds(run: Callable[[], object], clock: Callable[[], float], repeats: int = 5) -> float:
    """The median time of `repeats` runs, after one run to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return statistics.median(seconds[1:])
