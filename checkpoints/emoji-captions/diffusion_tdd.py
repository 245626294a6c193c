# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The diffusion process of TDD: noise schedules, and Gaussian noise on one-hot vectors. Tensors only, no network.

Notation, here and in `loss_tdd.py`, `samplers_tdd.py`, `sampling_tdd.py` and `modeling_tdd.py`:

| symbol          | variable              | meaning                                            | paper       |
| --------------- | --------------------- | -------------------------------------------------- | ----------- |
| K               | `num_categories`      | categories of a token: labels, or the vocabulary   | Section 3.2 |
| N               | `num_tokens`          | tokens that are diffused together                  | Section 3.4 |
| T               | `num_timesteps`       | number of timesteps                                | Section 3.2 |
| t               | `timesteps`           | timestep, from 0 (clean) to T (pure noise)         | Section 3.2 |
| y_0             | `targets`, `tokens`   | clean tokens: int64 ids, or probabilities over K   | Section 3.2 |
| epsilon         | `noise`               | standard normal numbers                            | Section 3.2 |
| alpha_bar_t     | `alpha_bar`           | the signal's share of the variance of y_t          | Section 3.1 |
| sigma_t         | `sigma`               | sqrt(1 - alpha_bar_t), the noise's deviation       | Section 3.2 |
| lambda          | `one_hot_scale`       | height of the one in a lambda-hot label            | Section 3.2 |
| W               | `token_embedding`     | the (K, d) matrix that the denoiser reads y_t with | ours        |
| d               | `hidden_size`         | width of the denoiser                              | ours        |
| c               | `prefix`              | the condition: the image's features                | Section 3.3 |
| f(y_t, t, c)    | `logits`              | unnormalised log-probabilities of y_0              | Section 3.2 |
| log p(y_0)      | `log_probs`           | normalised log-probabilities of y_0                | Section 3.2 |
| s(t)            | `guidance_scales`     | scale of the classifier-free guidance              | Algorithm 1 |
| K of the K-fold | `timesteps_per_image` | noisy labels for each encoded image                | Section 3.3 |
"""

import math
from functools import cache

import torch
from torch import Tensor

from .configuration_tdd import TDDConfig
from .settings_tdd import check, integer


# ---- Noise schedules


def argmax_accuracy(signal_to_noise: Tensor, num_categories: int) -> Tensor:
    r"""
    The chance that the argmax of a noisy one-hot vector is its token: `E_z[Phi(a + z)^(K - 1)]`, `z ~ N(0, 1)`.

    Args:
        signal_to_noise (`torch.Tensor`):
            Amplitudes `a = lambda sqrt(alpha_bar / (1 - alpha_bar))`, of any shape, non-negative.
        num_categories (`int`):
            K.

    Returns:
        `torch.Tensor`: float64 probabilities of the same shape, from 1 / K at `a = 0` to 1.
    """
    z = torch.linspace(-9.0, 9.0, 901, dtype=torch.float64, device=signal_to_noise.device)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    log_others_below = (num_categories - 1) * torch.special.log_ndtr(signal_to_noise.double()[..., None] + z)
    return torch.trapezoid(density * log_others_below.exp(), z)


def projected_signal(num_categories: int, hidden_size: int) -> float:
    """The share sqrt(min(1, d / K)) of a one-hot vector's signal-to-noise amplitude that a linear map to d dimensions
    keeps, on average over the categories and whatever the map is (docs/decisions.md, 10)."""
    return math.sqrt(min(1.0, hidden_size / num_categories))


def _linear_ratio(progress: Tensor) -> Tensor:
    """DDPM's 1,000 betas from 1e-4 to 0.02; another number of timesteps takes the value at the same t / T."""
    log_steps = torch.log1p(-torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    log_alpha_bar = torch.cat([torch.zeros(1, dtype=torch.float64), log_steps.cumsum(0)])
    position = 1000 * progress
    left = position.long().clamp(max=999)
    log_alpha_bar = torch.lerp(log_alpha_bar[left], log_alpha_bar[left + 1], position - left)
    return log_alpha_bar.exp() / -torch.expm1(log_alpha_bar)


def _cosine_ratio(progress: Tensor) -> Tensor:
    """Improved DDPM's `alpha_bar = cos^2((t / T + 0.008) / 1.008 pi / 2)`, divided by its value at t = 0."""
    offset = 0.008
    angle = 0.5 * math.pi * (progress + offset) / (1 + offset)
    first = 0.5 * math.pi * offset / (1 + offset)
    # 1 - cos^2(angle) / cos^2(first) without cancellation
    complement = torch.sin(angle + first) * torch.sin(angle - first)
    return angle.cos() ** 2 / complement


def _calibrated_ratio(progress: Tensor, num_categories: int, amplitude_scale: float) -> Tensor:
    """The signal-to-noise ratio at which the argmax accuracy is 1 - (1 - 1 / K) t / T."""
    amplitude = torch.linspace(0.0, 16.0, 2001, dtype=torch.float64)
    accuracy = argmax_accuracy(amplitude, num_categories)
    wanted = 1 - (1 - 1 / num_categories) * progress
    # Linear interpolation of the inverse. `accuracy` rises strictly until it rounds to 1, beyond what is ever wanted.
    right = torch.searchsorted(accuracy, wanted).clamp(1, len(amplitude) - 1)
    left = right - 1
    share = ((wanted - accuracy[left]) / (accuracy[right] - accuracy[left])).clamp(0, 1)
    return ((amplitude[left] + share * (amplitude[right] - amplitude[left])) / amplitude_scale) ** 2


def gaussian_schedule(
    noise_schedule: str, num_timesteps: int, num_categories: int, hidden_size: int, one_hot_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""
    `alpha_bar_t` (Section 3.1) and `1 - alpha_bar_t` for t = 0 ... T. The paper names no schedule; all are ours.

    - `"linear"` is DDPM's.
    - `"cosine"` is that of improved DDPM; the paper's figures fit it.
    - `"calibrated"` makes the chance that the best guess from `y_t W` is right fall evenly in t, from 1 to 1 / K.
    - `"projected"` makes the token's share of the variance of `y_t W` fall evenly in t, from 1 to 0.

    `docs/design.md` derives the last two. Whatever the schedule, y_T is pure noise, since the loop starts from it.

    Args:
        noise_schedule (`str`): The name.
        num_timesteps (`int`): T, at least 1.
        num_categories (`int`): K, at least 2.
        hidden_size (`int`): d, the width of `y_t W`.
        one_hot_scale (`float`, *optional*, defaults to 1.0): Lambda.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: float64 on the CPU, each of shape `(T + 1,)`. With many categories
        `1 - alpha_bar` near t = 0 is below what float32 or a subtraction can resolve, so it is computed by itself.

    Raises:
        `ValueError`: for an unknown schedule, T below 1, or K below 2.
    """
    check("noise_schedule", noise_schedule)
    check("num_timesteps", num_timesteps)
    check("num_categories", num_categories, integer(2))
    progress = torch.arange(1, num_timesteps, dtype=torch.float64) / num_timesteps
    if noise_schedule == "linear":
        ratio = _linear_ratio(progress)
    elif noise_schedule == "cosine":
        ratio = _cosine_ratio(progress)
    elif noise_schedule == "calibrated":
        amplitude_scale = one_hot_scale * projected_signal(num_categories, hidden_size)
        ratio = _calibrated_ratio(progress, num_categories, amplitude_scale)
    else:
        # The signal of y_t W has the variance lambda^2 alpha_bar |W_k|^2, the noise (1 - alpha_bar) sum_k |W_k|^2
        ratio = num_categories / one_hot_scale**2 * (1 - progress) / progress
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return torch.cat([one, ratio / (1 + ratio), zero]), torch.cat([zero, 1 / (1 + ratio), one])


def mask_schedule(noise_schedule: str, num_timesteps: int) -> Tensor:
    """MDD: the chance that a token is not masked, for t = 0 ... T, float64: `1 - sin(pi t / 2T)` for `"cosine"`, as in
    MaskGIT, and otherwise `1 - t / T`, since an unmasked token is always right."""
    check("noise_schedule", noise_schedule)
    progress = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    return 1 - torch.sin(0.5 * math.pi * progress) if noise_schedule == "cosine" else 1 - progress


class NoiseSchedule:
    r"""
    What a timestep means, for t = 0 ... T: float32 tensors of shape `(T + 1,)`, all on one device.

    Attributes:
        alpha_bar: The share of the signal's variance. With masks or random tokens, the chance that a token is visible.
        signal: `lambda sqrt(alpha_bar)`, the factor of the one-hot vector in y_t.
        sigma: `sqrt(1 - alpha_bar)`, the factor of the noise in y_t.
        visibility: The token's share of the variance of `y_t W`, from 1 at t = 0 to 0 at t = T: how much of a noisy
            token a linear reader can see. For the `"projected"` schedule it is 1 - t / T.
    """

    def __init__(self, alpha_bar: Tensor, signal: Tensor, sigma: Tensor, visibility: Tensor):
        self.alpha_bar, self.signal, self.sigma, self.visibility = alpha_bar, signal, sigma, visibility

    @classmethod
    def from_config(cls, config: TDDConfig) -> "NoiseSchedule":
        """The schedule of a configuration, on the CPU."""
        return _make_schedule(
            config.noise_schedule,
            config.num_timesteps,
            config.num_categories,
            config.hidden_size,
            config.corruption,
            config.one_hot_scale,
        )

    @property
    def num_timesteps(self) -> int:
        """`int`: T."""
        return len(self.alpha_bar) - 1

    def to(self, device: torch.device) -> "NoiseSchedule":
        """The schedule on a device: itself where it is there already."""
        if self.alpha_bar.device == device:
            return self
        tensors = (self.alpha_bar, self.signal, self.sigma, self.visibility)
        return NoiseSchedule(*(tensor.to(device) for tensor in tensors))


@cache
def _make_schedule(
    noise_schedule: str,
    num_timesteps: int,
    num_categories: int,
    hidden_size: int,
    corruption: str,
    one_hot_scale: float,
) -> NoiseSchedule:
    # Made once for all callers, whatever the first one's default device or inference mode
    with torch.device("cpu"), torch.inference_mode(False):
        if corruption != "gaussian":
            alpha_bar = mask_schedule(noise_schedule, num_timesteps)
            complement = 1 - alpha_bar
        else:
            alpha_bar, complement = gaussian_schedule(
                noise_schedule, num_timesteps, num_categories, hidden_size, one_hot_scale
            )
        signal_power = one_hot_scale**2 * alpha_bar
        visibility = signal_power / (signal_power + num_categories * complement)
        tensors = (alpha_bar, signal_power.sqrt(), complement.sqrt(), visibility)
        return NoiseSchedule(*(tensor.float() for tensor in tensors))


# ---- Gaussian noise on one-hot vectors


def noise_factor(weight: Tensor) -> Tensor:
    r"""
    A matrix R with `R^T R = W^T W`: `z R` with standard normal `z` is distributed exactly as `epsilon W` with the
    K-wide noise `epsilon`, since both are Gaussian with mean zero and covariance `W^T W`.

    With more categories than dimensions R is the transposed Cholesky factor of `W^T W` (d x d), so that the noise
    costs O(d^2) per token and not O(K d). Otherwise R is W itself.

    Args:
        weight (`torch.Tensor` of shape `(K, d)`):
            W. Gradients flow through the factor, so the expected loss has the gradient of the K-wide noise.

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
        # `cholesky` would make the host wait for the question whether it could. With NaN in the weights it has NaN
        return torch.linalg.cholesky_ex(gram + jitter * torch.eye(width, dtype=gram.dtype, device=gram.device)).L.T


def replace_by_random_tokens(tokens: Tensor, uniform: Tensor, alpha_bar: Tensor, num_categories: int) -> Tensor:
    r"""
    The forward process of D3PM with a uniform transition matrix: with chance `1 - alpha_bar` a token gives way to one
    of all K, each equally likely.

    Args:
        tokens (`torch.LongTensor` of shape `(rows, N)`): Clean tokens.
        uniform (`torch.Tensor` of shape `(rows, N, 2)`): Numbers in [0, 1).
        alpha_bar (`torch.Tensor` of shape `(rows, N)`): Of each token's timestep.
        num_categories (`int`): K.
    """
    random_tokens = (uniform[..., 1] * num_categories).long().clamp(max=num_categories - 1)
    return torch.where(uniform[..., 0] < alpha_bar, tokens, random_tokens)


def one_hot(tokens: Tensor, num_categories: int) -> Tensor:
    """y_0, float of shape (..., K), from int64 tokens (...), or from probabilities (..., K) as they are."""
    if tokens.is_floating_point():
        return tokens
    return torch.nn.functional.one_hot(tokens, num_categories).float()


def add_noise(clean: Tensor, noise: Tensor, schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    r"""
    The forward process of Section 3.2: `y_t = lambda sqrt(alpha_bar_t) y_0 + sqrt(1 - alpha_bar_t) epsilon`.

    It serves both spaces: K-wide one-hot vectors with standard normal noise and, the map W being linear, their d-wide
    projections with projected noise.

    Args:
        clean, noise (`torch.Tensor` of shape `(rows, N, width)`): `y_0` or `y_0 W`, and `epsilon` or `epsilon W`.
        schedule ([`NoiseSchedule`]): On the same device.
        timesteps (`torch.LongTensor` of shape `(rows, N)`): Timesteps, 0 ... T.

    Returns:
        `torch.Tensor`: float32 of shape `(rows, N, width)`.
    """
    return schedule.signal[timesteps][..., None] * clean.float() + schedule.sigma[timesteps][..., None] * noise.float()


__all__ = [
    "NoiseSchedule",
    "add_noise",
    "argmax_accuracy",
    "gaussian_schedule",
    "mask_schedule",
    "noise_factor",
    "one_hot",
    "projected_signal",
    "replace_by_random_tokens",
]
