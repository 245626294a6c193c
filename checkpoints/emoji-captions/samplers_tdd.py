# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Samplers: which noisy tokens follow from a prediction. Each has a `start`, and a `step` that a loop repeats.

The notation is that of `diffusion_tdd.py`. A "row" is one sequence that is denoised: an image has one row for each
sample that is drawn for it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .diffusion_tdd import replace_by_random_tokens


# The timestep, as a share of T, of tokens that the confidence sampler has settled or that were given
# (docs/decisions.md, 12 to 14).
SETTLED_TIMESTEP = 0.02


def settled_timestep(num_timesteps: int) -> int:
    """The timestep of settled and given tokens."""
    return max(1, round(SETTLED_TIMESTEP * num_timesteps))


def inference_timesteps(num_timesteps: int, num_inference_steps: int) -> list[int]:
    """The evenly spaced timesteps of a denoising loop: `num_inference_steps + 1` integers falling from T to 0."""
    return [num_timesteps - step * num_timesteps // num_inference_steps for step in range(num_inference_steps + 1)]


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
        noise (`torch.Tensor` of shape `(rows, N, width)`, *optional*):
            Its noise, as [`~Network.prepare`] returns it; `None` for masks.
        is_given (`torch.BoolTensor` of shape `(rows, N)`): Places whose token was given.
        is_final (`torch.BoolTensor` of shape `(rows, N)`): Places whose token no prediction changes any more.
    """

    tokens: Tensor
    timesteps: Tensor
    noise: Tensor | None
    is_given: Tensor
    is_final: Tensor


class Prediction(NamedTuple):
    """Predicted clean tokens, int64 of shape (rows, N), and their log-probabilities, float32 of the same shape."""

    tokens: Tensor
    log_probs: Tensor


# ---- Samplers: from a prediction to the next noisy tokens


class RenoiseSampler:
    r"""
    The paper's sampler (Section 3.2): all tokens start as pure noise, and every prediction is re-noised to the next
    timestep. Given tokens are re-noised like all others, so they appear as t falls.

    Args:
        num_timesteps (`int`): T.
        confidence_threshold (`float`, *optional*):
            A row is finished once all its tokens are at least as probable (ours).
    """

    def __init__(self, num_timesteps: int, confidence_threshold: float | None = None):
        self.num_timesteps, self.confidence_threshold = num_timesteps, confidence_threshold

    def timesteps_of_tokens(self, num_inference_steps: int) -> list[int]:
        """All timesteps that a token may have in a loop."""
        return inference_timesteps(self.num_timesteps, num_inference_steps)[:-1]

    def start(self, known: KnownTokens, noise: Tensor | None) -> NoisyTokens:
        """The state at t = T, with `noise` of shape (rows, N, width)."""
        timesteps = torch.full_like(known.tokens, self.num_timesteps)
        return NoisyTokens(known.tokens, timesteps, noise, known.mask, known.mask)

    def step(
        self, state: NoisyTokens, prediction: Prediction, next_timestep: Tensor, noise: Tensor | None
    ) -> NoisyTokens:
        """The state at `next_timestep`, int64 of shape ()."""
        is_final = state.is_given
        if self.confidence_threshold is not None:
            is_sure = (prediction.log_probs >= math.log(self.confidence_threshold)) | state.is_given
            is_final = is_final | is_sure.all(dim=1, keepdim=True)
        timesteps = next_timestep.expand_as(prediction.tokens)
        return NoisyTokens(prediction.tokens, timesteps, noise, state.is_given, is_final)


class ConfidenceSampler:
    r"""
    For networks trained with a timestep for each token (ours): the tokens that the network is surest of are re-noised
    to a low timestep, and all others to T. Only given tokens are final, any other may still be revised; with a
    threshold settled tokens are final too.

    Args:
        num_timesteps (`int`): T.
        end_token_ids (`Sequence[int]`): Tokens behind which a sequence is padding, see [`most_confident`].
        confidence_threshold (`float`, *optional*):
            In place of the timestep the tokens' own probabilities say how many are settled, see [`settle_sure`].
    """

    def __init__(
        self, num_timesteps: int, end_token_ids: Sequence[int] = (), confidence_threshold: float | None = None
    ):
        self.num_timesteps, self.end_token_ids = num_timesteps, end_token_ids
        self.confidence_threshold = confidence_threshold
        self.settled_timestep = settled_timestep(num_timesteps)

    def timesteps_of_tokens(self, num_inference_steps: int) -> list[int]:
        """All timesteps that a token may have in a loop."""
        return [self.settled_timestep, self.num_timesteps]

    def start(self, known: KnownTokens, noise: Tensor | None) -> NoisyTokens:
        """The state at t = T: noise, and the given tokens with little noise."""
        return self._settle(known.tokens, noise, known.mask, known.mask, known.mask)

    def step(
        self, state: NoisyTokens, prediction: Prediction, next_timestep: Tensor, noise: Tensor | None
    ) -> NoisyTokens:
        """The state in which the share 1 - t / T of the free places is settled, or that of the sure ones."""
        if self.confidence_threshold is not None:
            tokens, is_final = settle_sure(prediction, self.confidence_threshold, state, self.end_token_ids)
            return self._settle(tokens, noise, is_final, state.is_given, is_final)
        beyond_end = follows_end(prediction.tokens, self.end_token_ids)
        share = 1 - next_timestep.double() / self.num_timesteps
        is_settled = most_confident(prediction.log_probs, share, state, beyond_end)
        return self._settle(prediction.tokens, noise, is_settled, state.is_given, state.is_given)

    def _settle(self, tokens: Tensor, noise: Tensor | None, is_settled: Tensor, *masks: Tensor) -> NoisyTokens:
        timesteps = torch.where(is_settled, self.settled_timestep, self.num_timesteps)
        return NoisyTokens(tokens, timesteps, noise, *masks)


class UnmaskingSampler:
    r"""
    MDD: all free places start as masks, and the predictions that the network is surest of are unmasked, for good.

    Args:
        visible_share (`torch.Tensor` of shape `(T + 1,)`):
            The share of the free places that is visible at t = 0 ... T.
        mask_token (`int`): The token that stands for a mask, K.
        end_token_ids, confidence_threshold: As in [`ConfidenceSampler`].
    """

    def __init__(
        self,
        visible_share: Tensor,
        mask_token: int,
        end_token_ids: Sequence[int] = (),
        confidence_threshold: float | None = None,
    ):
        self.visible_share, self.mask_token = visible_share, mask_token
        self.end_token_ids, self.confidence_threshold = end_token_ids, confidence_threshold
        self.num_timesteps = len(visible_share) - 1

    def timesteps_of_tokens(self, num_inference_steps: int) -> list[int]:
        """All timesteps that a token may have in a loop."""
        return inference_timesteps(self.num_timesteps, num_inference_steps)[:-1]

    def start(self, known: KnownTokens, noise: Tensor | None = None) -> NoisyTokens:
        """The state at t = T: masks, and the given tokens."""
        timesteps = torch.full_like(known.tokens, self.num_timesteps)
        return self._unmask(known.tokens, timesteps, known.mask, known.mask)

    def step(
        self, state: NoisyTokens, prediction: Prediction, next_timestep: Tensor, noise: Tensor | None = None
    ) -> NoisyTokens:
        """The state in which as many places are visible as belong to `next_timestep`, or as are sure."""
        timesteps = next_timestep.expand_as(prediction.tokens)
        if self.confidence_threshold is not None:
            tokens, is_final = settle_sure(prediction, self.confidence_threshold, state, self.end_token_ids)
            return self._unmask(tokens, timesteps, state.is_given, is_final)
        beyond_end = follows_end(prediction.tokens, self.end_token_ids)
        share = self.visible_share.index_select(0, next_timestep[None]).double()
        is_visible = state.is_final | most_confident(prediction.log_probs, share, state, beyond_end)
        return self._unmask(prediction.tokens, timesteps, state.is_given, is_visible)

    def _unmask(self, tokens: Tensor, timesteps: Tensor, is_given: Tensor, is_visible: Tensor) -> NoisyTokens:
        return NoisyTokens(tokens.masked_fill(~is_visible, self.mask_token), timesteps, None, is_given, is_visible)


class UniformSampler(RenoiseSampler):
    r"""
    Random tokens in place of noise, as in D3PM: all free places start as random tokens, and of every prediction as
    many stay as belong to the next timestep. Given tokens stay from the start.

    Args:
        alpha_bar (`torch.Tensor` of shape `(T + 1,)`): The chance that a token stays, at t = 0 ... T.
        num_categories (`int`): K.
        confidence_threshold: As in [`RenoiseSampler`].
    """

    def __init__(self, alpha_bar: Tensor, num_categories: int, confidence_threshold: float | None = None):
        super().__init__(len(alpha_bar) - 1, confidence_threshold)
        self.alpha_bar, self.num_categories = alpha_bar, num_categories

    def start(self, known: KnownTokens, noise: Tensor | None) -> NoisyTokens:
        """The state at t = T. Of `noise`, (rows, N, 2), the random tokens are made."""
        return self._with_random_tokens(RenoiseSampler.start(self, known, noise))

    def step(
        self, state: NoisyTokens, prediction: Prediction, next_timestep: Tensor, noise: Tensor | None
    ) -> NoisyTokens:
        """The state at `next_timestep`, int64 of shape ()."""
        return self._with_random_tokens(RenoiseSampler.step(self, state, prediction, next_timestep, noise))

    def _with_random_tokens(self, state: NoisyTokens) -> NoisyTokens:
        uniform = torch.special.ndtr(state.noise)  # of standard normal numbers, those in (0, 1)
        alpha_bar = self.alpha_bar[state.timesteps]
        tokens = replace_by_random_tokens(state.tokens, uniform, alpha_bar, self.num_categories)
        tokens = torch.where(state.is_given, state.tokens, tokens)
        return NoisyTokens(tokens, state.timesteps, None, state.is_given, state.is_final)


Sampler = RenoiseSampler | ConfidenceSampler | UnmaskingSampler


def most_confident(log_probs: Tensor, share: Tensor, state: NoisyTokens, beyond_end: Tensor) -> Tensor:
    r"""
    The places of a sequence that are settled first.

    Args:
        log_probs (`torch.Tensor` of shape `(rows, N)`): Of the predicted tokens.
        share (`torch.Tensor`): Share of the free places to settle, one number in float64 or one for each row.
        state ([`NoisyTokens`]): The state. Places that were given are not free; final ones come first.
        beyond_end (`torch.BoolTensor` of shape `(rows, N)`):
            Places that hold padding by the prediction. The same share of them is settled as of the others: padding is
            easy, and if it came first all words would be left to the last steps, several at once
            (docs/decisions.md, 13).

    Returns:
        `torch.BoolTensor` of shape `(rows, N)`: the given places and `share` of the others, those with the highest
        log-probabilities.
    """
    log_probs = log_probs.masked_fill(state.is_final, float("inf"))
    settled = state.is_given
    for group in (~state.is_given & beyond_end, ~state.is_given & ~beyond_end):
        rank = log_probs.masked_fill(~group, float("-inf")).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        quota = (share * group.sum(dim=1, keepdim=True).double()).round()
        settled = settled | (group & (rank < quota))
    return settled


def settle_sure(
    prediction: Prediction, threshold: float, state: NoisyTokens, end_token_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    r"""
    Adaptive steps: settles for good the sure words, padding in the same share, and all that follows a settled end.

    Args:
        prediction ([`Prediction`]): The prediction.
        threshold (`float`): The probability of a sure word.
        state ([`NoisyTokens`]): The state that was predicted from.
        end_token_ids (`Sequence[int]`):
            Tokens behind which a sequence is padding: its end, and padding itself. Or none.

    Returns:
        `tuple`: the tokens, with padding behind a settled end, and the settled places, both of shape `(rows, N)`.
            (Settled padding does not count as an end: words may still be put behind it.)
    """
    tokens = prediction.tokens
    beyond_end = follows_end(tokens, end_token_ids)
    share = share_of_sure(prediction.log_probs, threshold, state, beyond_end)
    is_final = state.is_final | most_confident(prediction.log_probs, share, state, beyond_end)
    if end_token_ids:
        is_behind = follows_end(tokens, end_token_ids[:1], among=is_final)
        tokens = tokens.masked_fill(is_behind & ~state.is_given, end_token_ids[-1])
        is_final = is_final | is_behind
    return tokens, is_final


def share_of_sure(log_probs: Tensor, threshold: float, state: NoisyTokens, beyond_end: Tensor) -> Tensor:
    r"""
    The share of a sequence's free words that are final or sure: at least as probable as `threshold`, and the likeliest
    of those that are not final. Padding has no say: it is sure at once, and would end a sequence before its words are.

    Args:
        log_probs, state, beyond_end: As in [`most_confident`].
        threshold (`float`): A probability.

    Returns:
        `torch.Tensor` of shape `(rows, 1)`, float64: 1 where no word is open.
    """
    is_word = ~state.is_given & ~beyond_end
    is_open = is_word & ~state.is_final
    log_probs = log_probs.masked_fill(~is_open, float("-inf"))
    least = log_probs.amax(dim=1, keepdim=True).clamp(max=math.log(threshold))
    is_unsure = is_open & (log_probs < least)
    return 1 - is_unsure.sum(1, keepdim=True).double() / is_word.sum(1, keepdim=True).clamp(min=1)


def follows_end(tokens: Tensor, end_token_ids: Sequence[int], among: Tensor | None = None) -> Tensor:
    """Whether one of the end tokens stands before a place, bool of the shape (rows, N) of `tokens`. `among`, of the
    same shape, says which tokens count."""
    is_end = torch.zeros_like(tokens, dtype=torch.bool)
    for token in end_token_ids:
        is_end = is_end | (tokens == token)
    if among is not None:
        is_end = is_end & among
    return is_end.cumsum(1) - is_end.long() > 0


__all__ = [
    "ConfidenceSampler",
    "KnownTokens",
    "NoisyTokens",
    "Prediction",
    "RenoiseSampler",
    "Sampler",
    "UniformSampler",
    "UnmaskingSampler",
    "follows_end",
    "inference_timesteps",
    "most_confident",
    "settle_sure",
    "settled_timestep",
    "share_of_sure",
]
