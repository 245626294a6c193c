# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Parameters of the paper's tables, the cost of a training step, and scripts/estimate.py as users run it."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTImageProcessor

from modeling_tdd import TDDConfig, TDDForImageClassification, TDDModel
from modeling_tdd.evaluation.cost import Model, device_memory, measure_step, training_cost
from modeling_tdd.training.averaging import AveragedAdamW
from modeling_tdd.training.recipe import load_recipe


SCRIPTS = Path(__file__).parent.parent / "scripts"
RECIPES = SCRIPTS / "recipes"
sys.path.append(str(SCRIPTS))

import estimate  # noqa: E402


# Millions of parameters that the paper gives. Its 632 M for ViT-H/14 are those at 224 x 224: at 448 x 448 there are
# 768 more position embeddings of width 1,280, another 1.0 M.
TABLES = {
    "table1/mdd_vit_b16": 87,
    "table1/mdd_vit_l16": 305,
    "table1/mdd_vit_h14": 632 + 768 * 1280 / 1e6,
    "table1/tdd_vit_b16": 111,
    "table1/tdd_vit_b16_no_coefficient": 111,
    "table2/regression_loss": 111,
    "table2/cross_entropy_loss": 111,
    "table2/no_guidance": 111,
    "table2/guidance": 111,
    "table2/coefficient": 111,
    "table2/no_coefficient": 111,
    "table2/softmax_sampling": 111,
    "table2/argmax_sampling": 111,
}


def test_every_row_of_the_tables_has_a_recipe():
    paths = {f"{path.parent.name}/{path.stem}" for path in RECIPES.glob("table*/*.yaml")}
    assert paths == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_parameters_of_the_papers_tables(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    with torch.device("meta"):
        model = TDDForImageClassification(TDDConfig(**recipe.model, num_labels=recipe.data.num_labels))
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - TABLES[name]) < 1


def test_rows_of_table_2_differ_in_one_ablation_each():
    base = load_recipe(RECIPES / "table1/tdd_vit_b16.yaml")
    changed = {}
    for path in RECIPES.glob("table2/*.yaml"):
        recipe = load_recipe(path)
        changed[path.stem] = {key: value for key, value in recipe.model.items() if base.model.get(key) != value}
        assert recipe.augmentation == base.augmentation
        epochs = 400 if path.stem in ("regression_loss", "cross_entropy_loss") else 500
        assert (recipe.training["num_train_epochs"], recipe.training["batch_size"]) == (epochs, 4096)
    assert changed.pop("regression_loss") == {
        "prediction_type": "epsilon",
        "loss_weighting": "none",
        "label_smoothing": 0.0,
    }
    assert changed.pop("no_guidance") == {"condition_dropout": 0.0}
    assert changed.pop("no_coefficient") == {"loss_weighting": "none"}
    assert changed.pop("softmax_sampling") == {"sampling_strategy": "multinomial"}
    assert not any(changed.values())  # the rest are the paper's defaults


# ---- Operations and memory


def count_step(model: Model, **batch: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    return counter.get_total_flops()


def batch_of(model: Model, images: int) -> dict[str, Tensor]:
    tokens = model.config.max_position_embeddings
    shape = (images,) if model.config.vocab_size is None else (images, tokens)
    return {"pixel_values": torch.randn(images, 3, 16, 16), "labels": torch.randint(5, shape)}


@pytest.mark.parametrize("fields", [{}, {"corruption": "mask"}, {"prediction_type": "epsilon"}, {"pooling": "mean"}])
def test_operations_of_a_classifier_are_those_of_a_real_step(make_model, fields):
    model = make_model(num_labels=40, **fields).train()
    model.set_attn_implementation("eager")
    assert training_cost(model, 3, (16, 16))[0] == count_step(model, **batch_of(model, 3))


@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
def test_operations_of_a_captioner_are_those_of_a_real_step(make_captioner, corruption):
    model = make_captioner(vocab_size=50, corruption=corruption, condition_dropout=0.0).train()
    model.set_attn_implementation("eager")
    assert training_cost(model, 3, (16, 16))[0] == count_step(model, **batch_of(model, 3))


def test_a_frozen_encoder_costs_nothing(make_captioner):
    model = make_captioner(freeze_encoder=True, condition_dropout=0.0).train()
    model.set_attn_implementation("eager")
    batch = batch_of(model, 3)
    batch["image_features"] = model.model.get_image_features(batch.pop("pixel_values")).pooler_output
    assert training_cost(model, 3, (16, 16))[0] == count_step(model, **batch)
    assert device_memory(model, 0) == 20 * model.num_parameters() - 16 * model.model.encoder.num_parameters()


def test_operations_of_the_papers_models_are_those_of_the_closed_form():
    with torch.device("meta"):
        mdd = TDDForImageClassification(TDDConfig(num_labels=1000, corruption="mask"))
        tdd = TDDForImageClassification(TDDConfig(num_labels=1000))
    n, d = 197, 768
    patches, layer = 2 * 196 * d * d, 8 * n * d * d + 4 * n * n * d + 4 * n * d * 4 * d
    # Backward is twice the forward pass, but for the pixels, which need no gradient
    assert training_cost(mdd, 1, (224, 224))[0] == 3 * (patches + 12 * layer + 2 * d * 1000) - patches
    one, two = (training_cost(tdd, images, (224, 224))[0] for images in (1, 2))
    # Whatever the batch size: W^T W forward and backward, and two products of the gradient of its Cholesky factor
    assert 2 * one - two == 2 * 2 * 1000 * d * d + 2 * d**3


def test_memory_of_replicated_and_sharded_training(make_model):
    model = make_model()
    activations = {dtype: training_cost(model, 8, (16, 16), dtype)[1] for dtype in (torch.float32, torch.bfloat16)}
    whole, half = activations.values()
    assert whole > 4 * training_cost(model, 1, (16, 16))[1] > 0 and 0.4 * whole < half < 0.95 * whole
    assert device_memory(model, whole) == 20 * model.num_parameters() + whole
    assert device_memory(model, whole, shards=4) == 5 * model.num_parameters() + whole


# ---- Time


def test_predicted_time_is_within_a_quarter_of_the_real(make_model, vision_config, monkeypatch):
    """Of a step with twice the images of the measured one, in a network of twice the depth. It is the time of this
    process, and there are three tries: other processes share the processor's caches."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    vision_config.hidden_size, vision_config.intermediate_size = 128, 512
    fields = {"hidden_size": 128, "intermediate_size": 512, "num_labels": 200}
    small = make_model(**fields)
    vision_config.num_hidden_layers = 4
    large = make_model(**fields, num_hidden_layers=4)
    steps = ((small, 64), (large, 128))
    operations = [training_cost(model, images, (16, 16))[0] for model, images in steps]
    device = torch.device("cpu")
    ratios = []
    for _ in range(3):
        seconds = [measure_step(model, images, (16, 16), AveragedAdamW, device) for model, images in steps]
        ratios.append(operations[1] / operations[0] * seconds[0] / seconds[1])
        if 0.75 < ratios[-1] < 1.25:
            return
    pytest.fail(f"predicted / real: {ratios}, operations {operations}")


@pytest.mark.parametrize("make", ["make_model", "make_captioner"])
def test_a_step_on_cached_features_is_measured(request, make, monkeypatch):
    """The frozen encoder runs once, before the steps."""
    model, calls, encode = request.getfixturevalue(make)(freeze_encoder=True), [], TDDModel.get_image_features
    monkeypatch.setattr(TDDModel, "get_image_features", lambda *args, **kw: (calls.append(1), encode(*args, **kw))[1])
    assert measure_step(model, 2, (16, 16), torch.optim.AdamW, torch.device("cpu")) > 0 and len(calls) == 1


# ---- The script


def run_script(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["estimate.py", *arguments])
    estimate.main()


@pytest.mark.parametrize("ema_decay, optimizer", [(0.9, "AveragedAdamW"), (0, "AdamW")])
def test_script_measures_the_step_that_trains(monkeypatch, capsys, ema_decay, optimizer):
    steps = []
    hook = register_optimizer_step_post_hook(lambda made, *_: steps.append(type(made).__name__))
    run_script(monkeypatch, str(RECIPES / "digits.yaml"), "--measure", "--set", f"training.ema_decay={ema_decay}")
    hook.remove()
    assert set(steps) == {optimizer}
    output = capsys.readouterr().out
    assert "0.2 M parameters, 0.2 M are trained" in output and "measured now" in output
    assert "training = 50 epochs = 1100 steps = " in output
    assert 1e-4 < float(re.search(r"= 1 x [\d.]+ / [\d.]+ = ([\d.e-]+) s", output)[1]) < 60


def test_script_for_a_named_machine_agrees_with_its_formula(monkeypatch, capsys):
    run_script(monkeypatch, str(RECIPES / "table1/tdd_vit_b16.yaml"), "--machine", "a100x8")
    output = capsys.readouterr().out
    assert "8 x A100 80 GB SXM: 104 TFLOP/s each, a third of the peak (assumed" in output
    operations, seconds = map(float, re.search(r"= 2 x ([\d.]+) / 1.04e\+05 = ([\d.]+) s", output).groups())
    assert seconds == pytest.approx(2 * operations / 104e3, rel=1e-3)
    assert operations == pytest.approx(256 * float(re.search(r"([\d.]+) GFLOP per image", output)[1]), rel=1e-4)
    assert "training = 500 epochs = 156000 steps = " in output


def test_script_for_a_captioner_on_a_pretrained_encoder(monkeypatch, capsys, vision_config, tmp_path):
    vision_config.intermediate_size = 4096  # so that its parameters count in millions
    vision_config.save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    changes = [f"encoder={tmp_path}", "tokenizer.vocab_size=1000", "augmentation.size=16"]
    run_script(monkeypatch, str(RECIPES / "emoji.yaml"), "--set", *changes)
    parameters, trained = re.search(r"([\d.]+) M parameters, ([\d.]+) M are trained", capsys.readouterr().out).groups()
    assert float(parameters) > float(trained)  # the encoder is frozen


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("emoji", "no encoder outputs/emoji_encoder.* python scripts/train.py .*recipes/emoji_encoder.yaml"),
        ("emoji_subgroups", "lacks `data.num_labels`: give `--set data.num_labels=NUMBER`"),
        ("emoji_encoder", "Give a recipe for a classifier or a captioner"),
    ],
)
def test_script_says_what_is_missing(monkeypatch, tmp_path, recipe, message):
    monkeypatch.chdir(tmp_path)  # where no encoder was trained
    with pytest.raises(SystemExit, match=message):
        run_script(monkeypatch, str(RECIPES / f"{recipe}.yaml"))
