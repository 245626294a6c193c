# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""scripts/train.py as users run it, on a few embedded emoji: TDD, MDD and the baselines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from transformers import ViTConfig, ViTImageProcessor, ViTModel, pipeline

import modeling_tdd  # noqa: F401 - registers the Auto classes and the pipeline
from modeling_tdd.evaluation.baselines import AutoregressiveCaptioner


EMOJI = Path(__file__).parent.parent / "scripts/data/emoji_mini"
ENCODER = ViTConfig(
    image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
)
SETTINGS = (
    *("evaluation.num_inference_steps=[1, 4]", "evaluation.test_inference_steps=[4]", "augmentation.size=16"),
    *("training.num_train_epochs=2", "training.batch_size=32", "data.eval_splits=[validation, test_combo]"),
    *("model.hidden_size=32", "model.num_hidden_layers=1", "model.intermediate_size=64"),
)


@pytest.fixture
def files(tmp_path: Path) -> str:
    """The override of the data: 64 pictures for training and as `validation`, and 20 others."""
    for split, count in (("train", 64), ("test_combo", 20)):
        rows = load_dataset("parquet", data_files=str(EMOJI / f"{split}.parquet"), split="train")
        rows.select(range(count)).to_parquet(tmp_path / f"{split}.parquet")
    return "data.data_files={train: train.parquet, validation: train.parquet, test_combo: test_combo.parquet}"


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def check_captioner(folder: Path) -> None:
    """Scores of all settings; and a checkpoint that the pipeline loads."""
    scores = read(folder)["scores"]
    settings = [(entry["split"], entry["num_inference_steps"], entry["guidance_scale"]) for entry in scores]
    assert settings == [("validation", 1, 1.0), ("validation", 4, 1.0), ("test_combo", 4, 1.0)]
    for entry in scores:
        assert all(0 <= entry[name] <= 1 for name in ("exact_match", "token_f1", "stutter", "fluent"))
    captioner = pipeline("image-captioning", model=str(folder))
    assert captioner.image_processor is not None and captioner.tokenizer.eos_token == "[EOS]"


def test_all_methods_from_a_frozen_encoder_with_cached_features(tmp_path: Path, run_train: Callable, files: str):
    ViTModel(ENCODER, add_pooling_layer=False).save_pretrained("encoder")
    ViTImageProcessor(size={"height": 16, "width": 16}, do_convert_rgb=True).save_pretrained("encoder")
    methods = ("--methods", "nearest", "tdd", "mdd", "ar", "--seeds", "3", "4")
    command = ("emoji", *methods, "--set", "encoder=encoder", "feature_views=2", files, *SETTINGS)
    output = run_train(*command).out
    folder = tmp_path / "outputs/emoji"
    table = (folder / "results.md").read_text()
    assert table in output and "### validation" in table and "### test_combo" in table
    header, *rows = [line for line in table.splitlines() if line.startswith("|")]
    columns = "method | schedule | guidance | metric | 1 step | 4 steps | 4 less 1 | without steps"
    assert [cell.strip() for cell in header.strip("|").split("|")] == columns.split(" | ")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert ["tdd", "projected", "1", "exact_match"] in [row[:4] for row in cells]

    runs = {path.parent.name for path in folder.glob("*/result.json")}
    several = {f"{method}-seed{seed}" for method in ("tdd", "mdd", "ar") for seed in (3, 4)}
    assert runs == several | {"nearest-seed3"}  # which draws nothing
    for run in runs:
        assert run == f"{read(folder / run)['method']}-seed{read(folder / run)['seed']}"
    check_captioner(folder / "tdd-seed3")
    check_captioner(folder / "mdd-seed4")
    nearest, other = read(folder / "nearest-seed3")["scores"]
    assert (nearest["split"], nearest["exact_match"], nearest["fluent"]) == ("validation", 1, 1)  # each finds itself
    assert other["split"] == "test_combo" and other["exact_match"] < 1
    entries = read(folder / "ar-seed4")["scores"]
    assert [entry["split"] for entry in entries] == ["validation", "test_combo"]
    assert all("num_inference_steps" not in entry and 0 <= entry["token_f1"] <= 1 for entry in entries)
    assert isinstance(AutoregressiveCaptioner.from_pretrained(folder / "ar-seed4"), AutoregressiveCaptioner)

    # The features of `train` for `nearest`, which are those of `validation`; two augmented views; and `test_combo`
    cached = {path.name: path.stat().st_mtime_ns for path in (folder / "features").glob("features-*.arrow")}
    assert len(cached) == len(list((folder / "features").iterdir())) == 3
    again = run_train(*command).out
    assert again.count("is done already") == 7 and "trainable parameters" not in again and table in again
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "features").iterdir()} == cached


def test_with_an_encoder_that_is_trained_too(tmp_path: Path, run_train: Callable, files: str):
    vision_config = {**ENCODER.to_diff_dict(), "model_type": "vit"}
    vision_config.pop("transformers_version", None)
    changes = (
        *("encoder=null", "feature_views=1", "model.freeze_encoder=false"),
        f"model.vision_config={json.dumps(vision_config)}",
        "image_processor={size: {height: 16, width: 16}}",
    )
    run_train("emoji", "--methods", "tdd", "mdd", "--set", files, *SETTINGS, *changes)
    folder = tmp_path / "outputs/emoji"
    assert not (folder / "features").exists()
    for method in ("tdd", "mdd"):
        check_captioner(folder / f"{method}-seed0")
    with pytest.raises(SystemExit, match="--methods nearest: .*emoji.yaml can train tdd, mdd, uniform, ar."):
        run_train("emoji", "--methods", "nearest", "--set", *changes)
