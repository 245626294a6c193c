# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The denoising loop of Section 3.2: predict, guide, choose, re-noise. Tensors only; the network is a function.

The notation is that of `diffusion_tdd.py`. A "row" is one sequence that is denoised: an image has one row for each
sample that is drawn for it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


# The timestep, as a share of T, of tokens that the confidence sampler has settled or that were given
# (docs/decisions.md, 12 to 14).
SETTLED_TIMESTEP = 0.02


def inference_timesteps(num_timesteps: int, num_inference_steps: int) -> list[int]:
    """The evenly spaced timesteps of a denoising loop: `num_inference_steps + 1` integers falling from T to 0."""
    return [num_timesteps - step * num_timesteps // num_inference_steps for step in range(num_inference_steps + 1)]


def select_rows(values: tuple, keep: Tensor) -> tuple:
    """The rows of a boolean mask, of each tensor in a tuple or in tuples within it; `None` stays."""
    return tree_map(lambda tensor: None if tensor is None else tensor[keep], values)


# ---- What a loop draws, knows and passes on


class KnownTokens(NamedTuple):
    """Tokens that are given: int64 tokens of shape (rows, N), and a boolean mask of the places where they hold."""

    tokens: Tensor
    mask: Tensor

    @classmethod
    def none(cls, rows: int, num_tokens: int, device: torch.device) -> "KnownTokens":
        """Nothing is known."""
        tokens = torch.zeros(rows, num_tokens, dtype=torch.long, device=device)
        return cls(tokens, tokens.bool())


class NoisyTokens(NamedTuple):
    r"""
    The state of a loop, which is what the denoiser reads.

    Args:
        tokens (`torch.LongTensor` of shape `(rows, N)`): Tokens to add noise to; K stands for a mask.
        timesteps (`torch.LongTensor` of shape `(rows, N)`): The timestep of each token.
        noise (`torch.Tensor` of shape `(rows, N, noise_width)`, *optional*): Its noise; `None` for masks.
        is_final (`torch.BoolTensor` of shape `(rows, N)`): Places whose token no prediction changes any more.
    """

    tokens: Tensor
    timesteps: Tensor
    noise: Tensor | None
    is_final: Tensor


class Prediction(NamedTuple):
    """Predicted clean tokens, int64 of shape (rows, N), and their log-probabilities, float32 of the same shape."""

    tokens: Tensor
    log_probs: Tensor


class DenoisingStep(NamedTuple):
    """One step of a loop: its timestep, the indices of the rows that it denoised, their logits of shape (rows, N, K)
    after guidance and processing, and what they predict."""

    timestep: int
    rows: Tensor
    logits: Tensor
    prediction: Prediction


class RandomNumbers:
    r"""
    The random numbers of a loop's rows, which depend neither on the other rows nor on the global random state.

    Args:
        generators (`Sequence[torch.Generator]`):
            One for all images, which then all have the same numbers, or one for each image.
        num_images, num_samples (`int`): There are `num_samples` rows for each image, in succession.
        num_tokens, width (`int`): N, and the width of the noise.
        device (`torch.device`): Where the numbers are needed. A generator on the CPU serves any device.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        num_images: int,
        num_samples: int,
        num_tokens: int,
        width: int,
        device: torch.device,
    ):
        self.generators, self.device = generators, device
        self.shape = (num_samples, num_tokens, width)
        self.rows = torch.arange(num_images * num_samples, device=device) % (len(generators) * num_samples)

    def normal(self) -> Tensor:
        """Standard normal numbers of shape `(rows, N, width)`."""
        return self._draw(torch.randn, self.shape)

    def uniform(self) -> Tensor:
        """Numbers in [0, 1) of shape `(rows, N)`."""
        return self._draw(torch.rand, self.shape[:2])

    def _draw(self, function: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        drawn = [function(shape, generator=generator, device=generator.device) for generator in self.generators]
        return torch.cat(drawn).to(self.device)[self.rows]

    def select(self, keep: Tensor) -> None:
        """From now on only the rows of a boolean mask draw."""
        self.rows = self.rows[keep]


# ---- Samplers: from a prediction to the next noisy tokens


class RenoiseSampler:
    r"""
    The paper's sampler (Section 3.2): all tokens start as pure noise, and every prediction is re-noised to the next
    timestep. Given tokens are re-noised like all others, so they appear as t falls.

    Args:
        num_timesteps (`int`): T.
        numbers ([`RandomNumbers`]): The noise.
        known ([`KnownTokens`]): Given tokens.
    """

    def __init__(self, num_timesteps: int, numbers: RandomNumbers, known: KnownTokens):
        self.num_timesteps, self.numbers, self.known = num_timesteps, numbers, known

    def start(self) -> NoisyTokens:
        """The state at t = T."""
        return self._add_noise(self.known.tokens, torch.full_like(self.known.tokens, self.num_timesteps))

    def step(self, prediction: Prediction, next_timestep: int) -> NoisyTokens:
        """The state at `next_timestep`."""
        return self._add_noise(prediction.tokens, torch.full_like(prediction.tokens, next_timestep))

    def select(self, keep: Tensor) -> None:
        """From now on only the rows of a boolean mask are denoised."""
        self.known = select_rows(self.known, keep)

    def _add_noise(self, tokens: Tensor, timesteps: Tensor) -> NoisyTokens:
        return NoisyTokens(tokens, timesteps, self.numbers.normal(), self.known.mask)


class ConfidenceSampler(RenoiseSampler):
    r"""
    For networks trained with a timestep for each token (ours): the tokens that the network is surest of are re-noised
    to a low timestep, and all others to T. Only given tokens are final, any other may still be revised.

    Args:
        num_timesteps, numbers, known: As in [`RenoiseSampler`].
        end_token_ids (`Sequence[int]`): Tokens behind which a sequence is padding, see [`most_confident`].
    """

    def __init__(
        self, num_timesteps: int, numbers: RandomNumbers, known: KnownTokens, end_token_ids: Sequence[int] = ()
    ):
        super().__init__(num_timesteps, numbers, known)
        self.end_token_ids = end_token_ids
        self.settled_timestep = max(1, round(SETTLED_TIMESTEP * num_timesteps))

    def start(self) -> NoisyTokens:
        """The state at t = T: noise, and the given tokens with little noise."""
        return self._settle(self.known.tokens, self.known.mask)

    def step(self, prediction: Prediction, next_timestep: int) -> NoisyTokens:
        """The state in which the share 1 - t / T of the free places is settled."""
        beyond_end = follows_end(prediction.tokens, self.end_token_ids)
        share = 1 - next_timestep / self.num_timesteps
        return self._settle(
            prediction.tokens, most_confident(prediction.log_probs, share, self.known.mask, beyond_end)
        )

    def _settle(self, tokens: Tensor, is_settled: Tensor) -> NoisyTokens:
        return self._add_noise(tokens, torch.where(is_settled, self.settled_timestep, self.num_timesteps))


class UnmaskingSampler:
    r"""
    MDD: all free places start as masks, and the predictions that the network is surest of are unmasked, for good.

    Args:
        visible_share (`Sequence[float]`): The share of the free places that is visible at t = 0 ... T.
        mask_token (`int`): The token that stands for a mask, K.
        known ([`KnownTokens`]): Given tokens.
        end_token_ids (`Sequence[int]`): As in [`ConfidenceSampler`].
    """

    def __init__(
        self, visible_share: Sequence[float], mask_token: int, known: KnownTokens, end_token_ids: Sequence[int] = ()
    ):
        self.visible_share, self.mask_token = visible_share, mask_token
        self.known, self.end_token_ids = known, end_token_ids
        self.num_timesteps = len(visible_share) - 1
        self.is_visible = known.mask

    def start(self) -> NoisyTokens:
        """The state at t = T: masks, and the given tokens."""
        return self._unmask(self.known.tokens, self.known.mask, self.num_timesteps)

    def step(self, prediction: Prediction, next_timestep: int) -> NoisyTokens:
        """The state in which as many places are visible as belong to `next_timestep`."""
        beyond_end = follows_end(prediction.tokens, self.end_token_ids)
        confidence = prediction.log_probs.masked_fill(self.is_visible, float("inf"))  # what is visible ranks first
        share = self.visible_share[next_timestep]
        is_visible = self.is_visible | most_confident(confidence, share, self.known.mask, beyond_end)
        return self._unmask(prediction.tokens, is_visible, next_timestep)

    def select(self, keep: Tensor) -> None:
        """From now on only the rows of a boolean mask are denoised."""
        self.known, self.is_visible = select_rows((self.known, self.is_visible), keep)

    def _unmask(self, tokens: Tensor, is_visible: Tensor, timestep: int) -> NoisyTokens:
        self.is_visible = is_visible
        tokens = tokens.masked_fill(~is_visible, self.mask_token)
        return NoisyTokens(tokens, torch.full_like(tokens, timestep), None, is_visible)


Sampler = RenoiseSampler | ConfidenceSampler | UnmaskingSampler


def most_confident(log_probs: Tensor, share: float, known_mask: Tensor, beyond_end: Tensor) -> Tensor:
    r"""
    The places of a sequence that are settled first.

    Args:
        log_probs (`torch.Tensor` of shape `(rows, N)`): Of the predicted tokens; infinite for those that come first.
        share (`float`): Share of the free places to settle.
        known_mask (`torch.BoolTensor` of shape `(rows, N)`): Places that were given, and are not free.
        beyond_end (`torch.BoolTensor` of shape `(rows, N)`):
            Places that hold padding by the prediction. The same share of them is settled as of the others: padding is
            easy, and if it came first all words would be left to the last steps, several at once
            (docs/decisions.md, 13).

    Returns:
        `torch.BoolTensor` of shape `(rows, N)`: the given places and `share` of the others, those with the highest
        log-probabilities.
    """
    settled = known_mask
    for group in (~known_mask & beyond_end, ~known_mask & ~beyond_end):
        rank = log_probs.masked_fill(~group, float("-inf")).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        quota = (share * group.sum(dim=1, keepdim=True).double()).round()
        settled = settled | (group & (rank < quota))
    return settled


def follows_end(tokens: Tensor, end_token_ids: Sequence[int]) -> Tensor:
    """Whether one of the end tokens stands before a place, bool of the shape (rows, N) of `tokens`."""
    is_end = torch.zeros_like(tokens, dtype=torch.bool)
    for token in end_token_ids:
        is_end = is_end | (tokens == token)
    return is_end.cumsum(1) - is_end.long() > 0


# ---- Guidance and choice


def guidance_scales(guidance_schedule: str, guidance_scale: float, num_inference_steps: int) -> list[float]:
    r"""
    s(t) of Algorithm 1 for each step of a loop.

    Args:
        guidance_schedule (`str`):
            `"constant"`, or a `"linear"` or `"cosine"` rise from 1 at the first step to `guidance_scale` at the last.
        guidance_scale (`float`):
            The scale of the last step, at least 1. A loop of one step has this one alone.
        num_inference_steps (`int`):
            Number of steps.
    """
    shares = [step / (num_inference_steps - 1) for step in range(num_inference_steps - 1)] + [1.0]
    if guidance_schedule == "cosine":
        shares = [0.5 * (1 - math.cos(math.pi * share)) for share in shares]
    elif guidance_schedule == "constant":
        shares = [1.0] * num_inference_steps
    return [1 + (guidance_scale - 1) * share for share in shares]


def apply_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, equation 1: `uncond + scale * (cond - uncond)`."""
    return unconditional + scale * (conditional - unconditional)


def to_one(logits: Tensor, uniform: Tensor | None = None) -> Tensor:
    r"""
    The "to one" operation of appendix A.2: from logits over K categories to one token.

    Args:
        logits (`torch.Tensor` of shape `(..., K)`):
            Unnormalised log-probabilities.
        uniform (`torch.Tensor` of shape `(...)`, *optional*):
            By default the argmax is taken. With one number in [0, 1) for each token, a draw from the softmax, by the
            inverse of the cumulative distribution: a row's draw depends on its own numbers alone.

    Returns:
        `torch.Tensor`: int64 tokens of shape `(...)`.
    """
    if uniform is None:
        return logits.argmax(-1)
    cumulative = logits.float().softmax(-1).cumsum(-1)
    # Scaled by the last entry, so that rounding never leaves a draw beyond the last category.
    return (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)


class TokenChoice(NamedTuple):
    """From the logits of a step to its tokens: [`to_one`], except where the state's tokens are final."""

    state: NoisyTokens
    uniform: Tensor | None

    def __call__(self, logits: Tensor, places: int | slice = slice(None)) -> Tensor:
        """Tokens of shape (rows,) of one place from logits (rows, K), or of all, (rows, N) from (rows, N, K)."""
        chosen = to_one(logits, None if self.uniform is None else self.uniform[:, places])
        return torch.where(self.state.is_final[:, places], self.state.tokens[:, places], chosen)


# ---- The loop


class Network(Protocol):
    """What the loop asks of a network."""

    def __call__(self, state: NoisyTokens, conditional: bool = True) -> Tensor:
        """Predictions, float32 of shape (rows, N, K), under the images' conditions or under the null condition."""

    def to_logits(self, state: NoisyTokens, prediction: Tensor) -> Tensor:
        """Logits of the clean tokens from a prediction, which may be one of the noise."""

    def select(self, keep: Tensor) -> None:
        """From now on only the rows of a boolean mask are denoised."""


def denoise(
    network: Network,
    sampler: Sampler,
    numbers: RandomNumbers,
    guidance_scales: Sequence[float],
    sampling_strategy: str = "argmax",
    process_logits: Callable[[Tensor, Tensor, TokenChoice], Tensor] | None = None,
    stability_threshold: int | None = None,
    keep_rows: bool = False,
) -> Iterator[DenoisingStep]:
    r"""
    The inference loop of Section 3.2 with the guidance of Algorithm 1, a step at a time:
    ```
    1. Start from pure noise
    2. For each timestep t, from T down:
        a. Predict the clean tokens from the noisy ones
        b. Guide: move away from the prediction without an image
        c. Choose one token for each place; given ones stay
        d. Rows whose tokens have settled leave the loop
        e. Re-noise the tokens, less than before
    ```

    Args:
        network ([`Network`]): The denoiser under its conditions.
        sampler: One of the samplers above.
        numbers ([`RandomNumbers`]): The sampler's, for the draws of `"multinomial"`.
        guidance_scales (`Sequence[float]`): s(t), one for each step; see [`guidance_scales`].
        sampling_strategy (`str`, *optional*, defaults to `"argmax"`): `"argmax"` or `"multinomial"`.
        process_logits (`Callable`, *optional*):
            From logits, the indices of their rows, and the step's [`TokenChoice`], to other logits of the same shape.
        stability_threshold (`int`, *optional*):
            A row whose tokens have not changed for so many steps is finished and leaves the loop.
        keep_rows (`bool`, *optional*, defaults to `False`):
            Whether finished rows are computed on, for a `process_logits` that must see all rows at each step.

    Yields:
        [`DenoisingStep`]: after each prediction, of the rows that were not finished.
    """
    timesteps = inference_timesteps(sampler.num_timesteps, len(guidance_scales))
    # 1. Start
    state = sampler.start()
    rows = torch.arange(len(state.tokens), device=state.tokens.device)
    previous, unchanged = None, torch.zeros_like(rows)
    is_open = torch.ones_like(rows, dtype=torch.bool)
    for timestep, next_timestep, scale in zip(timesteps, timesteps[1:], guidance_scales):
        # 2a. Predict
        logits = network(state)
        # 2b. Guide
        if scale != 1:
            logits = apply_guidance(logits, network(state, conditional=False), scale)
        logits = network.to_logits(state, logits)
        # 2c. Choose
        uniform = numbers.uniform() if sampling_strategy == "multinomial" else None
        choose = TokenChoice(state, uniform)
        if process_logits is not None:
            logits = process_logits(logits, rows, choose)
        tokens = choose(logits)
        log_probs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        prediction = Prediction(tokens, log_probs)
        step = (rows, logits, prediction)
        yield DenoisingStep(timestep, *(select_rows(step, is_open) if keep_rows else step))
        if next_timestep == 0:
            return
        # 2d. Leave
        if stability_threshold is not None and previous is not None:
            unchanged = torch.where((tokens == previous).all(-1), unchanged + 1, 0)
            is_open = is_open & (unchanged < min(stability_threshold, len(timesteps)))
            if not is_open.any():
                return
            if not keep_rows and not is_open.all():
                for part in (network, sampler, numbers):
                    part.select(is_open)
                rows, unchanged, prediction, is_open = select_rows((rows, unchanged, prediction, is_open), is_open)
        previous = prediction.tokens
        # 2e. Re-noise
        state = sampler.step(prediction, next_timestep)


__all__ = [
    "ConfidenceSampler",
    "DenoisingStep",
    "KnownTokens",
    "Network",
    "NoisyTokens",
    "Prediction",
    "RandomNumbers",
    "RenoiseSampler",
    "TokenChoice",
    "UnmaskingSampler",
    "apply_guidance",
    "denoise",
    "follows_end",
    "guidance_scales",
    "inference_timesteps",
    "most_confident",
    "select_rows",
    "to_one",
]
