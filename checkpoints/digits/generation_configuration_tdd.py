# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Parameters of `generate`: captions by denoising."""

from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from .configuration_tdd import GUIDANCE_SCHEDULES, check_choice, check_range


SAMPLERS = ("renoise", "confidence")
SAMPLING_PARAMETERS = ("temperature", "top_k", "top_p")
COUNTS = (
    "max_length",
    "max_new_tokens",
    "num_inference_steps",
    "num_return_sequences",
    "stability_threshold",
    "top_k",
)


class TDDGenerationConfig(GenerationConfig):
    # no-format
    r"""
    Parameters of [`~TDDGenerationMixin.generate`]. What does not apply to diffusion, such as beams, is refused.

    Args:
        > Length

        max_length (`int`, *optional*):
            Tokens of a caption, the prompt and the end token among them; at most the model's
            `max_position_embeddings`, the default.
        max_new_tokens (`int`, *optional*):
            Tokens beyond the given ones. What exceeds `max_length` is cut.

        > Diffusion

        num_inference_steps (`int`, *optional*, defaults to 10):
            Denoising steps. (The paper: strong at about 10, best at 20, for classification.)
        sampler (`str`, *optional*):
            With Gaussian noise: how the next noisy tokens follow from a prediction. `"renoise"`, the paper's, adds
            noise of the next timestep to all tokens, see [`~sampling_tdd.RenoiseSampler`]. `"confidence"` (ours) adds
            little to the likeliest tokens and hides the others, see [`~sampling_tdd.ConfidenceSampler`]; it is the
            default of models trained with `timestep_sampling="per_token"`. With masks (MDD) there is no choice.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Classifier-free guidance (equation 1); 1.0 is none and costs nothing.
        guidance_schedule (`str`, *optional*, defaults to `"constant"`):
            s(t) of Algorithm 1: `"constant"`, or a `"linear"` or `"cosine"` rise from 1 to `guidance_scale`.
        stability_threshold (`int`, *optional*):
            A row whose tokens have not changed for so many steps is finished. By default all steps are taken.
        seed (`int`, *optional*, defaults to 0):
            Seed of all random numbers. Calls with the same seed agree.

        > Tokens

        do_sample (`bool`, *optional*, defaults to `False`):
            Whether tokens are drawn from the predicted distribution (appendix A.2), or its argmax is taken. Each image
            draws random numbers of its own, which depend on `seed` and its pixels alone: an image has the same
            captions in any batch.
        temperature, top_k, top_p (*optional*):
            With `do_sample`: as in Transformers.
        repetition_penalty (`float`, *optional*, defaults to 1.0):
            As in Transformers, against the tokens before a place.
        bad_words_ids (`list[list[int]]`, *optional*):
            Token sequences that must not appear.
        num_return_sequences (`int`, *optional*, defaults to 1):
            Captions per image. With `do_sample` they are draws, of which some may agree where the model is sure.
            Without, they all differ: the first is the caption itself, and the others are its likeliest alternatives,
            see [`likeliest_alternatives`].

        > Output

        return_dict_in_generate (`bool`, *optional*, defaults to `False`):
            Whether to return a [`TDDGenerationOutput`].
        output_trajectory (`bool`, *optional*, defaults to `False`):
            Whether that holds the trajectory.

        > Special tokens

        pad_token_id, eos_token_id (`int`, *optional*):
            The model's by default.

    Raises:
        `ValueError`: for an unknown argument or a value out of its range.
    """

    _DEFAULTS = {
        "max_length": None,
        "max_new_tokens": None,
        "num_inference_steps": 10,
        "sampler": None,
        "guidance_scale": 1.0,
        "guidance_schedule": "constant",
        "stability_threshold": None,
        "seed": 0,
        "do_sample": False,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "repetition_penalty": 1.0,
        "bad_words_ids": None,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "output_trajectory": False,
        "pad_token_id": None,
        "eos_token_id": None,
    }
    _METADATA = ("_from_model_config", "transformers_version", "_commit_hash")

    def __init__(self, **kwargs: Any):
        # Not calling super().__init__(): most of its attributes do not apply.
        for name, default in self._DEFAULTS.items():
            value = kwargs.pop(name, None)
            setattr(self, name, default if value is None else value)
        for name in self._METADATA:
            setattr(self, name, kwargs.pop(name, None))
        if kwargs:
            raise ValueError(
                f"Arguments that do not apply to diffusion: {', '.join(sorted(kwargs))}. "
                f"Allowed: {', '.join(self._DEFAULTS)}."
            )
        self.validate()

    def validate(self, **unused: Any) -> None:
        """Checks every parameter."""
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise ValueError(f"`{name}` must be an integer, got {value!r}.")
            if value is not None:
                check_range(name, value, 1)
        check_range("guidance_scale", self.guidance_scale, 1)
        check_choice("sampler", self.sampler, (None, *SAMPLERS))
        check_choice("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, got {value!r}.")
        for name in SAMPLING_PARAMETERS:
            if getattr(self, name) is not None and not self.do_sample:
                raise ValueError(f"`{name}` needs `do_sample=True`: the argmax has no use for it.")

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig) -> "TDDGenerationConfig":
        """The defaults, with the special tokens of a model."""
        return cls(
            num_inference_steps=min(cls._DEFAULTS["num_inference_steps"], model_config.num_timesteps),
            pad_token_id=model_config.pad_token_id,
            eos_token_id=model_config.eos_token_id,
            _from_model_config=True,
        )

    def get_generation_mode(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Diffusion has no generation mode of Transformers' autoregressive models.")


__all__ = ["SAMPLING_PARAMETERS", "TDDGenerationConfig"]
