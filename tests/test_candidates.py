# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Candidates of `generate`: choices of the caller's, and captions of the model's own that are ranked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import pipeline

from modeling_tdd import TDDForCaptioning, TDDProcessor
from modeling_tdd.candidates_tdd import rank_candidates


MakeCaptioner = Callable[..., TDDForCaptioning]
PAD, EOS = 0, 2
CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "emoji-captions"
PICTURES = [str(CHECKPOINT / name) for name in ("example.png", "weightlifter.png")]
SKIN = {"A": ["man", "woman", "person"], "B": ["light", "medium-dark", "dark"]}


@pytest.fixture(scope="module")
def shipped() -> tuple[TDDForCaptioning, TDDProcessor]:
    return TDDForCaptioning.from_pretrained(CHECKPOINT).eval(), TDDProcessor.from_pretrained(CHECKPOINT)


# ---- Ranking


def test_ranking_by_hand() -> None:
    tokens = torch.tensor([[[5], [6], [5], [7]]])
    scores = torch.tensor([[1.0, 3.0, 1.0, 2.0]])
    ranked = rank_candidates(tokens, scores, temperature=2.0, num_best=4)
    expected = torch.tensor([1.0, 3.0, 2.0]).div(2).softmax(0)
    torch.testing.assert_close(
        ranked.probs, torch.stack([expected[0], expected[1], torch.tensor(0.0), expected[2]])[None]
    )
    assert ranked.best.tolist() == [[1, 3, 0, 2]] and ranked.rows.tolist() == [1, 3, 0, 2]
    # Equal scores keep their order; the rows of a second image follow those of the first
    ranked = rank_candidates(torch.arange(6).view(2, 3, 1), torch.zeros(2, 3), 1.0, 2)
    assert ranked.rows.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    "fields", [{}, {"corruption": "mask"}, {"timestep_sampling": "shared"}, {"corruption": "uniform"}], ids=str
)
def test_choices_are_ranked_by_their_scores(
    make_captioner: MakeCaptioner, pixel_values: Tensor, fields: dict[str, Any]
) -> None:
    model = make_captioner(**fields)
    generator = torch.Generator().manual_seed(0)
    choices = torch.randint(3, 20, (4, 5, 8), generator=generator)
    for row, length in enumerate((1, 3, 4, 7, 2)):
        choices[:, row, length], choices[:, row, length + 1 :] = EOS, PAD
    call = {"choices": choices, "score_temperature": 2.0, "return_dict_in_generate": True}
    outputs = model.generate(pixel_values, num_return_sequences=3, **call)
    scores = model.score(pixel_values, choices)
    torch.testing.assert_close(outputs.candidate_probs, (scores / 2).softmax(-1))
    assert torch.equal(outputs.candidates, choices)
    order = scores.argsort(dim=-1, descending=True)[:, :3]
    expected = choices.gather(1, order[..., None].expand(-1, -1, 8)).flatten(0, 1)
    assert torch.equal(outputs.sequences, expected)
    # An image's result does not depend on the batch, nor on the order of its choices
    for row in range(4):
        alone = model.generate(pixel_values[row : row + 1], **{**call, "choices": choices[row : row + 1].flip(1)})
        assert torch.equal(alone.sequences[0], outputs.sequences[3 * row])
        torch.testing.assert_close(
            alone.candidate_probs.flip(1)[0], outputs.candidate_probs[row], atol=1e-5, rtol=1e-4
        )


def test_candidates_are_those_of_generate_in_the_order_of_their_scores(
    make_captioner: MakeCaptioner, pixel_values: Tensor
) -> None:
    model = make_captioner()
    for draws in ({}, {"do_sample": True, "seed": 3}):
        made = model.generate(pixel_values, num_return_sequences=6, **draws).view(4, 6, -1)
        outputs = model.generate(
            pixel_values, num_candidates=6, num_return_sequences=2, return_dict_in_generate=True, **draws
        )
        assert torch.equal(outputs.candidates[..., : made.shape[-1]], made)
        scores = model.score(pixel_values, made)
        best = scores.argmax(-1)
        assert torch.equal(outputs.sequences[::2, : made.shape[-1]], made[torch.arange(4), best])
        assert outputs.sequences.shape[0] == outputs.log_probs.shape[0] == len(outputs.num_steps) == 8
        # Some image's first caption is not its best, or the test would see no ranking
        assert best.any()


def test_free_places_of_choices_are_filled(make_captioner: MakeCaptioner, pixel_values: Tensor) -> None:
    model = make_captioner()
    choices = torch.tensor([[5, PAD, 6, EOS], [7, PAD, EOS, PAD], [8, PAD, PAD, EOS]]).repeat(4, 1, 1)
    mask = torch.tensor([[1, 0, 1, 1], [1, 0, 1, 1], [1, 0, 0, 1]]).repeat(4, 1, 1)
    outputs = model.generate(pixel_values, choices=choices, choices_mask=mask, return_dict_in_generate=True)
    candidates = outputs.candidates[..., :4]
    assert torch.equal(candidates[mask.bool()], choices[mask.bool()])
    assert ((candidates[~mask.bool()] != PAD) & (candidates[~mask.bool()] != EOS)).all()
    infilled = model.generate(pixel_values, decoder_input_ids=choices[:, 0], decoder_attention_mask=mask[:, 0])
    assert torch.equal(outputs.candidates[:, 0], infilled)
    torch.testing.assert_close(outputs.candidate_probs, model.score(pixel_values, outputs.candidates).softmax(-1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"choices": torch.ones(3, 2, 4, dtype=torch.long)},
            r"`choices` must have the shape \(4, num_choices, length\)",
        ),
        ({"choices": torch.ones(4, 0, 4, dtype=torch.long)}, "with at least one choice"),
        ({"choices": torch.ones(4, 4, dtype=torch.long)}, "`choices` must be a tensor of integers with 3 dimensions"),
        ({"choices": torch.full((4, 2, 4), 99)}, "must be in"),
        ({"choices": torch.ones(4, 2, 9, dtype=torch.long)}, "do not fit the 8 places"),
        ({"choices_mask": torch.ones(4, 2, 4)}, "`choices_mask` would have no effect"),
        ({"choices": torch.ones(4, 2, 4, dtype=torch.long), "num_candidates": 2}, "`num_candidates` would have no"),
        ({"choices": torch.ones(4, 2, 4, dtype=torch.long), "num_return_sequences": 3}, "there are 2 `choices`"),
        (
            {"choices": torch.ones(4, 2, 4, dtype=torch.long), "choices_mask": torch.ones(4, 2, 3)},
            "`choices_mask` must",
        ),
        ({"num_candidates": 2, "num_return_sequences": 3}, "`num_candidates` must be at least"),
        ({"num_candidates": 2000}, "`num_candidates` is 2000, but some image has fewer captions"),
    ],
)
def test_what_is_refused(make_captioner: MakeCaptioner, pixel_values: Tensor, call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_captioner().generate(pixel_values, **call)


def test_a_model_without_scores_is_refused_at_once(make_captioner: MakeCaptioner, pixel_values: Tensor) -> None:
    with pytest.raises(ValueError, match="`num_candidates` and `choices` are ranked by `score`"):
        make_captioner(prediction_type="epsilon").generate(pixel_values, num_candidates=2)


# ---- The processor


def test_choices_of_different_lengths_make_all_combinations(shipped: tuple[TDDForCaptioning, TDDProcessor]) -> None:
    processor = shipped[1]
    encoded = processor(infill="[A] climbing: [B] skin tone", choices=SKIN, return_tensors="pt")
    texts = processor.batch_decode(encoded.choices[0], skip_special_tokens=True)
    assert texts == [f"{who} climbing: {tone} skin tone" for who in SKIN["A"] for tone in SKIN["B"]]
    assert encoded.choices_mask.all() and encoded.choices.shape == encoded.choices_mask.shape == (1, 9, 9)
    # A gap by its number, a free place, and one set of choices for each of several texts
    encoded = processor(infill=["[MASK] [MASK]", "a [MASK] [MASK]: red"], choices={1: ["man", "woman"]})
    assert np.array(encoded["choices"]).shape[:2] == (2, 2)
    assert (np.array(encoded["choices_mask"]) == 0).sum() == 4
    whole = processor(choices=["man running", "a red apple"], return_tensors="pt").choices
    assert processor.batch_decode(whole[0], skip_special_tokens=True) == ["man running", "a red apple"]


def test_probabilities_of_gaps_are_sums(shipped: tuple[TDDForCaptioning, TDDProcessor]) -> None:
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    found = shipped[1].post_process_choices(probs, {"A": ["x", "y"], 0: ["v", "w"]})[0]
    assert found["A"] == pytest.approx({"x": 0.3, "y": 0.7}) and found[0] == pytest.approx({"v": 0.4, "w": 0.6})
    listed = shipped[1].post_process_choices(probs[:, :2], ["x", "y"])
    assert listed == [pytest.approx({"x": 0.1, "y": 0.2})]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"choices": []}, "at least one"),
        ({"choices": ["man", ""]}, "none empty"),
        ({"choices": ["man", "man "]}, r"must differ to the tokenizer, got \['man'\]"),
        ({"choices": ["man qqzzq"]}, "'man qqzzq' has words that the tokenizer does not know"),
        ({"choices": ["man " * 30]}, "has 30 tokens, and may have 1 to 19"),
        ({"choices": {"A": ["man"]}}, "or a dictionary beside `infill`"),
        ({"choices": ["man"], "infill": "[A]"}, "give `choices` as a dictionary"),
        (
            {"choices": {"A": ["man"], "B": ["x"]}, "infill": "[A] running"},
            r"\[B\] must stand once in .* stands 0 times",
        ),
        ({"choices": {"A": ["man"]}, "infill": "[A] and [A]"}, r"\[A\] must stand once in .* stands 2 times"),
        ({"choices": {1: ["man"]}, "infill": "[MASK] running"}, r"\[MASK\] number 1 must stand once"),
        ({"choices": {"A": []}, "infill": "[A]"}, "`choices` for 'A' must be a list of strings, at least one"),
        ({"choices": {"A": "man"}, "infill": "[A]"}, "`choices` for 'A' must be a list"),
        (
            {"choices": {gap: [str(number) for number in range(20)] for gap in "ABC"}, "infill": "[A] [B] [C]"},
            "4096 combinations at most, got 8000",
        ),
        ({"choices": ["man"], "text": "man"}, "not both"),
    ],
)
def test_wrong_choices(shipped: tuple[TDDForCaptioning, TDDProcessor], call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shipped[1](**call)


# ---- On the shipped captioner


def test_a_thousand_sets_of_choices_are_kept(shipped: tuple[TDDForCaptioning, TDDProcessor]) -> None:
    """Random captions with one to three gaps of one to three words: what comes out is always one of the choices."""
    model, processor = shipped
    random = np.random.default_rng(0)
    unknown, words = (
        processor.tokenizer.unk_token_id,
        ("man", "woman", "red", "apple", "dark", "of", "rabbit", "kangaroo"),
    )
    assert unknown not in processor.tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    features = torch.randn(20, 64, 256, generator=torch.Generator().manual_seed(0))

    def some_words(least: int, most: int) -> str:
        return " ".join(random.choice(words, random.integers(least, most + 1)))

    valid, lengths = 0, set()
    for _ in range(50):  # of 20 images each
        gaps = "ABC"[: random.integers(1, 4)]
        choices = {gap: list({some_words(1, 3) for _ in range(random.integers(1, 4))}) for gap in gaps}
        texts = [" ".join(f"{some_words(0, 1)} [{gap}]" for gap in gaps) for _ in range(20)]
        inputs = processor(infill=texts, choices=choices, return_tensors="pt")
        sequences = model.generate(image_features=features, **inputs)
        for row, sequence in enumerate(sequences):
            length = inputs.choices.shape[-1]
            valid += int((inputs.choices[row] == sequence[:length]).all(-1).any() and (sequence[length:] == PAD).all())
            lengths.add(int((sequence != PAD).sum()))
    assert valid == 1000 and len(lengths) > 8


def test_choices_through_the_pipeline() -> None:
    captioner = pipeline("image-captioning", model=str(CHECKPOINT))
    for batch_size in (1, 2):
        climbing, lifting = captioner(
            PICTURES, infill="[A] climbing: [B] skin tone", choices=SKIN, batch_size=batch_size
        )
        assert climbing[0]["generated_text"] == "woman climbing: dark skin tone"
        assert climbing[0]["choices"]["A"]["woman"] > 0.9 and climbing[0]["choices"]["B"]["dark"] > 0.5
        assert sum(lifting[0]["choices"]["B"].values()) == pytest.approx(1, abs=1e-5)
        assert climbing[0]["score"] <= min(climbing[0]["choices"]["A"]["woman"], climbing[0]["choices"]["B"]["dark"])
    captions = ["man running", "woman climbing: dark skin tone", "woman lifting weights"]
    ranked = captioner(PICTURES[1], choices=captions, num_return_sequences=3)
    assert ranked[0]["generated_text"] == "woman lifting weights" and ranked[0]["score"] == max(
        ranked[0]["choices"].values()
    )
    assert [record["score"] for record in ranked] == sorted(ranked[0]["choices"].values(), reverse=True)
    assert captioner(PICTURES[0], infill="woman [MASK]: [MASK] skin tone") == [
        {"generated_text": "woman climbing: dark skin tone"}
    ]
    best = captioner(PICTURES[0], num_candidates=4)
    assert len(best) == 1 and 0.25 < best[0]["score"] < 1 and best[0].keys() == {"generated_text", "score"}
