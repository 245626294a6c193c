# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Noise schedules and projected noise, against closed forms, hand-made numbers, and slow references: independent
quadrature, exact fractions, and K-wide noise on one-hot vectors."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr
from torch import Tensor

from modeling_tdd import TDDConfig
from modeling_tdd.diffusion_tdd import (
    NoiseSchedule,
    add_noise,
    argmax_accuracy,
    gaussian_schedule,
    mask_schedule,
    noise_factor,
    one_hot,
    projected_signal,
)


SCHEDULES = ("linear", "cosine", "calibrated", "projected")


def schedule_of(alpha_bar: list[float], one_hot_scale: float = 1.0) -> NoiseSchedule:
    """A schedule by hand; nothing here reads its visibility."""
    alpha_bar = torch.tensor(alpha_bar)
    return NoiseSchedule(alpha_bar, one_hot_scale * alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), torch.zeros(0))


# ---- Schedules


@settings(deadline=None, max_examples=60)
@given(
    noise_schedule=st.sampled_from(SCHEDULES),
    num_timesteps=st.integers(1, 1000),
    num_categories=st.integers(2, 50_000),
    hidden_size=st.integers(1, 1024),
    one_hot_scale=st.floats(0.05, 1.0),
)
def test_schedule_falls_from_one_to_zero(
    noise_schedule: str, num_timesteps: int, num_categories: int, hidden_size: int, one_hot_scale: float
) -> None:
    alpha_bar, complement = gaussian_schedule(
        noise_schedule, num_timesteps, num_categories, hidden_size, one_hot_scale
    )
    assert alpha_bar.shape == complement.shape == (num_timesteps + 1,)
    assert alpha_bar.dtype == complement.dtype == torch.float64
    assert alpha_bar[0] == 1 and alpha_bar[-1] == 0 and complement[0] == 0 and complement[-1] == 1
    assert (alpha_bar.diff() < 0).all() and (complement.diff() > 0).all()
    torch.testing.assert_close(alpha_bar + complement, torch.ones_like(alpha_bar), rtol=0, atol=1e-12)


def calibrated_amplitude(progress: float, num_categories: int) -> float:
    """The amplitude at which argmax(y_t) is right with the wanted chance, by NumPy on a finer grid of z."""
    z = np.linspace(-10, 10, 4001)
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    amplitude = np.linspace(0, 16, 2001)
    others_below = np.exp((num_categories - 1) * log_ndtr(amplitude[:, None] + z))
    accuracy = (density * others_below).sum(1) * (z[1] - z[0])
    keep = slice(0, np.flatnonzero(accuracy > 1 - 1e-5)[0] + 1)  # beyond it rounding stops the rise
    return float(np.interp(1 - (1 - 1 / num_categories) * progress, accuracy[keep], amplitude[keep]))


def first_complement(noise_schedule: str, num_categories: int, hidden_size: int) -> float:
    """1 - alpha_bar at t = 1 of T = 1000, by another way than the code's."""
    if noise_schedule == "linear":
        return 1e-4  # the first beta
    if noise_schedule == "cosine":
        angle, first = (0.5 * math.pi * (progress + 0.008) / 1.008 for progress in (0.001, 0.0))
        return 1 - (math.cos(angle) / math.cos(first)) ** 2
    if noise_schedule == "projected":
        ratio = num_categories * Fraction(999, 1)  # K (1 - t / T) / (t / T)
        return float(1 / (1 + ratio))
    power = calibrated_amplitude(0.001, num_categories) ** 2 / min(1, hidden_size / num_categories)
    return 1 / (1 + power)


@pytest.mark.parametrize("num_categories", [2, 10, 1000, 30_522, 151_936, 256_000])
@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_little_noise_is_resolved_for_any_number_of_categories(noise_schedule: str, num_categories: int) -> None:
    """With 151,936 categories 1 - alpha_bar at t = 1 is below what a subtraction in float32 can tell from 0."""
    hidden_size = 768
    alpha_bar, complement = gaussian_schedule(noise_schedule, 1000, num_categories, hidden_size)
    assert alpha_bar[0] == 1 and alpha_bar[-1] == 0
    assert (alpha_bar.diff() < 0).all() and (complement.diff() > 0).all()
    expected = first_complement(noise_schedule, num_categories, hidden_size)
    assert complement[1].item() == pytest.approx(expected, rel=1e-9)
    # The model's own, in float32
    schedule = NoiseSchedule.from_config(
        TDDConfig(
            noise_schedule=noise_schedule,
            vocab_size=num_categories,
            max_position_embeddings=2,
            hidden_size=hidden_size,
            num_attention_heads=12,
        )
    )
    assert schedule.num_timesteps == 1000
    assert schedule.sigma.dtype == schedule.alpha_bar.dtype == torch.float32
    assert schedule.sigma[0] == 0 and schedule.sigma[-1] == 1 and schedule.signal[-1] == 0
    assert (schedule.sigma.diff() > 0).all()
    assert schedule.sigma[1].item() == pytest.approx(math.sqrt(expected), rel=1e-6)


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_schedule_of_one_timestep(noise_schedule: str) -> None:
    alpha_bar, complement = gaussian_schedule(noise_schedule, 1, 10, 4)
    assert alpha_bar.tolist() == [1, 0] and complement.tolist() == [0, 1]


def test_linear_schedule_is_that_of_ddpm() -> None:
    expected, product = [1.0], 1.0
    for step in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        expected.append(product)
    expected[-1] = 0.0  # the loop starts from pure noise
    alpha_bar, _ = gaussian_schedule("linear", 1000, 10, 4)
    torch.testing.assert_close(alpha_bar, torch.tensor(expected, dtype=torch.float64), atol=0, rtol=1e-9)
    coarse, _ = gaussian_schedule("linear", 4, 10, 4)
    torch.testing.assert_close(coarse, alpha_bar[::250])  # the same at the same t / T


def test_cosine_schedule_by_hand() -> None:
    def squared_cosine(progress: float) -> float:
        return math.cos((progress + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = torch.tensor([squared_cosine(t / 4) / squared_cosine(0) for t in range(5)], dtype=torch.float64)
    alpha_bar, _ = gaussian_schedule("cosine", 4, 10, 4)
    torch.testing.assert_close(alpha_bar, expected, atol=1e-15, rtol=1e-12)


def test_mask_schedules_by_hand() -> None:
    def expected(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    torch.testing.assert_close(mask_schedule("linear", 4), expected([1, 0.75, 0.5, 0.25, 0]))
    torch.testing.assert_close(mask_schedule("calibrated", 2), expected([1, 0.5, 0]))
    torch.testing.assert_close(mask_schedule("cosine", 3), expected([1, 0.5, 1 - math.sqrt(3) / 2, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("quadratic", 10, 10, 4),
            "`noise_schedule` must be one of 'linear', 'cosine', 'calibrated', 'projected', got 'quadratic'",
        ),
        (("linear", 0, 10, 4), r"`num_timesteps` must be an integer in \[1, 1048576\], got 0"),
        (("calibrated", 10, 1, 4), "`num_categories` must be an integer of at least 2, got 1"),
    ],
)
def test_bad_schedule_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian_schedule(*arguments)


def test_schedule_of_a_configuration() -> None:
    config = TDDConfig(num_labels=7, num_timesteps=20, hidden_size=48, noise_schedule="linear", one_hot_scale=0.5)
    schedule = NoiseSchedule.from_config(config)
    alpha_bar, complement = gaussian_schedule("linear", 20, 7, 48, 0.5)
    torch.testing.assert_close(schedule.alpha_bar, alpha_bar.float())
    torch.testing.assert_close(schedule.signal, (0.5 * alpha_bar.sqrt()).float())
    torch.testing.assert_close(schedule.sigma, complement.sqrt().float())
    # The token's share of the variance of y_t W, where all rows of W have the same length
    share = 0.25 * alpha_bar / (0.25 * alpha_bar + 7 * complement)
    torch.testing.assert_close(schedule.visibility, share.float())
    masks = NoiseSchedule.from_config(TDDConfig(num_labels=7, num_timesteps=20, corruption="mask"))
    torch.testing.assert_close(masks.alpha_bar, mask_schedule("cosine", 20).float())


def test_a_schedule_moves_to_a_device_once() -> None:
    schedule = NoiseSchedule.from_config(TDDConfig(num_labels=7, num_timesteps=20))
    assert schedule.to(torch.device("cpu")) is schedule
    assert schedule.to(torch.device("meta")).sigma.device.type == "meta"
    assert schedule.sigma.device.type == "cpu"


# ---- What the calibrated and the projected schedule promise


def accuracy_of_argmax(num_categories: int, alpha_bar: float, one_hot_scale: float, samples: int) -> float:
    """How often argmax(y_t) is y_0, by drawing K-wide noise."""
    right, chunk = 0, 2000
    schedule = schedule_of([alpha_bar], one_hot_scale)
    clean = one_hot(torch.zeros(chunk, 1, dtype=torch.long), num_categories)
    for _ in range(samples // chunk):
        timesteps = torch.zeros(chunk, 1, dtype=torch.long)
        noisy = add_noise(clean, torch.randn(chunk, 1, num_categories), schedule, timesteps)
        right += (noisy.argmax(-1) == 0).sum().item()
    return right / samples


def accuracy_by_largest_other(num_categories: int, alpha_bar: float, one_hot_scale: float, samples: int) -> float:
    """The same, drawing the largest of the K - 1 other entries directly: its distribution function is Phi^(K - 1)."""
    own = torch.randn(samples, dtype=torch.float64)
    largest = torch.special.ndtri(torch.rand(samples, dtype=torch.float64) ** (1 / (num_categories - 1)))
    signal = one_hot_scale * math.sqrt(alpha_bar / (1 - alpha_bar))
    return (signal + own > largest).double().mean().item()


@pytest.mark.parametrize("one_hot_scale", [1.0, 0.5])
@pytest.mark.parametrize(
    ("num_categories", "estimate", "samples"),
    [
        (10, accuracy_of_argmax, 100_000),
        (10, accuracy_by_largest_other, 200_000),
        (1000, accuracy_of_argmax, 40_000),
        (1000, accuracy_by_largest_other, 200_000),
        (30_522, accuracy_by_largest_other, 200_000),
    ],
)
def test_calibrated_schedule_makes_argmax_accuracy_fall_evenly(
    num_categories: int, estimate: Callable[[int, float, float, int], float], samples: int, one_hot_scale: float
) -> None:
    num_timesteps = 8
    # As wide as there are categories: W loses nothing
    alpha_bar, _ = gaussian_schedule("calibrated", num_timesteps, num_categories, num_categories, one_hot_scale)
    for timestep in range(1, num_timesteps + 1):
        wanted = 1 - (1 - 1 / num_categories) * timestep / num_timesteps
        # 40,000 samples: one standard error is 0.0025 at the most
        assert abs(estimate(num_categories, alpha_bar[timestep].item(), one_hot_scale, samples) - wanted) < 0.01


def test_cosine_schedule_does_not_fall_evenly() -> None:
    """The estimators above see the fault that the calibrated schedule corrects."""
    alpha_bar, _ = gaussian_schedule("cosine", 8, 30_522, 30_522)
    assert accuracy_by_largest_other(30_522, alpha_bar[4].item(), 1.0, 10_000) < 0.05


@settings(deadline=None, max_examples=40)
@given(
    num_categories=st.integers(2, 100_000),
    num_timesteps=st.integers(2, 200),
    hidden_size=st.integers(1, 1024),
    one_hot_scale=st.floats(0.05, 1.0),
)
def test_calibrated_schedule_inverts_argmax_accuracy(
    num_categories: int, num_timesteps: int, hidden_size: int, one_hot_scale: float
) -> None:
    alpha_bar, complement = gaussian_schedule("calibrated", num_timesteps, num_categories, hidden_size, one_hot_scale)
    kept = one_hot_scale * projected_signal(num_categories, hidden_size)
    accuracy = argmax_accuracy(kept * (alpha_bar[1:] / complement[1:]).sqrt(), num_categories)
    wanted = 1 - (1 - 1 / num_categories) * torch.arange(1, num_timesteps + 1).double() / num_timesteps
    torch.testing.assert_close(accuracy, wanted, atol=1e-4, rtol=0)


def test_argmax_accuracy_of_two_categories_in_closed_form() -> None:
    """With K = 2 it is P(a + z > z') = Phi(a / sqrt(2))."""
    signal = torch.tensor([0.0, 0.5, 1.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(argmax_accuracy(signal, 2), torch.special.ndtr(signal / math.sqrt(2)))


@pytest.mark.parametrize(("num_categories", "width"), [(1000, 100), (1000, 300), (50, 200)])
def test_projection_keeps_the_share_of_the_signal_that_its_width_is_of_the_categories(
    num_categories: int, width: int
) -> None:
    """The best guess of a token from y_t W is right as often as the argmax of a y_t with so much weaker a signal."""
    weight = torch.randn(num_categories, width, dtype=torch.float64)
    # In coordinates where the projected noise is white the likeliest token is that of the nearest row
    rows = weight @ torch.linalg.pinv(noise_factor(weight))
    samples = 4000
    for wanted in (0.2, 0.5, 0.8):
        signal = 0.05 * torch.arange(1, 400, dtype=torch.float64)
        visible = argmax_accuracy(signal * projected_signal(num_categories, width), num_categories)
        amplitude = signal[torch.searchsorted(visible, wanted)]
        tokens = torch.randint(num_categories, (samples,))
        noisy = amplitude * rows[tokens] + torch.randn(samples, rows.shape[1], dtype=torch.float64)
        log_likelihood = noisy @ rows.T - 0.5 * amplitude * rows.square().sum(1)
        assert abs((log_likelihood.argmax(1) == tokens).double().mean() - wanted) < 0.05


@pytest.mark.parametrize("one_hot_scale", [1.0, 0.5])
@pytest.mark.parametrize(("num_categories", "width"), [(5, 8), (1748, 128)])
def test_projected_schedule_makes_the_tokens_share_of_its_projection_fall_evenly(
    num_categories: int, width: int, one_hot_scale: float
) -> None:
    num_timesteps, rows = 4, 4000
    config = TDDConfig(
        noise_schedule="projected",
        num_labels=num_categories,
        hidden_size=width,
        num_attention_heads=1,
        num_timesteps=num_timesteps,
        num_inference_steps=1,
        one_hot_scale=one_hot_scale,
    )
    schedule = NoiseSchedule.from_config(config)
    wanted = 1 - torch.arange(num_timesteps + 1) / num_timesteps
    torch.testing.assert_close(schedule.visibility, wanted)
    weight = torch.randn(num_categories, width)
    tokens, noise = torch.randint(num_categories, (rows, 1)), torch.randn(rows, 1, min(num_categories, width))
    for timestep in range(1, num_timesteps):
        timesteps = torch.full((rows, 1), timestep)
        noisy = add_noise(weight[tokens], noise @ noise_factor(weight), schedule, timesteps)
        signal = schedule.signal[timestep] * weight[tokens]
        share = signal.square().mean() / (signal.square().mean() + (noisy - signal).square().mean())
        assert abs(share - wanted[timestep]) < 0.02


def test_calibrated_schedule_leaves_most_of_the_projection_to_noise() -> None:
    """The fault that `projected` corrects: the best guess is nearly always right, but few readers see it."""
    config = TDDConfig(num_labels=1748, hidden_size=128, num_attention_heads=1, noise_schedule="calibrated")
    assert NoiseSchedule.from_config(config).visibility[1:].max() < 0.3


# ---- Noise on one-hot vectors


def test_noisy_one_hot_vectors_by_hand() -> None:
    schedule = schedule_of([1.0, 0.64], one_hot_scale=0.5)
    tokens, timesteps = torch.tensor([[1], [2]]), torch.tensor([[1], [0]])
    noise = torch.tensor([[[1.0, 0.0, -1.0]], [[9.0, 9.0, 9.0]]])
    noisy = add_noise(one_hot(tokens, 3), noise, schedule, timesteps)
    torch.testing.assert_close(noisy, torch.tensor([[[0.6, 0.4, -0.6]], [[0.0, 0.0, 0.5]]]))


def test_each_token_has_its_own_timestep() -> None:
    schedule = schedule_of([1.0, 0.5, 0.0])
    clean, noise = torch.full((1, 3, 2), 4.0), torch.full((1, 3, 2), 2.0)
    noisy = add_noise(clean, noise, schedule, torch.tensor([[0, 1, 2]]))[0, :, 0]
    torch.testing.assert_close(noisy, torch.tensor([4.0, math.sqrt(0.5) * 6, 2.0]))


def test_one_hot_leaves_probabilities_as_they_are() -> None:
    probabilities = torch.tensor([[0.2, 0.0, 0.8]])
    assert one_hot(probabilities, 3) is probabilities
    assert one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]


# ---- Projected noise


@pytest.mark.parametrize("num_categories", [1, 3, 8, 9, 500], ids=lambda size: f"K={size}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_noise_factor_is_a_root_of_the_gram_matrix(num_categories: int, dtype: torch.dtype, tolerance: float) -> None:
    weight = torch.randn(num_categories, 8, dtype=dtype)
    factor = noise_factor(weight)
    assert factor.dtype == dtype and factor.shape == (min(num_categories, 8), 8)
    torch.testing.assert_close(factor.T @ factor, weight.T @ weight, rtol=tolerance, atol=tolerance * num_categories)


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_noise_factor_of_a_rank_deficient_matrix(rank: int, scale: float) -> None:
    weight = scale * torch.randn(200, rank) @ torch.randn(rank, 16)
    factor = noise_factor(weight)
    gram = weight.T @ weight
    assert factor.isfinite().all()
    torch.testing.assert_close(factor.T @ factor, gram, rtol=1e-3, atol=1e-4 * gram.trace().item() + 1e-30)


def test_noise_factor_of_half_precision_weights_and_under_autocast() -> None:
    weight = torch.randn(300, 16)
    gram = weight.T @ weight
    with torch.autocast("cpu", torch.bfloat16):
        factor = noise_factor(weight)
    torch.testing.assert_close(factor.T @ factor, gram, rtol=1e-4, atol=1e-2)
    assert noise_factor(weight.bfloat16()).dtype == torch.float32


def test_gradient_of_the_noise_factor() -> None:
    """The gradient is made by hand in part, so it is compared with autograd's own through W^T W."""
    weight = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, 6, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((noise_factor(weight) * upstream).sum(), weight)
    (expected,) = torch.autograd.grad((torch.linalg.cholesky(weight.T @ weight).T * upstream).sum(), weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8)


def largest_z_score(samples: Tensor, others: Tensor) -> float:
    """The largest difference of two samples' means, over their entries, in standard errors.

    Args:
        samples, others: of shape `(n, entries)`.
    """
    variance = samples.var(0) / len(samples) + others.var(0) / len(others)
    return ((samples.mean(0) - others.mean(0)).abs() / variance.sqrt()).max().item()


# Sampling error stays below SAME in all of the few hundred entries compared; a wrong factor goes beyond DIFFERENT.
SAME, DIFFERENT = 4.5, 6.0

SCHEDULE = schedule_of([1.0, 0.7, 0.3, 0.01])

NoisyProjection = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(params=[(40, 6), (7, 6), (4, 6)], ids=["K>>d", "K=d+1", "K<d"])
def weight(request: pytest.FixtureRequest) -> Tensor:
    num_categories, width = request.param
    # Unequal columns with correlations, so that a factor of a wrong shape or order shows.
    return torch.randn(num_categories, width) @ torch.randn(width, width)


def dense(weight: Tensor, tokens: Tensor, timesteps: Tensor) -> Tensor:
    """y_t W as the paper has it: K-wide noise on one-hot vectors, then the product with W."""
    clean = one_hot(tokens, len(weight))
    return add_noise(clean, torch.randn(clean.shape), SCHEDULE, timesteps) @ weight


def projected_by(factor_of: Callable[[Tensor], Tensor]) -> NoisyProjection:
    """y_t W as the denoiser makes it: noise of the width of the factor, added to rows of W."""

    def project(weight: Tensor, tokens: Tensor, timesteps: Tensor) -> Tensor:
        factor = factor_of(weight)
        noise = torch.randn(*tokens.shape, len(factor)) @ factor
        return add_noise(weight[tokens], noise, SCHEDULE, timesteps)

    return project


projected = projected_by(noise_factor)


def draw_inputs(project: NoisyProjection, weight: Tensor, rows: int = 20_000) -> Tensor:
    """y_t W of the two tokens (2, 0) at t = 2, flat: (rows, 2 d)."""
    tokens, timesteps = torch.tensor([[2, 0]]).expand(rows, 2), torch.full((rows, 2), 2)
    return project(weight, tokens, timesteps).flatten(1)


def second_moments(inputs: Tensor) -> Tensor:
    """Products of all pairs of entries, across the two tokens too: (rows, m) -> (rows, m * m)."""
    return (inputs[:, :, None] * inputs[:, None, :]).flatten(1)


def test_projected_noise_has_the_moments_of_dense_noise(weight: Tensor) -> None:
    ours, reference = draw_inputs(projected, weight), draw_inputs(dense, weight)
    assert largest_z_score(ours, reference) < SAME
    assert largest_z_score(second_moments(ours), second_moments(reference)) < SAME


@pytest.mark.parametrize("fault", ["scale", "transposed", "diagonal"])
def test_moments_tell_a_wrong_factor(fault: str) -> None:
    weight = torch.randn(40, 6) @ torch.randn(6, 6)
    factor = noise_factor(weight)
    wrong = {
        "scale": 1.1 * factor,
        "transposed": factor.T,
        "diagonal": (weight.T @ weight).diagonal().sqrt().diag(),
    }[fault]
    ours, reference = draw_inputs(projected_by(lambda _: wrong), weight), draw_inputs(dense, weight)
    assert largest_z_score(second_moments(ours), second_moments(reference)) > DIFFERENT


def loss_gradients(weight: Tensor, project: NoisyProjection, groups: int = 1000) -> Tensor:
    """Gradients with respect to W of the mean loss of 32 tokens, `groups` times: (groups, K * d)."""
    weight = weight.clone().requires_grad_()
    num_categories, width = weight.shape
    head = torch.randn(width, num_categories, generator=torch.Generator().manual_seed(5))
    targets, timesteps = torch.arange(32)[:, None] % num_categories, torch.arange(32)[:, None] % 3 + 1
    gradients = []
    for _ in range(groups):
        inputs = project(weight, targets, timesteps)
        # Not linear, or the noise would not enter the expected gradient
        logits = torch.tanh(inputs[:, 0] / math.sqrt(num_categories)) @ head
        losses = torch.nn.functional.cross_entropy(logits, targets[:, 0], reduction="none")
        loss = (SCHEDULE.alpha_bar[timesteps[:, 0]] * losses).mean()
        gradients.append(torch.autograd.grad(loss, weight)[0].flatten())
    return torch.stack(gradients)


def test_projected_noise_has_the_expected_gradient_of_dense_noise(weight: Tensor) -> None:
    assert largest_z_score(loss_gradients(weight, projected), loss_gradients(weight, dense)) < SAME


@pytest.mark.parametrize("fault", ["scale", "no gradient"])
def test_expected_gradient_tells_a_wrong_factor(fault: str) -> None:
    weight = torch.randn(7, 6)

    def wrong(weight: Tensor) -> Tensor:
        factor = noise_factor(weight)
        return 1.5 * factor if fault == "scale" else factor.detach()

    assert largest_z_score(loss_gradients(weight, projected_by(wrong)), loss_gradients(weight, dense)) > DIFFERENT
