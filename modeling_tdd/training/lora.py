# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""LoRA through peft: which modules of a TDD model get adapters, and how adapters are merged into it."""

from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from ..modeling_tdd import TDDPreTrainedModel


DENOISER = r"denoiser\.layers\.\d+\.attention\.(q_proj|v_proj)"
# The names that vision models of Transformers and timm give to the projections to queries and values
ENCODER = r"encoder\..*\.(q_proj|v_proj|query|value|q_lin|v_lin|qkv)"
LORA_TARGETS = {
    "denoiser": rf".*\b{DENOISER}",
    "encoder": rf".*\b{ENCODER}",
    "all": rf".*\b({DENOISER}|{ENCODER})",
}


def add_lora(model: TDDPreTrainedModel, rank: int, target: str = "all", new_modules: Sequence[str] = ()) -> PeftModel:
    r"""
    Freezes a model and adds adapters to the query and value projections of its attention.

    Args:
        model ([`TDDPreTrainedModel`]): The model, changed in place.
        rank (`int`): Rank of the adapters.
        target (`str`, *optional*, defaults to `"all"`): `"denoiser"`, `"encoder"` or `"all"` (both).
        new_modules (`Sequence[str]`, *optional*):
            Names of newly initialised modules, such as `"classifier"`. All of their weights are trained.

    Returns:
        `PeftModel`: the model with adapters, for `Trainer`.

    Raises:
        `ValueError`: for another target, or if the encoder has other names for its projections. In that case give
            peft's `get_peft_model` a `LoraConfig` with the right `target_modules`.
    """
    if target not in LORA_TARGETS:
        raise ValueError(f"`target` must be one of {', '.join(LORA_TARGETS)}, got {target!r}.")
    if "denoiser" in new_modules:
        if target == "denoiser":
            raise ValueError(
                "`target='denoiser'` has nothing to adapt: the denoiser is new, and all of its weights train."
            )
        target = "encoder"
    # With adapters the encoder needs gradients. Without adapters its batch statistics must not change, since a saved
    # adapter does not hold them.
    model.config.freeze_encoder = target == "denoiser"
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS[target], modules_to_save=list(new_modules) or None
    )
    return get_peft_model(model, config)


def merge_lora(trainer: Trainer) -> None:
    """Saves the adapter to the folder `adapter` of the run, and merges it: the trainer's model is an ordinary one."""
    if trainer.args.should_save:
        trainer.model.save_pretrained(Path(trainer.args.output_dir) / "adapter")
    trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
