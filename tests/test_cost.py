# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Parameters of the paper's tables, the cost of a training step, and scripts/estimate.py as users run it."""

import re
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modeling_tdd import TDDConfig, TDDForImageClassification
from modeling_tdd.training.cost import (
    MACHINES,
    Machine,
    Model,
    StepCost,
    measure_machine,
    median_seconds,
    training_cost,
)
from modeling_tdd.training.recipe import load_recipe


ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "scripts/recipes"

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
        assert (recipe.training.epochs, recipe.training.batch_size) == (epochs, 4096)
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
    assert training_cost(model, (16, 16)).operations(3) == count_step(model, **batch_of(model, 3))


@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
def test_operations_of_a_captioner_are_those_of_a_real_step(make_captioner, corruption):
    model = make_captioner(vocab_size=50, corruption=corruption, condition_dropout=0.0).train()
    model.set_attn_implementation("eager")
    cost = training_cost(model, (16, 16))
    assert cost.operations(3) == count_step(model, **batch_of(model, 3))
    assert (cost.noise.total > 0) == (corruption == "gaussian")


def test_a_frozen_encoder_costs_nothing(make_captioner):
    model = make_captioner(freeze_encoder=True, condition_dropout=0.0).train()
    model.set_attn_implementation("eager")
    batch = batch_of(model, 3)
    batch["image_features"] = model.model.get_image_features(batch.pop("pixel_values")).pooler_output
    cost = training_cost(model, (16, 16))
    assert cost.encoder.total == 0 and cost.operations(3) == count_step(model, **batch)
    assert cost.parameters - cost.trainable == sum(p.numel() for p in model.model.encoder.parameters())


def test_operations_of_the_papers_model_are_those_of_the_closed_form():
    with torch.device("meta"):
        model = TDDForImageClassification(TDDConfig(num_labels=1000))
    cost = training_cost(model, (224, 224))
    n, d = 197, 768
    patches, layer = 2 * 196 * d * d, 8 * n * d * d + 4 * n * n * d + 4 * n * d * 4 * d
    assert cost.encoder.forward == patches + 12 * layer
    assert cost.encoder.backward == patches + 2 * 12 * layer  # pixels need no gradient
    assert cost.noise.forward == 2 * 1000 * d * d
    assert abs(cost.encoder_parameters / 1e6 - 87) < 1 and abs(cost.parameters / 1e6 - 111) < 1


def test_memory_of_replicated_and_sharded_training(make_model):
    model = make_model()
    whole, half = (training_cost(model, (16, 16), precision) for precision in ("no", "bf16"))
    ddp, fsdp = whole.memory(8), whole.memory(8, devices=4, shard=True)
    assert ddp["weights"] + ddp["gradients"] + ddp["optimiser"] + ddp["moving average"] == 20 * whole.parameters
    assert fsdp["optimiser"] * 4 == ddp["optimiser"] and ddp["weights"] / 4 < fsdp["weights"]
    assert fsdp["activations"] == ddp["activations"] > 4 * whole.memory(1)["activations"]
    assert 0.4 * whole.activation_bytes < half.activation_bytes < 0.95 * whole.activation_bytes


# ---- Time


def test_time_follows_its_formula(make_model):
    cost = training_cost(make_model(), (16, 16))
    machine = Machine("m", 1, operations_per_second=1e6, bytes_per_second=1e5, overhead=0.5)
    expected = 3 * (cost.operations(8) / 1e6 + 0.5) + cost.parameters * (28 + 12) / 1e5
    assert machine.step_seconds(cost, 8, accumulation=3) == pytest.approx(expected)
    assert all(machine.operations_per_second > 1e9 and machine.basis for machine in MACHINES.values())


def real_seconds(model: Model, cost: StepCost, images: int) -> tuple[float, float]:
    """Predicted and real processor time of a step; the prediction is from smaller steps."""
    machine = measure_machine(model, [batch_of(model, images // 4), batch_of(model, images // 2)], cost, process_time)
    optimizer, batch = torch.optim.AdamW(model.parameters(), fused=True), batch_of(model, images)
    average = torch.optim.swa_utils.AveragedModel(model)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)

    return machine.step_seconds(cost, images), median_seconds(step, process_time)


process_time = time.process_time  # other processes on the machine do not count


def test_predicted_time_is_within_a_quarter_of_the_real(make_model, vision_config):
    """There are three tries, since other processes that share the processor's caches disturb the measurement."""
    vision_config.hidden_size, vision_config.intermediate_size = 128, 512
    model = make_model(hidden_size=128, intermediate_size=512, num_labels=200).train()
    cost = training_cost(model, (16, 16))
    ratios = []
    for _ in range(3):
        predicted, real = real_seconds(model, cost, 64)
        ratios.append(predicted / real)
        if 0.75 < ratios[-1] < 1.25:
            return
    pytest.fail(f"predicted / real: {ratios}")


# ---- The script


def test_script_measures_and_prints_its_formula(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["estimate.py", str(RECIPES / "digits.yaml"), "--measure"])
    runpy.run_path(str(ROOT / "scripts/estimate.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "| encoder, per image" in output and "measured now" in output
    assert "epoch = 22 steps x step = " in output and "training = 50 epochs = " in output
    step, images = re.search(r"= ([\d.e-]+) s for (\d+) images", output).groups()
    assert int(images) == 64 and 1e-4 < float(step) < 60


def test_script_needs_to_know_how_many_categories(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["estimate.py", str(RECIPES / "emoji_subgroups.yaml")])
    with pytest.raises(ValueError, match="does not say how many labels there are: give `--categories`"):
        runpy.run_path(str(ROOT / "scripts/estimate.py"), run_name="__main__")
