# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""LoRA through peft: which modules of a TDD model get adapters."""

import re
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
    ordinary model again. Its adapter names the base model by its id on the Hub where it has one, else by its folder.
    Raises a `ValueError` if there is nothing to adapt, or the encoder is frozen."""
    from peft import LoraConfig, get_peft_model

    target = "encoder" if "denoiser" in new_modules and lora.target == "all" else lora.target
    if "denoiser" in new_modules and target == "denoiser":
        raise ValueError("`lora.target='denoiser'` has nothing to adapt: the denoiser is new, and all of it trains.")
    instead = "Use `lora.target='denoiser'`" if "denoiser" not in new_modules else "Train it without `lora`"
    if target != "denoiser" and model.config.freeze_encoder:
        raise ValueError(f"`lora.target={lora.target!r}` adapts the encoder. {instead}, or `freeze_encoder=False`.")
    if target != "denoiser" and not any(re.fullmatch(TARGETS["encoder"], name) for name, _ in model.named_modules()):
        encoder = model.config.vision_config
        raise ValueError(
            f"`lora.target={lora.target!r}` has nothing to adapt in the encoder: "
            f"`{getattr(encoder, 'architecture', encoder.model_type)}` has no query and value projections. {instead}."
        )
    modules = list(new_modules) or None
    config = LoraConfig(r=lora.rank, lora_alpha=2 * lora.rank, target_modules=TARGETS[target], modules_to_save=modules)
    if found := re.search(r"models--([^/\\]+)[/\\]snapshots", model.name_or_path):  # a copy from the Hub
        model.name_or_path = model.config.name_or_path = found[1].replace("--", "/")
    return get_peft_model(model, config)
