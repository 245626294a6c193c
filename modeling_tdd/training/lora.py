# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""LoRA through peft: which modules of a TDD model get adapters."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..modeling_tdd import TDDPreTrainedModel


DENOISER = r"denoiser\.layers\.\d+\.attention\.(q_proj|v_proj)"
# The names that vision models of Transformers and timm give to the projections to queries and values
ENCODER = r"encoder\..*\.(q_proj|v_proj|query|value|q_lin|v_lin|qkv)"
TARGETS = {"denoiser": rf".*\b{DENOISER}", "encoder": rf".*\b{ENCODER}", "all": rf".*\b({DENOISER}|{ENCODER})"}


@dataclass
class LoraRecipe:
    """Adapters of rank `rank` for the attention of `target`: `"denoiser"`, `"encoder"` or `"all"` (both)."""

    rank: int
    target: str = "all"

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"`lora.rank` must be at least 1, got {self.rank}.")
        if self.target not in TARGETS:
            raise ValueError(f"`lora.target` must be one of {', '.join(TARGETS)}, got {self.target!r}.")


def add_lora(model: TDDPreTrainedModel, lora: LoraRecipe, new_modules: Sequence[str] = ()) -> TDDPreTrainedModel:
    """Freezes a model and adds adapters to the query and value projections of its attention. All weights of modules
    that are new, such as `"classifier"`, are trained. Returns a `PeftModel`, whose `merge_and_unload()` makes an
    ordinary model again. Raises a `ValueError` if there is nothing to adapt."""
    from peft import LoraConfig, get_peft_model

    target = "encoder" if "denoiser" in new_modules and lora.target == "all" else lora.target
    if "denoiser" in new_modules and target == "denoiser":
        raise ValueError("`lora.target='denoiser'` has nothing to adapt: the denoiser is new, and all of it trains.")
    # With adapters the encoder needs gradients. Without adapters its batch statistics must not change, since a saved
    # adapter does not hold them.
    model.config.freeze_encoder = target == "denoiser"
    modules = list(new_modules) or None
    config = LoraConfig(r=lora.rank, lora_alpha=2 * lora.rank, target_modules=TARGETS[target], modules_to_save=modules)
    return get_peft_model(model, config)
