# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Every setting with its type and its range: the one table that configurations, `forward` and `generate` check by.

`docs/settings.md` shows it with the defaults, and with where a setting may be given.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig


class Setting(NamedTuple):
    """What a value must be: in words, and as a test of a value of any type."""

    allowed: str
    holds: Callable[[Any], bool]


# ---- Kinds of settings


def integer(low: int, high: int | None = None) -> Setting:
    """An integer from `low` to `high`. `True` is none."""

    def holds(value: Any) -> bool:
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        return is_integer and low <= value and (high is None or value <= high)

    return Setting(f"an integer {f'of at least {low}' if high is None else f'in [{low}, {high}]'}", holds)


def number(low: float, high: float, above: bool = False, below: bool = False) -> Setting:
    """A number from `low`, or `above` it, to `high`, or `below` it. `True` is none."""

    def holds(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return (low < value if above else low <= value) and (value < high if below else value <= high)

    return Setting(f"a number in {'(' if above else '['}{low}, {high}{')' if below else ']'}", holds)


def choice(*values: str | bool | None) -> Setting:
    """One of a few values."""
    return Setting(
        f"one of {', '.join(map(repr, values))}",
        lambda value: any(type(value) is type(allowed) and value == allowed for allowed in values),
    )


TENSORS = {
    "floats": lambda values: values.is_floating_point(),
    "int64": lambda values: values.dtype == torch.int64,
    "integers": lambda values: values.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    "floats or int64": lambda values: values.is_floating_point() or values.dtype == torch.int64,
    "booleans or numbers": lambda values: not values.is_complex(),
}


def tensor(kind: str, *dimensions: int) -> Setting:
    """A tensor of a kind of numbers, with one of the numbers of dimensions, or with any."""
    shapes = f" with {' or '.join(map(str, dimensions))} dimensions" if dimensions else ""

    def holds(value: Any) -> bool:
        if not isinstance(value, Tensor) or (dimensions and value.ndim not in dimensions):
            return False
        return value.numel() == 0 or TENSORS[kind](value)  # PyTorch makes an empty list a tensor of floats

    return Setting(f"a tensor of {kind}{shapes}", holds)


def _are_token_sequences(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) > 0
    return is_list and all(isinstance(row, list) and row and all(map(_TOKEN.holds, row)) for row in value)


def _are_label_names(value: Any) -> bool:
    is_filled = isinstance(value, dict) and len(value) > 0
    ids = {str(index) for index in range(len(value))} if is_filled else set()
    return is_filled and {str(key) for key in value} == ids and all(isinstance(name, str) for name in value.values())


def _is_dtype(value: Any) -> bool:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


FLAG = choice(True, False)
# Larger ones are slips: nothing could hold what they ask for
_SIZE, _LAYERS = integer(1, 2**20), integer(1, 1000)
_TOKEN = integer(0, 2**24 - 1)
_RATE = number(0, 1, below=True)
_COUNT = integer(1)

# ---- The table

SETTINGS = {
    # Image encoder
    "vision_config": Setting(
        "a vision model's configuration or a dictionary", lambda value: isinstance(value, (dict, PreTrainedConfig))
    ),
    "pooling": choice("cls", "mean", None),
    "freeze_encoder": FLAG,
    # Tokens and labels
    "vocab_size": integer(1, 2**24),
    "num_labels": _SIZE,
    "id2label": Setting("a dictionary from the integers 0, 1, 2 ... to names", _are_label_names),
    "problem_type": choice(None, "single_label_classification"),
    "max_position_embeddings": _SIZE,
    "pad_token_id": _TOKEN,
    "eos_token_id": _TOKEN,
    # Denoiser
    "hidden_size": _SIZE,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _SIZE,
    "intermediate_size": _SIZE,
    "hidden_act": Setting("the name of an activation in `transformers.activations.ACT2FN`", lambda v: type(v) is str),
    "hidden_dropout_prob": _RATE,
    "attention_probs_dropout_prob": _RATE,
    "layer_norm_eps": number(0, 1, above=True),
    "initializer_range": number(0, 10),
    "tie_word_embeddings": FLAG,
    "dtype": Setting("a floating-point dtype of PyTorch or its name", _is_dtype),
    # Diffusion process
    "num_timesteps": _SIZE,
    "noise_schedule": choice("linear", "cosine", "calibrated", "projected"),
    "input_weighting": choice("none", "visibility"),
    "corruption": choice("gaussian", "mask", "uniform"),
    "prediction_type": choice("sample", "epsilon"),
    "one_hot_scale": number(0.001, 1),
    # Training
    "timesteps_per_image": _COUNT,
    "timestep_sampling": choice("shared", "per_token"),
    "mistaken_share": _RATE,
    "condition_dropout": number(0, 1),
    "label_smoothing": _RATE,
    "pad_loss_weight": number(0, 1),
    "loss_weighting": choice("alpha_bar", "none"),
    # Denoising
    "num_inference_steps": _COUNT,
    "guidance_scale": number(1, 1_000_000),
    "guidance_schedule": choice("constant", "linear", "cosine"),
    "sampling_strategy": choice("argmax", "multinomial"),
    "num_noise_samples": integer(1, 2**16),
    "sampler": choice("renoise", "confidence"),
    "stability_threshold": _COUNT,
    "confidence_threshold": number(0, 1, above=True),
    "seed": integer(0, 2**64 - 1),
    # Captions
    "max_length": _COUNT,
    "max_new_tokens": _COUNT,
    "do_sample": FLAG,
    "temperature": number(1e-6, 1e6),
    "top_k": integer(0),
    "top_p": number(0, 1, above=True),
    "repetition_penalty": number(0.001, 1000),
    "bad_words_ids": Setting("a list of non-empty lists of token ids", _are_token_sequences),
    "num_return_sequences": integer(1, 2**16),
    "num_candidates": integer(1, 2**16),
    "score_temperature": number(0.001, 1000),
    "return_dict_in_generate": FLAG,
    "output_trajectory": FLAG,
    # Scores of given captions
    "method": choice("likelihood", "pseudo_likelihood", "diffusion_bound"),
    "num_draws": integer(1, 2**16),
    "max_rows": _COUNT,
    # What a call computes with
    "pixel_values": tensor("floats"),
    "labels": tensor("floats or int64", 1, 2, 3),
    "image_features": tensor("floats", 3),
    "tokens": tensor("int64", 2),
    "timesteps": tensor("int64", 1, 2, 3),
    "noise": tensor("floats", 3, 4),
    "input_ids": tensor("integers", 2),
    "attention_mask": tensor("booleans or numbers", 2),
    "decoder_input_ids": tensor("integers", 2),
    "decoder_attention_mask": tensor("booleans or numbers", 2),
    "choices": tensor("integers", 3),
    "choices_mask": tensor("booleans or numbers", 3),
    "cache": Setting("the `cache` of an earlier output", lambda value: hasattr(value, "key_values")),
    "use_cache": FLAG,
    "generation_config": Setting(
        "a `GenerationConfig` or a dictionary", lambda value: isinstance(value, (dict, GenerationConfig))
    ),
    "generator": Setting("a `torch.Generator`", lambda value: isinstance(value, torch.Generator)),
    "logits_processor": Setting(
        "a list of logits processors", lambda value: isinstance(value, (list, tuple)) and all(map(callable, value))
    ),
    "streamer": Setting(
        "an object with the methods `put` and `end`", lambda value: hasattr(value, "put") and hasattr(value, "end")
    ),
    "synced_gpus": FLAG,
}


# ---- Checks


def shorten(value: Any) -> str:
    """A value as an error shows it: of a tensor its shape, and of anything long its beginning."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or a class with a faulty `__repr__`
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 100 else f"{text[:97]}..."


def check(name: str, value: Any, setting: Setting | None = None) -> Any:
    r"""
    The value of a setting, with NumPy's numbers as Python's.

    Args:
        name (`str`): The setting.
        value (`Any`): What was given.
        setting ([`Setting`], *optional*): In place of the table's, where the model narrows it.

    Raises:
        `ValueError`: if the value is not allowed. The message names the setting, what is allowed, and the value.
    """
    setting = SETTINGS[name] if setting is None else setting
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if not setting.holds(value):
        raise ValueError(f"`{name}` must be {setting.allowed}, got {shorten(value)}.")
    return value


def check_given(**values: Any) -> None:
    """Checks what is not `None`."""
    for name, value in values.items():
        if value is not None:
            check(name, value)


def suggest(names: Iterable[Any], known: Iterable[str], cutoff: float = 0.6) -> str:
    """`" Did you mean `size`?"`: the known names that are most like unknown ones, or nothing if none is."""
    known = list(known)
    near = [f"`{found}`" for name in names for found in difflib.get_close_matches(str(name), known, 1, cutoff)]
    return f" Did you mean {', '.join(near)}?" if near else ""


def check_names(names: Iterable[str], known: Iterable[str], what: str, cutoff: float = 0.0) -> None:
    r"""
    Raises a `ValueError` for names that are not known, with the nearest one that is.

    Args:
        names (`Iterable[str]`): The names. What begins with an underscore is Transformers' own.
        known (`Iterable[str]`): The known ones.
        what (`str`): What has them, for the message.
        cutoff (`float`, *optional*, defaults to 0.0): Names less alike than this to a known one are let pass.
    """
    known = list(known)
    for name in names:
        if name not in known and not str(name).startswith("_"):
            hint = suggest([name], known, max(cutoff, 0.6))
            if hint or not cutoff:
                hint = hint or f" Known are {', '.join(sorted(known))}."
                raise ValueError(f"{what} has no `{name}`.{hint}")


# Names of arguments by which libraries load something, and what texts hold that say where (`C:`, `hf-hub:`, `a/b`)
_LOADS = re.compile(
    r"(^|(?<!drop)_)(path|file|filename|dir|folder|url|repo|repo_id|checkpoint)$|^pretrained(?!_window)|^backbone$"
)
_WHERE = re.compile(r"[/\\:~]")
# Texts that nothing is loaded by: names of labels, and where an encoder came from
_NOTES = ("_name_or_path", "id2label", "label2id", "label_names", "auto_map", "pretrained_cfg")


def refuse_locations(name: str, value: Any) -> None:
    """Raises a `ValueError` if a part of a configuration names a file, a URL or a repository, from which a library
    might load weights or run code. A model's weights are in its own checkpoint."""
    if isinstance(value, PreTrainedConfig):
        value = value.to_dict()
    if isinstance(value, dict):
        for key, item in value.items():
            if key in _NOTES and "model_args" not in name:
                continue
            is_timms = key == "backbone" and value.get("model_type") == "timm_backbone"  # the name of a network
            if item and _LOADS.search(str(key)) and not is_timms:
                raise ValueError(
                    f"`{name}.{key}` must not be given, since it names what to load, got {shorten(item)}."
                )
            refuse_locations(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            refuse_locations(name, item)
    elif isinstance(value, str) and _WHERE.search(value):
        raise ValueError(f"`{name}` must name no file, URL or repository, got {shorten(value)}.")


def refuse_given(reason: str, **values: Any) -> None:
    """Raises a `ValueError` for what is given, neither `None` nor `False`, where it would have no effect."""
    given = [f"`{name}`" for name, value in values.items() if value is not None and value is not False]
    if given:
        raise ValueError(f"{', '.join(given)} would have no effect: {reason}.")


def check_value_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Raises a `ValueError` for integers out of range. Those on a GPU are not looked at: the host would wait for them
    in each step, and what makes the batches has looked."""
    if torch.compiler.is_compiling() or values.numel() == 0 or values.device.type != "cpu":
        return
    least, most = values.aminmax()
    if least < low or most > high:
        raise ValueError(f"`{name}` must be in [{low}, {high}], got {least} to {most}.")


def check_shape(name: str, values: Tensor, shapes: list[tuple[int, ...]]) -> None:
    """Raises a `ValueError` unless a tensor has one of several shapes."""
    if tuple(values.shape) not in shapes:
        raise ValueError(f"`{name}` must have the shape {' or '.join(map(str, shapes))}, got {tuple(values.shape)}.")


def check_scores(scores: Tensor, guidance_scale: float) -> None:
    """Raises a `ValueError` for logits or log-probabilities that are NaN or infinite. A log-probability may be minus
    infinity, of a given token that a processor forbids."""
    if torch.compiler.is_compiling() or scores.is_meta or not (scores.isnan() | scores.isposinf()).any():
        return
    raise ValueError(
        f"The scores of the last step are not finite. `pixel_values` or weights may hold NaN or infinity, "
        f"`guidance_scale={guidance_scale!r}` may be too large, or a `logits_processor` may have left no token."
    )


def read_object(read: Callable[[Any], Any], file: Any) -> dict[str, Any]:
    """What `read` makes of a JSON file.

    Raises:
        `ValueError`: if the file holds no JSON object. The message names it.
    """
    try:
        content = read(file)
    except (ValueError, RecursionError) as error:  # also of text that is no UTF-8
        raise ValueError(f"`{file}` is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{file}` must hold a JSON object, got {shorten(content)}.")
    return content


__all__ = [
    "SETTINGS",
    "Setting",
    "check",
    "check_given",
    "check_names",
    "check_scores",
    "check_shape",
    "check_value_range",
    "integer",
    "read_object",
    "refuse_given",
    "refuse_locations",
    "shorten",
    "suggest",
]
