# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Samplers, guidance, choice and the denoising loop, with networks made by hand."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modeling_tdd.diffusion_tdd import mask_schedule
from modeling_tdd.samplers_tdd import (
    ConfidenceSampler,
    KnownTokens,
    NoisyTokens,
    Prediction,
    RenoiseSampler,
    UniformSampler,
    UnmaskingSampler,
    follows_end,
    inference_timesteps,
    most_confident,
    share_of_sure,
)
from modeling_tdd.sampling_tdd import (
    DenoisingStep,
    RandomNumbers,
    TokenChoice,
    apply_guidance,
    denoise,
    guidance_scales,
    select_rows,
    to_one,
)


CPU = torch.device("cpu")


def make_numbers(
    num_images: int = 1,
    num_samples: int = 1,
    num_tokens: int = 1,
    width: int | None = 3,
    seeds: Sequence[int] = (0,),
) -> RandomNumbers:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return RandomNumbers(generators, num_images, num_samples, num_tokens, width, CPU)


def known(tokens: list[list[int]], mask: list[list[int]]) -> KnownTokens:
    return KnownTokens(torch.tensor(tokens), torch.tensor(mask).bool())


def nothing_known(rows: int, num_tokens: int) -> KnownTokens:
    return KnownTokens.none(rows, num_tokens, CPU)


# ---- Timesteps


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


# ---- Guidance


def test_guidance_by_hand() -> None:
    conditional, unconditional = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0])
    assert apply_guidance(conditional, unconditional, 3.0).tolist() == [4.0, -3.0]
    assert apply_guidance(conditional, unconditional, 1.0).tolist() == conditional.tolist()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [5, 5, 5, 5, 5]), ("linear", [1, 2, 3, 4, 5]), ("cosine", [1, 1.585786438, 3, 4.414213562, 5])],
)
def test_guidance_schedule_by_hand(schedule: str, expected: list[float]) -> None:
    """From 1 to 5; a quarter of the cosine's way is (1 - cos(pi / 4)) / 2."""
    assert guidance_scales(schedule, 5.0, 5) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 3, 10, 50])
def test_a_guidance_schedule_rises_from_1_to_the_scale(schedule: str, steps: int) -> None:
    scales = guidance_scales(schedule, 3.0, steps)
    assert len(scales) == steps and scales[0] == 1 and scales[-1] == 3
    assert all(before < after for before, after in zip(scales, scales[1:]))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_loop_of_one_step_has_the_whole_scale(schedule: str) -> None:
    assert guidance_scales(schedule, 3.0, 1) == [3.0]


# ---- Choice


def test_to_one_argmax() -> None:
    assert to_one(torch.tensor([[[0.1, 2.0, 1.0], [3.0, 0.0, -1.0]]])).tolist() == [[1, 0]]


def test_to_one_multinomial_follows_the_softmax() -> None:
    """Pearson's chi-square with 4 degrees of freedom: 23.5 is passed once in 10,000 draws of the test."""
    draws = 100_000
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    tokens = to_one(logits.expand(draws, 5), torch.rand(draws))
    expected = draws * logits.softmax(-1)
    observed = torch.bincount(tokens, minlength=5)
    assert ((observed - expected).square() / expected).sum() < 23.5


def test_to_one_multinomial_at_the_edges() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(4, 1)
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    tokens = to_one(logits, torch.tensor([0.0, 0.49, 0.51, below_one]))
    assert tokens.tolist() == [1, 1, 2, 2]  # never a category without probability


def test_a_final_token_is_chosen_whatever_the_logits_say() -> None:
    is_final = torch.tensor([[True, False]])
    state = NoisyTokens(torch.tensor([[7, 8]]), torch.ones(1, 2), None, is_final, is_final)
    logits = torch.zeros(1, 2, 9)
    logits[..., 3] = 1.0
    choose = TokenChoice(state, None)
    assert choose(logits).tolist() == [[7, 3]]
    assert choose(logits[:, 0], 0).tolist() == [7] and choose(logits[:, 1], 1).tolist() == [3]
    # Each place draws by its own number
    choose = TokenChoice(state, torch.tensor([[0.0, 0.999]]))
    assert choose(logits).tolist() == [[7, 8]] and choose(logits[:, 1], 1).tolist() == [8]


# ---- Random numbers


def draw_rows(numbers: RandomNumbers, num_steps: int = 2) -> list[Tensor]:
    """The numbers of all rows in all steps, normal and uniform, of shape (steps, rows, N, ...)."""
    drawn = numbers.draw(num_steps, is_multinomial=True)
    return [torch.stack([numbers.of_rows(values, step) for step in range(num_steps)]) for values in drawn]


def test_one_generator_gives_all_images_the_same_numbers_and_each_sample_its_own() -> None:
    normal, uniform = draw_rows(make_numbers(num_images=3, num_samples=2, num_tokens=4))
    assert normal.shape == (2, 6, 4, 3) and uniform.shape == (2, 6, 4)
    for drawn in (normal, uniform):
        assert torch.equal(drawn[:, 0:2], drawn[:, 2:4]) and torch.equal(drawn[:, 0:2], drawn[:, 4:6])
        assert not torch.equal(drawn[:, 0], drawn[:, 1]) and not torch.equal(drawn[0], drawn[1])


def test_numbers_are_drawn_in_the_order_of_the_steps() -> None:
    """So a seed's draws do not depend on how many steps there are."""
    numbers, generator = make_numbers(num_tokens=4), torch.Generator().manual_seed(0)
    normal, uniform = numbers.draw(3, is_multinomial=True)
    for step in range(3):
        assert torch.equal(normal[step], torch.randn(1, 4, 3, generator=generator))
        assert torch.equal(uniform[step], torch.rand(1, 4, generator=generator))


def test_what_is_not_needed_is_not_drawn() -> None:
    numbers = make_numbers(width=None)
    assert numbers.draw(3) == (None, None) and numbers.of_rows(None, 0) is None
    assert torch.equal(numbers.generators[0].get_state(), torch.Generator().manual_seed(0).get_state())


def test_a_generator_for_each_image_gives_each_its_own_numbers_whatever_the_batch() -> None:
    together = draw_rows(make_numbers(num_images=3, num_samples=2, num_tokens=4, seeds=(5, 6, 7)))
    alone = draw_rows(make_numbers(num_images=1, num_samples=2, num_tokens=4, seeds=(6,)))
    for of_all, of_one in zip(together, alone):
        assert torch.equal(of_all[:, 2:4], of_one)
        assert len({tuple(row.flatten().tolist()) for row in of_all.flatten(0, 1)}) == 12


@pytest.mark.parametrize("seeds", [(0,), (3, 4, 5)])
def test_rows_that_stay_have_what_they_would_have_had(seeds: Sequence[int]) -> None:
    all_rows, some_rows = (make_numbers(num_images=3, num_samples=2, seeds=seeds) for _ in range(2))
    drawn, same = all_rows.draw(2)[0], some_rows.draw(2)[0]
    keep = torch.tensor([True, False, False, True, True, False])
    some_rows.select(keep)
    assert torch.equal(some_rows.of_rows(same, 0), all_rows.of_rows(drawn, 0)[keep])
    some_rows.select(torch.tensor([False, True, True]))
    assert torch.equal(some_rows.of_rows(same, 1), all_rows.of_rows(drawn, 1)[[3, 4]])


def test_rows_of_nested_tensors_are_selected() -> None:
    keep = torch.tensor([False, True])
    selected = select_rows((torch.tensor([1, 2]), None, ((torch.tensor([[3], [4]]),),)), keep)
    assert selected[0].tolist() == [2] and selected[1] is None and selected[2][0][0].tolist() == [[4]]


# ---- Renoising


def at(timestep: int) -> Tensor:
    return torch.tensor(timestep)


def test_renoising_starts_from_pure_noise_and_forgets_the_old_state() -> None:
    sampler, noise = RenoiseSampler(20), torch.randn(2, 2, 2, 3)
    start = sampler.start(nothing_known(2, 2), noise[0])
    assert start.timesteps.tolist() == [[20, 20]] * 2 and not start.is_final.any()
    prediction = Prediction(torch.tensor([[2, 1], [0, 2]]), torch.zeros(2, 2))
    state = sampler.step(start, prediction, at(15), noise[1])
    assert torch.equal(state.tokens, prediction.tokens) and state.timesteps.tolist() == [[15, 15]] * 2
    assert torch.equal(start.noise, noise[0]) and torch.equal(state.noise, noise[1])
    assert sampler.timesteps_of_tokens(4) == [20, 15, 10, 5]


def test_known_tokens_are_renoised_and_final() -> None:
    given_tokens = known([[1, 0], [0, 2]], [[1, 0], [0, 1]])
    sampler = RenoiseSampler(20)
    start = sampler.start(given_tokens, torch.randn(2, 2, 3))
    assert start.timesteps.tolist() == [[20, 20]] * 2  # pure noise: they appear as t falls
    assert torch.equal(start.is_final, given_tokens.mask)
    state = sampler.step(start, Prediction(torch.tensor([[1, 2], [0, 2]]), torch.zeros(2, 2)), at(5), start.noise)
    assert torch.equal(state.is_final, given_tokens.mask)


def test_a_renoised_row_is_final_once_all_its_tokens_are_sure() -> None:
    sampler = RenoiseSampler(20, confidence_threshold=0.9)
    start = sampler.start(known([[1, 0], [0, 0], [0, 0]], [[1, 0], [0, 0], [0, 0]]), None)
    log_probs = torch.tensor([[0.1, 0.95], [0.95, 0.89], [0.9001, 0.95]]).log()
    state = sampler.step(start, Prediction(torch.zeros(3, 2, dtype=torch.long), log_probs), at(5), None)
    assert state.is_final.tolist() == [[True, True], [False, False], [True, True]]


# ---- Confidence


def test_the_surest_tokens_are_settled_and_may_be_revised() -> None:
    """T = 100: settled tokens are at 0.02 T, all others at T."""
    sampler = ConfidenceSampler(100)
    state = sampler.start(nothing_known(1, 4), None)
    assert state.timesteps.tolist() == [[100] * 4]
    prediction = Prediction(torch.tensor([[1, 2, 0, 1]]), torch.tensor([[-0.1, -3.0, -0.5, -0.2]]))
    state = sampler.step(state, prediction, at(50), None)
    assert state.timesteps.tolist() == [[2, 100, 100, 2]] and not state.is_final.any()
    # Others are settled where the network has become surer of them
    prediction = Prediction(torch.tensor([[1, 2, 0, 1]]), torch.tensor([[-4.0, -0.1, -0.2, -3.0]]))
    state = sampler.step(state, prediction, at(50), None)
    assert state.timesteps.tolist() == [[100, 2, 2, 100]]
    state = sampler.step(state, prediction, at(25), None)
    assert state.timesteps.tolist() == [[100, 2, 2, 2]]
    assert sorted(sampler.timesteps_of_tokens(4)) == [2, 100]


def test_with_a_threshold_sure_tokens_are_settled_for_good() -> None:
    """Two of four places are as sure as 0.9, whatever the timestep; then the surest of the others has its turn."""
    sampler = ConfidenceSampler(100, confidence_threshold=0.9)
    state = sampler.start(nothing_known(1, 4), None)
    tokens = torch.tensor([[1, 2, 0, 1]])
    state = sampler.step(state, Prediction(tokens, torch.tensor([[0.91, 0.2, 0.3, 0.95]]).log()), at(99), None)
    assert state.is_final.tolist() == [[True, False, False, True]] and state.timesteps.tolist() == [[2, 100, 100, 2]]
    state = sampler.step(state, Prediction(tokens, torch.tensor([[0.1, 0.2, 0.3, 0.1]]).log()), at(1), None)
    assert state.is_final.tolist() == [[True, False, True, True]]


def test_known_tokens_have_little_noise_from_the_start() -> None:
    sampler = ConfidenceSampler(100)
    state = sampler.start(known([[2, 0, 0]], [[1, 0, 0]]), None)
    assert state.tokens[0, 0] == 2 and state.timesteps.tolist() == [[2, 100, 100]]
    assert state.is_final.tolist() == [[True, False, False]]
    prediction = Prediction(torch.tensor([[2, 1, 0]]), torch.tensor([[-9.0, -1.0, -2.0]]))
    state = sampler.step(state, prediction, at(50), None)
    assert state.timesteps.tolist() == [[2, 2, 100]]  # one of two free places


def test_a_settled_token_has_noise_of_at_least_the_first_timestep() -> None:
    assert ConfidenceSampler(10).start(known([[1]], [[1]]), None).timesteps.tolist() == [[1]]


# ---- Masks


MASK = 5


def test_masks_give_way_in_the_order_of_confidence() -> None:
    """Four places of which 2, then 3, then 4 are to be visible."""
    sampler = UnmaskingSampler(torch.tensor([1.0, 0.75, 0.5, 0.0]), MASK)
    state = sampler.start(nothing_known(1, 4))
    assert state.tokens.tolist() == [[MASK] * 4] and state.noise is None
    assert state.timesteps.tolist() == [[3] * 4] and not state.is_final.any()
    log_probs = torch.tensor([[-0.1, -3.0, -0.5, -0.2]])
    state = sampler.step(state, Prediction(torch.tensor([[1, 2, 3, 4]]), log_probs), at(2))
    assert state.tokens.tolist() == [[1, MASK, MASK, 4]] and state.timesteps.tolist() == [[2] * 4]
    assert state.is_final.tolist() == [[True, False, False, True]]
    # What is visible stays, however sure the network now is of other places
    log_probs = torch.tensor([[-9.0, -1.0, -2.0, -9.0]])
    state = sampler.step(state, Prediction(torch.tensor([[1, 2, 3, 4]]), log_probs), at(1))
    assert state.tokens.tolist() == [[1, 2, MASK, 4]]
    state = sampler.step(state, Prediction(torch.tensor([[1, 2, 3, 4]]), log_probs), at(0))
    assert state.tokens.tolist() == [[1, 2, 3, 4]] and state.is_final.all()


def test_sure_tokens_are_unmasked_before_their_turn() -> None:
    sampler = UnmaskingSampler(torch.tensor([1.0, 0.75, 0.5, 0.0]), MASK, confidence_threshold=0.9)
    prediction = Prediction(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0.95, 0.92, 0.3, 0.99]]).log())
    state = sampler.step(sampler.start(nothing_known(1, 4)), prediction, at(2))
    assert state.tokens.tolist() == [[1, 2, MASK, 4]]


def test_known_tokens_are_no_masks() -> None:
    sampler = UnmaskingSampler(torch.tensor([1.0, 0.5, 0.0]), MASK)
    state = sampler.start(known([[3, 0, 0]], [[1, 0, 0]]))
    assert state.tokens.tolist() == [[3, MASK, MASK]] and state.is_final.tolist() == [[True, False, False]]
    prediction = Prediction(torch.tensor([[3, 1, 2]]), torch.tensor([[-9.0, -2.0, -1.0]]))
    state = sampler.step(state, prediction, at(1))
    assert state.tokens.tolist() == [[3, MASK, 2]]  # one of two free places


@settings(deadline=None, max_examples=40)
@given(data=st.data(), num_timesteps=st.integers(1, 30), length=st.integers(1, 12))
def test_mask_loop_unmasks_everything(data: st.DataObject, num_timesteps: int, length: int) -> None:
    sampler = UnmaskingSampler(mask_schedule("cosine", num_timesteps), MASK)
    steps = data.draw(st.integers(1, num_timesteps))
    state, masks_left = sampler.start(nothing_known(2, length)), [length]
    for timestep in inference_timesteps(num_timesteps, steps)[1:]:
        tokens = torch.where(state.is_final, state.tokens, torch.randint(5, (2, length)))
        state = sampler.step(state, Prediction(tokens, torch.randn(2, length)), at(timestep))
        masks_left.append((state.tokens == MASK).sum(1).max().item())
    assert masks_left == sorted(masks_left, reverse=True)
    assert masks_left[-1] == 0


# ---- Random tokens


def test_random_tokens_give_way_to_the_prediction_as_t_falls() -> None:
    sampler = UniformSampler(torch.linspace(1, 0, 11), 5)
    given_tokens = known([[3] + [0] * 999], [[1] + [0] * 999])
    noise = torch.randn(3, 1, 1000, 2)
    state = sampler.start(given_tokens, noise[0])
    assert state.timesteps.unique().item() == 10 and state.noise is None and state.tokens[0, 0] == 3
    assert (torch.bincount(state.tokens[0], minlength=5) > 140).all()  # of 1,000, 200 each
    prediction = Prediction(torch.full((1, 1000), 4).index_fill(1, at(0), 3), torch.zeros(1, 1000))
    state = sampler.step(state, prediction, at(5), noise[1])
    assert state.timesteps.unique().item() == 5 and state.tokens[0, 0] == 3
    assert 0.53 < (state.tokens == 4).float().mean() < 0.67  # a half, and a fifth of the others
    state = sampler.step(state, prediction, at(0), noise[2])
    assert (state.tokens[0, 1:] == 4).all()


# ---- Which places are settled first


def state_of(given_mask: list[int], is_final: list[int] | None = None) -> NoisyTokens:
    """A state of one row, of which only these masks matter."""
    is_given, nothing = torch.tensor([given_mask]).bool(), torch.zeros(1, len(given_mask), dtype=torch.long)
    return NoisyTokens(
        nothing, nothing, None, is_given, is_given if is_final is None else torch.tensor([is_final]).bool()
    )


def test_words_and_padding_are_settled_in_the_same_share() -> None:
    """Padding, of places 3 to 6, is the surest; still two of four words' and padding's places are settled by half."""
    log_probs = torch.tensor([[-3.0, -1.0, -2.0, -0.4, -0.1, -0.2, -0.3]])
    half, nothing = torch.tensor(0.5), torch.zeros(1, 7).bool()
    beyond_end = torch.tensor([[False, False, False, True, True, True, True]])
    settled = most_confident(log_probs, half, state_of([0] * 7), nothing)
    assert settled.tolist() == [[False, False, False, True, True, True, True]]
    settled = most_confident(log_probs, half, state_of([0] * 7), beyond_end)
    assert settled.tolist() == [[False, True, True, False, True, True, False]]  # 1.5 rounds to the even 2


def test_given_places_are_settled_beside_the_share_of_the_others_and_final_ones_come_first() -> None:
    log_probs = torch.tensor([[-9.0, -1.0, -2.0, -3.0, -4.0]])
    state, nothing = state_of([1, 0, 0, 0, 0]), torch.zeros(1, 5).bool()
    for share, expected in ((0.5, [1, 1, 1, 0, 0]), (0.0, [1, 0, 0, 0, 0]), (1.0, [1] * 5)):
        settled = most_confident(log_probs, torch.tensor(share), state, nothing)
        assert settled.tolist() == [[bool(place) for place in expected]]
    state = state_of([1, 0, 0, 0, 0], is_final=[1, 0, 0, 0, 1])
    settled = most_confident(log_probs, torch.tensor(0.5), state, nothing)
    assert settled.tolist() == [[True, True, False, False, True]]


def test_share_of_sure_words_by_hand() -> None:
    """Place 0 is given, and place 5 padding: four words."""
    log_probs, state = torch.tensor([[0.1, 0.95, 0.5, 0.91, 0.2, 0.99]]).log(), state_of([1, 0, 0, 0, 0, 0])
    beyond_end = torch.tensor([[False] * 5 + [True]])
    assert share_of_sure(log_probs, 0.9, state, beyond_end).tolist() == [[0.5]]
    assert share_of_sure(log_probs, 0.99, state, beyond_end).tolist() == [[0.25]]  # the likeliest alone
    # Final words count, and beside them the likeliest of the others
    state = state_of([1, 0, 0, 0, 0, 0], is_final=[1, 1, 0, 0, 1, 0])
    assert share_of_sure(log_probs, 0.99, state, beyond_end).tolist() == [[0.75]]
    # No word is open, or there is none
    assert share_of_sure(log_probs, 0.99, state_of([1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]), beyond_end).item() == 1
    assert share_of_sure(log_probs, 0.99, state_of([1] * 5 + [0]), beyond_end).item() == 1


def test_places_behind_the_end() -> None:
    tokens = torch.tensor([[5, 2, 7, 2], [5, 0, 7, 7], [5, 6, 7, 2]])
    assert follows_end(tokens, (2, 0)).tolist() == [
        [False, False, True, True],
        [False, False, True, True],
        [False, False, False, False],
    ]
    assert not follows_end(tokens, ()).any()


@pytest.mark.parametrize("kind", ["confidence", "unmasking"])
def test_samplers_settle_words_and_padding_in_the_same_share(kind: str) -> None:
    """The end, 2, stands at place 1: two places behind it and two up to it, of which half is settled each."""
    if kind == "confidence":
        sampler = ConfidenceSampler(100, (2, 0))
    else:
        sampler = UnmaskingSampler(torch.linspace(1, 0, 101), MASK, (2, 0))
    prediction = Prediction(torch.tensor([[4, 2, 0, 0]]), torch.tensor([[-3.0, -4.0, -0.1, -0.2]]))
    state = sampler.step(sampler.start(nothing_known(1, 4), None), prediction, at(50), None)
    settled = state.timesteps == 2 if kind == "confidence" else state.is_final
    assert settled.tolist() == [[True, False, True, False]]


# ---- The loop


class RecordingNetwork:
    """Predicts the same logits in every state, 0 without the condition, and remembers the states."""

    def __init__(self, logits: Tensor):
        self.logits = logits
        self.states: list[NoisyTokens] = []
        self.scales: list[float | None] = []
        self.places: list[Tensor | None] = []
        self.timesteps: list[int] = []

    def prepare(self, rows: int, timesteps: Tensor, noise: Tensor | None, is_guided: bool) -> Tensor | None:
        self.timesteps = timesteps.tolist()
        return noise

    def __call__(self, state: NoisyTokens, guidance_scale: Tensor | None, places: Tensor | None = None) -> Tensor:
        self.states.append(state)
        self.scales.append(None if guidance_scale is None else guidance_scale.item())
        self.places.append(places)
        logits = self.logits.expand(len(state.tokens), -1, -1)
        logits = logits if guidance_scale is None else apply_guidance(logits, torch.zeros_like(logits), guidance_scale)
        return logits if places is None else logits[places]

    def select(self, keep: Tensor) -> None:
        if len(self.logits) > 1:
            self.logits = self.logits[keep]


def run_renoising(
    network: RecordingNetwork, rows: int, num_tokens: int, scales: Sequence[float], **settings: object
) -> list[DenoisingStep]:
    """The paper's loop with T = 10 and 3 categories."""
    numbers = make_numbers(num_images=rows, num_tokens=num_tokens)
    return list(denoise(network, RenoiseSampler(10), numbers, nothing_known(rows, num_tokens), scales, **settings))


def test_loop_by_hand() -> None:
    network = RecordingNetwork(torch.tensor([[[0.0, 5.0, 1.0], [2.0, 0.0, 1.0]]]))
    steps = run_renoising(network, rows=2, num_tokens=2, scales=[1.0] * 4)
    # One call a step, none at t = 0, without guidance
    assert [state.timesteps.unique().tolist() for state in network.states] == [[10], [8], [5], [3]]
    assert [step.timestep for step in steps] == network.timesteps == [10, 8, 5, 3]
    assert network.scales == [None] * 4
    for step in steps:
        assert step.prediction.tokens.tolist() == [[1, 0], [1, 0]] and step.rows.tolist() == [0, 1]
        log_probs = torch.tensor([5.0 - math.log(1 + math.exp(5) + math.e), 2.0 - math.log(math.exp(2) + 1 + math.e)])
        torch.testing.assert_close(step.prediction.log_probs, log_probs.expand(2, 2))
    # The states: pure noise, then the predicted tokens with fresh noise of their timestep
    noise, _ = make_numbers(num_tokens=2).draw(4)
    for step, state in enumerate(network.states):
        assert torch.equal(state.noise, noise[step].expand(2, -1, -1))
    assert all(state.tokens.tolist() == [[1, 0], [1, 0]] for state in network.states[1:])


def test_guidance_within_the_loop() -> None:
    logits = torch.tensor([[[1.0, 0.0, -1.0]]])
    network = RecordingNetwork(logits)
    steps = run_renoising(network, rows=1, num_tokens=1, scales=[1.0, 2.0, 3.0])
    assert network.scales == [1.0, 2.0, 3.0]
    for step, scale in zip(steps, (1, 2, 3)):
        torch.testing.assert_close(step.logits, scale * logits)


def test_a_multinomial_loop_draws_the_same_in_every_image_and_anew_in_every_step() -> None:
    network = RecordingNetwork(torch.zeros(1, 16, 3))
    numbers = make_numbers(num_images=3, num_samples=2, num_tokens=16)
    known_tokens = nothing_known(6, 16)
    steps = list(
        denoise(network, RenoiseSampler(10), numbers, known_tokens, [1.0] * 3, sampling_strategy="multinomial")
    )
    for step in steps:
        tokens = step.prediction.tokens
        assert torch.equal(tokens[0:2], tokens[2:4]) and not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(steps[0].prediction.tokens, steps[1].prediction.tokens)


def test_loop_of_masks_shows_the_network_ever_fewer_masks() -> None:
    """The first place is the surest: it is visible in the second call, and in the last only one mask is left."""
    logits = torch.zeros(1, 4, 5)
    logits[0, torch.arange(4), torch.tensor([3, 1, 4, 0])] = torch.tensor([9.0, 5.0, 7.0, 3.0])
    network = RecordingNetwork(logits)
    sampler = UnmaskingSampler(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), MASK)
    steps = list(denoise(network, sampler, make_numbers(width=None), nothing_known(1, 4), [1.0] * 4))
    assert [state.tokens.tolist() for state in network.states] == [
        [[MASK, MASK, MASK, MASK]],
        [[3, MASK, MASK, MASK]],
        [[3, MASK, 4, MASK]],
        [[3, 1, 4, MASK]],
    ]
    assert steps[-1].prediction.tokens.tolist() == [[3, 1, 4, 0]]


def test_known_tokens_are_in_every_prediction() -> None:
    network = RecordingNetwork(torch.tensor([[[0.0, 5.0, 1.0]]]).expand(1, 2, 3))
    numbers = make_numbers(num_tokens=2)
    steps = list(denoise(network, RenoiseSampler(10), numbers, known([[2, 0]], [[1, 0]]), [1.0] * 3))
    assert all(step.prediction.tokens.tolist() == [[2, 1]] for step in steps)


def test_processed_logits_decide() -> None:
    network = RecordingNetwork(torch.tensor([[[0.0, 5.0, 1.0]]]))
    seen = []

    def forbid_one(rows: Tensor, logits: Tensor, choose: TokenChoice) -> Tensor:
        seen.append((rows.tolist(), choose(logits).tolist()))
        return logits.index_fill(-1, torch.tensor([1]), -torch.inf)

    steps = run_renoising(network, rows=2, num_tokens=1, scales=[1.0] * 2, process_logits=forbid_one)
    assert seen == [([0, 1], [[1], [1]])] * 2
    assert all(step.prediction.tokens.tolist() == [[2], [2]] for step in steps)


def test_settled_rows_leave_the_loop() -> None:
    """Row 0 always predicts the same; the others' tokens are drawn from uniform logits, and change."""
    logits = torch.zeros(3, 40, 3)
    logits[0, :, 1] = 50.0
    network = RecordingNetwork(logits)
    steps = run_renoising(
        network, rows=3, num_tokens=40, scales=[1.0] * 5, sampling_strategy="multinomial", stability_threshold=2
    )
    assert [step.rows.tolist() for step in steps] == [[0, 1, 2]] * 3 + [[1, 2]] * 2
    assert [len(state.tokens) for state in network.states] == [3, 3, 3, 2, 2]
    full = run_renoising(
        RecordingNetwork(logits), rows=3, num_tokens=40, scales=[1.0] * 5, sampling_strategy="multinomial"
    )
    for step, whole in zip(steps, full):
        assert torch.equal(step.prediction.tokens, whole.prediction.tokens[step.rows])


def test_a_loop_ends_when_all_rows_have_settled() -> None:
    network = RecordingNetwork(torch.tensor([[[0.0, 5.0, 1.0]]]))
    steps = run_renoising(network, rows=2, num_tokens=1, scales=[1.0] * 10, stability_threshold=3)
    assert [step.timestep for step in steps] == [10, 9, 8, 7]


def test_only_logits_of_open_places_are_computed_where_nothing_reads_the_others() -> None:
    """Masks: what is visible is final. The result is that of a loop with all logits."""
    logits = torch.zeros(1, 4, 5)
    logits[0, torch.arange(4), torch.tensor([3, 1, 4, 0])] = torch.tensor([9.0, 5.0, 7.0, 3.0])
    sampler, networks, results = UnmaskingSampler(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), MASK), [], []
    for all_logits in (True, False):
        networks.append(RecordingNetwork(logits))
        arguments = (make_numbers(num_images=2, width=None), known([[0, 0, 2, 0]] * 2, [[0, 0, 1, 0]] * 2), [1.0] * 4)
        results.append(list(denoise(networks[-1], sampler, *arguments, all_logits=all_logits)))
    assert networks[0].places == [None] * 4
    assert [places.sum().item() for places in networks[1].places] == [6, 4, 2, 2]
    for whole, part in zip(*results):
        assert part.logits is None and torch.equal(part.prediction.tokens, whole.prediction.tokens)
    assert results[1][-1].prediction.tokens.tolist() == [[3, 1, 2, 0]] * 2


@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
def test_rows_that_are_sure_leave_the_loop(corruption: str) -> None:
    """Row 0 is sure of all places at once, row 1 of one of three: then the others follow one by one."""
    logits = torch.zeros(2, 3, 5)
    logits[0, :, 1], logits[1, 0, 2], logits[1, 2, 3] = 50.0, 50.0, 1.0
    network, numbers = RecordingNetwork(logits), make_numbers(num_images=2, num_tokens=3)
    sampler = ConfidenceSampler(10, confidence_threshold=0.9)
    if corruption == "mask":
        sampler = UnmaskingSampler(torch.linspace(1, 0, 11), MASK, confidence_threshold=0.9)
    steps = list(denoise(network, sampler, numbers, nothing_known(2, 3), [1.0] * 10, all_logits=False))
    assert [step.rows.tolist() for step in steps] == [[0, 1], [1], [1]]
    assert [places.sum().item() for places in network.places] == [6, 2, 1]
    assert steps[0].prediction.tokens.tolist() == [[1, 1, 1], [2, 0, 3]]
    assert steps[-1].prediction.tokens.tolist() == [[2, 0, 3]]


def test_what_follows_a_settled_end_is_settled_padding() -> None:
    """The end, 2, stands at place 1. Once it is settled, so is all behind it; behind padding, 0, nothing is."""
    sampler, tokens = ConfidenceSampler(100, (2, 0), confidence_threshold=0.9), torch.tensor([[4, 2, 0, 3, 0]])
    start = sampler.start(nothing_known(1, 5), None)
    unsure = Prediction(tokens, torch.tensor([[0.95, 0.5, 0.99, 0.4, 0.98]]).log())
    state = sampler.step(start, unsure, at(50), None)
    assert state.is_final.tolist() == [[True, False, True, False, True]]  # half of the words, and of the padding
    state = sampler.step(
        state, unsure._replace(log_probs=torch.tensor([[0.9, 0.95, 0.9, 0.4, 0.9]]).log()), at(50), None
    )
    assert state.is_final.all() and state.tokens.tolist() == [[4, 2, 0, 0, 0]]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), length=st.integers(1, 12), threshold=st.floats(0.01, 1.0))
def test_adaptive_rows_end_within_as_many_steps_as_they_have_places(
    data: st.DataObject, length: int, threshold: float
) -> None:
    """Whatever is predicted: the network of this test draws its logits anew in each step, ends among them."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    sampler = ConfidenceSampler(100, (2, 0), confidence_threshold=threshold)
    given_mask = torch.rand(3, length, generator=generator) < 0.3
    state = sampler.start(KnownTokens(torch.randint(5, (3, length), generator=generator), given_mask), None)
    for _ in range(length + 1):
        tokens = torch.where(state.is_final, state.tokens, torch.randint(5, (3, length), generator=generator))
        before = state
        state = sampler.step(state, Prediction(tokens, torch.rand(3, length, generator=generator).log()), at(5), None)
        assert (state.is_final | ~before.is_final).all()  # what is final stays so
    assert state.is_final.all()
