# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Captioning by denoising: `generate` and its output.

A caption always has the model's N places, as in training. What is known of it beforehand is fixed: a prompt, the words
around a gap, and padding in the places beyond the wanted length.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import (
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .candidates_tdd import RankedCandidates, rank_candidates
from .configuration_tdd import TDDConfig, check_steps
from .fixed_tokens_tdd import (
    FixedTokens,
    choice_tokens,
    completes_sequence,
    end_tokens,
    infilling_tokens,
    likeliest_alternatives,
    pad_after_end,
    prompt_tokens,
)
from .generation_configuration_tdd import SAMPLING_PARAMETERS, TDDGenerationConfig, drop_inert
from .samplers_tdd import (
    ConfidenceSampler,
    NoisyTokens,
    RenoiseSampler,
    Sampler,
    UniformSampler,
    UnmaskingSampler,
    follows_end,
)
from .sampling_tdd import (
    DenoisingStep,
    RandomNumbers,
    TokenChoice,
    denoise,
    guidance_scales,
)
from .settings_tdd import check, check_given, check_scores, integer, refuse_given


logger = logging.get_logger(__name__)

TRAJECTORY_CANDIDATES = 5


@dataclass
class TDDTrajectory(ModelOutput):
    r"""
    What a denoising loop went through. A row that stopped early repeats its last step.

    Args:
        timesteps (`torch.LongTensor` of shape `(num_steps,)`):
            The timestep of each step; there are fewer than `num_inference_steps` where all rows stopped early.
        tokens (`torch.LongTensor` of shape `(num_sequences, num_steps, length)`):
            The draft at each step, with whatever stands behind its end.
        log_probs (`torch.FloatTensor` of the same shape): Log-probability of each of its tokens.
        candidates (`torch.LongTensor` of shape `(num_sequences, num_steps, length, 5)`):
            The likeliest tokens of each place, best first; fewer than 5 where the vocabulary has fewer.
        candidate_log_probs (`torch.FloatTensor` of the same shape): Their log-probabilities.
    """

    timesteps: Tensor | None = None
    tokens: Tensor | None = None
    log_probs: Tensor | None = None
    candidates: Tensor | None = None
    candidate_log_probs: Tensor | None = None


@dataclass
class TDDGenerationOutput(ModelOutput):
    r"""
    Output of [`~TDDGenerationMixin.generate`] with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`):
            Captions: the prompt where one was given, tokens, the end token, padding.
        log_probs (`torch.FloatTensor` of the same shape):
            Log-probability of each token at the row's last step, given the draft before. 0 for padding after the end.
        num_steps (`torch.LongTensor` of shape `(batch_size * num_return_sequences,)`):
            Denoising steps that each row took.
        candidates (`torch.LongTensor` of shape `(batch_size, num_candidates, length)`, *optional*):
            With `choices` or `num_candidates`: the captions that were ranked, in the order in which they were given or
            made.
        candidate_probs (`torch.FloatTensor` of shape `(batch_size, num_candidates)`, *optional*):
            The probability of each among them.
        trajectory ([`TDDTrajectory`], *optional*, with `output_trajectory=True`):
            The steps.
    """

    sequences: Tensor | None = None
    log_probs: Tensor | None = None
    num_steps: Tensor | None = None
    candidates: Tensor | None = None
    candidate_probs: Tensor | None = None
    trajectory: TDDTrajectory | None = None


class TDDGenerationMixin:
    """`generate` for models that denoise tokens together. It stands beside `PreTrainedModel`."""

    # What the model has
    config: TDDConfig
    model: Any
    make_network: Any
    denoising_step: Any
    _scoring_method: Any
    _score_tokens: Any

    generation_config_class = TDDGenerationConfig
    output_modalities = ("text",)

    @property
    def generation_config(self) -> TDDGenerationConfig:
        """[`TDDGenerationConfig`]: what `generate` does where a call does not say. A dictionary or a plain
        `GenerationConfig` becomes one, or is refused. A copy is kept, in which a `max_length` of `None` becomes the
        model's number of places, which `Seq2SeqTrainer` reads."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | dict[str, Any]) -> None:
        self._generation_config = copy(TDDGenerationConfig.convert(value))
        if self._generation_config.max_length is None:
            self._generation_config.max_length = self.config.max_position_embeddings

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        choices: Tensor | None = None,
        choices_mask: Tensor | None = None,
        generation_config: GenerationConfig | dict[str, Any] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generator: torch.Generator | None = None,
        streamer: BaseStreamer | None = None,
        labels: Tensor | None = None,
        synced_gpus: bool | None = None,
        **kwargs: Any,
    ) -> Tensor | TDDGenerationOutput:
        r"""
        Captions images by the argmax-and-re-noise loop of Section 3.2:
        ```
        1. Check the settings, and encode the images into the prefix, once
        2. Fix the tokens of prompt and infilling, and padding beyond the wanted length
        3. Denoise (see [`~sampling_tdd.denoise`]), and after each step send a draft to the streamer
        4. With several captions per image, and no draws: denoise again around the likeliest alternatives
        5. Pad what follows a caption's end
        6. With choices or candidates: score them, and keep the most probable
        ```
        In eval mode a row's caption depends neither on the other rows nor on global random state; in training mode
        dropout does.

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
                1 for fixed tokens, 0 for places to fill. A caption does not end before its last fixed token.
            choices (`torch.LongTensor` of shape `(batch_size, num_choices, length)`, *optional*):
                The captions that are allowed, with their end tokens and padding, as the processor makes them. The most
                probable one by [`~TDDLikelihoodMixin.score`] is returned, or the `num_return_sequences` most probable.
            choices_mask (`torch.Tensor` of the same shape, *optional*):
                1 for fixed tokens, 0 for places to fill; by default all are fixed.
            generation_config ([`TDDGenerationConfig`], `GenerationConfig` or `dict`, *optional*):
                Parameters; the model's own by default. What does not apply to diffusion is refused, in a plain
                `GenerationConfig` and in a dictionary too.
            logits_processor (`LogitsProcessorList`, *optional*):
                Processors of Transformers. Each place is processed given the tokens before it at the same step, so
                each processor is called `num_inference_steps * N` times, fewer where all rows stopped early. It sees
                all rows at each call, those that have stopped too: one for each image, or `num_return_sequences` with
                `do_sample`. (Without `do_sample` a second loop of as many calls has the `num_return_sequences - 1`
                alternatives of each image, in succession.) Its `input_ids` are one token of padding, in the place of
                the first token of Transformers' decoders, and the tokens before the place.
            generator (`torch.Generator`, *optional*):
                Source of the noise, in place of `seed`. A CPU generator serves a model on any device.
            streamer (`BaseStreamer`, *optional*):
                Receives through `put` the prompt and, at the end, the tokens behind it; and each step's draft of these
                through `put_draft`, where it has that.
            labels (`torch.Tensor`, *optional*):
                Nothing reads them: `Seq2SeqTrainer` passes all that a batch has.
            synced_gpus (`bool`, *optional*):
                Whether all processes must take the same number of steps, which they do without `stability_threshold`
                and `confidence_threshold`.
            kwargs:
                Parameters of [`TDDGenerationConfig`], which take precedence. Arguments of Transformers that do not
                apply to diffusion may have the value that has no effect, such as `num_beams=1`.

        Returns:
            `torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`, an image's captions in
            succession, or [`TDDGenerationOutput`] with `return_dict_in_generate=True`.

        Raises:
            `ValueError`: for unknown arguments, for parameters, tensors or token ids of a wrong type or out of range,
                for a prompt or infilling that does not fit, and for scores that are not finite in the last step.

        Example:

        ```python
        >>> inputs = processor(images=image, return_tensors="pt")
        >>> processor.batch_decode(model.generate(**inputs, num_inference_steps=20), skip_special_tokens=True)
        ```"""
        # 1. Check and encode
        config = self._prepare_generation_config(generation_config, kwargs)
        check_given(generator=generator, logits_processor=logits_processor, streamer=streamer, synced_gpus=synced_gpus)
        check_given(choices=choices, choices_mask=choices_mask)
        is_ranked = choices is not None or config.num_candidates is not None
        self._check_call(
            config,
            is_ranked,
            synced_gpus,
            choices,
            choices_mask,
            input_ids=input_ids,
            decoder_input_ids=decoder_input_ids,
        )
        prefix = self.model.get_prefix(pixel_values, image_features)
        # 2. Fix tokens
        rows = len(prefix)
        name = "input_ids" if decoder_input_ids is None else "decoder_input_ids"
        if choices is not None:
            name = "choices"
            decoder_input_ids, decoder_attention_mask = choice_tokens(choices, choices_mask, rows, config)
            rows = len(decoder_input_ids)
        fixed = self._prepare_fixed_tokens(
            config, rows, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, name
        ).to(prefix.device)
        output = TokenStreamer(streamer, fixed, config)
        # 3. Denoise
        images = pixel_values if pixel_values is not None else image_features
        wanted = config.num_candidates or (config.num_return_sequences if choices is None else 1)
        captions = wanted if config.do_sample else 1
        loop = (config, prefix, images, logits_processor, generator)
        recorder = self._denoise(*loop, fixed.repeat(captions), output, keep_first=captions < wanted)
        # 4. Alternatives
        if captions < wanted:
            first = recorder.first_log_probs
            alternatives = likeliest_alternatives(first, recorder.tokens, fixed, wanted - 1, config)
            recorder = recorder.join(self._denoise(*loop, alternatives), len(prefix))
        # 5. Pad
        check_scores(recorder.log_probs, config.guidance_scale)
        tokens = pad_after_end(recorder.tokens, config)
        # 6. Rank
        ranked = None
        if is_ranked:
            ranked = self._rank(config, prefix, tokens)
            recorder, tokens = recorder.select(ranked.rows), tokens[ranked.rows]
        sequences = tokens[:, : fixed.length]
        output.end(sequences)
        return self._make_output(config, sequences, recorder, ranked) if config.return_dict_in_generate else sequences

    def _check_call(
        self,
        config: TDDGenerationConfig,
        is_ranked: bool,
        synced_gpus: bool | None,
        choices: Tensor | None,
        choices_mask: Tensor | None,
        **prompts: Tensor | None,
    ) -> None:
        """Refuses arguments that do not go together, and ranking by a model that cannot score captions."""
        if synced_gpus:
            for name in ("stability_threshold", "confidence_threshold"):
                if getattr(config, name) is not None:
                    raise ValueError(f"`synced_gpus=True` needs `{name}=None`: processes may stop at other steps.")
        if choices is None:
            refuse_given("there are no `choices`", choices_mask=choices_mask)
        else:
            refuse_given("the `choices` are whole captions", num_candidates=config.num_candidates, **prompts)
        if is_ranked:
            try:
                self._scoring_method(None)
            except ValueError as error:
                raise ValueError(f"`num_candidates` and `choices` are ranked by `score`: {error}") from error

    def _make_output(
        self,
        config: TDDGenerationConfig,
        sequences: Tensor,
        recorder: "StepRecorder",
        ranked: RankedCandidates | None,
    ) -> TDDGenerationOutput:
        length = sequences.shape[1]
        is_padding = follows_end(sequences, end_tokens(config))
        return TDDGenerationOutput(
            sequences=sequences,
            log_probs=recorder.log_probs[:, :length].masked_fill(is_padding, 0.0),
            num_steps=recorder.num_steps,
            candidates=None if ranked is None else ranked.tokens[..., :length],
            candidate_probs=None if ranked is None else ranked.probs,
            trajectory=recorder.trajectory(length) if config.output_trajectory else None,
        )

    def _rank(self, config: TDDGenerationConfig, prefix: Tensor, tokens: Tensor) -> RankedCandidates:
        """The captions of each image, ranked by [`~TDDLikelihoodMixin.score`]."""
        scores = self._score_tokens(prefix, tokens, self._scoring_method(None)).view(len(prefix), -1)
        candidates = tokens.view(*scores.shape, -1)
        return rank_candidates(candidates, scores, config.score_temperature, config.num_return_sequences)

    def _denoise(
        self,
        config: TDDGenerationConfig,
        prefix: Tensor,
        images: Tensor,
        logits_processor: LogitsProcessorList | None,
        generator: torch.Generator | None,
        fixed: FixedTokens,
        output: "TokenStreamer | None" = None,
        keep_first: bool = False,
    ) -> "StepRecorder":
        """One denoising loop around fixed tokens, which has one or several successive rows for each image. With
        `keep_first` the log-probabilities of the first step are kept, for alternatives."""
        numbers = self._random_numbers(config, images, len(fixed.tokens) // len(images), generator, prefix.device)
        recorder = StepRecorder(config.output_trajectory, keep_first=keep_first)
        processor = TokenLogitsProcessor(config, logits_processor, fixed)
        scales = guidance_scales(config.guidance_schedule, config.guidance_scale, config.num_inference_steps)
        is_given = fixed.mask.all(1)  # of these a step only finds the log-probabilities
        for step in denoise(
            self.make_network(prefix),
            self._make_sampler(config, prefix.device),
            numbers,
            fixed.known,
            scales[:1] if is_given.all() else scales,
            sampling_strategy="multinomial" if config.do_sample else "argmax",
            process_logits=processor if processor.has_effect else None,
            stability_threshold=config.stability_threshold,
            given_rows=is_given if is_given.any() else None,
            keep_rows=bool(logits_processor),
            all_logits=config.return_dict_in_generate or config.output_trajectory or keep_first,
            step=self.denoising_step,
        ):
            recorder.record(step)
            if output is not None:
                output.put_draft(recorder.tokens)
        return recorder

    def _random_numbers(
        self,
        config: TDDGenerationConfig,
        images: Tensor,
        num_samples: int,
        generator: torch.Generator | None,
        device: torch.device,
    ) -> RandomNumbers:
        """The numbers of one generator for all images or, to draw tokens, of one for each image."""
        if generator is None:
            generator = torch.Generator().manual_seed(config.seed)
        generators = [generator]
        if config.do_sample:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
            generators = [torch.Generator().manual_seed(seed ^ number) for number in image_checksums(images)]
        shape = (len(images), num_samples, self.config.max_position_embeddings)
        width = None if self.config.corruption == "mask" else self.config.noise_width
        return RandomNumbers(generators, *shape, width, device)

    def _make_sampler(self, config: TDDGenerationConfig, device: torch.device) -> Sampler:
        end, threshold = end_tokens(config), config.confidence_threshold
        alpha_bar = self.model.denoiser.schedule_on(device).alpha_bar
        if self.config.corruption == "mask":
            return UnmaskingSampler(alpha_bar, self.config.num_categories, end, threshold)
        if self.config.corruption == "uniform":
            return UniformSampler(alpha_bar, self.config.num_categories, threshold)
        if config.sampler == "confidence":
            return ConfidenceSampler(self.config.num_timesteps, end, threshold)
        return RenoiseSampler(self.config.num_timesteps, threshold)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | dict[str, Any] | None, kwargs: dict[str, Any]
    ) -> TDDGenerationConfig:
        """Arguments of the call over `generation_config` over the model's special tokens and the defaults."""
        given = self.generation_config if generation_config is None else TDDGenerationConfig.convert(generation_config)
        given.validate()
        kwargs = drop_inert(kwargs)
        parameters = {name: getattr(given, name) for name in TDDGenerationConfig._DEFAULTS}
        # An argmax has no use for the parameters of draws, which only the call itself may not give
        if not kwargs.get("do_sample", parameters["do_sample"]):
            for name in SAMPLING_PARAMETERS:
                parameters.pop(name)
        config = TDDGenerationConfig(**{**parameters, **kwargs})
        check_steps(self.config.num_timesteps, config.num_inference_steps)
        token = integer(0, self.config.vocab_size - 1)
        for name in ("pad_token_id", "eos_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(self.config, name))
            check(name, getattr(config, name), token)
        for banned in config.bad_words_ids or []:
            for token_id in banned:
                check("bad_words_ids", token_id, token)
        if self.config.corruption != "gaussian":
            if config.sampler is not None:
                raise ValueError(
                    f"`sampler={config.sampler!r}` needs Gaussian noise, and this model has "
                    f"`corruption={self.config.corruption!r}`."
                )
        elif config.sampler is None:
            config.sampler = "confidence" if self.config.timestep_sampling == "per_token" else "renoise"
        return config

    def _prepare_fixed_tokens(
        self,
        config: TDDGenerationConfig,
        batch_size: int,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor | None,
        decoder_attention_mask: Tensor | None,
        name: str,
    ) -> FixedTokens:
        """Checks prompt or infilling, and fixes padding behind the last place that each row may fill. `name` is the
        argument that the tokens come from."""
        places = self.config.max_position_embeddings
        max_length = places if config.max_length is None else min(config.max_length, places)
        check_given(input_ids=input_ids, attention_mask=attention_mask)
        check_given(decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask)
        if input_ids is not None and decoder_input_ids is not None:
            raise ValueError("Give a prompt (`input_ids`) or an infilling (`decoder_input_ids`), not both.")
        if input_ids is None:
            refuse_given("there are no `input_ids`", attention_mask=attention_mask)
        if decoder_input_ids is None:
            refuse_given("there are no `decoder_input_ids`", decoder_attention_mask=decoder_attention_mask)
        if decoder_input_ids is not None:
            tokens, mask, given_length = infilling_tokens(decoder_input_ids, decoder_attention_mask)
        elif input_ids is not None:
            tokens, mask, given_length = prompt_tokens(input_ids, attention_mask)
        else:
            tokens = torch.zeros(batch_size, 0, dtype=torch.long)
            mask, given_length = tokens.bool(), torch.zeros(batch_size, dtype=torch.long)
        if len(tokens) != batch_size:
            raise ValueError(f"There are {batch_size} images and {len(tokens)} rows of tokens.")
        if tokens.shape[1] > max_length:
            raise ValueError(
                f"`{name}`: {tokens.shape[1]} given tokens do not fit the {max_length} places of a caption."
            )
        given = tokens[mask]
        if ((given < 0) | (given >= self.config.vocab_size)).any():
            raise ValueError(f"`{name}` must be in [0, {self.config.vocab_size - 1}], got {given.tolist()}.")
        tokens = tokens.masked_fill(~mask, config.pad_token_id)  # whatever stands there, nothing may read it
        row_length = (given_length + min(config.max_new_tokens or places, places)).clamp(max=max_length)
        missing = (0, places - tokens.shape[1])
        beyond = torch.arange(places, device=mask.device) >= row_length[:, None]
        return FixedTokens(
            tokens=nn.functional.pad(tokens, missing, value=config.pad_token_id),
            mask=nn.functional.pad(mask, missing, value=False) | beyond,
            pad_token_id=config.pad_token_id,
            prompt_length=0 if input_ids is None else int(given_length.min()),
            length=int(row_length.max()),
        )

    def adjust_generation_fn(
        self,
        generation_config: GenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: str | None,
        pretrained_model_name_or_path: str | None,
        **kwargs: Any,
    ) -> None:
        """Called by `from_pretrained`: loads the checkpoint's generation_config.json."""
        kwargs.pop("trust_remote_code", None)
        # Changes of the model's configuration come here too, `from_pretrained(..., timesteps_per_image=8)`.
        allowed = self.generation_config_class._DEFAULTS
        kwargs = {name: value for name, value in kwargs.items() if name in allowed or not hasattr(self.config, name)}
        if generation_config is not None:
            self.generation_config = generation_config
        elif pretrained_model_name_or_path is not None:
            try:
                self.generation_config = self.generation_config_class.from_pretrained(
                    pretrained_model_name_or_path,
                    _from_auto=from_auto_class,
                    _from_pipeline=from_pipeline,
                    **kwargs,
                )
            except OSError:  # there is none; for one that cannot be read it is a ValueError
                logger.info("No generation_config.json: the default generation parameters are used.")


def image_checksums(images: Tensor) -> list[int]:
    r"""
    A 62-bit number for each image that depends on all its values, and on no other image: integer arithmetic, so it is
    the same in any batch and on any device.

    Args:
        images (`torch.Tensor` of shape `(batch_size, ...)`): Pixels or features, of any floating-point dtype.
    """
    bits = images.detach().float().flatten(1).contiguous().view(torch.int32).long()
    # Odd multipliers without a pattern, from the place alone: Weyl's sequence, mixed as in SplitMix64
    multipliers = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 0x1E3779B97F4A7C15
    multipliers = ((multipliers ^ (multipliers >> 30)) * 0x3F58476D1CE4E5B9) | 1
    return ((bits * multipliers).sum(1) & (2**62 - 1)).tolist()


class TokenStreamer:
    """Sends the prompt, each step's draft and the captions to a streamer, where there is one."""

    def __init__(self, streamer: BaseStreamer | None, fixed: FixedTokens, config: TDDGenerationConfig):
        self.streamer, self.fixed, self.config = streamer, fixed, config
        if streamer is not None:
            streamer.put(fixed.tokens[:, : fixed.prompt_length].cpu())

    def put_draft(self, tokens: Tensor) -> None:
        """Sends the tokens of all places behind the prompt, to a streamer that takes drafts."""
        if hasattr(self.streamer, "put_draft"):
            draft = pad_after_end(tokens[:, : self.fixed.length], self.config)
            self.streamer.put_draft(draft[:, self.fixed.prompt_length :].cpu())

    def end(self, sequences: Tensor) -> None:
        """Sends the captions behind the prompt."""
        if self.streamer is not None:
            self.streamer.put(sequences[:, self.fixed.prompt_length :].cpu())
            self.streamer.end()


class TokenLogitsProcessor:
    """Applies Transformers' logits processors, made for the next token alone, to the places of a draft."""

    def __init__(self, config: TDDGenerationConfig, logits_processor: LogitsProcessorList | None, fixed: FixedTokens):
        self.end_tokens = [config.pad_token_id, config.eos_token_id]
        before_content = fixed.before_content
        self.before_content = before_content if before_content.any() else None
        self.given_processors: Any = LogitsProcessorList(logits_processor or [])
        self.processors: Any = LogitsProcessorList()
        self.bad_sequences = [words for words in config.bad_words_ids or [] if len(words) > 1]
        if config.bad_words_ids is not None:
            self.processors.append(NoBadWordsLogitsProcessor(config.bad_words_ids))
        self.penalties: Any = LogitsProcessorList()
        if config.repetition_penalty != 1.0:
            self.penalties.append(RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty)))
        self.warpers: Any = LogitsProcessorList()
        if config.do_sample and config.temperature is not None:
            self.warpers.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.do_sample and config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.do_sample and config.top_p is not None:
            self.warpers.append(TopPLogitsWarper(float(config.top_p)))

    @property
    def has_effect(self) -> bool:
        """Whether other logits than those it is given can come out."""
        processors = (self.given_processors, self.processors, self.penalties, self.warpers)
        return self.before_content is not None or any(processors)

    def __call__(self, rows: Tensor, logits: Tensor, choose: TokenChoice) -> Tensor:
        """From logits of shape (rows, N, K) to others; `choose` makes tokens of them."""
        if self.before_content is not None:
            is_end = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            is_end[self.end_tokens] = True
            logits = logits.masked_fill(self.before_content[rows][..., None] & is_end, float("-inf"))
        if not self.given_processors and not self.processors and not self.penalties:
            return self.warpers(None, logits.flatten(0, 1)).view(logits.shape)
        before = torch.zeros(len(logits), 0, dtype=torch.long, device=logits.device)
        first = torch.full((len(logits), 1), self.end_tokens[0], device=logits.device)
        has_ended = torch.zeros(len(logits), 1, dtype=torch.bool, device=logits.device)
        processed = []
        for place in range(logits.shape[1]):
            # Behind the end too: a later step may move the end, and what is unmasked (MDD) stays
            place_logits = self.given_processors(torch.cat([first, before], dim=1), logits[:, place])
            place_logits = self.processors(before, place_logits)
            place_logits = self._forbid_before_final(place, before, place_logits, choose.state)
            # Behind the end stands padding, which is no repetition
            place_logits = torch.where(has_ended, place_logits, self.penalties(before, place_logits))
            processed.append(self.warpers(before, place_logits))
            token = choose(processed[-1], place)[:, None]
            before = torch.cat([before, token], dim=1)
            has_ended = has_ended | (token == self.end_tokens[0]) | (token == self.end_tokens[1])
        return torch.stack(processed, dim=1)

    def _forbid_before_final(self, place: int, before: Tensor, logits: Tensor, state: NoisyTokens) -> Tensor:
        """Forbids the tokens that would complete a bad sequence with final tokens behind the place. Transformers'
        processor knows the tokens before it alone."""
        if not self.bad_sequences:
            return logits
        tokens = torch.cat([before, state.tokens[:, place:]], dim=1)
        is_known = torch.cat([torch.ones_like(before, dtype=torch.bool), state.is_final[:, place:]], dim=1)
        logits = logits.clone()
        for words in self.bad_sequences:
            for index, word in enumerate(words[:-1]):
                completes = completes_sequence(words, index, tokens, is_known)[:, place]
                logits[:, word] = logits[:, word].masked_fill(completes, float("-inf"))
        return logits


class StepRecorder:
    """The latest tokens and log-probabilities of every row. On demand also those of all steps, and the
    log-probabilities of all K categories in the first step."""

    def __init__(self, keep_trajectory: bool, keep_first: bool = False):
        self.keep_trajectory, self.keep_first = keep_trajectory, keep_first
        self.timesteps: list[int] = []
        self.history: list[tuple[Tensor, ...]] = []

    def record(self, step: DenoisingStep) -> None:
        """Takes a step; rows that have left the loop keep what they have. The first step is every row's."""
        latest = list(step.prediction)
        if self.keep_first and not self.timesteps:
            self.first_log_probs = step.logits.log_softmax(-1)
        if self.keep_trajectory:
            log_probs = step.logits.log_softmax(-1)
            best = log_probs.topk(min(TRAJECTORY_CANDIDATES, log_probs.shape[-1]), dim=-1)
            latest += [best.indices, best.values]
        if not self.timesteps:
            self.num_steps = torch.zeros_like(step.rows)
            self.latest = tuple(torch.empty_like(tensor) for tensor in latest)
        for kept, tensor in zip(self.latest, latest):
            kept[step.rows] = tensor
        self.num_steps[step.rows] += 1
        self.timesteps.append(step.timestep)
        if self.keep_trajectory:
            self.history.append(tuple(tensor.clone() for tensor in self.latest))

    @property
    def tokens(self) -> Tensor:
        return self.latest[0]

    @property
    def log_probs(self) -> Tensor:
        return self.latest[1]

    def join(self, other: "StepRecorder", num_images: int) -> "StepRecorder":
        """What this and another loop recorded of the same images, this one's rows of an image first."""

        def join_rows(one: Tensor, two: Tensor) -> Tensor:
            pair = (tensor.unflatten(0, (num_images, -1)) for tensor in (one, two))
            return torch.cat(list(pair), dim=1).flatten(0, 1)

        joined = StepRecorder(self.keep_trajectory)
        joined.timesteps = max(self.timesteps, other.timesteps, key=len)
        joined.num_steps = join_rows(self.num_steps, other.num_steps)
        joined.latest = tuple(join_rows(*pair) for pair in zip(self.latest, other.latest))
        # A loop that ended earlier repeats its last step
        steps = range(len(joined.timesteps)) if self.keep_trajectory else ()
        for step in steps:
            histories = (loop.history[min(step, len(loop.history) - 1)] for loop in (self, other))
            joined.history.append(tuple(join_rows(*pair) for pair in zip(*histories)))
        return joined

    def select(self, rows: Tensor) -> "StepRecorder":
        """What was recorded of some rows."""
        selected = StepRecorder(self.keep_trajectory)
        selected.timesteps, selected.num_steps = self.timesteps, self.num_steps[rows]
        selected.latest = tuple(tensor[rows] for tensor in self.latest)
        selected.history = [tuple(tensor[rows] for tensor in step) for step in self.history]
        return selected

    def trajectory(self, length: int) -> TDDTrajectory:
        """All steps of the first `length` places."""
        steps = (torch.stack(kept, dim=1)[:, :, :length] for kept in zip(*self.history))
        return TDDTrajectory(torch.tensor(self.timesteps), *steps)


__all__ = ["TDDGenerationMixin", "TDDGenerationOutput", "TDDTrajectory"]
