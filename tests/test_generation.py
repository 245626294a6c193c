# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Tests of `generate`: hand-made logits, determinism, early stopping, fixed tokens, and what it refuses."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from modeling_tdd import TDDForCaptioning, TDDGenerationConfig
from modeling_tdd.samplers_tdd import (
    NoisyTokens,
)
from modeling_tdd.sampling_tdd import (
    apply_guidance,
)


MakeCaptioner = Callable[..., TDDForCaptioning]
PAD, EOS = 0, 2
CORRUPTIONS = ("gaussian", "mask", "uniform")


class Script:
    """In the place of a captioner's network: its logits are a table of shape (rows, steps, N, K)."""

    def __init__(self, model: TDDForCaptioning, logits: Tensor):
        self.logits = logits
        self.rows = torch.arange(len(logits))
        self.seen_rows: list[list[int]] = []
        self.states: list[NoisyTokens] = []
        model.make_network = lambda prefix: self

    def prepare(self, rows: int, timesteps: Tensor, noise: Tensor | None, is_guided: bool) -> Tensor | None:
        return noise

    def __call__(self, state: NoisyTokens, guidance_scale: Tensor | None, places: Tensor | None = None) -> Tensor:
        self.states.append(state)
        self.seen_rows.append(self.rows.tolist())
        logits = self.logits[self.rows, len(self.states) - 1]
        return logits if places is None else logits[places]

    def select(self, keep: Tensor) -> None:
        self.rows = self.rows[keep]


class UniformNetwork:
    """Logits of 0 for any number of rows, so that the random numbers alone decide."""

    def __init__(self, model: TDDForCaptioning):
        self.shape = (model.config.max_position_embeddings, model.config.vocab_size)
        model.make_network = lambda prefix: self

    def prepare(self, rows: int, timesteps: Tensor, noise: Tensor | None, is_guided: bool) -> Tensor | None:
        return noise

    def __call__(self, state: NoisyTokens, guidance_scale: Tensor | None, places: Tensor | None = None) -> Tensor:
        logits = torch.zeros(len(state.tokens), *self.shape)
        return logits if places is None else logits[places]


def script_tokens(model: TDDForCaptioning, drafts: Sequence, strength: float = 5.0) -> Script:
    """A script whose argmax at each step is `drafts`, of shape (rows, steps, N)."""
    one_hot = torch.nn.functional.one_hot(torch.tensor(drafts), model.config.vocab_size)
    return Script(model, strength * one_hot.float())


def script_logits(
    model: TDDForCaptioning, places: list[dict[int, float]], rows: int = 1, steps: int = 1, rest: float = -20.0
) -> Script:
    """A script of the same logits at each step: a dictionary from tokens to logits a place, and `rest` for others."""
    logits = torch.full((len(places), model.config.vocab_size), rest)
    for place, given in enumerate(places):
        for token, value in given.items():
            logits[place, token] = value
    return Script(model, logits.expand(rows, steps, -1, -1))


def images(rows: int) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(7))


# ---- Hand-made logits


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_result_of_hand_made_logits(make_captioner: MakeCaptioner, corruption: str) -> None:
    model = make_captioner(corruption=corruption, max_position_embeddings=4)
    script_tokens(model, [[[5, 6, EOS, 9]], [[7, EOS, 8, PAD]], [[7, PAD, 8, EOS]]])
    outputs = model.generate(images(3), num_inference_steps=1, return_dict_in_generate=True)
    assert outputs.sequences.tolist() == [[5, 6, EOS, PAD], [7, EOS, PAD, PAD], [7, PAD, PAD, PAD]]
    log_prob = math.log(math.exp(5) / (math.exp(5) + 19))  # one token of 20 has the logit 5, the others 0
    expected = torch.tensor([[log_prob] * 3 + [0.0], [log_prob] * 2 + [0.0] * 2, [log_prob] * 2 + [0.0] * 2])
    torch.testing.assert_close(outputs.log_probs, expected)
    assert outputs.num_steps.tolist() == [1, 1, 1]
    assert outputs.trajectory is None


def test_sequences_alone_by_default(make_captioner: MakeCaptioner) -> None:
    model = make_captioner()
    sequences = model.generate(images(2))
    assert sequences.dtype == torch.int64 and sequences.shape == (2, 8)
    outputs = model.generate(images(2), return_dict_in_generate=True)
    assert torch.equal(outputs.sequences, sequences)


def test_guidance_by_hand(make_captioner: MakeCaptioner) -> None:
    """One step from t = T, where every row reads the same noise."""
    model, pixel_values = make_captioner(), images(3)
    with torch.no_grad():
        noise = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(3)).expand(3, -1, -1)
        tokens, timesteps = torch.randint(20, (3, 8)), torch.full((3, 8), 20)
        conditional = model(pixel_values, tokens=tokens, timesteps=timesteps, noise=noise).logits
        unconditional = model.lm_head(model.model.denoiser(tokens, timesteps, noise).last_hidden_state)
    outputs = model.generate(
        pixel_values,
        num_inference_steps=1,
        guidance_scale=3.0,
        seed=3,
        return_dict_in_generate=True,
        output_trajectory=True,
    )
    expected = apply_guidance(conditional, unconditional, 3.0).log_softmax(-1)
    assert torch.equal(outputs.trajectory.tokens[:, 0], expected.argmax(-1))
    torch.testing.assert_close(outputs.trajectory.log_probs[:, 0], expected.max(-1).values, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, conditional.log_softmax(-1), atol=0.1)


# ---- Determinism and batches

RISING = {"guidance_schedule": "linear"}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize(
    ("prompt", "call"),
    [
        (None, {}),
        (None, {"stability_threshold": 2, "num_inference_steps": 12}),
        ("left", {"guidance_scale": 2.0, "guidance_schedule": "linear"}),
        ("right", {"num_return_sequences": 2}),
        ("left", {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2}),
        ("right", {"stability_threshold": 2, "num_inference_steps": 12, "guidance_scale": 1.5}),
        # Without guidance in the first step: the null condition is first read when rows may have left
        (None, {"stability_threshold": 1, "num_inference_steps": 12, "guidance_scale": 1.5, **RISING}),
        ("left", {"max_new_tokens": 3}),
        ("right", {"repetition_penalty": 1.5, "bad_words_ids": [[5], [6, 7]]}),
    ],
    ids=str,
)
def test_a_row_is_the_same_alone_and_in_a_batch(
    make_captioner: MakeCaptioner, corruption: str, prompt: str | None, call: dict[str, Any]
) -> None:
    model, pixel_values = make_captioner(corruption=corruption), images(3)
    call = {"num_inference_steps": 5, "return_dict_in_generate": True, **call}
    prompts: list[list[int]] = [[], [5], [9, 11, 4]]
    together: dict[str, Tensor] = {}
    alone: list[dict[str, Tensor]] = [{}, {}, {}]
    if prompt is not None:
        padding = [[PAD] * (3 - len(tokens)) for tokens in prompts]
        is_left = prompt == "left"
        rows = [pads + tokens if is_left else tokens + pads for pads, tokens in zip(padding, prompts)]
        masks = [[int(token != PAD) for token in row] for row in rows]
        together = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
        alone = [{}, *({"input_ids": torch.tensor([tokens])} for tokens in prompts[1:])]
    batch = model.generate(pixel_values, **together, **call)
    repeats = call.get("num_return_sequences", 1)
    assert len(batch.sequences) == 3 * repeats
    for index in range(3):
        row = model.generate(pixel_values[index : index + 1], **alone[index], **call)
        of_row = slice(index * repeats, (index + 1) * repeats)
        length = row.sequences.shape[1]
        assert torch.equal(batch.sequences[of_row, :length], row.sequences)
        assert (batch.sequences[of_row, length:] == PAD).all()
        torch.testing.assert_close(batch.log_probs[of_row, :length], row.log_probs, rtol=1e-3, atol=1e-3)
        assert torch.equal(batch.num_steps[of_row], row.num_steps)
        if prompt is not None:
            assert (row.sequences[:, : len(prompts[index])] == torch.tensor(prompts[index])).all()


def test_images_matter(make_captioner: MakeCaptioner) -> None:
    log_probs = make_captioner().generate(images(2), return_dict_in_generate=True).log_probs
    assert not torch.allclose(log_probs[0], log_probs[1], atol=0.01)


@pytest.mark.parametrize("do_sample", [False, True])
def test_seed_and_generator_decide_alone(make_captioner: MakeCaptioner, do_sample: bool) -> None:
    model, pixel_values = make_captioner(), images(2)

    def run(**kwargs: Any) -> Tensor:
        outputs = model.generate(pixel_values, do_sample=do_sample, return_dict_in_generate=True, **kwargs)
        return torch.stack([outputs.sequences.float(), outputs.log_probs])

    first = run()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(run(), first) and torch.equal(run(seed=0), first)
    assert torch.equal(run(generator=torch.Generator().manual_seed(0), seed=5), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(run(seed=1), first)
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(run(generator=generator), run(generator=generator))  # it moves on


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("repeats", [1, 3])
def test_each_image_draws_numbers_of_its_own(make_captioner: MakeCaptioner, corruption: str, repeats: int) -> None:
    """With uniform logits the caption is what is drawn."""
    model, pixel_values = make_captioner(corruption=corruption), images(4)
    UniformNetwork(model)

    def run(pixels: Tensor = pixel_values, **kwargs: Any) -> Tensor:
        # No token ends a caption, so that all draws are seen
        kwargs = {"do_sample": True, "num_return_sequences": repeats, "eos_token_id": 19, "pad_token_id": 19, **kwargs}
        outputs = model.generate(pixels, return_dict_in_generate=True, output_trajectory=True, **kwargs)
        return outputs.trajectory.tokens[:, 0]

    first = run()
    assert len({tuple(row) for row in first.tolist()}) == 4 * repeats  # images and their captions all differ
    assert torch.equal(run(), first)
    assert all(not torch.equal(one, other) for one, other in zip(run(seed=1), first))
    for index in range(4):
        of_image = slice(index * repeats, (index + 1) * repeats)
        assert torch.equal(run(pixel_values[index : index + 1]), first[of_image])
    # The pixels decide, and not the place in the batch: equal images draw equally
    swapped = run(pixel_values[[2, 1, 1, 0]]).unflatten(0, (4, repeats))
    assert torch.equal(swapped, first.unflatten(0, (4, repeats))[[2, 1, 1, 0]])
    changed = pixel_values.clone()
    changed[0, 0, 0, 0] += 1e-4
    assert not torch.equal(run(changed)[0], first[0]) and torch.equal(run(changed)[repeats:], first[repeats:])
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(run(generator=generator), first)
    assert not torch.equal(run(generator=generator), first)
    features = model.model.get_image_features(pixel_values).pooler_output
    drawn = run(None, image_features=features)
    assert len({tuple(row) for row in drawn.tolist()}) == 4 * repeats
    assert torch.equal(run(None, image_features=features[3:]), drawn[3 * repeats :])


@torch.no_grad()
def test_images_of_half_precision_draw_too(make_captioner: MakeCaptioner) -> None:
    model, pixel_values = make_captioner().bfloat16(), images(3).bfloat16()
    UniformNetwork(model)
    sequences = model.generate(pixel_values, do_sample=True)
    assert len({tuple(row) for row in sequences.tolist()}) == 3
    assert torch.equal(model.generate(pixel_values[1:2], do_sample=True), sequences[1:2])


# ---- Several captions of an image


ALTERNATIVES = {
    "free": {},
    "prompt": {
        "input_ids": torch.tensor([[5, 6], [7, PAD], [9, 9]]),
        "attention_mask": torch.tensor([[1, 1], [1, 0], [1, 1]]),
    },
    "infilling": {
        "decoder_input_ids": torch.tensor([[5, 1, 7, 1, 9], [1, 4, 4, 1, 1], [1, 1, 1, 1, EOS]]),
        "decoder_attention_mask": torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]),
    },
    "short": {"max_new_tokens": 2},
    "early stopping": {"stability_threshold": 1, "num_inference_steps": 12},
    "guided": {"guidance_scale": 2.0},
    "processed": {"repetition_penalty": 1.5, "bad_words_ids": [[5]]},
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("name", ALTERNATIVES)
def test_several_captions_differ_and_the_first_is_the_caption_itself(
    make_captioner: MakeCaptioner, corruption: str, name: str
) -> None:
    """Where no token is drawn too: the others are the likeliest alternatives, whatever the noise contributes."""
    model, pixel_values, call = make_captioner(corruption=corruption), images(3), ALTERNATIVES[name]
    one = model.generate(pixel_values, **call)
    outputs = model.generate(
        pixel_values, num_return_sequences=4, return_dict_in_generate=True, output_trajectory=True, **call
    )
    sequences = outputs.sequences.unflatten(0, (3, 4))
    assert torch.equal(sequences[:, 0], one)
    for captions in sequences.tolist():
        assert len({tuple(caption) for caption in captions}) == 4
    for name_of_mask, name_of_tokens in (
        ("attention_mask", "input_ids"),
        ("decoder_attention_mask", "decoder_input_ids"),
    ):
        if name_of_mask in call:
            mask, tokens = call[name_of_mask].bool(), call[name_of_tokens]
            for captions in sequences.unbind(1):
                assert torch.equal(captions[:, : mask.shape[1]][mask], tokens[mask])
    assert torch.equal(model.generate(pixel_values, num_return_sequences=4, **call), outputs.sequences)
    assert name != "processed" or not (sequences == 5).any()
    # Padding stands behind the end alone, and every row has its steps
    is_pad = sequences == PAD
    assert (is_pad.int().diff(dim=-1) >= 0).all()
    assert outputs.num_steps.shape == (12,) and outputs.log_probs.shape == outputs.sequences.shape
    steps = len(outputs.trajectory.timesteps)
    assert outputs.num_steps.max() == steps
    assert outputs.trajectory.tokens.shape == (12, steps, sequences.shape[-1])
    is_kept = outputs.log_probs != 0
    assert torch.equal(outputs.trajectory.tokens[:, -1][is_kept], outputs.sequences[is_kept])


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_alternatives_are_the_same_alone_and_in_a_batch(make_captioner: MakeCaptioner, corruption: str) -> None:
    model, pixel_values = make_captioner(corruption=corruption), images(5)
    together = model.generate(pixel_values, num_return_sequences=3)
    for index in range(5):
        alone = model.generate(pixel_values[index : index + 1], num_return_sequences=3)
        assert torch.equal(alone, together[3 * index : 3 * index + 3])


def test_likeliest_alternatives_by_hand(make_captioner: MakeCaptioner) -> None:
    """Three places, the last of which ends the caption. By their log-probabilities against the caption's own tokens
    6 in place of 5 comes first, then 8 in place of 7, with 5 in front of it, and then 9 in place of 5."""
    model = make_captioner(max_position_embeddings=4)
    places = [{5: 3.0, 6: 2.9, 9: 1.0}, {7: 3.0, 8: 2.5}, {EOS: 9.0}, {PAD: 9.0}]

    def run(number: int, **kwargs: Any) -> list[list[int]]:
        rows = iter((1, number - 1))  # of the two loops: the caption, and its alternatives

        def make_network(prefix: Tensor) -> Script:
            script = script_logits(model, places, rows=next(rows))
            model.make_network = make_network
            return script

        model.make_network = make_network
        return model.generate(images(1), num_inference_steps=1, num_return_sequences=number, **kwargs).tolist()

    end = [EOS, PAD]
    assert run(4) == [[5, 7, *end], [6, 7, *end], [5, 8, *end], [9, 7, *end]]
    # Place 0 is given, so alternatives are of place 1 on
    assert run(2, input_ids=torch.tensor([[9]])) == [[9, 7, *end], [9, 8, *end]]


def test_alternatives_where_the_first_step_forbids_the_captions_token(make_captioner: MakeCaptioner) -> None:
    """By the first step's draft 5 may not follow 4; the last step has another draft, and 5 is the caption's token."""
    model, rows = make_captioner(max_position_embeddings=2), iter((1, 2))

    def make_network(prefix: Tensor) -> Script:
        script = script_logits(model, [{4: 3.0, 6: 2.5}, {5: 3.0, 7: 2.0, 8: 1.5, 9: 1.0}], next(rows), 2)
        script.logits = script.logits.clone()
        script.logits[:, 1, 0, 6] = 9.0  # in the last step
        model.make_network = make_network
        return script

    model.make_network = make_network
    call = {"num_inference_steps": 2, "bad_words_ids": [[4, 5], [8]], "sampler": "renoise"}
    sequences = model.generate(images(1), num_return_sequences=3, **call).tolist()
    assert sequences == [[6, 5], [6, 7], [6, 9]]  # neither a forbidden 8 nor the lowest ids


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_more_captions_than_there_are_is_an_error(make_captioner: MakeCaptioner, corruption: str) -> None:
    """One place: 18 tokens besides padding and the caption's own."""
    model = make_captioner(corruption=corruption, max_position_embeddings=1)
    with torch.no_grad():
        model.lm_head.bias[PAD] = -1e4
    sequences = model.generate(images(2), num_return_sequences=19)
    assert [len(set(captions)) for captions in sequences.view(2, 19).tolist()] == [19, 19]
    with pytest.raises(ValueError, match="`num_return_sequences` is 20, but some image has fewer captions than that"):
        model.generate(images(2), num_return_sequences=20)
    model = make_captioner(corruption=corruption)
    full = torch.full((2, 8), 5)
    assert torch.equal(model.generate(images(2), input_ids=full), full)
    with pytest.raises(ValueError, match="`num_return_sequences` is 2, but some image has fewer captions than that"):
        model.generate(images(2), input_ids=full, num_return_sequences=2)


def test_drawn_captions_stand_together(make_captioner: MakeCaptioner) -> None:
    model = make_captioner()
    script = script_tokens(model, [[[10 + row] * 8] for row in range(6)], strength=100.0)
    sequences = model.generate(images(2), num_return_sequences=3, num_inference_steps=1, do_sample=True)
    assert sequences[:, 0].tolist() == [10, 11, 12, 13, 14, 15]
    assert len({tuple(noise.flatten().tolist()) for noise in script.states[0].noise}) == 6


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@torch.no_grad()
def test_nothing_made_of_the_weights_outlives_a_call(make_captioner: MakeCaptioner, corruption: str) -> None:
    """`param.data.copy_` does not raise the tensor's version, by which a cache could tell that it is stale."""
    # More tokens than the width, or the noise's factor would be the weight itself
    model, other = (
        make_captioner(corruption=corruption, vocab_size=50),
        make_captioner(corruption=corruption, vocab_size=50),
    )
    call = {"guidance_scale": 1.5, "return_dict_in_generate": True}
    before = model.generate(images(3), **call)
    model.model.denoiser.token_embedding.weight.data.copy_(other.model.denoiser.token_embedding.weight)
    fresh = TDDForCaptioning(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    after, expected = model.generate(images(3), **call), fresh.generate(images(3), **call)
    assert torch.equal(after.sequences, expected.sequences) and torch.equal(after.log_probs, expected.log_probs)
    assert not torch.equal(after.log_probs, before.log_probs)


# ---- Early stopping


def test_settled_rows_leave_the_batch(make_captioner: MakeCaptioner) -> None:
    """Row 0 never changes, row 1 changes until its 3rd step, row 2 until its 6th."""
    model = make_captioner(max_position_embeddings=1)
    drafts = [[5, 5, 5, 5, 5, 5], [6, 7, 8, 8, 8, 8], [9, 10, 9, 10, 9, 11]]
    script = script_tokens(model, [[[token] for token in row] for row in drafts])
    outputs = model.generate(
        images(3), num_inference_steps=6, stability_threshold=2, return_dict_in_generate=True, output_trajectory=True
    )
    assert outputs.sequences.tolist() == [[5], [8], [11]]
    assert outputs.num_steps.tolist() == [3, 5, 6]
    assert script.seen_rows == [[0, 1, 2]] * 3 + [[1, 2]] * 2 + [[2]]
    assert outputs.trajectory.tokens[..., 0].tolist() == drafts  # a row that has left repeats its last step


def test_the_loop_ends_with_its_last_row(make_captioner: MakeCaptioner) -> None:
    model = make_captioner(max_position_embeddings=1)
    script = script_tokens(model, [[[5]] * 10, [[6]] * 10])
    outputs = model.generate(images(2), stability_threshold=3, return_dict_in_generate=True, output_trajectory=True)
    assert len(script.states) == 4 and outputs.num_steps.tolist() == [4, 4]
    assert outputs.trajectory.timesteps.tolist() == [20, 18, 16, 14]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_early_stopping_changes_no_other_row(make_captioner: MakeCaptioner, corruption: str) -> None:
    """With a real denoiser: a row that stays has the trajectory that it has where no row leaves."""
    model, pixel_values = make_captioner(corruption=corruption), images(6)
    call = {"num_inference_steps": 12, "guidance_scale": 2.0, "return_dict_in_generate": True}
    if corruption == "gaussian":
        call["sampler"] = "renoise"
    stopping = model.generate(pixel_values, stability_threshold=1, output_trajectory=True, **call)
    full = model.generate(pixel_values, output_trajectory=True, **call)
    assert len(set(stopping.num_steps.tolist())) > 1  # some leave before others
    assert full.num_steps.tolist() == [12] * 6
    for row, steps in enumerate(stopping.num_steps.tolist()):
        assert torch.equal(stopping.trajectory.tokens[row, :steps], full.trajectory.tokens[row, :steps])


# ---- Trajectory and streamer


def test_trajectory(make_captioner: MakeCaptioner) -> None:
    model = make_captioner()
    outputs = model.generate(
        images(3), num_inference_steps=4, max_length=6, return_dict_in_generate=True, output_trajectory=True
    )
    trajectory = outputs.trajectory
    assert trajectory.timesteps.tolist() == [20, 15, 10, 5]
    assert trajectory.tokens.shape == trajectory.log_probs.shape == (3, 4, 6)
    assert trajectory.candidates.shape == trajectory.candidate_log_probs.shape == (3, 4, 6, 5)
    assert torch.equal(trajectory.candidates[..., 0], trajectory.tokens)  # the argmax comes first
    torch.testing.assert_close(trajectory.candidate_log_probs[..., 0], trajectory.log_probs)
    assert (trajectory.candidate_log_probs.diff(dim=-1) <= 0).all() and (trajectory.candidate_log_probs <= 0).all()
    is_kept = outputs.log_probs != 0
    assert torch.equal(trajectory.tokens[:, -1][is_kept], outputs.sequences[is_kept])
    assert torch.equal(trajectory.log_probs[:, -1][is_kept], outputs.log_probs[is_kept])


def test_a_small_vocabulary_has_fewer_candidates(make_captioner: MakeCaptioner) -> None:
    model = make_captioner(vocab_size=3)
    trajectory = model.generate(images(1), return_dict_in_generate=True, output_trajectory=True).trajectory
    assert trajectory.candidates.shape[-1] == 3
    torch.testing.assert_close(trajectory.candidate_log_probs.exp().sum(-1), torch.ones(1, 10, 8))


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def put(self, value: Tensor) -> None:
        self.calls.append(("put", value.tolist()))

    def end(self) -> None:
        self.calls.append(("end", None))


class DraftRecorder(Recorder):
    def put_draft(self, value: Tensor) -> None:
        self.calls.append(("draft", value.tolist()))


def test_streamer(make_captioner: MakeCaptioner) -> None:
    model = make_captioner(max_position_embeddings=4)
    script_tokens(model, [[[9, 5, EOS, 6], [9, 7, 8, EOS]]])
    call = {"input_ids": torch.tensor([[3]]), "num_inference_steps": 2}
    model.generate(images(1), streamer=(streamer := DraftRecorder()), **call)
    assert streamer.calls == [
        ("put", [[3]]),
        ("draft", [[5, EOS, PAD]]),
        ("draft", [[7, 8, EOS]]),
        ("put", [[7, 8, EOS]]),
        ("end", None),
    ]
    script_tokens(model, [[[9, 5, EOS, 6], [9, 7, 8, EOS]]])
    model.generate(images(1), streamer=(streamer := Recorder()), num_inference_steps=2)
    assert streamer.calls == [("put", [[]]), ("put", [[9, 7, 8, EOS]]), ("end", None)]


# ---- Logits processors and sampling


def test_bad_words(make_captioner: MakeCaptioner) -> None:
    model = make_captioner(max_position_embeddings=3)
    places = [{5: 3.0, 6: 2.0}, {7: 3.0, 8: 2.0}, {9: 3.0, 10: 2.0}]

    def run(**kwargs: Any) -> list[int]:
        script_logits(model, places)
        return model.generate(images(1), num_inference_steps=1, **kwargs)[0].tolist()

    assert run() == [5, 7, 9]
    assert run(bad_words_ids=[[7]]) == [5, 8, 9]
    assert run(bad_words_ids=[[5, 7], [7, 9]]) == [5, 8, 9]  # 9 may follow 8
    assert run(bad_words_ids=[[6, 7]]) == [5, 7, 9]  # there is no 6
    # What stands before a place is the token that was fixed there, not the likeliest
    assert run(bad_words_ids=[[6, 7]], input_ids=torch.tensor([[6]])) == [6, 8, 9]
    assert run(bad_words_ids=[[5, 7]], input_ids=torch.tensor([[6]])) == [6, 7, 9]


def test_bad_words_when_sampling(make_captioner: MakeCaptioner) -> None:
    """What stands before a place is the token that was drawn."""
    model = make_captioner(max_position_embeddings=2)
    script_logits(model, [{5: 0.0, 6: 0.0}, {7: 0.0, 8: 0.0}], rows=200)
    sequences = model.generate(
        images(1), num_return_sequences=200, num_inference_steps=1, do_sample=True, bad_words_ids=[[5, 7], [6, 8]]
    )
    pairs = sequences.tolist()
    assert pairs.count([5, 8]) + pairs.count([6, 7]) == 200
    assert 60 < pairs.count([5, 8]) < 140


def test_bad_words_of_a_settled_place(make_captioner: MakeCaptioner) -> None:
    """MDD: place 1 is shown first, as the most confident; then place 0 must not make a bad pair of it."""
    model = make_captioner(corruption="mask", noise_schedule="linear", max_position_embeddings=2)
    first = torch.full((2, 20), -20.0)
    first[0, 5], first[0, 6], first[1, 7], first[1, 8] = 2.0, 1.9, 9.0, 0.0
    later = first.clone()
    later[1, 7], later[1, 8] = 0.0, 9.0  # of no effect: place 1 is settled
    Script(model, torch.stack([first, later])[None])
    assert model.generate(images(1), num_inference_steps=2)[0].tolist() == [5, 7]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_bad_words_before_a_given_token(make_captioner: MakeCaptioner, corruption: str) -> None:
    """The tokens around a gap are known: what is put into it may not complete a bad sequence with them."""
    model = make_captioner(corruption=corruption, max_position_embeddings=3)
    gap = {"decoder_input_ids": torch.tensor([[4, 1, 7]]), "decoder_attention_mask": torch.tensor([[1, 0, 1]])}

    def run(bad_words_ids: list[list[int]]) -> list[int]:
        script_logits(model, [{4: 3.0}, {5: 3.0, 6: 2.0}, {7: 3.0}], steps=2)
        return model.generate(images(1), num_inference_steps=2, bad_words_ids=bad_words_ids, **gap)[0].tolist()

    assert run([[9, 9]]) == [4, 5, 7]
    for bad in ([5, 7], [4, 5], [4, 5, 7]):
        assert run([bad]) == [4, 6, 7]
    for other in ([5, 8], [3, 5, 7], [4, 5, 7, 9], [5, 7, 9]):
        assert run([other]) == [4, 5, 7]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("confidence_threshold", [None, 0.3])
def test_no_caption_has_a_bad_sequence(
    make_captioner: MakeCaptioner, corruption: str, confidence_threshold: float | None
) -> None:
    """Pairs and triples that occur without the ban, in captions and alternatives."""
    model = make_captioner(corruption=corruption)
    model.lm_head.bias.data[[PAD, EOS]] = -20.0  # long captions
    call = {"num_return_sequences": 4, "num_inference_steps": 4, "confidence_threshold": confidence_threshold}
    captions = model.generate(images(6), **call).tolist()
    bad = [row[place : place + length] for row in captions for place in range(3) for length in (2, 3)]
    bad = [words for words in bad if PAD not in words and EOS not in words]
    assert len(bad) > 20
    for row in model.generate(images(6), bad_words_ids=bad, **call).tolist():
        assert not [words for words in bad if any(row[i : i + len(words)] == words for i in range(8))]


def test_bad_words_behind_an_end_that_is_revised(make_captioner: MakeCaptioner) -> None:
    """MDD: place 2 stands behind a predicted end when it is unmasked for good. Then place 0 is no end after all."""
    model = make_captioner(corruption="mask", noise_schedule="linear", max_position_embeddings=3)
    first, later = torch.full((3, 20), -20.0), torch.full((3, 20), -20.0)
    first[0, EOS], first[1, PAD], first[1, 9], first[2, 5], first[2, 8] = 2.0, 2.0, 2.0, 9.0, 3.0
    later[0, 7], later[1, 9], later[2, 5] = 9.0, 9.0, 9.0
    Script(model, torch.stack([first, later])[None])
    assert model.generate(images(1), num_inference_steps=2)[0].tolist() == [7, 9, 5]
    Script(model, torch.stack([first, later])[None])
    assert model.generate(images(1), num_inference_steps=2, bad_words_ids=[[5]])[0].tolist() == [7, 9, 8]


def test_repetition_penalty_by_hand(make_captioner: MakeCaptioner) -> None:
    model = make_captioner(max_position_embeddings=4)
    places = [{5: 2.0}, {5: 2.0, 6: 1.5}, {EOS: 3.0}, {PAD: 3.0, 9: 2.9}]

    def run(**kwargs: Any) -> list[int]:
        script_logits(model, places)
        outputs = model.generate(
            images(1), num_inference_steps=1, return_dict_in_generate=True, output_trajectory=True, **kwargs
        )
        return outputs.trajectory.tokens[0, 0].tolist()

    assert run() == [5, 5, EOS, PAD]
    assert run(repetition_penalty=1.3) == [5, 5, EOS, PAD]  # 2.0 / 1.3 = 1.54 is above 1.5
    assert run(repetition_penalty=1.4) == [5, 6, EOS, PAD]  # 2.0 / 1.4 = 1.43 is below
    assert run(repetition_penalty=1.4, input_ids=torch.tensor([[6]])) == [6, 5, EOS, PAD]


def test_padding_is_no_repetition(make_captioner: MakeCaptioner) -> None:
    model = make_captioner(max_position_embeddings=4)
    script_logits(model, [{EOS: 3.0}, {PAD: 3.0, 9: 2.9}, {PAD: 3.0, 9: 2.9}, {PAD: 3.0, 9: 2.9}])
    outputs = model.generate(
        images(1), num_inference_steps=1, repetition_penalty=2.0, return_dict_in_generate=True, output_trajectory=True
    )
    assert outputs.trajectory.tokens[0, 0].tolist() == [EOS, PAD, PAD, PAD]


def test_given_processors_are_applied_to_every_place(make_captioner: MakeCaptioner) -> None:
    class NextIsOneMore(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            wanted = torch.where(input_ids[:, -1] == PAD, 4, input_ids[:, -1] + 1)
            return scores.scatter(1, wanted[:, None], 100.0)

    model = make_captioner(max_position_embeddings=4)
    sequences = model.generate(images(2), logits_processor=LogitsProcessorList([NextIsOneMore()]))
    assert sequences.tolist() == [[4, 5, 6, 7]] * 2


PROBABILITIES = {5: 0.4, 6: 0.3, 7: 0.2, 8: 0.1}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({}, {5: 0.4, 6: 0.3, 7: 0.2, 8: 0.1}),
        ({"temperature": 0.5}, {5: 16 / 30, 6: 9 / 30, 7: 4 / 30, 8: 1 / 30}),  # squares
        ({"top_k": 2}, {5: 4 / 7, 6: 3 / 7}),
        ({"top_p": 0.6}, {5: 4 / 7, 6: 3 / 7}),  # 0.4 is below 0.6, 0.4 + 0.3 is above
        ({"top_k": 3, "temperature": 0.5}, {5: 16 / 29, 6: 9 / 29, 7: 4 / 29}),
    ],
    ids=str,
)
def test_sampled_frequencies(make_captioner: MakeCaptioner, call: dict[str, Any], expected: dict[int, float]) -> None:
    model, draws = make_captioner(max_position_embeddings=4), 2000
    script_logits(model, [{token: math.log(p) for token, p in PROBABILITIES.items()}] * 4, rows=draws)
    sequences = model.generate(
        images(1), num_return_sequences=draws, num_inference_steps=1, do_sample=True, eos_token_id=19, **call
    )
    counts = torch.bincount(sequences.flatten(), minlength=20) / sequences.numel()
    frequencies = torch.zeros(20)
    frequencies[list(expected)] = torch.tensor(list(expected.values()))
    assert set(counts.nonzero().flatten().tolist()) == set(expected)
    torch.testing.assert_close(counts, frequencies, rtol=0, atol=0.025)  # 4.5 standard deviations


def test_argmax_without_sampling(make_captioner: MakeCaptioner) -> None:
    model = make_captioner(max_position_embeddings=4)
    script_logits(model, [{token: math.log(p) for token, p in PROBABILITIES.items()}] * 4, rows=50)
    assert (model.generate(images(50), num_inference_steps=1) == 5).all()


# ---- Prompts and infilling


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_infilling_keeps_fixed_tokens_at_every_step(make_captioner: MakeCaptioner, corruption: str) -> None:
    model = make_captioner(corruption=corruption)
    tokens = torch.tensor([[5, 1, 7, 1, 9], [1, 4, 4, 1, 1]])
    mask = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 0, 0]])
    outputs = model.generate(
        images(2),
        decoder_input_ids=tokens,
        decoder_attention_mask=mask,
        return_dict_in_generate=True,
        output_trajectory=True,
    )
    is_fixed = mask.bool()
    assert torch.equal(outputs.sequences[:, :5][is_fixed], tokens[is_fixed])
    for step in range(10):
        assert torch.equal(outputs.trajectory.tokens[:, step, :5][is_fixed], tokens[is_fixed])


@pytest.mark.parametrize("sampler", ["renoise", "confidence"])
@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.0, "guidance_schedule": "linear"}])
def test_a_given_caption_is_the_same_alone_and_beside_a_gap(
    make_captioner: MakeCaptioner, sampler: str, guidance: dict[str, Any]
) -> None:
    model, tokens = make_captioner(), torch.tensor([[5, 6, 7, 9, 8, 5, 4, EOS]]).repeat(2, 1)
    mask = torch.tensor([[1] * 8, [1, 0, 0, 1, 1, 1, 1, 1]])
    call = {"sampler": sampler, "num_inference_steps": 4, "return_dict_in_generate": True, **guidance}
    both = model.generate(images(2), decoder_input_ids=tokens, decoder_attention_mask=mask, **call)
    alone = model.generate(images(2)[:1], decoder_input_ids=tokens[:1], decoder_attention_mask=mask[:1], **call)
    assert both.num_steps.tolist() == [1, 4] and alone.num_steps.tolist() == [1]
    torch.testing.assert_close(both.log_probs[:1], alone.log_probs)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_what_stands_in_a_gap_is_not_read(make_captioner: MakeCaptioner, corruption: str) -> None:
    model, mask = make_captioner(corruption=corruption), torch.tensor([[1, 0, 1]])
    captions = [
        model.generate(images(1), decoder_input_ids=torch.tensor([[5, value, 6]]), decoder_attention_mask=mask)
        for value in (1, -100, 1000)
    ]
    assert torch.equal(captions[0], captions[1]) and torch.equal(captions[0], captions[2])


def test_fixed_tokens_reach_the_denoiser(make_captioner: MakeCaptioner) -> None:
    """Re-noised like any predicted token, or with little noise from the start, or, with MDD, visible from the
    start."""
    model, prompt = make_captioner(max_position_embeddings=4), torch.tensor([[5, 6]])
    call = {"num_inference_steps": 3, "sampler": "renoise"}
    fixed = script_tokens(model, [[[11, 12, 13, 14]] * 3])
    model.generate(images(1), input_ids=prompt, **call)
    predicted = script_tokens(model, [[[5, 6, 13, 14]] * 3])
    model.generate(images(1), **call)
    for step, (state, expected) in enumerate(zip(fixed.states, predicted.states, strict=True)):
        assert torch.equal(state.timesteps, expected.timesteps) and torch.equal(state.noise, expected.noise)
        assert state.is_final.tolist() == [[True, True, False, False]]
        if step == 0:
            assert (state.timesteps == 20).all()  # pure noise
        else:
            assert state.tokens.tolist() == expected.tokens.tolist() == [[5, 6, 13, 14]]

    script = script_tokens(model, [[[11, 12, 13, 14]] * 3])
    model.generate(images(1), input_ids=prompt, num_inference_steps=3, sampler="confidence")
    assert script.states[0].tokens[:, :2].tolist() == [[5, 6]]
    assert script.states[0].timesteps.tolist() == [[1, 1, 20, 20]]  # the free places are noise

    model = make_captioner(corruption="mask", max_position_embeddings=4)
    script = script_tokens(model, [[[11, 12, 13, 14]] * 3])
    model.generate(images(1), input_ids=prompt, num_inference_steps=3)
    assert script.states[0].tokens.tolist() == [[5, 6, 20, 20]]  # K = 20 is the mask


@pytest.mark.parametrize(
    ("fields", "sampler"),
    [({}, "confidence"), ({"timestep_sampling": "shared"}, "renoise")],
    ids=["per_token", "shared"],
)
def test_the_sampler_is_the_one_that_the_training_is_for(
    make_captioner: MakeCaptioner, fields: dict[str, Any], sampler: str
) -> None:
    model = make_captioner(**fields)
    timesteps = {}
    for name in (None, "renoise", "confidence"):
        script = script_tokens(model, [[[5, 6, 7, 8, 9, 10, 11, 12]] * 4])
        model.generate(images(1), num_inference_steps=4, sampler=name)
        timesteps[name] = [state.timesteps.tolist() for state in script.states]
    assert timesteps["renoise"] == [[[t] * 8] for t in (20, 15, 10, 5)]
    assert timesteps[None] == timesteps[sampler] and timesteps["renoise"] != timesteps["confidence"]


def test_masks_have_no_sampler_to_choose(make_captioner: MakeCaptioner) -> None:
    for sampler in ("renoise", "confidence"):
        with pytest.raises(
            ValueError, match=f"`sampler='{sampler}'` needs Gaussian noise, and this model has `corruption"
        ):
            make_captioner(corruption="mask").generate(images(1), sampler=sampler)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_caption_does_not_end_before_a_fixed_token(make_captioner: MakeCaptioner, corruption: str) -> None:
    model = make_captioner(corruption=corruption, max_position_embeddings=5)
    script_logits(model, [{EOS: 5.0, PAD: 4.0, 8: 3.0}] * 5, rows=2, steps=3)
    sequences = model.generate(
        images(2),
        decoder_input_ids=torch.tensor([[5, 1, 7, 1], [1, 1, 1, EOS]]),
        decoder_attention_mask=torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]]),
        num_inference_steps=3,
    )
    assert sequences.tolist() == [[5, 8, 7, EOS, PAD], [8, 8, 8, EOS, PAD]]


def test_a_prompt_is_an_infilling_of_the_beginning(make_captioner: MakeCaptioner) -> None:
    model, pixel_values, tokens = make_captioner(), images(2), torch.tensor([[5, 6], [7, 9]])
    prompted = model.generate(pixel_values, input_ids=tokens)
    infilled = model.generate(pixel_values, decoder_input_ids=tokens, decoder_attention_mask=torch.ones_like(tokens))
    assert torch.equal(prompted, infilled) and torch.equal(prompted[:, :2], tokens)


def test_an_empty_prompt_is_none(make_captioner: MakeCaptioner) -> None:
    model, pixel_values = make_captioner(), images(2)
    expected = model.generate(pixel_values)
    for prompt, mask in [
        (torch.tensor([[PAD], [PAD]]), torch.tensor([[0], [0]])),
        (torch.zeros(2, 0), torch.zeros(2, 0)),
    ]:
        assert torch.equal(model.generate(pixel_values, input_ids=prompt, attention_mask=mask), expected)


def test_prompt_for_several_sequences(make_captioner: MakeCaptioner) -> None:
    prompts = torch.tensor([[5, 6], [7, 9]])
    sequences = make_captioner().generate(images(2), input_ids=prompts, num_return_sequences=3)
    assert torch.equal(sequences[:, :2], prompts.repeat_interleave(3, dim=0))


def test_mdd_unmasks_in_the_order_of_confidence(make_captioner: MakeCaptioner) -> None:
    model = make_captioner(corruption="mask", noise_schedule="linear", max_position_embeddings=4)
    places = [{5: 1.0}, {6: 4.0}, {7: 3.0}, {8: 2.0}]
    mask = 20
    script = script_logits(model, places, steps=4, rest=0.0)
    model.generate(images(1), num_inference_steps=4)
    assert [state.tokens[0].tolist() for state in script.states] == [
        [mask, mask, mask, mask],
        [mask, 6, mask, mask],
        [mask, 6, 7, mask],
        [mask, 6, 7, 8],
    ]
    # Fixed places do not count: of two free ones, one is shown after the first of two steps
    script = script_logits(model, places, steps=2, rest=0.0)
    model.generate(images(1), input_ids=torch.tensor([[9, 10]]), num_inference_steps=2)
    assert [state.tokens[0].tolist() for state in script.states] == [[9, 10, mask, mask], [9, 10, 7, mask]]


# ---- Lengths


def test_max_length_and_max_new_tokens(make_captioner: MakeCaptioner) -> None:
    model, pixel_values, prompt = make_captioner(), images(2), torch.tensor([[5, 6], [7, 9]])
    assert model.generate(pixel_values, max_length=3).shape == (2, 3)
    assert model.generate(pixel_values, max_length=100).shape == (2, 8)
    assert model.generate(pixel_values, max_new_tokens=3).shape == (2, 3)
    assert model.generate(pixel_values, max_new_tokens=256).shape == (2, 8)  # the pipeline's default
    assert model.generate(pixel_values, input_ids=prompt, max_new_tokens=3).shape == (2, 5)
    assert model.generate(pixel_values, input_ids=prompt, max_new_tokens=3, max_length=4).shape == (2, 4)
    with pytest.raises(ValueError, match="2 given tokens do not fit the 1 places"):
        model.generate(pixel_values, input_ids=prompt, max_length=1)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_places_beyond_the_length_are_padding(make_captioner: MakeCaptioner, corruption: str) -> None:
    """The denoiser sees all places that it was trained with; rows may differ in what is allowed."""
    model = make_captioner(corruption=corruption, max_position_embeddings=5)
    script = script_tokens(model, [[[11, 12, 13, 14, 15]] * 2] * 2)
    sequences = model.generate(
        images(2),
        input_ids=torch.tensor([[5, 6], [7, PAD]]),
        attention_mask=torch.tensor([[1, 1], [1, 0]]),
        max_new_tokens=1,
        num_inference_steps=2,
    )
    assert sequences.tolist() == [[5, 6, 13], [7, 12, PAD]]
    assert script.states[0].tokens.shape[1] == 5
    if corruption == "mask":
        assert script.states[0].tokens[:, 2:].tolist() == [[20, PAD, PAD], [PAD, PAD, PAD]]


# ---- Configuration


def test_generation_config_is_saved_and_loaded(make_captioner: MakeCaptioner, tmp_path: Path) -> None:
    model = make_captioner()
    assert isinstance(model.generation_config, TDDGenerationConfig)
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (PAD, EOS)
    model.generation_config = TDDGenerationConfig(
        num_inference_steps=3, guidance_scale=2.5, max_length=6, do_sample=True, temperature=0.7, bad_words_ids=[[5]]
    )
    model.save_pretrained(tmp_path)
    loaded = TDDForCaptioning.from_pretrained(tmp_path)
    assert isinstance(loaded.generation_config, TDDGenerationConfig)
    names = TDDGenerationConfig._DEFAULTS
    for name in names:
        assert getattr(loaded.generation_config, name) == getattr(model.generation_config, name), name
    outputs = loaded.generate(images(2), return_dict_in_generate=True)
    assert outputs.num_steps.tolist() == [3, 3] and outputs.sequences.shape == (2, 6)
    given = TDDForCaptioning.from_pretrained(tmp_path, generation_config=GenerationConfig(max_length=4))
    assert given.generate(images(2)).shape == (2, 4)
    (tmp_path / "generation_config.json").unlink()
    assert TDDForCaptioning.from_pretrained(tmp_path).generation_config.num_inference_steps == 10


def test_a_generation_config_serves_several_models(make_captioner: MakeCaptioner) -> None:
    config = TDDGenerationConfig(num_inference_steps=4)
    for length in (4, 8):
        model = make_captioner(max_position_embeddings=length)
        model.generation_config = config
        assert model.generate(images(1)).shape == (1, length)
    assert config.max_length is None


def test_what_is_given_takes_precedence(make_captioner: MakeCaptioner) -> None:
    model, pixel_values = make_captioner(), images(1)
    model.generation_config.num_inference_steps = 4

    def num_steps(**kwargs: Any) -> int:
        return model.generate(pixel_values, return_dict_in_generate=True, **kwargs).num_steps.item()

    config = TDDGenerationConfig(num_inference_steps=6)
    assert num_steps() == 4
    assert num_steps(num_inference_steps=5) == 5
    assert num_steps(generation_config=config) == 6
    assert num_steps(generation_config=config, num_inference_steps=7) == 7
    assert num_steps(num_inference_steps=None) == 10  # None is the default
    model.generation_config = TDDGenerationConfig(do_sample=True, temperature=0.5, top_k=3)
    assert num_steps(do_sample=False) == 10  # what only sampling reads is left out


@pytest.mark.parametrize("make", [dict, GenerationConfig, TDDGenerationConfig], ids=lambda kind: kind.__name__)
def test_a_generation_config_may_be_a_dictionary_or_a_plain_one(make_captioner: MakeCaptioner, make: type) -> None:
    """The parameters of a dictionary were ignored."""
    model, pixel_values = make_captioner(), images(2)
    config = make(max_new_tokens=3, num_beams=1, seed=4)
    expected = model.generate(pixel_values, max_new_tokens=3, seed=4)
    assert torch.equal(model.generate(pixel_values, generation_config=config), expected)
    model.generation_config = config
    assert isinstance(model.generation_config, TDDGenerationConfig) and model.generation_config.max_length == 8
    assert torch.equal(model.generate(pixel_values), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_beams": 2}, "do not apply to diffusion: num_beams=2"),
        ({"temperature": 0.5}, "`temperature` needs `do_sample=True`"),
        ({"num_inference_step": 3}, "has no `num_inference_step`. Did you mean `num_inference_steps`"),
        ({"eos_token_id": [2, 4]}, r"`eos_token_id` must be an integer in .* got \[2, 4\]"),
    ],
)
@pytest.mark.parametrize("make", [dict, GenerationConfig], ids=lambda kind: kind.__name__)
def test_what_does_not_apply_is_refused_when_it_is_given(
    make_captioner: MakeCaptioner, make: type, wrong: dict[str, Any], message: str
) -> None:
    """It was ignored in a call, and saved with the model, which could not be loaded again."""
    model = make_captioner()
    with pytest.raises(ValueError, match=message):
        model.generate(images(1), generation_config=make(**wrong))
    with pytest.raises(ValueError, match=message):
        model.generation_config = make(**wrong)
    with pytest.raises(ValueError, match=message):
        TDDGenerationConfig(**wrong)
    with pytest.raises(ValueError, match="must be a `GenerationConfig` or a dictionary, got 3"):
        model.generate(images(1), generation_config=3)


@pytest.mark.parametrize("name", ["num_beams", "min_length", "no_repeat_ngram_size", "max_time"])
def test_arguments_that_do_not_apply_are_refused(make_captioner: MakeCaptioner, name: str) -> None:
    with pytest.raises(ValueError, match=f"do not apply to diffusion: {name}=2.*num_inference_steps"):
        make_captioner().generate(images(1), **{name: 2})
    for value in (None, GenerationConfig._get_default_generation_params().get(name)):
        make_captioner().generate(images(1), **{name: value})


@pytest.mark.parametrize(
    ("name", "nearest"), [("num_steps", "num_"), ("guidance", "guidance_scale"), ("do_sampel", "do_sample")]
)
def test_unknown_arguments_are_refused_with_the_nearest_known_one(
    make_captioner: MakeCaptioner, name: str, nearest: str
) -> None:
    with pytest.raises(ValueError, match=f"`generate` has no `{name}`. Did you mean `{nearest}"):
        make_captioner().generate(images(1), **{name: 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer of at least 1, got 0"),
        ({"num_inference_steps": 21}, r"`num_inference_steps` must be an integer in \[1, 20\], got 21"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps` must be an integer of at least 1, got 2.5"),
        ({"guidance_scale": 0.9}, r"`guidance_scale` must be a number in \[1, 1000000\], got 0.9"),
        ({"guidance_schedule": "step"}, "`guidance_schedule` must be one of 'constant'"),
        ({"sampler": "ancestral"}, "`sampler` must be one of 'renoise', 'confidence'"),
        ({"max_length": 0}, "`max_length` must be an integer of at least 1"),
        ({"max_new_tokens": -1}, "`max_new_tokens` must be an integer of at least 1"),
        ({"num_return_sequences": 0}, "`num_return_sequences` must be an integer in"),
        ({"stability_threshold": 0}, "`stability_threshold` must be an integer of at least 1"),
        ({"temperature": 0.0, "do_sample": True}, "`temperature` must be a number in"),
        ({"temperature": 0.5}, "`temperature` needs `do_sample=True`"),
        ({"top_k": 5, "do_sample": False}, "`top_k` needs `do_sample=True`"),
        ({"repetition_penalty": -1.0}, "`repetition_penalty` must be a number in"),
        ({"input_ids": torch.tensor([[20], [3]])}, r"`input_ids` must be in \[0, 19\], got \[20, 3\]"),
        ({"input_ids": torch.tensor([[-1], [3]])}, r"`input_ids` must be in \[0, 19\], got \[-1, 3\]"),
        ({"input_ids": torch.tensor([[3]])}, "2 images and 1 rows"),
        ({"input_ids": torch.full((2, 9), 3)}, "9 given tokens do not fit the 8 places"),
        ({"decoder_input_ids": torch.full((2, 4), 3)}, "needs a `decoder_attention_mask`"),
        (
            {"decoder_input_ids": torch.full((2, 4), 3), "decoder_attention_mask": torch.ones(2, 3)},
            "`decoder_attention_mask` must have the shape of `decoder_input_ids`",
        ),
        (
            {"decoder_input_ids": torch.full((2, 4), 3), "input_ids": torch.full((2, 4), 3)},
            "not both",
        ),
        ({"image_features": torch.zeros(2, 17, 32)}, "either `pixel_values` or `image_features`"),
    ],
    ids=str,
)
def test_bad_arguments(make_captioner: MakeCaptioner, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_captioner().generate(images(2), **arguments)
