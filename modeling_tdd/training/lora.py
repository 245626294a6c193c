# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""LoRA through peft: which modules of a TDD model get adapters."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..modeling_tdd import TDDPreTrainedModel


DENOISER = r"denoiser\.layers\.\d+\.attention\.(q_proj|v_proj)"
# The names that vision models of Transformers and timm give to the projections to queries and values
ENCODER = r"encoder\..*\.(q_proj|v_proj|query|value|q_lin|v_lin|qkv)"
LORA_TARGETS = {
    "denoiser": rf".*\b{DENOISER}",
    "encoder": rf".*\b{ENCODER}",
    "all": rf".*\b({DENOISER}|{ENCODER})",
}


@dataclass
class LoraRecipe:
    """Adapters of rank `rank` for the attention of `target`: `"denoiser"`, `"encoder"` or `"all"` (both)."""

    rank: int
    target: str = "all"

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"`lora.rank` must be at least 1, got {self.rank}.")
        if self.target not in LORA_TARGETS:
            raise ValueError(f"`lora.target` must be one of {', '.join(LORA_TARGETS)}, got {self.target!r}.")


def add_lora(model: TDDPreTrainedModel, lora: LoraRecipe, new_modules: Sequence[str] = ()) -> TDDPreTrainedModel:
    r"""
    Freezes a model and adds adapters to the query and value projections of its attention.

    Args:
        model ([`TDDPreTrainedModel`]): The model, changed in place.
        lora ([`LoraRecipe`]): The adapters.
        new_modules (`Sequence[str]`, *optional*):
            Names of newly initialised modules, such as `"classifier"`. All of their weights are trained.

    Returns:
        `PeftModel`: the model with adapters, for [`TDDTrainer`]. Its `merge_and_unload()` makes an ordinary model.

    Raises:
        `ValueError`: if the denoiser is new, or if the encoder has other names for its projections. In that case give
            peft's `get_peft_model` a `LoraConfig` with the right `target_modules`.
    """
    from peft import LoraConfig, get_peft_model

    target = lora.target
    if "denoiser" in new_modules:
        if target == "denoiser":
            raise ValueError(
                "`lora.target='denoiser'` has nothing to adapt: the denoiser is new, and all of its weights train."
            )
        target = "encoder"
    # With adapters the encoder needs gradients. Without adapters its batch statistics must not change, since a saved
    # adapter does not hold them.
    model.config.freeze_encoder = target == "denoiser"
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank,
        target_modules=LORA_TARGETS[target],
        modules_to_save=list(new_modules) or None,
    )
    return get_peft_model(model, config)
