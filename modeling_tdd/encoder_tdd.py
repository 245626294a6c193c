# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The image encoder: any vision model of Transformers or timm, described by measurement and not by its name.

One dry run of a second copy of the encoder says how wide its tokens are, which of them are patches, and which of its
parameters nothing reads. The copy is on the meta device, where tensors have shapes and gradients but no values, so a
run costs a fraction of a second and no memory, also while `from_pretrained` builds the model.
"""

import copy
import inspect
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .settings_tdd import refuse_locations


PROBE_BATCH_SIZE = 2
# Sides of square images to try with an encoder whose configuration names none
USUAL_IMAGE_SIZES = (224, 256, 384, 512, 64, 32)


class EncoderLayout(NamedTuple):
    r"""
    What a model must know of its encoder.

    Args:
        hidden_size (`int`): Width of the encoder's tokens.
        num_channels (`int`): Channels of the images that it takes.
        num_leading_tokens (`int`): Special tokens (class, distillation, register) in front of the patch tokens.
        num_trailing_tokens (`int`): Special tokens behind the patch tokens.
        is_channels_last (`bool`): Whether an encoder that returns maps has them as (batch, height, width, channels).
        patch_size (`int`, *optional*): For an encoder that takes flattened patches (SigLIP 2): their side in pixels.
    """

    hidden_size: int
    num_channels: int
    num_leading_tokens: int
    num_trailing_tokens: int
    is_channels_last: bool
    patch_size: int | None


class RemovedModule(nn.Module):
    """Stands for a part of an encoder whose result nothing reads. It has no weights and returns its first input."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else None


# ---- Running an encoder


def flatten_patches(pixel_values: Tensor, patch_size: int) -> dict[str, Tensor | None]:
    r"""
    The inputs of an encoder that takes flattened patches (NaFlex), from ordinary images.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Images.
        patch_size (`int`): Side of a patch in pixels.

    Returns:
        `dict`: `pixel_values` of shape `(batch_size, num_patches, patch_size * patch_size * num_channels)`, with the
        channels of a pixel together; `pixel_attention_mask`, which is `None`, since there are no padding patches;
        `spatial_shapes` of shape `(batch_size, 2)`, int64 on the CPU: rows and columns of patches.

    Raises:
        `ValueError`: if the height or the width is not a multiple of `patch_size`.
    """
    batch_size, num_channels, height, width = pixel_values.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"`pixel_values` must have a height and a width that are multiples of the encoder's patch size "
            f"{patch_size}, got {height} x {width}."
        )
    rows, columns = height // patch_size, width // patch_size
    patches = pixel_values.reshape(batch_size, num_channels, rows, patch_size, columns, patch_size)
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch_size, rows * columns, -1)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": None,
        # On the CPU: the encoder reads these values, so a GPU would have to wait, and the meta device has none
        "spatial_shapes": torch.tensor([[rows, columns]], device="cpu").expand(batch_size, 2),
    }


def run_encoder(encoder: nn.Module, layout: EncoderLayout, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
    """The encoder's own output for images of shape `(batch_size, num_channels, height, width)`."""
    if layout.patch_size is None:
        return encoder(pixel_values, **kwargs)
    return encoder(**flatten_patches(pixel_values, layout.patch_size), **kwargs)


def as_tokens(hidden_states: Tensor, layout: EncoderLayout) -> Tensor:
    """Maps of shape (batch, channels, height, width) or (batch, height, width, channels) become tokens of shape
    (batch, height * width, channels), row by row. Tokens stay as they are."""
    if hidden_states.ndim == 3:
        return hidden_states
    return hidden_states.flatten(1, 2) if layout.is_channels_last else hidden_states.flatten(2).transpose(1, 2)


def pool_tokens(tokens: Tensor, pooling: str | None, layout: EncoderLayout) -> Tensor:
    r"""
    The condition c of Section 3.3.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): The encoder's.
        pooling (`str`, *optional*): `"cls"`: the first token. `"mean"`: the mean of the patch tokens, without special
            tokens. `None`: all tokens.

    Returns:
        `torch.Tensor` of shape `(batch_size, 1, hidden_size)`, or `tokens` without pooling.
    """
    if pooling == "cls":
        return tokens[:, :1]
    if pooling == "mean":
        end = tokens.shape[1] - layout.num_trailing_tokens
        return tokens[:, layout.num_leading_tokens : end].mean(dim=1, keepdim=True)
    return tokens


# ---- Building an encoder


def build_encoder(vision_config: PreTrainedConfig, pooling: str | None) -> tuple[PreTrainedModel, EncoderLayout]:
    r"""
    An encoder with new weights, without the parts that its tokens do not depend on, and its layout.

    A parameter that nothing reads gets no gradient, which stops distributed training, and makes checkpoints larger.
    Poolers and heads behind the last layer are removed (an attribute that may be `None` becomes `None`, another one a
    [`RemovedModule`]). Other unread parameters, such as a mask token, stay: see [`freeze_unread`].

    Args:
        vision_config ([`PreTrainedConfig`]): The encoder's configuration; it is not changed.
        pooling (`str`, *optional*): `"cls"`, `"mean"` or `None`, as in [`pool_tokens`].

    Raises:
        `ValueError`: if the configuration is not that of a vision model of one tower, if the encoder cannot read
            images of shape (batch_size, num_channels, height, width) or returns neither tokens nor a map, if it draws
            random numbers in eval mode (a masked autoencoder), or if `pooling="cls"` and it has no special token in
            front of its patch tokens. Also if it names a file, a URL or a repository.
    """
    probe = measure_encoder(vision_config)
    if pooling == "cls" and probe.layout.num_leading_tokens == 0:
        raise ValueError(
            f"`pooling='cls'` needs an encoder with a class token, and `{vision_config.model_type}` has none in front "
            "of its patch tokens. Use `pooling='mean'`, or `None` for all tokens."
        )
    encoder = AutoModel.from_config(vision_config)
    for name, may_be_none in probe.removed.items():
        _replace(encoder, name, None if may_be_none else RemovedModule())
    return encoder, probe.layout


def freeze_unread(encoder: nn.Module, vision_config: PreTrainedConfig) -> None:
    """The parameters that nothing reads, such as a mask token, do not require a gradient. Transformers'
    `from_pretrained` makes all that it loads require one."""
    unread = measure_encoder(vision_config).unread
    for name, parameter in encoder.named_parameters():
        if name in unread:
            parameter.requires_grad_(False)


class EncoderProbe(NamedTuple):
    r"""
    Result of [`measure_encoder`].

    Args:
        layout ([`EncoderLayout`]): Of its tokens.
        unread (`frozenset[str]`): Names of the parameters that nothing reads.
        removed (`dict[str, bool]`): Names of the modules to remove, and whether `None` may take their place.
    """

    layout: EncoderLayout
    unread: frozenset[str]
    removed: dict[str, bool]


# A probe depends on the configuration alone, so what is kept of one cannot become wrong.
_PROBES: dict[tuple[type, str], EncoderProbe] = {}


def measure_encoder(vision_config: PreTrainedConfig) -> EncoderProbe:
    """Builds a copy of the encoder on the meta device and runs it forwards and backwards once; it raises what
    [`build_encoder`] does. If the encoder needs values in its forward pass, a copy on the CPU is run instead. A second
    call with the same configuration returns the same result at no cost."""
    key = (type(vision_config), vision_config.to_json_string(use_diff=False))
    if key not in _PROBES:
        _PROBES[key] = _measure(vision_config)
    return _PROBES[key]


def _measure(vision_config: PreTrainedConfig) -> EncoderProbe:
    refuse_locations("vision_config", vision_config)
    if type(vision_config) not in MODEL_MAPPING:
        raise ValueError(f"`AutoModel` has no model for `vision_config`, which is a {type(vision_config).__name__}.")
    try:
        return _measure_on("meta", vision_config)
    except _CannotRun:
        pass  # also for an encoder that cannot run anywhere: only the CPU's error is about the encoder
    try:
        return _measure_on("cpu", vision_config)
    except _CannotRun as error:
        cause = error.__cause__
        raise ValueError(
            "`vision_config` must be that of an image encoder, which reads `pixel_values` of shape (batch_size, "
            f"num_channels, height, width). `{vision_config.model_type}` failed with {type(cause).__name__}: {cause}"
        ) from cause


class _CannotRun(Exception):
    """No image size that was tried could be run. The cause is the error of the first one."""


class _Recorder(TorchDispatchMode):
    """Records two kinds of operations: those that draw random numbers, and those that join sequences of tokens."""

    def __init__(self):
        super().__init__()
        self.random_operations: list[str] = []
        self.joined_lengths: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Kernels of attention bear the tag for their dropout, of which there is none in eval mode
        if torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in str(func):
            self.random_operations.append(str(func))
        if func is torch.ops.aten.cat.default and len(args) > 1 and args[1] in (1, -2):
            tensors = args[0]
            if all(tensor.ndim == 3 and len(tensor) == PROBE_BATCH_SIZE for tensor in tensors):
                self.joined_lengths.append([tensor.shape[1] for tensor in tensors])
        return func(*args, **(kwargs or {}))


class _Run(NamedTuple):
    """One forward pass: the encoder's hidden states, the names of its modules in the order of their calls, rows and
    columns of what its first convolution or projection returned, and the operations."""

    hidden_states: Tensor | None
    calls: list[str]
    grid: tuple[int, int]
    recorder: _Recorder


@torch.inference_mode(False)  # whoever makes a model may be in it
@torch.enable_grad()
def _measure_on(device: str, vision_config: PreTrainedConfig) -> EncoderProbe:
    vision_config = copy.deepcopy(vision_config)  # `from_config` writes to it
    if vision_config._attn_implementation not in (None, "eager", "sdpa"):
        vision_config._attn_implementation = "eager"  # the others need a GPU
    with torch.random.fork_rng(devices=[]), torch.device(device):
        encoder = AutoModel.from_config(vision_config).eval()
        num_channels, patch_size = _num_channels(vision_config), _flattened_patch_size(encoder)
        unknown = EncoderLayout(0, num_channels, 0, 0, False, patch_size)
        image_size, run = _run_at_first_possible_size(encoder, unknown)
        name = vision_config.model_type
        if run.recorder.random_operations:
            raise ValueError(
                f"`{name}` draws random numbers in eval mode ({', '.join(sorted(set(run.recorder.random_operations)))}"
                "), as a masked autoencoder does, so an image would have no features of its own. Use an encoder that "
                "does not mask. `ViTModel.from_pretrained` reads the weights of a `ViTMAEModel`: save that model."
            )
        layout = _find_layout(encoder, unknown, image_size, run, name)
        parameters = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
        gradients = torch.autograd.grad(run.hidden_states.sum(), list(parameters.values()), allow_unused=True)
        unread = frozenset(name for name, gradient in zip(parameters, gradients) if gradient is None)
        removed = {}
        for name in list(_unread_modules(encoder, unread, run.calls)):
            if (may_be_none := _find_replacement(encoder, name, layout, image_size, run)) is not None:
                removed[name] = may_be_none
        return EncoderProbe(layout, unread, removed)


def _num_channels(vision_config: PreTrainedConfig) -> int:
    model_args = getattr(vision_config, "model_args", None) or {}  # of timm
    return getattr(vision_config, "num_channels", None) or model_args.get("in_chans", 3)


def _flattened_patch_size(encoder: PreTrainedModel) -> int | None:
    """The side of its patches if an encoder takes them flattened, with their rows and columns in `spatial_shapes`."""
    takes_patches = "spatial_shapes" in inspect.signature(encoder.forward).parameters
    return encoder.config.patch_size if takes_patches else None


def _image_sizes(encoder: nn.Module, patch_size: int | None) -> Iterator[tuple[int, int]]:
    """Heights and widths that an encoder may take: what its configuration names first, then usual ones."""
    timm_model = getattr(encoder, "timm_model", None)
    named = [
        getattr(encoder.config, "image_size", None),
        (getattr(encoder.config, "model_args", None) or {}).get("img_size"),
        None if timm_model is None else tuple(timm_model.pretrained_cfg.get("input_size", ()))[1:],
        None if patch_size is None else 8 * patch_size,
    ]
    for size in [*filter(None, named), *USUAL_IMAGE_SIZES]:
        yield (size, size) if isinstance(size, int) else tuple(size)


def _run(encoder: nn.Module, layout: EncoderLayout, image_size: tuple[int, int]) -> _Run:
    """A forward pass with black images.

    Raises:
        `Exception`: whatever the encoder does for a size that it cannot take.
    """
    calls, grids = [], []

    def record(name: str, module: nn.Module, output: Any) -> None:
        calls.append(name)
        if isinstance(module, nn.Conv2d):
            grids.append(tuple(output.shape[-2:]))
        elif isinstance(module, nn.Linear) and output.ndim == 3:
            side = math.isqrt(output.shape[1])
            grids.append((side, side) if side**2 == output.shape[1] else (output.shape[1], 1))

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: record(name, module, output))
        for name, module in encoder.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    dtype = next(parameter.dtype for parameter in encoder.parameters() if parameter.is_floating_point())
    images = torch.zeros(PROBE_BATCH_SIZE, layout.num_channels, *image_size, dtype=dtype)
    try:
        with _Recorder() as recorder:
            outputs = run_encoder(encoder, layout, images, return_dict=True)
    finally:
        for hook in hooks:
            hook.remove()
    return _Run(getattr(outputs, "last_hidden_state", None), calls, grids[0] if grids else image_size, recorder)


def _run_at_first_possible_size(encoder: nn.Module, layout: EncoderLayout) -> tuple[tuple[int, int], _Run]:
    first_error = None
    for image_size in _image_sizes(encoder, layout.patch_size):
        try:
            return image_size, _run(encoder, layout, image_size)
        except Exception as error:  # encoders refuse a size in many ways
            first_error = first_error or error
    raise _CannotRun from first_error


def _halved(grid: tuple[int, int]) -> set[tuple[int, int]]:
    """A grid and all that follow from it by halving both sides again and again, rounded up or down."""
    grids, pending = set(), {grid}
    while pending:
        grids |= pending
        smaller = {(height // 2, width // 2) for height, width in pending}
        smaller |= {(-(-height // 2), -(-width // 2)) for height, width in pending}
        pending = {size for size in smaller if min(size) > 0} - grids
    return grids


def _find_layout(
    encoder: nn.Module, unknown: EncoderLayout, image_size: tuple[int, int], run: _Run, name: str
) -> EncoderLayout:
    """Width, special tokens and order of the axes, from the shape of the hidden states against the patch grid: the
    first convolution's, or the largest halving of it that leaves no more patches than there are tokens."""
    shape = () if run.hidden_states is None else run.hidden_states.shape
    grids = _halved(run.grid)

    def is_grid(rows: int, columns: int) -> bool:
        return (rows, columns) in grids or rows * image_size[1] == columns * image_size[0]

    if len(shape) == 3 and shape[0] == PROBE_BATCH_SIZE:
        num_patches = max((rows * columns for rows, columns in grids if rows * columns <= shape[1]), default=0)
        leading = _num_leading_tokens(run.recorder.joined_lengths, shape[1], num_patches)
        if leading is not None:
            trailing = shape[1] - num_patches - leading
            return unknown._replace(hidden_size=shape[2], num_leading_tokens=leading, num_trailing_tokens=trailing)
    if len(shape) == 4 and shape[0] == PROBE_BATCH_SIZE:
        orders = {is_last for is_last in (False, True) if is_grid(*(shape[1:3] if is_last else shape[2:]))}
        if len(orders) == 2:  # as many channels as rows and columns: larger images have more rows, not more channels
            larger = _run(encoder, unknown, (2 * image_size[0], 2 * image_size[1])).hidden_states.shape
            orders = {larger[1] != shape[1]}
        if len(orders) == 1:
            is_channels_last = orders.pop()
            return unknown._replace(
                hidden_size=shape[3] if is_channels_last else shape[1], is_channels_last=is_channels_last
            )
    returned = f"the shape {tuple(shape)}" if shape else "none"
    raise ValueError(
        "`vision_config` must be that of an encoder whose `last_hidden_state` has patch tokens of shape (batch_size, "
        "num_tokens, hidden_size), with or without special tokens, or is a map. "
        f"`{name}` returns {returned} for {PROBE_BATCH_SIZE} images of {image_size[0]} x {image_size[1]}."
    )


def _num_leading_tokens(joined_lengths: list[list[int]], num_tokens: int, num_patches: int) -> int | None:
    """Where the patch tokens start in the last join that made a sequence of `num_tokens`. `None` if there are other
    tokens and no such join: then the tokens are not those of patches, but the queries of a detector, for example."""
    if num_tokens == num_patches:
        return 0
    for lengths in reversed(joined_lengths):
        if sum(lengths) == num_tokens and num_patches in lengths:
            last = max(index for index, length in enumerate(lengths) if length == num_patches)
            return sum(lengths[:last])
    return None


def _unread_modules(encoder: nn.Module, unread: frozenset[str], calls: list[str]) -> Iterator[str]:
    """The largest modules all of whose parameters are unread, if they run behind all that is read: then the tokens
    cannot depend on their results."""
    owners_of_read = {name.rpartition(".")[0] for name, _ in encoder.named_parameters() if name not in unread}
    last_read = max((index for index, name in enumerate(calls) if name in owners_of_read), default=len(calls))

    def walk(module: nn.Module, prefix: str) -> Iterator[str]:
        for child_name, child in module.named_children():
            name = f"{prefix}{child_name}"
            parameters = [f"{name}.{parameter_name}" for parameter_name, _ in child.named_parameters()]
            if not parameters or not unread.issuperset(parameters):
                yield from walk(child, f"{name}.")
            elif not any(call == name or call.startswith(f"{name}.") for call in calls[:last_read]):
                yield name

    yield from walk(encoder, "")


def _replace(encoder: nn.Module, name: str, replacement: nn.Module | None) -> None:
    parent, _, child = name.rpartition(".")
    setattr(encoder.get_submodule(parent), child, replacement)


def _find_replacement(
    encoder: nn.Module, name: str, layout: EncoderLayout, image_size: tuple[int, int], run: _Run
) -> bool | None:
    """Removes a module. `True` if `None` may take its place, `False` if a `RemovedModule` must, and `None` if the
    encoder does not run without it, so that it stays."""
    module = encoder.get_submodule(name)
    for replacement in (None, RemovedModule()):
        _replace(encoder, name, replacement)
        try:
            shape = _run(encoder, layout, image_size).hidden_states.shape
        except Exception:  # code that calls the module or reads its weights fails in many ways
            continue
        if shape == run.hidden_states.shape:
            return replacement is None
    _replace(encoder, name, module)
    return None


__all__ = [
    "EncoderLayout",
    "EncoderProbe",
    "RemovedModule",
    "as_tokens",
    "build_encoder",
    "flatten_patches",
    "freeze_unread",
    "measure_encoder",
    "pool_tokens",
    "run_encoder",
]
