# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Scores of checkpoints on a data set, with their noise and without it, and scripts/score.py as users run it."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from test_pipeline import WORDS, make_tokenizer
from tokenizers import normalizers
from transformers import ViTConfig, ViTImageProcessor

from modeling_tdd import TDDForCaptioning, TDDForImageClassification, TDDProcessor
from modeling_tdd.evaluation.scoring import load_checkpoint, predict, references_of, score_checkpoint, without_noise


SCRIPT = Path(__file__).parents[1] / "scripts/score.py"
IMAGES = [PILImage.effect_noise((16, 16), 90).convert("RGB") for _ in range(6)]


def make_data(column: str, values: list, feature: object) -> Dataset:
    return Dataset.from_dict({"image": IMAGES, column: values}, features=Features({"image": Image(), column: feature}))


@pytest.fixture
def classifier(make_model: Callable[..., TDDForImageClassification], tmp_path: Path) -> str:
    """A classifier whose answers depend on its noise, as those of random weights do."""
    make_model(id2label=dict(enumerate("abcde"))).save_pretrained(tmp_path / "classifier")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "classifier")
    return str(tmp_path / "classifier")


@pytest.fixture
def captioner(make_captioner: Callable[..., TDDForCaptioning], tmp_path: Path) -> str:
    make_captioner(vocab_size=len(WORDS)).save_pretrained(tmp_path / "captioner")
    processor = TDDProcessor(ViTImageProcessor(size={"height": 16, "width": 16}), make_tokenizer())
    processor.save_pretrained(tmp_path / "captioner")
    return str(tmp_path / "captioner")


def test_predictions_are_the_models_own(classifier: str, captioner: str) -> None:
    """Whatever the size of the batches."""
    data = make_data("label", [0] * 6, Value("int64"))
    for checkpoint in (classifier, captioner):
        model, processor = load_checkpoint(checkpoint)
        inputs = processor(images=IMAGES, return_tensors="pt")
        if checkpoint == captioner:
            sequences = model.generate(**inputs, num_inference_steps=2)
            expected = processor.batch_decode(sequences, skip_special_tokens=True)
        else:
            expected = model(**inputs, num_inference_steps=2).logits.argmax(-1).tolist()
        assert predict(model, processor, data, batch_size=4, num_inference_steps=2) == expected


def test_without_noise_replaces_every_draw_and_only_within(classifier: str) -> None:
    model, processor = load_checkpoint(classifier)
    pixel_values = processor(images=IMAGES, return_tensors="pt")["pixel_values"]

    def logits(seed: int) -> torch.Tensor:
        return model(pixel_values, generator=torch.Generator().manual_seed(seed)).logits

    assert not logits(0).equal(logits(1))
    with without_noise():
        assert logits(0).equal(logits(1))
    assert not logits(0).equal(logits(1))


def test_labels_are_matched_by_name(classifier: str) -> None:
    model, _ = load_checkpoint(classifier)
    numbers = [0, 1, 2, 3, 4, 0]
    assert references_of(make_data("label", numbers, Value("int64")), model) == numbers
    reversed_names = ClassLabel(names=list("edcba"))
    assert references_of(make_data("label", numbers, reversed_names), model) == [4, 3, 2, 1, 0, 4]
    with pytest.raises(ValueError, match="does not know these labels of the data: x, y"):
        references_of(make_data("label", [0, 1, 2, 0, 1, 2], ClassLabel(names=["a", "y", "x"])), model)
    with pytest.raises(ValueError, match="does not know these labels of the data: 5"):
        references_of(make_data("label", [5] * 6, Value("int64")), model)
    with pytest.raises(ValueError, match="needs a column label; it has image, caption"):
        references_of(make_data("caption", ["a"] * 6, Value("string")), model)


@pytest.mark.parametrize(
    ("values", "feature"), [([1, 2, 1, 2, 3, 1], Value("int64")), (["1", "2", "1", "2", "3", "1"], Value("string"))]
)
def test_labels_without_names_are_matched_as_training_names_them(
    make_model: Callable[..., TDDForImageClassification], values: list, feature: Value
) -> None:
    model = make_model(num_labels=3, id2label=dict(enumerate("123")))
    assert references_of(make_data("label", values, feature), model) == [0, 1, 0, 1, 2, 0]
    with pytest.raises(ValueError, match="does not know these labels of the data: 0"):
        references_of(make_data("label", [type(values[0])(0), *values[1:]], feature), model)


def test_words_are_labels(classifier: str) -> None:
    model, _ = load_checkpoint(classifier)
    assert references_of(make_data("label", list("abcdea"), Value("string")), model) == [0, 1, 2, 3, 4, 0]


def test_references_of_a_lower_case_captioner_are_lower_case(captioner: str) -> None:
    """As in training with `lower_case`."""
    model, processor = load_checkpoint(captioner)
    data = make_data("caption", [""] * 6, Value("string"))
    captions = [caption.upper() for caption in predict(model, processor, data, 6, num_inference_steps=2)]
    data, grid = make_data("caption", captions, Value("string")), [{"num_inference_steps": 2}]
    for normalizer, right in ((normalizers.NFC(), captions.count("")), (normalizers.Lowercase(), 6)):
        processor.tokenizer.backend_tokenizer.normalizer = normalizer
        processor.save_pretrained(captioner)
        [entry] = score_checkpoint(captioner, data, "validation", grid)["scores"]
        assert entry["exact_match"] == pytest.approx(right / 6)


def test_the_baseline_has_no_noise_and_its_classifier_no_steps(
    make_model: Callable[..., TDDForImageClassification], classifier: str
) -> None:
    make_model(corruption="mask").save_pretrained(classifier)
    data = make_data("label", [0] * 6, Value("int64"))
    grid = [{"num_inference_steps": steps, "guidance_scale": 1.5} for steps in (1, 5)]
    [entry] = score_checkpoint(classifier, data, "validation", grid)["scores"]
    assert entry.keys() == {"split", "num_inference_steps", "guidance_scale", "top1"}
    assert (entry["split"], entry["num_inference_steps"], entry["guidance_scale"]) == ("validation", 1, 1.0)
    with pytest.raises(ValueError, match="has `corruption='mask'`: no noise that could be replaced"):
        score_checkpoint(classifier, data, "validation", grid, compare_without_noise=True)


def test_checkpoints_of_other_models_are_refused(tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a model of TDD or MDD, got 'vit'"):
        load_checkpoint(tmp_path)


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def rows_of(output: str) -> list[list[str]]:
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_script_scores_captions_with_and_without_noise(
    captioner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = load_checkpoint(captioner)
    data = make_data("captions", [["x"]] * 6, [Value("string")])
    drawn = predict(model, processor, data, 6, num_inference_steps=4)
    with without_noise():
        zeroed = predict(model, processor, data, 6, num_inference_steps=4)
    # The first four references are what the model predicts, so exact match is known.
    references = [["something else", caption] for caption in drawn[:4]] + [["x y z"]] * 2
    make_data("captions", references, [Value("string")]).to_parquet(tmp_path / "held_out.parquet")
    monkeypatch.chdir(tmp_path)

    arguments = ["captioner", "--data", "held_out.parquet", "--steps", "2", "4"]
    run_script(monkeypatch, *arguments, "--without-noise", "--output", "deep/scores.json", "--plot", "steps.png")
    output = capsys.readouterr().out
    assert output.startswith("6 images of held_out.parquet, in %:") and "### held_out" in output
    header, _, first, *rows = rows_of(output)
    assert header == ["method", "schedule", "guidance", "metric", "2 steps", "4 steps", "4 less 2"]
    assert first[:4] == ["captioner", "projected", "1", "exact_match"] and first[5] == "66.67"
    [result] = json.loads((tmp_path / "deep/scores.json").read_text())
    entry = result["scores"][1]
    assert entry["num_inference_steps"] == 4 and entry["exact_match"] == pytest.approx(4 / 6)
    right = [one == other for one, other in zip(drawn[:4], zeroed)]
    assert entry["exact_match_without_noise"] == pytest.approx(sum(right) / 6)
    assert entry["changed"] == pytest.approx(sum(one != other for one, other in zip(drawn, zeroed)) / 6)
    assert rows[-1][3] == "changed" and rows[-1][5] == f"{100 * entry['changed']:.2f}"
    assert PILImage.open("steps.png").size[0] > 300 and Path("steps.md").read_text().strip() in output

    run_script(monkeypatch, *arguments[:3], "--num-images", "2", "--coco", "--guidance", "1", "1.5")
    output = capsys.readouterr().out
    assert output.startswith("2 images") and {"bleu_4", "cider"} <= {row[3] for row in rows_of(output)}
    assert {row[2] for row in rows_of(output)[2:]} == {"1", "1.5"} and rows_of(output)[0][4:] == ["10 steps"]


def test_script_refuses_arguments_without_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["run", "--without-noise", "--num-images", "3"], "--num-images, --without-noise need --data"),
        (["run", "--data", str(tmp_path)], "is no file, so it needs --split"),
    ):
        with pytest.raises(SystemExit):
            run_script(monkeypatch, *arguments)
        assert message in capsys.readouterr().err
