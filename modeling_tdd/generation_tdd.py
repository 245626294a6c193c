# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Captioning by denoising: `generate`, its configuration and its output."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedConfig
from transformers.generation import (
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import ModelOutput

from .configuration_tdd import GUIDANCE_SCHEDULES, check_choice, check_range
from .diffusion_tdd import denoise


SAMPLERS = ("renoise",)
TRAJECTORY_CANDIDATES = 5


class TDDGenerationConfig(GenerationConfig):
    # no-format
    r"""
    Parameters of [`~TDDGenerationMixin.generate`]. What does not apply to diffusion, such as beams, is refused.

    Args:
        > Length

        max_length (`int`, *optional*):
            Places for tokens, the prompt among them; at most the model's `max_position_embeddings`, the default.
        max_new_tokens (`int`, *optional*):
            Places beyond the prompt. What exceeds `max_length` is cut.

        > Diffusion

        num_inference_steps (`int`, *optional*, defaults to 10):
            Denoising steps.
        sampler (`str`, *optional*, defaults to `"renoise"`):
            How a state follows from a prediction. `"renoise"` is the paper's.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Classifier-free guidance (equation 1); 1.0 is none and costs nothing.
        guidance_schedule (`str`, *optional*, defaults to `"constant"`):
            s(t) of Algorithm 1: `"constant"`, or a `"linear"` or `"cosine"` rise from 1 to `guidance_scale`.
        stability_threshold (`int`, *optional*):
            A row whose tokens have not changed for so many steps is finished. By default all steps are taken.
        seed (`int`, *optional*, defaults to 0):
            Seed of the noise, the same for each image. Calls with the same seed agree.

        > Tokens

        do_sample (`bool`, *optional*, defaults to `False`):
            Whether tokens are drawn from the predicted distribution (appendix A.2), or its argmax.
        temperature, top_k, top_p (*optional*):
            With `do_sample`: as in Transformers.
        repetition_penalty (`float`, *optional*, defaults to 1.0):
            As in Transformers, against the tokens before a place.
        bad_words_ids (`list[list[int]]`, *optional*):
            Token sequences that must not appear.
        num_return_sequences (`int`, *optional*, defaults to 1):
            Captions an image, each from noise of its own.

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
        "sampler": "renoise",
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
            setattr(self, name, kwargs.pop(name, default))
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
        for name in ("max_length", "max_new_tokens", "stability_threshold", "top_k"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1)
        for name in ("num_inference_steps", "num_return_sequences", "guidance_scale"):
            check_range(name, getattr(self, name), 1)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("guidance_schedule", self.guidance_schedule, GUIDANCE_SCHEDULES)
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, got {value!r}.")
        for name in ("temperature", "top_k", "top_p"):
            if getattr(self, name) is not None and not self.do_sample:
                raise ValueError(f"`{name}` needs `do_sample=True`: the argmax has no use for it.")

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig) -> "TDDGenerationConfig":
        """The defaults, with the special tokens of a model."""
        return cls(
            pad_token_id=model_config.pad_token_id, eos_token_id=model_config.eos_token_id, _from_model_config=True
        )

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return dict(TDDGenerationConfig._DEFAULTS)

    def get_generation_mode(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Diffusion has no generation mode of Transformers' autoregressive models.")


@dataclass
class TDDTrajectory(ModelOutput):
    r"""
    What a denoising loop went through. A row that stopped early repeats its last step.

    Args:
        timesteps (`torch.LongTensor` of shape `(num_inference_steps,)`): The timestep of each step.
        tokens (`torch.LongTensor` of shape `(num_sequences, num_inference_steps, length)`): The draft at each step.
        scores (`torch.FloatTensor` of the same shape): Log-probability of each of its tokens.
        candidates (`torch.LongTensor` of shape `(num_sequences, num_inference_steps, length, 5)`):
            The likeliest tokens of each place.
        candidate_scores (`torch.FloatTensor` of the same shape): Their log-probabilities.
    """

    timesteps: torch.LongTensor | None = None
    tokens: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    candidates: torch.LongTensor | None = None
    candidate_scores: torch.FloatTensor | None = None


@dataclass
class TDDGenerationOutput(ModelOutput):
    r"""
    Output of [`~TDDGenerationMixin.generate`] with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`):
            Captions: the prompt where one was given, tokens, the end token, padding.
        scores (`torch.FloatTensor` of the same shape):
            Log-probability of each place's token at the row's last step.
        num_steps (`torch.LongTensor` of shape `(batch_size * num_return_sequences,)`):
            Denoising steps that each row took.
        trajectory ([`TDDTrajectory`], *optional*, with `output_trajectory=True`):
            The steps.
    """

    sequences: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    num_steps: torch.LongTensor | None = None
    trajectory: TDDTrajectory | None = None


class TDDGenerationMixin:
    """`generate` for models that denoise tokens together. It stands beside `PreTrainedModel`."""

    generation_config_class = TDDGenerationConfig
    output_modalities = ("text",)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generator: torch.Generator | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> Tensor | TDDGenerationOutput:
        r"""
        Captions images by the argmax-and-re-noise loop of Section 3.2:
        ```
        1. Encode the images into the prefix, once
        2. Fix the tokens of prompt and infilling
        3. Denoise: for each step
            a. predict clean tokens, with guidance, processed by the logits processors
            b. keep the tokens and scores of the rows that are still denoised; send a draft to the streamer
        4. Pad what follows a caption's end
        ```
        A row's caption depends neither on the other rows nor on global random state.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`, *optional*):
                Images.
            input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*):
                A prompt: the caption's fixed beginning.
            attention_mask (`torch.Tensor` of the same shape, *optional*):
                1 for the prompt's tokens, 0 for padding, on either side.
            image_features (`torch.FloatTensor`, *optional*):
                In place of `pixel_values`: features of shape `(batch_size, prefix_length, encoder_hidden_size)`.
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):
                Infilling: tokens, of which those with a 1 in `decoder_attention_mask` stay as they are.
            decoder_attention_mask (`torch.Tensor` of the same shape, *optional*):
                1 for fixed tokens, 0 for places to fill.
            generation_config ([`TDDGenerationConfig`] or `GenerationConfig`, *optional*):
                Parameters; the model's own by default. Of a plain `GenerationConfig` those that apply are taken.
            logits_processor (`LogitsProcessorList`, *optional*):
                Processors of Transformers. Each place is processed given the draft's tokens before it.
            generator (`torch.Generator`, *optional*):
                Source of the noise, in place of `seed`. A CPU generator serves a model on any device.
            streamer (`BaseStreamer`, *optional*):
                Receives the final tokens through `put`, and each step's draft through `put_draft` where it has one.
            kwargs:
                Parameters of [`TDDGenerationConfig`], which take precedence.

        Returns:
            `torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`, an image's captions in
            succession, or [`TDDGenerationOutput`] with `return_dict_in_generate=True`.

        Raises:
            `ValueError`: for parameters or token ids out of range, or a prompt or infilling that does not fit.

        Example:

        ```python
        >>> inputs = processor(images=image, return_tensors="pt")
        >>> processor.batch_decode(model.generate(**inputs, num_inference_steps=20), skip_special_tokens=True)
        ```"""
        config = self._prepare_generation_config(generation_config, kwargs)
        check_range("num_inference_steps", config.num_inference_steps, 1, self.config.num_timesteps)
        # 1. Encode the images
        prefix = self.model.get_prefix(pixel_values, image_features)
        repeats = config.num_return_sequences
        # 2. Fix tokens
        length, fixed_tokens, fixed_mask = self._prepare_fixed_tokens(
            config, len(prefix), input_ids, attention_mask, decoder_input_ids, decoder_attention_mask
        )
        if fixed_tokens is not None:
            fixed_tokens = fixed_tokens.to(prefix.device).repeat_interleave(repeats, dim=0)
            fixed_mask = fixed_mask.to(prefix.device).repeat_interleave(repeats, dim=0)
        # 3. Denoise
        predictor = self.make_predictor(prefix, repeats, config.guidance_scale, config.guidance_schedule)
        recorder = StepRecorder(len(prefix) * repeats, length, prefix.device, config.output_trajectory)
        for step in denoise(
            predictor,
            predictor.corruption,
            rows=len(prefix) * repeats,
            num_tokens=length,
            num_inference_steps=config.num_inference_steps,
            sampling_strategy="multinomial" if config.do_sample else "argmax",
            generator=torch.Generator().manual_seed(config.seed) if generator is None else generator,
            num_noise_samples=repeats,
            process_logits=TokenLogitsProcessor.make(config, logits_processor, prefix.device),
            fixed_tokens=fixed_tokens,
            fixed_mask=fixed_mask,
            stability_threshold=config.stability_threshold,
        ):
            recorder.record(step)
            if streamer is not None and hasattr(streamer, "put_draft"):
                streamer.put_draft(recorder.tokens.cpu())
        # 4. Pad
        sequences = self._pad_after_end(recorder.tokens, config)
        if streamer is not None:
            streamer.put(sequences.cpu())
            streamer.end()
        if not config.return_dict_in_generate:
            return sequences
        return TDDGenerationOutput(
            sequences=sequences,
            scores=recorder.scores,
            num_steps=recorder.num_steps,
            trajectory=recorder.trajectory() if config.output_trajectory else None,
        )

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> TDDGenerationConfig:
        """Arguments of the call over `generation_config` over the model's own over the defaults."""
        given = generation_config if generation_config is not None else getattr(self, "generation_config", None)
        parameters = {}
        if given is not None:
            values = {name: getattr(given, name, None) for name in TDDGenerationConfig._DEFAULTS}
            parameters = {name: copy.deepcopy(value) for name, value in values.items() if value is not None}
        config = TDDGenerationConfig(**{**parameters, **kwargs})
        for name in ("pad_token_id", "eos_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(self.config, name))
        return config

    def _prepare_fixed_tokens(
        self,
        config: TDDGenerationConfig,
        batch_size: int,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor | None,
        decoder_attention_mask: Tensor | None,
    ) -> tuple[int, Tensor | None, Tensor | None]:
        """Number of places, and the tokens and mask of those that are fixed."""
        places = self.config.max_position_embeddings
        length = places if config.max_length is None else min(config.max_length, places)
        prompt = None if input_ids is None or input_ids.shape[1] == 0 else input_ids
        if prompt is not None and decoder_input_ids is not None:
            raise ValueError("Give a prompt (`input_ids`) or an infilling (`decoder_input_ids`), not both.")
        if decoder_input_ids is not None:
            if decoder_attention_mask is None or decoder_attention_mask.shape != decoder_input_ids.shape:
                raise ValueError(
                    "`decoder_input_ids` needs a `decoder_attention_mask` of its shape, 1 for fixed tokens."
                )
            tokens, mask = decoder_input_ids, decoder_attention_mask.bool()
        elif prompt is not None:
            mask = torch.ones_like(prompt, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
            # Padding on the left moves to the right: a prompt begins at the first place.
            order = mask.logical_not().long().argsort(dim=1, stable=True)
            tokens, mask = prompt.gather(1, order), mask.gather(1, order)
        else:
            return self._cut_length(config, length, 0), None, None
        self._check_fixed_tokens(tokens, mask, batch_size, length)
        length = self._cut_length(config, length, tokens.shape[1] if prompt is not None else 0)
        length = max(length, tokens.shape[1])
        missing = (0, length - tokens.shape[1])
        tokens = torch.nn.functional.pad(tokens, missing, value=config.pad_token_id)
        return length, tokens, torch.nn.functional.pad(mask, missing, value=False)

    @staticmethod
    def _cut_length(config: TDDGenerationConfig, length: int, prompt_length: int) -> int:
        return length if config.max_new_tokens is None else min(length, prompt_length + config.max_new_tokens)

    def _check_fixed_tokens(self, tokens: Tensor, mask: Tensor, batch_size: int, length: int) -> None:
        if tokens.shape[0] != batch_size:
            raise ValueError(f"There are {batch_size} images and {tokens.shape[0]} rows of tokens.")
        if tokens.shape[1] > length:
            raise ValueError(f"{tokens.shape[1]} given tokens do not fit the {length} places of a caption.")
        fixed = tokens[mask]
        if fixed.numel() > 0 and (fixed.min() < 0 or fixed.max() >= self.config.vocab_size):
            raise ValueError(f"Given token ids must be in [0, {self.config.vocab_size - 1}], got {fixed.tolist()}.")

    @staticmethod
    def _pad_after_end(tokens: Tensor, config: TDDGenerationConfig) -> Tensor:
        is_end = (tokens == config.eos_token_id) | (tokens == config.pad_token_id)
        follows_end = is_end.cumsum(1) - is_end.long() > 0
        return tokens.masked_fill(follows_end, config.pad_token_id)


class TokenLogitsProcessor:
    """Applies Transformers' logits processors, made for the next token alone, to the places of a draft."""

    def __init__(self, processors: LogitsProcessorList, warpers: LogitsProcessorList):
        self.processors = processors
        self.warpers = warpers

    @classmethod
    def make(
        cls, config: TDDGenerationConfig, logits_processor: LogitsProcessorList | None, device: torch.device
    ) -> "TokenLogitsProcessor | None":
        """The processors that a configuration asks for, after the given ones; `None` where there are none."""
        processors = LogitsProcessorList(logits_processor or [])
        if config.bad_words_ids is not None:
            processors.append(NoBadWordsLogitsProcessor(config.bad_words_ids))
        if config.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        warpers = LogitsProcessorList()
        if config.do_sample and config.temperature is not None:
            warpers.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.do_sample and config.top_k is not None:
            warpers.append(TopKLogitsWarper(config.top_k))
        if config.do_sample and config.top_p is not None:
            warpers.append(TopPLogitsWarper(float(config.top_p)))
        return cls(processors, warpers) if processors or warpers else None

    def __call__(self, logits: Tensor, tokens: Tensor | None) -> Tensor:
        """From scores of shape (rows, N, K) to others. What comes before a place is its own, processed argmax, so that
        the outcome holds for the tokens of this step and not of the last."""
        if self.processors:
            before = torch.zeros(len(logits), 0, dtype=torch.long, device=logits.device)
            processed = []
            for place in range(logits.shape[1]):
                processed.append(self.processors(before, logits[:, place]))
                before = torch.cat([before, processed[-1].argmax(-1, keepdim=True)], dim=1)
            logits = torch.stack(processed, dim=1)
        if self.warpers:
            logits = self.warpers(None, logits.flatten(0, 1)).view(logits.shape)
        return logits


class StepRecorder:
    """The latest tokens and scores of every row, and on demand all of them."""

    def __init__(self, rows: int, length: int, device: torch.device, keep_trajectory: bool):
        self.tokens = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.scores = torch.zeros(rows, length, device=device)
        self.num_steps = torch.zeros(rows, dtype=torch.long, device=device)
        self.keep_trajectory = keep_trajectory
        self.timesteps: list[int] = []
        self.history: list[tuple[Tensor, ...]] = []
        shape = (rows, length, TRAJECTORY_CANDIDATES)
        self.candidates = torch.zeros(shape, dtype=torch.long, device=device)
        self.candidate_scores = torch.zeros(shape, device=device)

    def record(self, step: Any) -> None:
        """Takes a [`DenoisingStep`]; rows that have left the loop keep what they have."""
        log_probabilities = step.logits.log_softmax(-1)
        self.tokens[step.rows] = step.tokens
        self.scores[step.rows] = log_probabilities.gather(-1, step.tokens[..., None])[..., 0]
        self.num_steps[step.rows] += 1
        if self.keep_trajectory:
            top = log_probabilities.topk(min(TRAJECTORY_CANDIDATES, log_probabilities.shape[-1]), dim=-1)
            self.candidate_scores[step.rows, :, : top.values.shape[-1]] = top.values
            self.candidates[step.rows, :, : top.values.shape[-1]] = top.indices
            self.timesteps.append(step.timestep)
            state = (self.tokens, self.scores, self.candidates, self.candidate_scores)
            self.history.append(tuple(tensor.clone() for tensor in state))

    def trajectory(self) -> TDDTrajectory:
        tokens, scores, candidates, candidate_scores = (torch.stack(kept, dim=1) for kept in zip(*self.history))
        return TDDTrajectory(torch.tensor(self.timesteps), tokens, scores, candidates, candidate_scores)


__all__ = ["TDDGenerationConfig", "TDDGenerationMixin", "TDDGenerationOutput", "TDDTrajectory"]
