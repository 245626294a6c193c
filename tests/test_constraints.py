# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Captioning under constraints: what is measured, against slow references, and the script that measures it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling_tdd import TDDForCaptioning
from modeling_tdd.evaluation.baselines import AutoregressiveCaptioner, AutoregressiveConfig
from modeling_tdd.evaluation.captioners import fill_gaps
from modeling_tdd.evaluation.constraint_reports import group_by_method
from modeling_tdd.evaluation.constraints import Distractors, Example, _best_confidence_temperature, draw_examples


ROOT = Path(__file__).parent.parent
PAD, EOS = 0, 2
WORDS = [token for token in range(20) if token not in (PAD, EOS)]


@pytest.fixture
def autoregressive(make_captioner: Callable[..., TDDForCaptioning]) -> AutoregressiveCaptioner:
    config = make_captioner().config.to_dict()
    config.pop("model_type")
    return AutoregressiveCaptioner(AutoregressiveConfig(**config)).eval()


def rows(*captions: list[int]) -> Tensor:
    return torch.tensor([caption + [EOS] + [PAD] * (7 - len(caption)) for caption in captions])


def test_score_of_the_autoregressive_captioner_is_minus_its_loss(
    autoregressive: AutoregressiveCaptioner, pixel_values: Tensor
) -> None:
    labels = torch.stack([rows([5, 6, 7], [8]), rows([9], [3, 4]), rows([5], [6]), rows([7, 7, 7, 7, 7, 7, 7], [8])])
    scores = autoregressive.score(pixel_values, labels, max_rows=3)
    for image in range(4):
        for caption in range(2):
            row = labels[image, caption][None]
            with torch.no_grad():
                loss = autoregressive(row, pixel_values[image : image + 1]).loss
            assert scores[image, caption].item() == pytest.approx(-loss.item() * int((row != PAD).sum()), abs=1e-4)


def test_gaps_are_filled_left_to_right(autoregressive: AutoregressiveCaptioner, pixel_values: Tensor) -> None:
    tokens = rows([5, 6, 7, 8], [9, 10, 11], [4, 5, 6], [7, 8])
    is_gap = torch.zeros_like(tokens, dtype=torch.bool)
    is_gap[0, 1:3], is_gap[1, 0:3], is_gap[2, 2], is_gap[3, 0] = True, True, True, True
    features = autoregressive.model.get_image_features(pixel_values).pooler_output
    expected = tokens.clone()
    for row, place in is_gap.nonzero().tolist():  # greedily, a place at a time, from the words before it
        logits = autoregressive.next_logits(
            autoregressive.model.get_prefix(None, features[row : row + 1]), expected[row : row + 1, :place]
        )[0, -1]
        expected[row, place] = max(WORDS, key=lambda token: logits[token].item())
    hidden = tokens.masked_fill(is_gap, PAD)
    assert torch.equal(fill_gaps(autoregressive, features, hidden, is_gap), expected)
    # With as many beams as there are words, a gap of one token is filled with the likeliest of all whole captions
    best = fill_gaps(autoregressive, features, hidden, is_gap, num_candidates=len(WORDS))
    for row, place in ((2, 2), (3, 0)):
        every = tokens[row].repeat(len(WORDS), 1)
        every[:, place] = torch.tensor(WORDS)
        scores = autoregressive.score(pixel_values[row : row + 1], every[None])[0]
        assert torch.equal(best[row], every[scores.argmax()])


@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
def test_gaps_are_filled_by_denoising(
    make_captioner: Callable[..., TDDForCaptioning], pixel_values: Tensor, corruption: str
) -> None:
    model = make_captioner(corruption=corruption)
    tokens = rows([5, 6, 7, 8], [9, 10, 11], [4, 5, 6], [7, 8])
    is_gap = torch.zeros_like(tokens, dtype=torch.bool)
    is_gap[:, 0], is_gap[0, 1] = True, True
    features = model.model.get_image_features(pixel_values).pooler_output
    for number in (1, 4):
        filled = fill_gaps(model, features, tokens.masked_fill(is_gap, PAD), is_gap, number, batch_size=3)
        assert torch.equal(filled[~is_gap], tokens[~is_gap])
        assert ((filled[is_gap] != PAD) & (filled[is_gap] != EOS)).all()


def test_examples_are_parts_of_captions() -> None:
    captions = [(5, 6, 7), (8,), tuple(range(3, 20))]
    examples = draw_examples(captions, 5, 50, max_tokens=10, seed=0)
    assert examples == draw_examples(captions, 5, 50, max_tokens=10, seed=0)
    parts = {(example.image, example.start, example.end) for example in examples}
    assert parts == {(0, start, end) for start in range(3) for end in range(start + 1, 4)} | {(1, 0, 1)}


def test_wrong_choices_fit_the_place_first() -> None:
    captions = [(5, 6, 7), (5, 8, 7), (5, 9, 10, 7), (5, 11, 12), (13,)]
    chosen = Distractors(captions).draw(Example(0, (5, 6, 7), 1, 2), np.random.default_rng(0))
    assert chosen[0] == (6,) and set(chosen[1:3]) == {(8,), (9, 10)}  # between 5 and 7
    assert len(set(chosen)) == 5 and all(choice[0] in (6, 8, 9, 11) for choice in chosen)  # then behind 5


def test_the_temperature_of_a_confidence_makes_it_right() -> None:
    generator = np.random.default_rng(0)
    probability = generator.uniform(0.05, 0.95, 20_000)
    right = generator.random(20_000) < probability
    assert _best_confidence_temperature(2.5 * np.log(probability), right) == pytest.approx(2.5, rel=0.05)


def test_the_script_measures_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import compare_captioners

    def run(*given: str) -> str:
        arguments = ["--data", str(ROOT / "scripts/data/emoji_mini"), "--num-images", "12"]
        arguments += ["--splits", "validation", "test_combo", "--output-dir", str(tmp_path), *given]
        monkeypatch.setattr(sys, "argv", ["compare_captioners.py", *arguments])
        compare_captioners.main()
        return capsys.readouterr().out

    shipped = str(ROOT / "checkpoints/emoji-captions")
    table = run(shipped)
    file = tmp_path / "emoji-captions.json"
    result: dict[str, Any] = json.loads(file.read_text())
    combo = result["test_combo"]
    assert combo["images"] == 12 and combo["infilling"]["gaps"] == 12 and combo["choices"]["sets"] > 20
    assert combo["infilling"]["exact_match"] > 0.5 and combo["choices"]["top1"] > 0.8
    coverage = list(combo["captions"]["coverage"].values())
    assert coverage[-1] == pytest.approx(combo["captions"]["exact_match"]) and coverage[0] >= coverage[-1]
    assert combo["captions"]["temperature"] == result["confidence_temperature"] != result["temperature"]
    assert "| test_combo | emoji-captions | 1     |" in table and (tmp_path / "coverage.png").stat().st_size > 10_000
    changed = file.read_text().replace('"images": 12', '"images": 11')
    file.write_text(changed)
    assert run(shipped) == table and file.read_text() == changed  # read, not measured again

    # A file of something else is refused, and one from before it was noted is judged by the images of its splits
    with pytest.raises(
        SystemExit, match=r"emoji-captions.json was measured on something else: num_images was 12, is 9"
    ):
        run(shipped, "--num-images", "9")
    with pytest.raises(
        SystemExit, match=f"something else: folder was {shipped}, is elsewhere/emoji-captions. Use ano"
    ):
        run("elsewhere/emoji-captions")
    with pytest.raises(SystemExit, match=r"something else: splits was \['validation', 'test_combo'\], is \['valid"):
        run(shipped, "--splits", "validation")
    file.write_text(json.dumps({name: value for name, value in result.items() if name != "measured"}))
    assert run(shipped) == table
    with pytest.raises(SystemExit, match="something else: validation was 12, is 9; test_combo was 12, is 9"):
        run(shipped, "--num-images", "9")
    with pytest.raises(SystemExit, match="something else: test_combo was 12, is None"):
        run(shipped, "--splits", "validation")
    with pytest.raises(SystemExit):
        run(shipped, "elsewhere/emoji-captions")
    assert "the folders need different names" in capsys.readouterr().err
    assert {name: len(seeds) for name, seeds in group_by_method({"a-seed0": {}, "a-seed12": {}, "b": {}}).items()} == {
        "a": 2,
        "b": 1,
    }
