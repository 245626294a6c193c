# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Tests of the diffusion maths against closed forms, hand-made numbers, and independent Monte Carlo estimates."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modeling_tdd.diffusion_tdd import (
    GaussianCorruption,
    MaskCorruption,
    add_noise,
    alpha_bar_schedule,
    apply_guidance,
    argmax_accuracy,
    denoise,
    guidance_scale_at,
    inference_timesteps,
    most_confident,
    noise_factor,
    projected_signal,
    to_one,
    token_timesteps,
    training_timesteps,
    visibility,
    with_mistakes,
)


SCHEDULES = ("linear", "cosine", "calibrated", "projected")


# ---- Schedules


@settings(deadline=None, max_examples=60)
@given(
    noise_schedule=st.sampled_from(SCHEDULES),
    corruption=st.sampled_from(["gaussian", "mask"]),
    num_timesteps=st.integers(1, 1000),
    num_categories=st.integers(2, 50_000),
    one_hot_scale=st.floats(0.05, 1.0),
)
def test_schedule_falls_from_one(
    noise_schedule: str, corruption: str, num_timesteps: int, num_categories: int, one_hot_scale: float
) -> None:
    alpha_bar = alpha_bar_schedule(noise_schedule, num_timesteps, num_categories, corruption, one_hot_scale)
    assert alpha_bar.shape == (num_timesteps + 1,) and alpha_bar.dtype == torch.float32
    assert alpha_bar[0] == 1
    assert (alpha_bar.diff() <= 0).all() and alpha_bar[-1] < alpha_bar[0]
    assert alpha_bar.isfinite().all() and alpha_bar.min() >= 0
    assert alpha_bar[-1] < 0.01  # sampling starts from pure noise, so training has to get there


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_schedule_of_one_timestep(noise_schedule: str) -> None:
    alpha_bar = alpha_bar_schedule(noise_schedule, 1, 10)
    assert alpha_bar[0] == 1 and 0 <= alpha_bar[1] < 0.01


def test_linear_schedule_is_that_of_ddpm() -> None:
    expected, product = [1.0], 1.0
    for step in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        expected.append(product)
    torch.testing.assert_close(alpha_bar_schedule("linear", 1000, 10), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_cosine_schedule_by_hand() -> None:
    def squared_cosine(progress: float) -> float:
        return math.cos((progress + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = torch.tensor([squared_cosine(t / 4) / squared_cosine(0) for t in range(5)])
    torch.testing.assert_close(alpha_bar_schedule("cosine", 4, 10), expected, atol=1e-6, rtol=1e-5)


def test_mask_schedules_by_hand() -> None:
    torch.testing.assert_close(alpha_bar_schedule("linear", 4, 10, "mask"), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    torch.testing.assert_close(alpha_bar_schedule("calibrated", 2, 10, "mask"), torch.tensor([1, 0.5, 0]))
    torch.testing.assert_close(
        alpha_bar_schedule("cosine", 3, 10, "mask"), torch.tensor([1, 0.5, 1 - math.sqrt(3) / 2, 0])
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("quadratic", 10, 10),
            "`noise_schedule` must be one of 'linear', 'cosine', 'calibrated', 'projected', got 'quadratic'",
        ),
        (("linear", 0, 10), "`num_timesteps` must be at least 1, got 0"),
        (("calibrated", 10, 1), "`num_categories` must be at least 2, got 1"),
    ],
)
def test_bad_schedule_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alpha_bar_schedule(*arguments)


def accuracy_of_argmax(num_categories: int, alpha_bar: Tensor, one_hot_scale: float, samples: int) -> float:
    """How often argmax(y_t) is y_0, by drawing K-wide noise."""
    right, chunk = 0, 2000
    for _ in range(samples // chunk):
        clean = torch.zeros(chunk, num_categories)
        clean[:, 0] = one_hot_scale
        noisy = add_noise(clean, torch.randn(chunk, num_categories), alpha_bar)
        right += (noisy.argmax(-1) == 0).sum().item()
    return right / samples


def accuracy_by_largest_rival(num_categories: int, alpha_bar: Tensor, one_hot_scale: float, samples: int) -> float:
    """The same, drawing the largest of the K - 1 other entries directly: its distribution function is Phi^(K - 1)."""
    own = torch.randn(samples, dtype=torch.float64)
    largest = torch.special.ndtri(torch.rand(samples, dtype=torch.float64) ** (1 / (num_categories - 1)))
    signal = one_hot_scale * (alpha_bar.double() / (1 - alpha_bar.double())).sqrt()
    return (signal + own > largest).double().mean().item()


@pytest.mark.parametrize("one_hot_scale", [1.0, 0.5])
@pytest.mark.parametrize(
    ("num_categories", "estimate", "samples"),
    [
        (10, accuracy_of_argmax, 100_000),
        (10, accuracy_by_largest_rival, 200_000),
        (1000, accuracy_of_argmax, 40_000),
        (1000, accuracy_by_largest_rival, 200_000),
        (30_522, accuracy_by_largest_rival, 200_000),
    ],
)
def test_calibrated_schedule_makes_argmax_accuracy_fall_evenly(
    num_categories: int, estimate: Callable[[int, Tensor, float, int], float], samples: int, one_hot_scale: float
) -> None:
    num_timesteps = 8
    alpha_bar = alpha_bar_schedule("calibrated", num_timesteps, num_categories, one_hot_scale=one_hot_scale)
    for timestep in range(1, num_timesteps + 1):
        wanted = 1 - (1 - 1 / num_categories) * timestep / num_timesteps
        # 40,000 samples: one standard error is 0.0025 at the most
        assert abs(estimate(num_categories, alpha_bar[timestep], one_hot_scale, samples) - wanted) < 0.01


def test_cosine_schedule_does_not_fall_evenly() -> None:
    """The estimators above see the fault that the calibrated schedule mends."""
    alpha_bar = alpha_bar_schedule("cosine", 8, 30_522)
    assert accuracy_by_largest_rival(30_522, alpha_bar[4], 1.0, 10_000) < 0.05


@settings(deadline=None, max_examples=40)
@given(num_categories=st.integers(2, 100_000), num_timesteps=st.integers(1, 200))
def test_calibrated_schedule_inverts_argmax_accuracy(num_categories: int, num_timesteps: int) -> None:
    alpha_bar = alpha_bar_schedule("calibrated", num_timesteps, num_categories).double()[1:]
    accuracy = argmax_accuracy((alpha_bar / (1 - alpha_bar)).sqrt(), num_categories)
    wanted = 1 - (1 - 1 / num_categories) * torch.arange(1, num_timesteps + 1) / num_timesteps
    torch.testing.assert_close(accuracy, wanted.double(), atol=1e-3, rtol=0)


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
        scores = noisy @ rows.T - 0.5 * amplitude * rows.square().sum(1)
        assert abs((scores.argmax(1) == tokens).double().mean() - wanted) < 0.05


@pytest.mark.parametrize("one_hot_scale", [1.0, 0.5])
@pytest.mark.parametrize(("num_categories", "width"), [(5, 8), (1748, 128)])
def test_projected_schedule_makes_the_tokens_share_of_its_projection_fall_evenly(
    num_categories: int, width: int, one_hot_scale: float
) -> None:
    num_timesteps, rows = 4, 4000
    alpha_bar = alpha_bar_schedule("projected", num_timesteps, num_categories, one_hot_scale=one_hot_scale)
    wanted = 1 - torch.arange(num_timesteps + 1) / num_timesteps
    torch.testing.assert_close(visibility(alpha_bar, num_categories, one_hot_scale), wanted, atol=1e-3, rtol=0)
    corruption = GaussianCorruption(torch.randn(num_categories, width), alpha_bar, one_hot_scale)
    tokens = torch.randint(num_categories, (rows, 1))
    noise = corruption.draw_noise(rows, 1)
    for timestep in range(1, num_timesteps):
        noisy = corruption.state_at(tokens, torch.full((rows,), timestep), noise)
        signal = alpha_bar[timestep].sqrt() * corruption.clean(tokens)
        share = signal.square().mean() / (signal.square().mean() + (noisy - signal).square().mean())
        assert abs(share - wanted[timestep]) < 0.02


def test_calibrated_schedule_leaves_most_of_the_projection_to_noise() -> None:
    """The fault that the projected schedule mends: the best guess is nearly always right, and few readers see it."""
    alpha_bar = alpha_bar_schedule("calibrated", 1000, 1748, one_hot_scale=projected_signal(1748, 128))
    assert visibility(alpha_bar[1:], 1748).max() < 0.3


# ---- Timesteps


@settings(deadline=None, max_examples=100)
@given(data=st.data(), num_timesteps=st.integers(1, 200), batch_size=st.integers(1, 5))
def test_training_timesteps_are_distinct_and_in_range(
    data: st.DataObject, num_timesteps: int, batch_size: int
) -> None:
    repeats = data.draw(st.integers(1, num_timesteps))
    timesteps = training_timesteps(batch_size, repeats, num_timesteps, torch.device("cpu"))
    assert timesteps.shape == (batch_size, repeats) and timesteps.dtype == torch.int64
    assert timesteps.min() >= 1 and timesteps.max() <= num_timesteps
    assert all(len(set(row)) == repeats for row in timesteps.tolist())


@pytest.mark.parametrize("repeats", [1, 3, 4])
def test_training_timesteps_are_uniform(repeats: int) -> None:
    """Each column by itself: the share of each of 10 timesteps within 5 standard errors of a tenth."""
    rows = 50_000
    timesteps = training_timesteps(rows, repeats, 10, torch.device("cpu"))
    for column in timesteps.T:
        share = torch.bincount(column - 1, minlength=10) / rows
        assert (share - 0.1).abs().max() < 5 * math.sqrt(0.1 * 0.9 / rows)


@settings(deadline=None)
@given(data=st.data(), num_timesteps=st.integers(1, 2000))
def test_inference_timesteps_fall_evenly(data: st.DataObject, num_timesteps: int) -> None:
    steps = data.draw(st.integers(1, num_timesteps))
    timesteps = inference_timesteps(num_timesteps, steps)
    assert len(timesteps) == steps + 1
    assert timesteps[0] == num_timesteps and timesteps[-1] == 0
    gaps = [before - after for before, after in zip(timesteps, timesteps[1:])]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_inference_timesteps_by_hand() -> None:
    assert inference_timesteps(1000, 4) == [1000, 750, 500, 250, 0]
    assert inference_timesteps(3, 3) == [3, 2, 1, 0]
    assert inference_timesteps(7, 1) == [7, 0]


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_bad_number_of_inference_steps_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"`num_inference_steps` must be in \[1, 10\], got {steps}"):
        inference_timesteps(10, steps)


# ---- Guidance and discretisation


def test_guidance_by_hand() -> None:
    conditional, unconditional = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0])
    assert apply_guidance(conditional, unconditional, 3.0).tolist() == [4.0, -3.0]
    assert apply_guidance(conditional, unconditional, 1.0).tolist() == conditional.tolist()


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [5, 5, 5]), ("linear", [1, 2, 5]), ("cosine", [1, 1.585786438, 5])]
)
def test_guidance_schedule_by_hand(schedule: str, expected: list[float]) -> None:
    """From 1 to 5 at a progress of 0, 1/4 and 1; a quarter of the cosine's way is (1 - cos(pi / 4)) / 2."""
    assert [guidance_scale_at(schedule, 5.0, progress) for progress in (0, 0.25, 1)] == pytest.approx(expected)


def test_bad_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match="`guidance_schedule` must be one of .* got 'sine'"):
        guidance_scale_at("sine", 2.0, 0.5)
    with pytest.raises(ValueError, match="`guidance_scale` must be at least 1, got 0.9"):
        guidance_scale_at("constant", 0.9, 0.5)


def test_to_one_argmax() -> None:
    assert to_one(torch.tensor([[[0.1, 2.0, 1.0], [3.0, 0.0, -1.0]]])).tolist() == [[1, 0]]


def test_to_one_multinomial_follows_the_softmax() -> None:
    """Pearson's chi-square with 4 degrees of freedom: 23.5 is passed once in 10,000 draws of the test."""
    draws = 100_000
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    tokens = to_one(logits.expand(draws, 5), "multinomial", torch.rand(draws))
    expected = draws * logits.softmax(-1)
    observed = torch.bincount(tokens, minlength=5)
    assert ((observed - expected).square() / expected).sum() < 23.5


def test_to_one_multinomial_at_the_edges() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(4, 1)
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    tokens = to_one(logits, "multinomial", torch.tensor([0.0, 0.49, 0.51, below_one]))
    assert tokens.tolist() == [1, 1, 2, 2]  # never a category without probability


def test_bad_sampling_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="`sampling_strategy` must be one of 'argmax', 'multinomial', got 'beam'"):
        to_one(torch.zeros(1, 3), "beam")


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


def largest_z_score(samples: Tensor, others: Tensor) -> float:
    """The largest difference of two samples' means, over their entries, in standard errors.

    Args:
        samples, others: of shape `(n, entries)`.
    """
    variance = samples.var(0) / len(samples) + others.var(0) / len(others)
    return ((samples.mean(0) - others.mean(0)).abs() / variance.sqrt()).max().item()


# Sampling error stays below SAME in all of the few hundred entries compared; a wrong factor goes beyond DIFFERENT.
SAME, DIFFERENT = 4.5, 6.0


@pytest.fixture(params=[(40, 6), (7, 6), (4, 6)], ids=["K>>d", "K=d+1", "K<d"])
def weight(request: pytest.FixtureRequest) -> Tensor:
    num_categories, width = request.param
    # Unequal columns with correlations, so that a factor of a wrong shape or order shows.
    return torch.randn(num_categories, width) @ torch.randn(width, width)


def corruptions(weight: Tensor, factor: Tensor | None = None) -> tuple[GaussianCorruption, GaussianCorruption]:
    """The projected corruption, with `noise_factor(weight)` unless another factor is given, and the dense one."""
    alpha_bar = torch.tensor([1.0, 0.7, 0.3, 0.01])
    return GaussianCorruption(weight, alpha_bar, factor=factor), GaussianCorruption(weight, alpha_bar, dense=True)


def draw_inputs(corruption: GaussianCorruption, rows: int) -> Tensor:
    """y_t W of the two tokens (2, 0) at t = 2, flat: (rows, 2 d)."""
    targets, timesteps = torch.tensor([[2, 0]]).expand(rows, 2), torch.full((rows,), 2)
    return corruption.corrupt(targets, timesteps, corruption.draw_noise(rows, 2)).inputs_embeds.flatten(1)


def second_moments(inputs: Tensor) -> Tensor:
    """Products of all pairs of entries, across the two tokens too: (rows, m) -> (rows, m * m)."""
    return (inputs[:, :, None] * inputs[:, None, :]).flatten(1)


def test_projected_noise_has_the_moments_of_dense_noise(weight: Tensor) -> None:
    projected, dense = (draw_inputs(corruption, 20_000) for corruption in corruptions(weight))
    assert largest_z_score(projected, dense) < SAME
    assert largest_z_score(second_moments(projected), second_moments(dense)) < SAME


@pytest.mark.parametrize("fault", ["scale", "transposed", "diagonal"])
def test_moments_tell_a_wrong_factor(fault: str) -> None:
    weight = torch.randn(40, 6) @ torch.randn(6, 6)
    factor = noise_factor(weight)
    wrong = {
        "scale": 1.1 * factor,
        "transposed": factor.T,
        "diagonal": (weight.T @ weight).diagonal().sqrt().diag(),
    }[fault]
    projected, dense = (draw_inputs(corruption, 20_000) for corruption in corruptions(weight, wrong))
    assert largest_z_score(second_moments(projected), second_moments(dense)) > DIFFERENT


def loss_gradients(
    weight: Tensor, make_corruption: Callable[[Tensor], GaussianCorruption], groups: int = 1000
) -> Tensor:
    """Gradients with respect to W of the mean loss of 32 tokens, `groups` times: (groups, K * d)."""
    weight = weight.clone().requires_grad_()
    num_categories, width = weight.shape
    head = torch.randn(width, num_categories, generator=torch.Generator().manual_seed(5))
    targets, timesteps = torch.arange(32)[:, None] % num_categories, torch.arange(32) % 3 + 1
    gradients = []
    for _ in range(groups):
        corruption = make_corruption(weight)
        inputs, loss_weight = corruption.corrupt(targets, timesteps, corruption.draw_noise(32, 1))
        # Not linear, or the noise would not enter the expected gradient
        logits = torch.tanh(inputs[:, 0] / math.sqrt(num_categories)) @ head
        losses = torch.nn.functional.cross_entropy(logits, targets[:, 0], reduction="none")
        gradients.append(torch.autograd.grad((loss_weight[:, 0] * losses).mean(), weight)[0].flatten())
    return torch.stack(gradients)


def test_projected_noise_has_the_expected_gradient_of_dense_noise(weight: Tensor) -> None:
    projected = loss_gradients(weight, lambda weight: corruptions(weight)[0])
    dense = loss_gradients(weight, lambda weight: corruptions(weight)[1])
    assert largest_z_score(projected, dense) < SAME


@pytest.mark.parametrize("fault", ["scale", "no gradient"])
def test_expected_gradient_tells_a_wrong_factor(fault: str) -> None:
    weight = torch.randn(7, 6)

    def wrong(weight: Tensor) -> GaussianCorruption:
        factor = noise_factor(weight)
        return corruptions(weight, 1.5 * factor if fault == "scale" else factor.detach())[0]

    projected = loss_gradients(weight, wrong)
    dense = loss_gradients(weight, lambda weight: corruptions(weight)[1])
    assert largest_z_score(projected, dense) > DIFFERENT


# ---- Gaussian corruption


@pytest.mark.parametrize("dense", [False, True])
def test_gaussian_corruption_by_hand(dense: bool) -> None:
    """W = 2 I, so that both spaces agree: y_t W = sqrt(ab) * lambda * 2 e_k + sqrt(1 - ab) * 2 noise."""
    corruption = GaussianCorruption(2 * torch.eye(3), torch.tensor([1.0, 0.64]), one_hot_scale=0.5, dense=dense)
    noise = torch.tensor([[[1.0, 0.0, -1.0]], [[0.0, 0.0, 0.0]]])
    inputs, loss_weight = corruption.corrupt(torch.tensor([[1], [2]]), torch.tensor([1, 0]), noise)
    torch.testing.assert_close(inputs, torch.tensor([[[1.2, 0.8, -1.2]], [[0.0, 0.0, 1.0]]]))
    torch.testing.assert_close(loss_weight, torch.tensor([[0.64], [1.0]]))


@pytest.mark.parametrize("dense", [False, True])
def test_one_hot_probabilities_are_their_tokens(dense: bool) -> None:
    corruption = GaussianCorruption(torch.randn(6, 4), torch.tensor([1.0, 0.5, 0.1]), dense=dense)
    tokens, timesteps = torch.tensor([[0, 5], [2, 3]]), torch.tensor([1, 2])
    noise = corruption.draw_noise(2, 2)
    one_hot = torch.nn.functional.one_hot(tokens, 6).float()
    hard, soft = corruption.corrupt(tokens, timesteps, noise), corruption.corrupt(one_hot, timesteps, noise)
    torch.testing.assert_close(hard.inputs_embeds, soft.inputs_embeds)
    torch.testing.assert_close(hard.loss_weight, soft.loss_weight)


def test_soft_targets_are_mixtures() -> None:
    weight = torch.randn(3, 4)
    corruption = GaussianCorruption(weight, torch.tensor([1.0, 0.25]))
    inputs, _ = corruption.corrupt(torch.tensor([[[0.2, 0.0, 0.8]]]), torch.tensor([1]), torch.zeros(1, 1, 3))
    torch.testing.assert_close(inputs[0, 0], 0.5 * (0.2 * weight[0] + 0.8 * weight[2]))


def test_loss_weighting() -> None:
    alpha_bar, timesteps = torch.tensor([1.0, 0.5, 0.1]), torch.tensor([2, 1])
    weighted = GaussianCorruption(torch.eye(2), alpha_bar, loss_weighting="alpha_bar")
    unweighted = GaussianCorruption(torch.eye(2), alpha_bar, loss_weighting="none")
    assert weighted.weigh(timesteps).tolist() == alpha_bar[[2, 1]].tolist()
    assert unweighted.weigh(timesteps).tolist() == [1, 1]


def test_a_step_forgets_the_old_state() -> None:
    corruption = GaussianCorruption(torch.randn(3, 4), torch.tensor([1.0, 0.6, 0.1]))
    tokens, noise = torch.tensor([[2], [0]]), corruption.draw_noise(2, 1)
    stepped = corruption.step(torch.full((2, 1, 4), 9.0), tokens, torch.zeros(2, 1), 1, noise)
    torch.testing.assert_close(stepped, corruption.state_at(tokens, torch.tensor([1, 1]), noise))


# ---- Mask corruption


MASK = 5


def mask_corruption(alpha_bar: list[float], loss_weighting: str = "none") -> MaskCorruption:
    """Five tokens whose embeddings are their number, in a width of 2; the mask's is -1."""
    weight = torch.arange(5.0)[:, None].expand(5, 2)
    return MaskCorruption(weight, torch.full((2,), -1.0), torch.tensor(alpha_bar), loss_weighting)


def test_mask_corruption_masks_where_noise_says() -> None:
    corruption = mask_corruption([1.0, 0.4], loss_weighting="alpha_bar")
    noise = torch.tensor([[0.1, 0.39, 0.41, 0.9]])[..., None]
    inputs, loss_weight = corruption.corrupt(torch.tensor([[3, 1, 4, 0]]), torch.tensor([1]), noise)
    assert inputs[0, :, 0].tolist() == [3, 1, -1, -1]
    torch.testing.assert_close(loss_weight, torch.tensor([[0.0, 0.0, 0.4, 0.4]]))  # masked places alone


@pytest.mark.parametrize("loss_weighting", ["none", "alpha_bar"])
def test_mask_rate_is_the_schedule(loss_weighting: str) -> None:
    corruption = mask_corruption([1.0, 0.7, 0.0], loss_weighting)
    rows, length = 2000, 20
    for timestep, visible in enumerate([1.0, 0.7, 0.0]):
        noise = corruption.draw_noise(rows, length)
        targets, timesteps = torch.ones(rows, length, dtype=torch.int64), torch.full((rows,), timestep)
        inputs, loss_weight = corruption.corrupt(targets, timesteps, noise)
        is_mask = inputs[..., 0] == -1
        standard_error = math.sqrt(visible * (1 - visible) / (rows * length))
        assert abs(is_mask.float().mean().item() - (1 - visible)) <= 5 * standard_error
        assert (loss_weight[~is_mask] == 0).all()
        assert (loss_weight[is_mask] == (visible if loss_weighting == "alpha_bar" else 1.0)).all()


def test_masks_give_way_in_the_order_of_confidence() -> None:
    """Four places of which 2, then 3, then 4 are to be visible."""
    corruption = mask_corruption([1.0, 0.75, 0.5, 0.0])
    state = corruption.start(torch.zeros(1, 4, 1))
    assert state.tolist() == [[MASK] * 4]
    scores = torch.tensor([[-0.1, -3.0, -0.5, -0.2]])
    state = corruption.step(state, torch.tensor([[1, 2, 3, 4]]), scores, 2, torch.empty(0))
    assert state.tolist() == [[1, MASK, MASK, 4]]
    # What is visible stays, however confident the model now is of another token there
    scores = torch.tensor([[-0.01, -1.0, -2.0, -0.01]])
    state = corruption.step(state, torch.tensor([[0, 2, 3, 0]]), scores, 1, torch.empty(0))
    assert state.tolist() == [[1, 2, MASK, 4]]
    state = corruption.step(state, torch.tensor([[0, 0, 3, 0]]), scores, 0, torch.empty(0))
    assert state.tolist() == [[1, 2, 3, 4]]


@settings(deadline=None, max_examples=40)
@given(data=st.data(), num_timesteps=st.integers(1, 30), length=st.integers(1, 12))
def test_mask_loop_unmasks_everything(data: st.DataObject, num_timesteps: int, length: int) -> None:
    alpha_bar = alpha_bar_schedule("cosine", num_timesteps, 5, "mask")
    corruption = mask_corruption(alpha_bar.tolist())
    steps = data.draw(st.integers(1, num_timesteps))
    state, masks_left = corruption.start(torch.zeros(2, length, 1)), [length]
    for timestep in inference_timesteps(num_timesteps, steps)[1:]:
        tokens, scores = torch.randint(5, (2, length)), torch.randn(2, length)
        state = corruption.step(state, tokens, scores, timestep, torch.empty(0))
        masks_left.append((state == MASK).sum(1).max().item())
    assert masks_left == sorted(masks_left, reverse=True)
    assert masks_left[-1] == 0


def test_words_and_padding_are_settled_in_the_same_share() -> None:
    """Padding, of places 3 to 6, is the surest; still two of four words' and padding's places are settled by half."""
    scores = torch.tensor([[-3.0, -1.0, -2.0, -0.4, -0.1, -0.2, -0.3]])
    beyond_end = torch.tensor([[False, False, False, True, True, True, True]])
    assert most_confident(scores, 0.5).tolist() == [[False, False, False, True, True, True, True]]
    settled = most_confident(scores, 0.5, beyond_end=beyond_end)
    assert settled.tolist() == [[False, True, True, False, True, True, False]]  # 1.5 rounds to the even 2


def test_given_places_are_settled_beside_the_share_of_the_others() -> None:
    scores = torch.tensor([[-9.0, -1.0, -2.0, -3.0, -4.0]])
    fixed_mask = torch.tensor([[True, False, False, False, False]])
    assert most_confident(scores, 0.5, fixed_mask).tolist() == [[True, True, True, False, False]]
    assert most_confident(scores, 0.0, fixed_mask).tolist() == [[True, False, False, False, False]]
    assert most_confident(scores, 1.0, fixed_mask).all()


def test_tokens_are_hidden_by_chance_and_visible_ones_have_less_noise() -> None:
    torch.manual_seed(0)
    num_timesteps = 1000
    timesteps = torch.tensor([1, 250, 1000]).repeat_interleave(2000)
    drawn = token_timesteps(timesteps, 5, num_timesteps).view(3, -1)
    hidden = (drawn == num_timesteps).float().mean(dim=1)
    # Standard errors: below 0.005 for 10,000 tokens
    torch.testing.assert_close(hidden, torch.tensor([0.001, 0.25, 1.0]), atol=0.02, rtol=0)
    visible = drawn[drawn < num_timesteps]
    assert (visible.min(), visible.max()) == (1, 800)
    assert visible.float().mean().sub(400.5).abs() < 8


def test_a_share_of_the_tokens_is_that_of_another_sequence_at_the_same_place() -> None:
    torch.manual_seed(0)
    rows = 4000
    places = torch.arange(5) * rows
    targets = torch.arange(rows)[:, None] + places  # every token is of one row and place
    shown = with_mistakes(targets, 0.1)
    is_mistaken = shown != targets
    # Standard error: 0.002 of 20,000 tokens
    assert abs(is_mistaken.float().mean() - 0.1) < 0.01
    assert torch.equal(shown // rows, targets // rows)
    assert (is_mistaken.sum(1) == 0).float().mean().sub(0.9**5).abs() < 0.04  # each token for itself


# ---- The loop


class RecordingPredictor:
    """Predicts `scores` whatever it is given, and remembers what that was."""

    def __init__(self, scores: Tensor):
        self.scores = scores
        self.calls: list[tuple[Tensor, int]] = []

    def __call__(self, state: Tensor, timestep: int, token_timesteps: Tensor | None = None) -> Tensor:
        self.calls.append((state.clone(), timestep))
        return self.scores.expand(len(state), -1, -1)


def gaussian_corruption(num_timesteps: int = 10) -> GaussianCorruption:
    """With W = I a state is y_t itself."""
    return GaussianCorruption(torch.eye(3), alpha_bar_schedule("cosine", num_timesteps, 3))


def test_loop_by_hand() -> None:
    predictor = RecordingPredictor(torch.tensor([[[0.0, 5.0, 1.0], [2.0, 0.0, 1.0]]]))
    corruption = gaussian_corruption()
    steps = list(
        denoise(
            predictor,
            corruption,
            rows=2,
            num_tokens=2,
            num_inference_steps=4,
            sampling_strategy="argmax",
            generator=torch.Generator().manual_seed(3),
        )
    )
    # One call a step, none at t = 0
    assert [timestep for _, timestep in predictor.calls] == [10, 8, 5, 3]
    assert [step.timestep for step in steps] == [10, 8, 5, 3]
    assert all(step.tokens.tolist() == [[1, 0], [1, 0]] for step in steps)
    # The states: pure noise, then the predicted one-hot vectors with the noise of their timestep
    generator = torch.Generator().manual_seed(3)
    noises = [torch.randn(1, 2, 3, generator=generator).expand(2, 2, 3) for _ in range(4)]
    torch.testing.assert_close(predictor.calls[0][0], noises[0])
    one_hot = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    for (state, timestep), noise in zip(predictor.calls[1:], noises[1:]):
        torch.testing.assert_close(state, add_noise(one_hot, noise, corruption.alpha_bar[timestep]))


@pytest.mark.parametrize("sampling_strategy", ["argmax", "multinomial"])
def test_loop_gives_each_image_the_same_noise_and_each_sample_its_own(sampling_strategy: str) -> None:
    predictor = RecordingPredictor(torch.zeros(1, 16, 3))
    steps = list(
        denoise(
            predictor,
            gaussian_corruption(),
            rows=6,
            num_tokens=16,
            num_inference_steps=3,
            sampling_strategy=sampling_strategy,
            generator=torch.Generator().manual_seed(0),
            num_noise_samples=2,
        )
    )
    for state, _ in predictor.calls:
        assert torch.equal(state[0:2], state[2:4]) and torch.equal(state[0:2], state[4:6])
        assert not torch.equal(state[0], state[1])
    if sampling_strategy == "multinomial":
        tokens = steps[0].tokens
        assert torch.equal(tokens[0:2], tokens[2:4]) and not torch.equal(tokens[0], tokens[1])


def test_loop_of_masks_shows_the_predictor_ever_fewer_masks() -> None:
    """The first place is the surest: it is visible in the second call, and in the last only one mask is left."""
    scores = torch.full((1, 4, 5), 0.0)
    scores[0, torch.arange(4), torch.tensor([3, 1, 4, 0])] = torch.tensor([9.0, 5.0, 7.0, 3.0])
    predictor = RecordingPredictor(scores)
    steps = list(
        denoise(
            predictor,
            mask_corruption([1.0, 0.75, 0.5, 0.25, 0.0]),
            rows=1,
            num_tokens=4,
            num_inference_steps=4,
            sampling_strategy="argmax",
            generator=torch.Generator(),
        )
    )
    assert [state.tolist() for state, _ in predictor.calls] == [
        [[MASK, MASK, MASK, MASK]],
        [[3, MASK, MASK, MASK]],
        [[3, MASK, 4, MASK]],
        [[3, 1, 4, MASK]],
    ]
    assert steps[-1].tokens.tolist() == [[3, 1, 4, 0]]


@pytest.mark.parametrize(
    ("steps", "strategy", "message"),
    [(0, "argmax", "num_inference_steps"), (11, "argmax", "num_inference_steps"), (1, "beam", "sampling_strategy")],
)
def test_loop_refuses_bad_settings_before_it_predicts(steps: int, strategy: str, message: str) -> None:
    predictor = RecordingPredictor(torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match=message):
        list(
            denoise(
                predictor,
                gaussian_corruption(),
                rows=1,
                num_tokens=1,
                num_inference_steps=steps,
                sampling_strategy=strategy,
                generator=torch.Generator(),
            )
        )
    assert not predictor.calls
