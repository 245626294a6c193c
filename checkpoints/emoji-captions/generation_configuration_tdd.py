# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Parameters of `generate`: captions by denoising."""

import inspect
from typing import Any

from transformers import GenerationConfig, GenerationMixin

from .settings_tdd import check, check_names, read_object, shorten


# With `do_sample` alone, and the values with which they have no effect there either
SAMPLING_PARAMETERS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


class TDDGenerationConfig(GenerationConfig):
    # no-format
    r"""
    Parameters of [`~TDDGenerationMixin.generate`]. What does not apply to diffusion, such as beams, is refused, except
    with the value that has no effect in Transformers (`num_beams=1`, `use_cache=True`). `None` stands for the default.

    Args:
        > Length

        max_length (`int`, *optional*):
            Tokens of a caption, the prompt and the end token among them; at most the model's
            `max_position_embeddings`, the default. A model's own generation configuration holds the number.
        max_new_tokens (`int`, *optional*):
            Tokens beyond the given ones. What exceeds `max_length` is cut.

        > Diffusion

        num_inference_steps (`int`, *optional*, defaults to 10):
            Denoising steps. (The paper: strong at about 10, best at 20, for classification.)
        sampler (`str`, *optional*):
            With Gaussian noise: how the next noisy tokens follow from a prediction. `"renoise"`, the paper's, adds
            noise of the next timestep to all tokens, see [`~samplers_tdd.RenoiseSampler`]. `"confidence"` (ours) adds
            little to the likeliest tokens and hides the others, see [`~samplers_tdd.ConfidenceSampler`]; it is the
            default of models trained with `timestep_sampling="per_token"`. With masks (MDD) there is no choice.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Classifier-free guidance (equation 1); 1.0 is none and costs nothing.
        guidance_schedule (`str`, *optional*, defaults to `"constant"`):
            s(t) of Algorithm 1: `"constant"`, or a `"linear"` or `"cosine"` rise from 1 to `guidance_scale`.
        stability_threshold (`int`, *optional*):
            A row whose tokens have not changed for so many steps is finished. By default all steps are taken.
        confidence_threshold (`float`, *optional*):
            Adaptive steps (ours): in each step all words that are at least as probable are settled for good, at least
            one, and padding in the same share; a row is finished when all its tokens are settled. So
            `num_inference_steps` is the most that a row takes. With the sampler `"renoise"` no token is settled before
            the others: a row is finished when all its tokens are as probable. By default all steps are taken.
        seed (`int`, *optional*, defaults to 0):
            Seed of all random numbers. Calls with the same seed agree.

        > Tokens

        do_sample (`bool`, *optional*, defaults to `False`):
            Whether tokens are drawn from the predicted distribution (appendix A.2), or its argmax is taken. Each image
            draws random numbers of its own, which depend on `seed` and its pixels alone: an image has the same
            captions in any batch.
        temperature, top_k, top_p (*optional*):
            With `do_sample`: as in Transformers. Without, only values that have no effect are allowed: 1.0, 0 and 1.0.
        repetition_penalty (`float`, *optional*, defaults to 1.0):
            As in Transformers, against the tokens before a place.
        bad_words_ids (`list[list[int]]`, *optional*):
            Token sequences that must not appear.
        num_return_sequences (`int`, *optional*, defaults to 1):
            Captions per image. With `do_sample` they are draws, of which some may agree where the model is sure.
            Without, they all differ: the first is the caption itself, and the others are its likeliest alternatives,
            see [`likeliest_alternatives`].
        num_candidates (`int`, *optional*):
            So many captions of each image are made, as `num_return_sequences` would make them, and ranked by
            [`~TDDLikelihoodMixin.score`]; the most probable `num_return_sequences` are returned. By default none is
            ranked. It takes about as long as `num_candidates` captions and their scores.
        score_temperature (`float`, *optional*, defaults to 1.0):
            What the scores of candidates and choices are divided by before their softmax. It changes no order, only
            how sure the probabilities are. Choose it on held-out captions.

        > Output

        return_dict_in_generate (`bool`, *optional*, defaults to `False`):
            Whether to return a [`TDDGenerationOutput`].
        output_trajectory (`bool`, *optional*, defaults to `False`):
            Whether that holds the trajectory.

        > Special tokens

        pad_token_id, eos_token_id (`int`, *optional*):
            The model's by default. A caption has one end token; a list of several is refused.

    Raises:
        `ValueError`: for an unknown argument, or a value of a wrong type or out of its range, also where an attribute
            is set later.
    """

    _DEFAULTS = {
        "max_length": None,
        "max_new_tokens": None,
        "num_inference_steps": 10,
        "sampler": None,
        "guidance_scale": 1.0,
        "guidance_schedule": "constant",
        "stability_threshold": None,
        "confidence_threshold": None,
        "seed": 0,
        "do_sample": False,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "repetition_penalty": 1.0,
        "bad_words_ids": None,
        "num_return_sequences": 1,
        "num_candidates": None,
        "score_temperature": 1.0,
        "return_dict_in_generate": False,
        "output_trajectory": False,
        "pad_token_id": None,
        "eos_token_id": None,
    }
    # Beside those that Transformers has, too
    num_inference_steps: int
    sampler: str | None
    guidance_schedule: str
    stability_threshold: int | None
    confidence_threshold: float | None
    seed: int
    num_candidates: int | None
    score_temperature: float
    output_trajectory: bool

    # What Transformers keeps here. A caption needs no first token, but Trainer copies the tokenizer's.
    _METADATA = ("_from_model_config", "transformers_version", "bos_token_id")

    def __init__(self, **kwargs: Any):
        # Not calling super().__init__(): most of its attributes do not apply.
        for name in self._METADATA:
            setattr(self, name, kwargs.pop(name, None))
        kwargs.pop("_commit_hash", None)  # of older versions of Transformers
        given = drop_inert(kwargs)
        for name in self._DEFAULTS:
            setattr(self, name, given.get(name))
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks a parameter whenever it is set. `None` is its default."""
        if name in self._DEFAULTS:
            value = self._DEFAULTS[name] if value is None else check(name, value)
        else:
            check_names([name], [*self._DEFAULTS, *self._METADATA], "`TDDGenerationConfig`")
        super().__setattr__(name, value)

    def validate(self, **unused: Any) -> None:  # type: ignore[override]
        """Checks the parameters against each other."""
        for name, inert in SAMPLING_PARAMETERS.items():
            if getattr(self, name) not in (None, inert) and not self.do_sample:
                value = getattr(self, name)
                raise ValueError(f"`{name}` needs `do_sample=True`: the argmax has no use for it, got {value!r}.")
        if self.num_candidates is not None and self.num_candidates < self.num_return_sequences:
            raise ValueError(
                f"`num_candidates` must be at least `num_return_sequences`, {self.num_return_sequences}, got "
                f"{self.num_candidates}."
            )

    @classmethod
    def convert(cls, given: GenerationConfig | dict[str, Any]) -> "TDDGenerationConfig":
        """The same from a dictionary or a plain `GenerationConfig`, whose parameters must all apply."""
        if isinstance(given, cls):
            return given
        check("generation_config", given)
        given = given if isinstance(given, dict) else vars(given)
        try:
            return cls(**{str(name): value for name, value in given.items() if not str(name).startswith("_")})
        except ValueError as error:
            raise ValueError(f"`generation_config`: {error}") from error

    @classmethod
    def from_model_config(cls, model_config: Any) -> "TDDGenerationConfig":
        """The defaults, with the special tokens of a model."""
        return cls(
            num_inference_steps=min(cls._DEFAULTS["num_inference_steps"], model_config.num_timesteps),
            max_length=model_config.max_position_embeddings,
            pad_token_id=model_config.pad_token_id,
            eos_token_id=model_config.eos_token_id,
            _from_model_config=True,
        )

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        """What Transformers fills in for `None`: Trainer calls it, and its own are those of beam search."""
        return {name: value for name, value in TDDGenerationConfig._DEFAULTS.items() if value is not None}

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        return read_object(super()._dict_from_json_file, json_file)

    def get_generation_mode(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("Diffusion has no generation mode of Transformers' autoregressive models.")


def drop_inert(given: dict[str, Any]) -> dict[str, Any]:
    """The parameters of [`TDDGenerationConfig`] among arguments of Transformers' `generate`, checked. The others must
    be `None`, `False`, or what has no effect in Transformers.

    Raises:
        `ValueError`: for others, and for unknown names.
    """
    inert = GenerationConfig._get_default_generation_params()
    known = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}
    others = {name: value for name, value in given.items() if name not in TDDGenerationConfig._DEFAULTS}
    check_names(others.keys() - known, TDDGenerationConfig._DEFAULTS, "`generate`")
    for name, value in others.items():
        is_default = isinstance(value, (int, float, str)) and value == inert.get(name) and value is not True
        if not (value is None or value is False or is_default or inert.get(name) is value):
            raise ValueError(
                f"Arguments that do not apply to diffusion: {name}={shorten(value)}. "
                f"Allowed: {', '.join(TDDGenerationConfig._DEFAULTS)}."
            )
    return {
        name: value if value is None else check(name, value)
        for name, value in given.items()
        if name in TDDGenerationConfig._DEFAULTS
    }


__all__ = ["SAMPLING_PARAMETERS", "TDDGenerationConfig", "drop_inert"]
