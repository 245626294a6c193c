# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The mathematics of TDD and of its rival MDD: schedules, corruptions, guidance. Tensors only, no network.

Symbols: K categories, T timesteps, d the denoiser's width, N tokens, W the (K, d) projection that the denoiser applies
to a noisy one-hot vector, lambda the one-hot scale.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .configuration_tdd import GUIDANCE_SCHEDULES, NOISE_SCHEDULES, SAMPLING_STRATEGIES, check_choice, check_range


# Where tokens have timesteps of their own: the highest of a visible token in training, and that to which the sampler
# re-noises a token that it has settled on or that was given, as shares of T (docs/decisions.md, 12 to 14).
HIGHEST_VISIBLE_TIMESTEP = 0.8
SETTLED_TIMESTEP = 0.02


# ---- Schedules


def argmax_accuracy(signal: Tensor, num_categories: int) -> Tensor:
    r"""
    The chance that the argmax of a noisy one-hot vector is its token: `E_z[Phi(a + z)^(K - 1)]`, `z ~ N(0, 1)`.

    Args:
        signal (`torch.Tensor`):
            Signal-to-noise amplitudes `a = lambda sqrt(alpha_bar / (1 - alpha_bar))`, of any shape, non-negative.
        num_categories (`int`):
            K.

    Returns:
        `torch.Tensor`: float64 probabilities of `signal`'s shape, from 1 / K at `a = 0` to 1.
    """
    z = torch.linspace(-9.0, 9.0, 901, dtype=torch.float64, device=signal.device)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    log_others_below = (num_categories - 1) * torch.special.log_ndtr(signal.double()[..., None] + z)
    return torch.trapezoid(density * log_others_below.exp(), z)


def projected_signal(num_categories: int, width: int) -> float:
    r"""
    The share of a one-hot vector's signal-to-noise amplitude that a linear map to `width` dimensions keeps.

    With W of shape (K, d) the power that the best detector finds in `y_t W` is `a^2 W_k (W^T W)^-1 W_k^T` for token k:
    `a^2` times the leverage of row k, and the leverages of K rows sum to the rank of W, at most d. So whatever W is, a
    token keeps min(1, d / K) of it on average.
    """
    return math.sqrt(min(1.0, width / num_categories))


def _calibrated_alpha_bar(num_timesteps: int, num_categories: int, one_hot_scale: float) -> Tensor:
    """`alpha_bar` whose argmax accuracy falls in equal steps from 1 at t = 0 to 1 / K at t = T."""
    signal = torch.linspace(0.0, 16.0, 2001, dtype=torch.float64)
    accuracy = argmax_accuracy(signal, num_categories)
    progress = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
    wanted = 1 - (1 - 1 / num_categories) * progress
    # Linear interpolation of the inverse. `accuracy` rises strictly until it rounds to 1, beyond what is ever wanted.
    right = torch.searchsorted(accuracy, wanted).clamp(1, len(signal) - 1)
    left = right - 1
    share = ((wanted - accuracy[left]) / (accuracy[right] - accuracy[left])).clamp(0, 1)
    squared = ((signal[left] + share * (signal[right] - signal[left])) / one_hot_scale) ** 2
    return torch.cat([torch.ones(1, dtype=torch.float64), squared / (1 + squared)])


@cache
def alpha_bar_schedule(
    noise_schedule: str,
    num_timesteps: int,
    num_categories: int,
    corruption: str = "gaussian",
    one_hot_scale: float = 1.0,
) -> Tensor:
    r"""
    The schedule `alpha_bar_t` for t = 0 ... T (Section 3.1), falling from 1 at t = 0.

    For `corruption="gaussian"` it is the share of the signal's variance, and
    - `"linear"` is DDPM's, 1,000 betas from 1e-4 to 0.02, of which other T take the value at the same t / T;
    - `"cosine"` is that of improved DDPM, `cos^2`;
    - `"calibrated"` makes the chance that `argmax(y_t)` is the token fall evenly in t, from 1 to 1 / K. In K
      dimensions a one-hot vector drowns early: under `"cosine"` that chance is one half at t = 0.15 T for K = 30,522,
      so that most steps see noise alone. With `one_hot_scale` times [`projected_signal`] it is the chance of the
      best guess from the d-wide projection of `y_t`, all that a denoiser sees.
    - `"projected"` makes the token's share of the variance of its projection `y_t W` fall evenly in t, from 1 to 0. K
      independent noises meet in each of the d dimensions, so a schedule for y_t leaves its projection with up to K
      times the noise: what the best guess can still read, a small network cannot (docs/decisions.md, 14).

    For `corruption="mask"` it is the chance that a token is not masked: `1 - sin(pi t / 2T)` for `"cosine"`, as in
    MaskGIT, and else `1 - t / T`, since an unmasked token is always right.

    Args:
        noise_schedule (`str`):
            `"linear"`, `"cosine"`, `"calibrated"` or `"projected"`.
        num_timesteps (`int`):
            T, at least 1.
        num_categories (`int`):
            K; at least 2 for `"calibrated"` with Gaussian noise.
        corruption (`str`, *optional*, defaults to `"gaussian"`):
            `"gaussian"` or `"mask"`.
        one_hot_scale (`float`, *optional*, defaults to 1.0):
            Lambda; changes `"calibrated"` and `"projected"` alone.

    Returns:
        `torch.Tensor`: float32 of shape `(num_timesteps + 1,)`, on the CPU. Do not write to it: it is cached.

    Raises:
        `ValueError`: for an unknown schedule, T below 1, or a single category with `"calibrated"`.
    """
    check_choice("noise_schedule", noise_schedule, NOISE_SCHEDULES)
    check_range("num_timesteps", num_timesteps, 1)
    # Cached for all callers, whatever the first one's default device or inference mode.
    with torch.device("cpu"), torch.inference_mode(False):
        progress = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        if corruption == "mask":
            alpha_bar = 1 - torch.sin(0.5 * math.pi * progress) if noise_schedule == "cosine" else 1 - progress
        elif noise_schedule == "linear":
            log_steps = torch.log1p(-torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
            log_alpha_bar = torch.cat([torch.zeros(1, dtype=torch.float64), log_steps.cumsum(0)])
            position = 1000 * progress
            left = position.long().clamp(max=999)
            alpha_bar = torch.lerp(log_alpha_bar[left], log_alpha_bar[left + 1], position - left).exp()
        elif noise_schedule == "cosine":
            offset = 0.008
            angle = 0.5 * math.pi / (1 + offset)
            alpha_bar = (torch.cos((progress + offset) * angle) / math.cos(offset * angle)) ** 2
        elif noise_schedule == "projected":
            # The signal has the power lambda^2 ab |W_k|^2, and the noise (1 - ab) sum_k |W_k|^2: K times a row's
            ratio = num_categories / one_hot_scale**2 * (1 - progress) / progress.clamp(min=1e-12)
            alpha_bar = ratio / (1 + ratio)
        else:
            check_range("num_categories", num_categories, 2)
            alpha_bar = _calibrated_alpha_bar(num_timesteps, num_categories, one_hot_scale)
        return alpha_bar.clamp(0, 1).float()


def visibility(alpha_bar: Tensor, num_categories: int, one_hot_scale: float = 1.0) -> Tensor:
    r"""
    A token's share of the variance of its projection `y_t W`, from 1 at t = 0 to 0 where there is noise alone: how
    much of a noisy token a linear reader can believe. For the `"projected"` schedule it is 1 - t / T.

    Args:
        alpha_bar (`torch.Tensor`): The schedule, or some of it.
        num_categories (`int`): K.
        one_hot_scale (`float`, *optional*, defaults to 1.0): Lambda.

    Returns:
        `torch.Tensor`: of `alpha_bar`'s shape and dtype.
    """
    signal = one_hot_scale**2 * alpha_bar
    return signal / (signal + num_categories * (1 - alpha_bar))


def training_timesteps(batch_size: int, timesteps_per_image: int, num_timesteps: int, device: torch.device) -> Tensor:
    r"""
    Draws the K distinct timesteps of each image (Section 3.3), each uniform over 1 ... T.

    One random start and even spacing around the circle of timesteps (systematic sampling): every timestep is equally
    likely, as in the paper, and the K of an image never crowd together, which lowers the loss's variance.

    Returns:
        `torch.Tensor`: int64 of shape `(batch_size, timesteps_per_image)`.
    """
    start = torch.randint(num_timesteps, (batch_size, 1), device=device)
    spacing = torch.arange(timesteps_per_image, device=device) * num_timesteps // timesteps_per_image
    return (start + spacing) % num_timesteps + 1


def token_timesteps(timesteps: Tensor, num_tokens: int, num_timesteps: int) -> Tensor:
    r"""
    Gives the tokens of a sequence timesteps of their own, around the sequence's t: with chance t / T a token is at T,
    pure noise; else its timestep is uniform over 1 ... 0.8 T.

    Where all tokens share t, each can be read off its own noisy vector about as well as off its neighbours', and the
    loss is lowest for a network that reads just that. A token at T can only be learned from the image and from what
    is visible of the others, as in masked diffusion, and what is visible is noisy here, so that it can be doubted.

    Args:
        timesteps (`torch.LongTensor` of shape `(rows,)`): A timestep a sequence, 1 ... T.
        num_tokens (`int`): N.
        num_timesteps (`int`): T.

    Returns:
        `torch.LongTensor` of shape `(rows, num_tokens)`.
    """
    shape = (len(timesteps), num_tokens)
    is_hidden = torch.rand(shape, device=timesteps.device) * num_timesteps < timesteps[:, None]
    highest_visible = max(1, round(HIGHEST_VISIBLE_TIMESTEP * num_timesteps))
    visible = torch.randint(1, highest_visible + 1, shape, device=timesteps.device)
    return torch.where(is_hidden, num_timesteps, visible)


def with_mistakes(targets: Tensor, share: float) -> Tensor:
    r"""
    Sequences of which a share of the tokens is that of another sequence of the batch, at the same place.

    In the denoising loop a visible token is the network's own, and may be wrong. A network that has only seen right
    ones has no reason to doubt it.

    Args:
        targets (`torch.LongTensor` of shape `(rows, N)`): Clean tokens.
        share (`float`): The chance of a token to be exchanged, in [0, 1).

    Returns:
        `torch.LongTensor` of shape `(rows, N)`: what to corrupt in their place; `targets` remain what to predict.
    """
    others = targets[torch.randperm(len(targets), device=targets.device)]
    is_mistaken = torch.rand(targets.shape, device=targets.device) < share
    return torch.where(is_mistaken, others, targets)


def inference_timesteps(num_timesteps: int, num_inference_steps: int) -> list[int]:
    r"""
    The evenly spaced timesteps of a denoising loop: `num_inference_steps + 1` integers falling from T to 0.

    Raises:
        `ValueError`: if `num_inference_steps` is not in 1 ... T.
    """
    check_range("num_inference_steps", num_inference_steps, 1, num_timesteps)
    return [num_timesteps - step * num_timesteps // num_inference_steps for step in range(num_inference_steps + 1)]


# ---- Guidance and discretisation


def guidance_scale_at(guidance_schedule: str, guidance_scale: float, progress: float) -> float:
    r"""
    s(t) of Algorithm 1.

    Args:
        guidance_schedule (`str`):
            `"constant"`, or a `"linear"` or `"cosine"` rise from 1 to `guidance_scale`.
        guidance_scale (`float`):
            The final scale, at least 1.
        progress (`float`):
            0 at the first denoising step (t = T), 1 at t = 0.
    """
    check_choice("guidance_schedule", guidance_schedule, GUIDANCE_SCHEDULES)
    check_range("guidance_scale", guidance_scale, 1)
    if guidance_schedule == "linear":
        share = progress
    elif guidance_schedule == "cosine":
        share = 0.5 * (1 - math.cos(math.pi * progress))
    else:
        share = 1.0
    return 1 + (guidance_scale - 1) * share


def apply_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, equation 1: `uncond + scale * (cond - uncond)`."""
    return unconditional + scale * (conditional - unconditional)


def to_one(logits: Tensor, sampling_strategy: str = "argmax", uniform: Tensor | None = None) -> Tensor:
    r"""
    The "to one" operation of appendix A.2: from scores over K categories to one token.

    Args:
        logits (`torch.Tensor` of shape `(..., K)`):
            Unnormalised scores.
        sampling_strategy (`str`, *optional*, defaults to `"argmax"`):
            `"argmax"`, or `"multinomial"` for a draw from the softmax.
        uniform (`torch.Tensor` of shape `(...)`, *optional*):
            One number in [0, 1) a token, which decides the draw of `"multinomial"` through the inverse distribution
            function. An explicit number keeps a row's result apart from the other rows and from global state.

    Returns:
        `torch.Tensor`: int64 tokens of shape `(...)`.
    """
    check_choice("sampling_strategy", sampling_strategy, SAMPLING_STRATEGIES)
    if sampling_strategy == "argmax":
        return logits.argmax(-1)
    cumulative = logits.float().softmax(-1).cumsum(-1)
    # Scaled by the last entry, so that rounding never leaves a draw beyond the last category.
    return (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)


# ---- Corruptions: TDD's Gaussian noise and MDD's masks, one interface


class CorruptedTokens(NamedTuple):
    """What a corruption makes of clean tokens: the denoiser's input and each token's weight in the loss."""

    inputs_embeds: Tensor
    loss_weight: Tensor


def _per_token(values: Tensor, tokens: Tensor) -> Tensor:
    """Gives `values`, one a row or one a token, trailing axes until they broadcast over `tokens`."""
    return values.reshape(values.shape + (1,) * (tokens.ndim - values.ndim))


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The forward process of Section 3.2: `sqrt(alpha_bar) * clean + sqrt(1 - alpha_bar) * noise`.

    It serves both spaces: K-wide one-hot vectors with standard normal noise, and, the map being linear, their d-wide
    projections with projected noise.
    """
    return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise


def noise_factor(weight: Tensor) -> Tensor:
    r"""
    A matrix R with `R^T R = W^T W`: `z R` with standard normal `z` is distributed exactly as `epsilon W` with the
    K-wide noise `epsilon`, since both are Gaussian with mean zero and covariance `W^T W`.

    With more categories than dimensions R is the transposed Cholesky factor of `W^T W` (d x d), so that the noise
    costs O(d^2) a token and not O(K d). Otherwise R is W itself.

    Args:
        weight (`torch.Tensor` of shape `(K, d)`):
            W. Gradients flow through the factor, so the expected loss has the dense noise's gradient.

    Returns:
        `torch.Tensor`: R, float32 (float64 if `weight` is) of shape `(min(K, d), d)`.
    """
    num_categories, width = weight.shape
    weight = weight if weight.dtype == torch.float64 else weight.float()
    if num_categories <= width:
        return weight
    # Autocast would square W in half precision, where the product need not be positive definite.
    with torch.autocast(weight.device.type, enabled=False):
        # Half the gradient of W^T W, doubled: the factor's is symmetric, so both halves are one product of O(K d^2)
        half = weight.detach().T @ weight
        gram = 2 * half - half.detach()
        # What rounding can take from the smallest eigenvalue; it widens the noise by less than one part in 10^4.
        finfo = torch.finfo(gram.dtype)
        jitter = finfo.eps * gram.diagonal().sum() + finfo.tiny
        return torch.linalg.cholesky(gram + jitter * torch.eye(width, dtype=gram.dtype, device=gram.device)).T


def most_confident(
    scores: Tensor, share: float, fixed_mask: Tensor | None = None, beyond_end: Tensor | None = None
) -> Tensor:
    r"""
    The places of a sequence that are settled first.

    Args:
        scores (`torch.Tensor` of shape `(rows, N)`): Log-probabilities of predicted tokens; infinite where settled.
        share (`float`): Share of the free places to settle.
        fixed_mask (`torch.BoolTensor` of shape `(rows, N)`, *optional*): Places that were given, and are not free.
        beyond_end (`torch.BoolTensor` of shape `(rows, N)`, *optional*):
            Places that hold padding by the prediction. The same share of them is settled as of the others: padding is
            easy, and if it came first all words would be left to the last steps, several at once.

    Returns:
        `torch.BoolTensor` of shape `(rows, N)`: the fixed places and `share` of the others, those of highest score.
    """
    is_free = torch.ones_like(scores, dtype=torch.bool) if fixed_mask is None else ~fixed_mask
    groups = [is_free] if beyond_end is None else [is_free & beyond_end, is_free & ~beyond_end]
    settled = ~is_free
    for group in groups:
        rank = scores.masked_fill(~group, float("-inf")).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        quota = (share * group.sum(dim=1, keepdim=True).double()).round()
        settled = settled | (group & (rank < quota))
    return settled


class GaussianCorruption:
    r"""
    TDD: Gaussian noise on one-hot vectors (Section 3.2), kept in the d-wide space that the denoiser reads.

    A state is `y_t W`. It is equal in distribution to adding K-wide noise to the one-hot vector and projecting, and
    `dense=True` does precisely that: the reference in tests, and what regression on the K-wide noise needs. Then a
    state is the K-wide `y_t`.

    Args:
        weight (`torch.Tensor` of shape `(K, d)`):
            W.
        alpha_bar (`torch.Tensor` of shape `(T + 1,)`):
            The schedule.
        one_hot_scale (`float`, *optional*, defaults to 1.0):
            Lambda of lambda-hot labels.
        loss_weighting (`str`, *optional*, defaults to `"alpha_bar"`):
            `"alpha_bar"` or `"none"`.
        dense (`bool`, *optional*, defaults to `False`):
            Whether states are K wide.
        factor (`torch.Tensor` of shape `(min(K, d), d)`, *optional*):
            `noise_factor(weight)`, where the caller has it.
    """

    def __init__(
        self,
        weight: Tensor,
        alpha_bar: Tensor,
        one_hot_scale: float = 1.0,
        loss_weighting: str = "alpha_bar",
        dense: bool = False,
        factor: Tensor | None = None,
    ):
        self.weight = weight
        self.alpha_bar = alpha_bar
        self.one_hot_scale = one_hot_scale
        self.loss_weighting = loss_weighting
        self.dense = dense
        self._factor = None if dense else noise_factor(weight) if factor is None else factor
        self.noise_width = weight.shape[0] if dense else self._factor.shape[0]

    def draw_noise(self, rows: int, length: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal noise of shape `(rows, length, noise_width)` on the weight's device.

        With a generator it is drawn on the generator's device: a CPU generator serves a model on any device.
        """
        device = self.weight.device if generator is None else generator.device
        return torch.randn(rows, length, self.noise_width, generator=generator, device=device).to(self.weight.device)

    def clean(self, targets: Tensor) -> Tensor:
        """`lambda y_0` as a state. `targets`: int64 tokens (..., N), or float probabilities (..., N, K)."""
        if targets.is_floating_point():
            state = targets if self.dense else targets.to(self.weight.dtype) @ self.weight
        elif self.dense:
            state = torch.nn.functional.one_hot(targets, self.weight.shape[0]).to(self.weight.dtype)
        else:
            state = torch.nn.functional.embedding(targets, self.weight)
        return self.one_hot_scale * state

    def state_at(self, targets: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """`y_t` as a state, from tokens or probabilities, int64 timesteps of shape (rows,) or (rows, N), and noise."""
        clean = self.clean(targets)
        alpha_bar = _per_token(self.alpha_bar[timesteps], clean)
        state_noise = noise if self.dense else noise.to(self._factor.dtype) @ self._factor
        return add_noise(clean.float(), state_noise.float(), alpha_bar)

    def embed(self, state: Tensor) -> Tensor:
        """`y_t W`, shape (rows, N, d): what the denoiser reads."""
        return (state.to(self.weight.dtype) @ self.weight) if self.dense else state.to(self.weight.dtype)

    def weigh(self, timesteps: Tensor) -> Tensor:
        """The timestep-conditioned coefficient of the loss, of the timesteps' shape."""
        alpha_bar = self.alpha_bar[timesteps]
        return alpha_bar if self.loss_weighting == "alpha_bar" else torch.ones_like(alpha_bar)

    def corrupt(self, targets: Tensor, timesteps: Tensor, noise: Tensor) -> CorruptedTokens:
        """The denoiser's input and loss weights for clean targets of shape (rows, N) or (rows, N, K)."""
        inputs_embeds = self.embed(self.state_at(targets, timesteps, noise))
        return CorruptedTokens(inputs_embeds, _per_token(self.weigh(timesteps), inputs_embeds[..., 0]))

    def start(self, noise: Tensor, fixed_tokens: Tensor | None = None, fixed_mask: Tensor | None = None) -> Tensor:
        """The state at t = T that a denoising loop starts from: pure noise. Fixed tokens appear as t falls."""
        return noise if self.dense else noise.to(self._factor.dtype) @ self._factor

    def accept(self, state: Tensor, tokens: Tensor) -> Tensor:
        """The tokens that a prediction settles on: all of them, for any may still be revised."""
        return tokens

    def token_timesteps(
        self,
        sampler: str,
        scores: Tensor,
        next_timestep: int,
        fixed_mask: Tensor | None = None,
        beyond_end: Tensor | None = None,
    ) -> Tensor | None:
        r"""
        Timesteps of shape (rows, N) to re-noise to, or `None` where all tokens share `next_timestep`.

        `"renoise"` is the paper's loop. `"confidence"` is for networks trained with a timestep of each token's own:
        what the network is surest of has lost most of its noise, the rest is noise alone, and both may be revised.
        """
        if sampler == "renoise":
            return None
        num_timesteps = len(self.alpha_bar) - 1
        settled = most_confident(scores, 1 - next_timestep / num_timesteps, fixed_mask, beyond_end)
        return torch.where(settled, max(1, round(SETTLED_TIMESTEP * num_timesteps)), num_timesteps)

    def step(
        self,
        state: Tensor,
        tokens: Tensor,
        scores: Tensor,
        next_timestep: int | Tensor,
        noise: Tensor,
        fixed_mask: Tensor | None = None,
        beyond_end: Tensor | None = None,
    ) -> Tensor:
        """Re-noises the predicted tokens to `next_timestep` (Section 3.2, inference), one for all or, of shape
        (rows, N), one for each; the old state is forgotten."""
        if isinstance(next_timestep, int):
            next_timestep = torch.full((len(tokens),), next_timestep, device=tokens.device)
        return self.state_at(tokens, next_timestep, noise)


class MaskCorruption:
    r"""
    MDD: tokens are replaced by a mask, and unmasked in the order of confidence. The interface is that of
    [`GaussianCorruption`]; a state holds int64 tokens of shape (rows, N), with K in the place of a mask.

    Args:
        weight (`torch.Tensor` of shape `(K, d)`):
            Embeddings of the tokens.
        mask_embedding (`torch.Tensor` of shape `(d,)`):
            What the denoiser reads in a masked place.
        alpha_bar (`torch.Tensor` of shape `(T + 1,)`):
            The chance that a token is not masked.
        loss_weighting (`str`, *optional*, defaults to `"none"`):
            `"alpha_bar"` or `"none"`. The loss counts masked places only, whatever the weighting.
    """

    noise_width = 1

    def __init__(self, weight: Tensor, mask_embedding: Tensor, alpha_bar: Tensor, loss_weighting: str = "none"):
        self.weight = weight
        self.mask_embedding = mask_embedding
        self.alpha_bar = alpha_bar
        self.loss_weighting = loss_weighting
        self.mask_token = weight.shape[0]

    def draw_noise(self, rows: int, length: int, generator: torch.Generator | None = None) -> Tensor:
        """Uniform noise in [0, 1) of shape `(rows, length, 1)`; see [`GaussianCorruption.draw_noise`]."""
        device = self.weight.device if generator is None else generator.device
        return torch.rand(rows, length, 1, generator=generator, device=device).to(self.weight.device)

    def embed(self, state: Tensor) -> Tensor:
        """Embeddings of shape (rows, N, d): what the denoiser reads."""
        is_mask = (state == self.mask_token)[..., None]
        embeds = torch.nn.functional.embedding(state.clamp(max=self.mask_token - 1), self.weight)
        return torch.where(is_mask, self.mask_embedding.to(embeds.dtype), embeds)

    def corrupt(self, targets: Tensor, timesteps: Tensor, noise: Tensor) -> CorruptedTokens:
        """The denoiser's input and loss weights (zero for visible tokens) for int64 targets of shape (rows, N)."""
        alpha_bar = _per_token(self.alpha_bar[timesteps], targets)
        is_mask = noise[..., 0] >= alpha_bar
        state = targets.masked_fill(is_mask, self.mask_token)
        coefficient = alpha_bar if self.loss_weighting == "alpha_bar" else torch.ones_like(alpha_bar)
        return CorruptedTokens(self.embed(state), coefficient * is_mask)

    def start(self, noise: Tensor, fixed_tokens: Tensor | None = None, fixed_mask: Tensor | None = None) -> Tensor:
        """The state at t = T that a denoising loop starts from: all masks, but for fixed tokens."""
        masks = torch.full(noise.shape[:2], self.mask_token, device=noise.device)
        return masks if fixed_mask is None else torch.where(fixed_mask, fixed_tokens, masks)

    def accept(self, state: Tensor, tokens: Tensor) -> Tensor:
        """The tokens that a prediction settles on: what is visible stays."""
        return torch.where(state == self.mask_token, tokens, state)

    def token_timesteps(
        self,
        sampler: str,
        scores: Tensor,
        next_timestep: int,
        fixed_mask: Tensor | None = None,
        beyond_end: Tensor | None = None,
    ) -> None:
        """Whatever the sampler, all tokens share a timestep: `step` settles them in the order of confidence."""

    def step(
        self,
        state: Tensor,
        tokens: Tensor,
        scores: Tensor,
        next_timestep: int,
        noise: Tensor,
        fixed_mask: Tensor | None = None,
        beyond_end: Tensor | None = None,
    ) -> Tensor:
        """Unmasks the most confident predictions until `alpha_bar` of the row's free places are visible.

        Args:
            state (`torch.Tensor` of shape `(rows, N)`): The state before; visible tokens stay as they are.
            tokens (`torch.Tensor` of shape `(rows, N)`): Predicted tokens.
            scores (`torch.Tensor` of shape `(rows, N)`): Their log-probabilities, the confidence.
            next_timestep (`int`): The timestep to step to.
            noise (`torch.Tensor`): Not used: the order is the confidence's alone.
            fixed_mask (`torch.BoolTensor` of shape `(rows, N)`, *optional*): Places that were never masked.
            beyond_end (`torch.BoolTensor` of shape `(rows, N)`, *optional*): As in [`most_confident`].
        """
        is_mask = state == self.mask_token
        confidence = scores.masked_fill(~is_mask, float("inf"))  # what is visible ranks first
        settled = most_confident(confidence, self.alpha_bar[next_timestep].item(), fixed_mask, beyond_end)
        return torch.where(is_mask & settled, tokens, state)


# ---- The loop


class DenoisingStep(NamedTuple):
    """One step of a denoising loop: its timestep, the indices of the rows that it denoised, their scores of shape
    (rows, N, K), and the tokens (rows, N) that the scores gave."""

    timestep: int
    rows: Tensor
    logits: Tensor
    tokens: Tensor


class TokenChoice(NamedTuple):
    """From the scores of a step to its tokens: the "to one" operation, but what is settled or fixed stays."""

    corruption: GaussianCorruption | MaskCorruption
    state: Tensor
    sampling_strategy: str
    uniform: Tensor | None
    fixed_tokens: Tensor | None
    fixed_mask: Tensor | None

    def __call__(self, logits: Tensor, places: int | slice = slice(None)) -> Tensor:
        """Tokens of shape (rows,) of one place from scores (rows, K), or of all, (rows, N) from (rows, N, K)."""
        uniform = None if self.uniform is None else self.uniform[:, places]
        tokens = to_one(logits, self.sampling_strategy, uniform)
        tokens = self.corruption.accept(self.state[:, places], tokens)
        if self.fixed_mask is None:
            return tokens
        return torch.where(self.fixed_mask[:, places], self.fixed_tokens[:, places], tokens)


class Predictor(Protocol):
    """What the loop asks of a network."""

    def __call__(self, state: Tensor, timestep: int, token_timesteps: Tensor | None = None) -> Tensor:
        """Scores of shape (rows, N, K) from a state of the corruption and its timestep, or its tokens' (rows, N)."""

    def select(self, keep: Tensor) -> None:
        """From now on only the rows of the boolean mask `keep` are denoised."""


def denoise(
    predict: Predictor,
    corruption: GaussianCorruption | MaskCorruption,
    *,
    rows: int,
    num_tokens: int,
    num_inference_steps: int,
    sampling_strategy: str,
    generator: torch.Generator,
    num_noise_samples: int = 1,
    sampler: str = "renoise",
    process_logits: Callable[[Tensor, Tensor, TokenChoice], Tensor] | None = None,
    fixed_tokens: Tensor | None = None,
    fixed_mask: Tensor | None = None,
    follows_end: Callable[[Tensor], Tensor] | None = None,
    stability_threshold: int | None = None,
) -> Iterator[DenoisingStep]:
    r"""
    The inference loop of Section 3.2, a step at a time.

    Args:
        predict ([`Predictor`]):
            From a state and its timestep to scores of shape `(rows, N, K)`.
        corruption ([`GaussianCorruption`] or [`MaskCorruption`]):
            The process to reverse.
        rows (`int`):
            Batch size times `num_noise_samples`; an image's samples are neighbours.
        num_tokens (`int`):
            N.
        num_inference_steps (`int`):
            Number of steps, each one call of `predict`.
        sampling_strategy (`str`):
            `"argmax"` or `"multinomial"`, see [`to_one`].
        generator (`torch.Generator`):
            Source of all noise. Every image gets the same noise: its result is the same alone and in a batch.
        num_noise_samples (`int`, *optional*, defaults to 1):
            Different draws of the noise an image.
        sampler (`str`, *optional*, defaults to `"renoise"`):
            How a state follows from a prediction, see [`GaussianCorruption.token_timesteps`].
        process_logits (`Callable`, *optional*):
            From the scores, the indices of the rows, and what makes tokens of scores, to other scores of the same
            shape.
        fixed_tokens (`torch.LongTensor` of shape `(rows, N)`, *optional*):
            Tokens that stay as they are where `fixed_mask` is true: infilling.
        fixed_mask (`torch.BoolTensor` of shape `(rows, N)`, *optional*):
            Where `fixed_tokens` holds.
        follows_end (`Callable`, *optional*):
            From tokens to a mask of the places behind a sequence's end, see `beyond_end` of [`most_confident`].
        stability_threshold (`int`, *optional*):
            A row whose tokens have not changed for so many steps is finished and leaves the loop.

    Yields:
        [`DenoisingStep`]: after each prediction.

    Raises:
        `ValueError`: if `num_inference_steps` is not in 1 ... T, or for an unknown `sampling_strategy`.
    """
    timesteps = inference_timesteps(len(corruption.alpha_bar) - 1, num_inference_steps)
    check_choice("sampling_strategy", sampling_strategy, SAMPLING_STRATEGIES)
    # 1. Pure noise; each image has the same, which is why its row's number is all that must be known of it
    noise = corruption.draw_noise(num_noise_samples, num_tokens, generator)
    active = torch.arange(rows, device=noise.device)
    noise = noise[active % num_noise_samples]
    levels = corruption.token_timesteps(sampler, torch.zeros_like(noise[..., 0]), timesteps[0], fixed_mask)
    if levels is None or fixed_mask is None:
        state = corruption.start(noise, fixed_tokens, fixed_mask)
    else:
        state = corruption.step(noise, fixed_tokens, noise[..., 0], levels, noise)
    tokens, unchanged = None, torch.zeros_like(active)
    for timestep, next_timestep in zip(timesteps, timesteps[1:]):
        # 2. Predict clean tokens
        logits = predict(state, timestep, levels)
        # 3. Back to the one-hot vectors
        uniform = None
        if sampling_strategy == "multinomial":
            uniform = torch.rand(num_noise_samples, num_tokens, generator=generator, device=generator.device)
            uniform = uniform.to(logits.device)[active % num_noise_samples]
        choose = TokenChoice(corruption, state, sampling_strategy, uniform, fixed_tokens, fixed_mask)
        if process_logits is not None:
            logits = process_logits(logits, active, choose)
        previous, tokens = tokens, choose(logits)
        yield DenoisingStep(timestep, active, logits, tokens)
        if next_timestep == 0:
            return
        # 4. Rows that have settled leave the batch
        noise = corruption.draw_noise(num_noise_samples, num_tokens, generator)
        if stability_threshold is not None and previous is not None:
            unchanged = torch.where((tokens == previous).all(-1), unchanged + 1, 0)
            keep = unchanged < stability_threshold
            if not keep.any():
                return
            if not keep.all():
                predict.select(keep)
                active, state, logits, tokens, unchanged = (
                    kept[keep] for kept in (active, state, logits, tokens, unchanged)
                )
                if fixed_mask is not None:
                    fixed_tokens, fixed_mask = fixed_tokens[keep], fixed_mask[keep]
        # 5. Re-noise, less than before
        scores = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        beyond_end = None if follows_end is None else follows_end(tokens)
        levels = corruption.token_timesteps(sampler, scores, next_timestep, fixed_mask, beyond_end)
        next_levels = next_timestep if levels is None else levels
        noise = noise[active % num_noise_samples]
        state = corruption.step(state, tokens, scores, next_levels, noise, fixed_mask, beyond_end)


__all__ = [
    "DenoisingStep",
    "GaussianCorruption",
    "MaskCorruption",
    "Predictor",
    "TokenChoice",
    "alpha_bar_schedule",
    "apply_guidance",
    "argmax_accuracy",
    "denoise",
    "guidance_scale_at",
    "inference_timesteps",
    "most_confident",
    "noise_factor",
    "projected_signal",
    "token_timesteps",
    "to_one",
    "training_timesteps",
    "visibility",
    "with_mistakes",
]
