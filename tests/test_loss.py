# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What the training loss draws, and the loss itself. test_modeling and test_captioning have the models' losses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modeling_tdd.loss_tdd import (
    diffusion_loss,
    draw_noisy_targets,
    draw_timesteps,
    draw_token_timesteps,
    replace_by_wrong_tokens,
    sum_by_timestep,
)


CPU = torch.device("cpu")
MASK = 20

MakeModel = Callable[..., nn.Module]


@pytest.fixture
def make_denoiser(make_captioner: MakeModel) -> MakeModel:
    """A function from fields of `TDDConfig` to a denoiser of 8 tokens of 20 categories, in training mode."""

    def make(**fields: Any) -> nn.Module:
        return make_captioner(**fields).model.denoiser.train()

    return make


@pytest.fixture
def targets() -> Tensor:
    """Four sequences that share no token with another at the same place."""
    return (torch.arange(4)[:, None] * 5 + torch.arange(8)) % 20


# ---- Timesteps


@settings(deadline=None, max_examples=100)
@given(data=st.data(), num_timesteps=st.integers(1, 200), batch_size=st.integers(1, 5))
def test_timesteps_are_distinct_and_in_range(data: st.DataObject, num_timesteps: int, batch_size: int) -> None:
    repeats = data.draw(st.integers(1, num_timesteps))
    timesteps = draw_timesteps(batch_size, repeats, num_timesteps, CPU)
    assert timesteps.shape == (batch_size, repeats) and timesteps.dtype == torch.int64
    assert timesteps.min() >= 1 and timesteps.max() <= num_timesteps
    assert all(len(set(row)) == repeats for row in timesteps.tolist())


@pytest.mark.parametrize("repeats", [1, 3, 4])
def test_timesteps_are_uniform(repeats: int) -> None:
    """Each column by itself: the share of each of 10 timesteps within 5 standard errors of a tenth."""
    rows = 50_000
    timesteps = draw_timesteps(rows, repeats, 10, CPU)
    for column in timesteps.T:
        share = torch.bincount(column - 1, minlength=10) / rows
        assert (share - 0.1).abs().max() < 5 * math.sqrt(0.1 * 0.9 / rows)


def test_tokens_are_hidden_by_chance_and_visible_ones_have_less_noise() -> None:
    num_timesteps = 1000
    timesteps = torch.tensor([1, 250, 1000]).repeat_interleave(2000)[:, None]
    drawn = draw_token_timesteps(timesteps, 5, num_timesteps)
    assert drawn.shape == (6000, 5)
    drawn = drawn.view(3, -1)
    hidden = (drawn == num_timesteps).float().mean(dim=1)
    # Standard errors: below 0.005 for 10,000 tokens
    torch.testing.assert_close(hidden, torch.tensor([0.001, 0.25, 1.0]), atol=0.02, rtol=0)
    visible = drawn[drawn < num_timesteps]
    assert (visible.min(), visible.max()) == (1, 800)
    assert visible.float().mean().sub(400.5).abs() < 8


def test_a_generator_decides_what_is_drawn() -> None:
    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return draw_token_timesteps(draw_timesteps(40, 1, 1000, CPU, generator), 5, 1000, generator)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


# ---- Wrong tokens


def test_a_share_of_the_tokens_is_that_of_another_sequence_at_the_same_place() -> None:
    rows = 4000
    places = torch.arange(5) * rows
    targets = torch.arange(rows)[:, None] + places  # every token is of one row and place
    replaced = replace_by_wrong_tokens(targets, 0.1)
    is_wrong = replaced != targets
    # Standard error: 0.002 of 20,000 tokens
    assert abs(is_wrong.float().mean() - 0.1) < 0.01
    assert torch.equal(replaced // rows, targets // rows)
    assert (is_wrong.sum(1) == 0).float().mean().sub(0.9**5).abs() < 0.04  # each token for itself


@pytest.mark.parametrize(
    ("fields", "training", "has_wrong_tokens"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"timestep_sampling": "shared"}, True, False),
        ({"timestep_sampling": "shared", "mistaken_share": 0.1}, True, True),
        ({"corruption": "mask"}, True, False),
        ({"mistaken_share": 0}, True, False),
        ({"corruption": "mask", "mistaken_share": 0.1}, True, True),
    ],
    ids=str,
)
def test_training_reads_some_wrong_tokens(
    make_denoiser: MakeModel, targets: Tensor, fields: dict[str, Any], training: bool, has_wrong_tokens: bool
) -> None:
    denoiser = make_denoiser(**fields).train(training)
    right = targets.repeat_interleave(3, dim=0)
    noisy = [draw_noisy_targets(denoiser, targets).tokens for _ in range(10)]
    is_wrong = torch.stack([(tokens != right) & (tokens != MASK) for tokens in noisy])
    assert is_wrong.any() == has_wrong_tokens
    assert is_wrong.float().mean() < 0.2
    # With given timesteps nothing is drawn but the noise, for tests and users that compare two losses
    given_timesteps = draw_noisy_targets(denoiser, targets, timesteps=torch.ones(4, 3, dtype=torch.long)).tokens
    assert (given_timesteps == right)[given_timesteps != MASK].all()


# ---- Noisy targets


def test_noisy_targets_of_training_mode(make_denoiser: MakeModel, targets: Tensor) -> None:
    denoiser = make_denoiser(timestep_sampling="shared", condition_dropout=0.0)
    noisy = draw_noisy_targets(denoiser, targets)
    assert torch.equal(noisy.tokens, targets.repeat_interleave(3, dim=0))
    assert noisy.timesteps.shape == (12, 8) and noisy.noise.shape == (12, 8, 20)
    assert (noisy.timesteps == noisy.timesteps[:, :1]).all()  # one timestep for a sequence
    of_image = noisy.timesteps[:, 0].view(4, 3)
    assert all(len(set(row)) == 3 for row in of_image.tolist())
    assert (noisy.loss_weight == 1).all()
    assert len({tuple(row) for row in noisy.noise.flatten(1).tolist()}) == 12
    again = draw_noisy_targets(denoiser, targets)
    assert not torch.equal(again.noise, noisy.noise) and not torch.equal(again.timesteps, noisy.timesteps)


def test_a_timestep_for_each_token(make_denoiser: MakeModel, targets: Tensor) -> None:
    timesteps = draw_noisy_targets(make_denoiser(), targets).timesteps
    assert timesteps.shape == (12, 8) and (timesteps != timesteps[:, :1]).any()


def test_given_timesteps_and_noise(make_denoiser: MakeModel, targets: Tensor) -> None:
    denoiser = make_denoiser()
    timesteps, noise = torch.arange(1, 13).view(4, 3), torch.randn(4, 3, 8, 20)
    noisy = draw_noisy_targets(denoiser, targets, timesteps, noise)
    assert torch.equal(noisy.timesteps, torch.arange(1, 13)[:, None].expand(12, 8))
    assert torch.equal(noisy.noise, noise.flatten(0, 1))
    per_token = torch.randint(1, 21, (4, 3, 8))
    assert torch.equal(draw_noisy_targets(denoiser, targets, per_token).timesteps, per_token.flatten(0, 1))


@pytest.mark.parametrize("fields", [{}, {"timestep_sampling": "shared"}, {"corruption": "mask"}], ids=str)
def test_an_evaluation_draws_the_same_for_each_image_and_at_each_call(
    make_denoiser: MakeModel, targets: Tensor, fields: dict[str, Any]
) -> None:
    denoiser = make_denoiser(**fields).eval()
    state = torch.get_rng_state()
    noisy = draw_noisy_targets(denoiser, targets)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    alone = draw_noisy_targets(denoiser, targets[2:3])
    for together, row in zip(noisy, alone):
        assert (together is None) == (row is None)
        if row is not None:
            assert torch.equal(together[6:9], row)
    if noisy.noise is not None:
        assert torch.equal(noisy.noise[:3], noisy.noise[9:]) and not torch.equal(noisy.noise[0], noisy.noise[1])
    # Training draws anew
    assert not torch.equal(draw_noisy_targets(denoiser.train(), targets).timesteps, noisy.timesteps)


def test_loss_weighting(make_denoiser: MakeModel, targets: Tensor) -> None:
    timesteps = torch.arange(1, 13).view(4, 3)
    denoiser = make_denoiser(timestep_sampling="shared", loss_weighting="alpha_bar")
    weight = draw_noisy_targets(denoiser, targets, timesteps).loss_weight
    expected = (
        1 - torch.arange(1, 13) / 20
    )  # `projected` has visibility 1 - t / T, so alpha_bar is K v / (1 - v + K v)
    expected = 20 * expected / (1 - expected + 20 * expected)
    torch.testing.assert_close(weight, expected[:, None].expand(12, 8))
    assert (draw_noisy_targets(make_denoiser(), targets, timesteps).loss_weight == 1).all()


# ---- Masks


def test_masks_stand_where_the_noise_says(make_denoiser: MakeModel, targets: Tensor) -> None:
    denoiser = make_denoiser(
        corruption="mask", noise_schedule="linear", loss_weighting="alpha_bar", timesteps_per_image=1
    )
    noise = torch.tensor([0.1, 0.39, 0.41, 0.9, 0.0, 0.0, 0.0, 0.0]).view(1, 1, 8, 1)
    noisy = draw_noisy_targets(denoiser, targets[:1], torch.tensor([[12]]), noise)  # alpha_bar is 0.4
    assert noisy.noise is None
    assert noisy.tokens.tolist() == [[0, 1, MASK, MASK, 4, 5, 6, 7]]
    expected = torch.tensor([[0.0, 0.0, 0.4, 0.4, 0.0, 0.0, 0.0, 0.0]])  # masked places alone
    torch.testing.assert_close(noisy.loss_weight, expected)


@pytest.mark.parametrize("loss_weighting", ["none", "alpha_bar"])
def test_mask_rate_is_the_schedule(make_denoiser: MakeModel, loss_weighting: str) -> None:
    denoiser = make_denoiser(
        corruption="mask", noise_schedule="linear", loss_weighting=loss_weighting, timesteps_per_image=1
    )
    rows = 4000
    targets = torch.ones(rows, 8, dtype=torch.long)
    for timestep, visible in ((6, 0.7), (14, 0.3), (20, 0.0)):
        noisy = draw_noisy_targets(denoiser, targets, torch.full((rows, 1), timestep))
        is_mask = noisy.tokens == MASK
        standard_error = math.sqrt(visible * (1 - visible) / (rows * 8))
        assert abs(is_mask.float().mean().item() - (1 - visible)) <= 5 * standard_error
        assert (noisy.loss_weight[~is_mask] == 0).all()
        expected = torch.tensor(visible if loss_weighting == "alpha_bar" else 1.0).expand(int(is_mask.sum()))
        torch.testing.assert_close(noisy.loss_weight[is_mask], expected)


# ---- The loss


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon"])
def test_loss_by_hand(make_captioner: MakeModel, pixel_values: Tensor, targets: Tensor, prediction_type: str) -> None:
    """A loop over rows and places, with what is drawn given."""
    model = make_captioner(
        prediction_type=prediction_type,
        timestep_sampling="shared",
        loss_weighting="alpha_bar",
        label_smoothing=0.1 if prediction_type == "sample" else 0.0,
        condition_dropout=0.0,
    ).train()
    denoiser, prefix = model.model.denoiser, model.model.get_prefix(pixel_values)
    timesteps, noise = torch.randint(1, 21, (4, 3)), torch.randn(4, 3, 8, 20)
    token_weight = torch.rand(4, 8)
    outputs = diffusion_loss(denoiser, model.lm_head, prefix, targets, timesteps, noise, token_weight)
    alpha_bar = denoiser.schedule_on(CPU).alpha_bar
    losses = torch.zeros(4, 3, 8)
    for image in range(4):
        for repeat in range(3):
            timestep = timesteps[image, repeat]
            hidden = denoiser(
                targets[image][None], timestep.expand(1, 8), noise[image, repeat][None], prefix[image][None]
            ).last_hidden_state
            logits = model.lm_head(hidden)[0]
            torch.testing.assert_close(outputs.logits[image, repeat], logits, rtol=1e-4, atol=1e-4)
            for place in range(8):
                if prediction_type == "epsilon":
                    loss = (logits[place] - noise[image, repeat, place]).square().mean()
                else:
                    log_probs = logits[place].log_softmax(-1)
                    loss = -0.9 * log_probs[targets[image, place]] - 0.1 * log_probs.mean()
                losses[image, repeat, place] = alpha_bar[timestep] * token_weight[image, place] * loss
    torch.testing.assert_close(outputs.loss, losses.mean(), rtol=1e-4, atol=1e-5)
    tenth = (timesteps - 1) // 2
    for index in range(10):
        torch.testing.assert_close(
            outputs.loss_by_timestep[index, 0], losses[tenth == index].sum(), rtol=1e-4, atol=1e-4
        )


def test_sums_by_timestep_by_hand() -> None:
    losses, weight = torch.tensor([[2.0, 4.0], [8.0, 16.0]]), torch.tensor([[1.0, 0.5], [0.0, 2.0]])
    timesteps = torch.tensor([[1, 100], [101, 1000]])
    sums = sum_by_timestep(losses, weight, timesteps, 1000)
    expected = torch.zeros(10, 2)
    expected[0] = torch.tensor([4.0, 1.5])
    expected[9] = torch.tensor([32.0, 2.0])
    assert torch.equal(sums, expected)
