"""The training side: recipes, data, augmentation, the loop, and scripts/train_classification.py as users run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import ViTImageProcessor, pipeline

import modeling_tdd  # noqa: F401 - registers the Auto classes
from modeling_tdd import TDDConfig
from modeling_tdd.training.batches import build_mixup, build_train_transform
from modeling_tdd.training.cli import recipe_method
from modeling_tdd.training.loop import make_accelerator, make_loader, prepare_training, update_ema
from modeling_tdd.training.recipe import TrainingRecipe, load_recipe
from modeling_tdd.training.results import mean_and_spread, save_checkpoint, write_json


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "scripts/recipes").rglob("*.yaml"))
SCRIPT = [str(ROOT / "scripts/train_classification.py"), str(ROOT / "scripts/recipes/digits.yaml")]


# ---- Recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_model_configuration_is_valid(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    TDDConfig(**recipe.model)
    ViTImageProcessor(**recipe.image_processor)


def test_imagenet_recipe_is_the_papers():
    recipe = load_recipe(ROOT / "scripts/recipes/imagenet_vit_b16.yaml")
    training, augmentation = recipe.training, recipe.augmentation
    assert (training.epochs, training.warmup_epochs, training.batch_size) == (500, 20, 4096)
    assert (training.base_learning_rate, training.weight_decay, training.max_grad_norm) == (1e-4, 0.3, 3.0)
    assert training.learning_rate == pytest.approx(1.6e-3) and training.adam_beta2 == 0.95
    assert training.ema_decay == 0.9999 and not training.ema_warmup
    process = {"loss_weighting": "alpha_bar", "input_weighting": "none", "noise_schedule": "cosine"}
    process |= {"label_smoothing": 0.1, "num_inference_steps": 20}
    assert recipe.model.items() >= process.items()
    assert augmentation.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (augmentation.re_prob, augmentation.re_mode, augmentation.re_count) == (0.25, "pixel", 1)
    assert build_mixup(augmentation, 1000) is None
    transform = str(build_train_transform(augmentation, ViTImageProcessor(**recipe.image_processor)))
    for part in ("RandomResizedCrop", "RandomHorizontalFlip", "RandAugment", "RandomErasing"):
        assert part in transform
    assert "ColorJitter" not in transform


def test_learning_rates_of_the_recipes():
    rates = {path.stem: load_recipe(path).training.learning_rate for path in RECIPES if path.parent.name == "recipes"}
    assert rates == pytest.approx(
        {
            "coco_vit_b16": 1e-4,
            "digits": 1e-3,
            "emoji": 2e-3,
            "emoji_encoder": 2e-3,
            "emoji_encoder_full": 2e-3,
            "emoji_full": 2e-3,
            "emoji_subgroups": 1e-3,
            "imagenet_vit_b16": 1.6e-3,
            "imagenet_vl_enriched": 3e-4,
            "paper_captions": 2e-3,
        }
    )
    digits = load_recipe(SCRIPT[1], ["training.batch_size=256"])
    assert digits.training.learning_rate == digits.training.base_learning_rate == 4e-3


def test_recipes_of_figure_5_differ_in_the_weightings_alone():
    recipes = [load_recipe(path) for path in RECIPES if path.parent.name == "fig5"]
    weightings = {(recipe.model["input_weighting"], recipe.model["loss_weighting"]) for recipe in recipes}
    assert weightings == {(first, second) for first in ("none", "visibility") for second in ("none", "alpha_bar")}
    digits = load_recipe(SCRIPT[1])
    for recipe in recipes:
        assert recipe.training == digits.training and recipe.data == digits.data
        assert recipe.model == digits.model | {key: recipe.model[key] for key in ("input_weighting", "loss_weighting")}
        assert recipe.model["noise_schedule"] == "cosine" and recipe.evaluation.guidance_scale == [1.0]
        assert recipe.evaluation.num_inference_steps == [1, 2, 5, 10, 20, 50]


def test_overrides_change_nested_values():
    changes = ["training.epochs=5", "training.base_learning_rate=1e-4", "model.vision_config.num_hidden_layers=1"]
    recipe = load_recipe(SCRIPT[1], changes)
    assert recipe.training.epochs == 5 and recipe.model["vision_config"]["num_hidden_layers"] == 1
    assert recipe.training.base_learning_rate == 1e-4  # YAML 1.1 would read a string


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.epoch=5", "Unknown keys in `training`: epoch. Allowed: epochs"),
        ("trainer.epochs=5", "Unknown keys in `recipe`: trainer"),
        ("training.epochs", "must read `section.key=value`, got 'training.epochs'"),
        ("training.epochs=0", "`training.epochs` must be at least 1, got 0"),
        ("training.base_learning_rate=0", "`training.base_learning_rate` must be above 0, got 0"),
        ("training.learning_rate=1e-3", "Unknown keys in `training`: learning_rate. Allowed: .*base_learning_rate"),
        ("training.mixed_precision=int8", "`training.mixed_precision` must be .*got 'int8'"),
    ],
)
def test_bad_overrides_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(SCRIPT[1], [change])


def test_missing_parts_of_a_recipe_are_named(tmp_path):
    tree = yaml.safe_load(Path(SCRIPT[1]).read_text())
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.dump({**tree, "data": {}}))
    with pytest.raises(ValueError, match="Section `data`.*path"):
        load_recipe(file)
    del tree["model"]
    file.write_text(yaml.dump(tree))
    with pytest.raises(ValueError, match="lacks the section `model`"):
        load_recipe(file)


def test_a_recipe_changes_its_base_key_by_key(tmp_path):
    (tmp_path / "bases").mkdir()
    tree = yaml.safe_load(Path(SCRIPT[1]).read_text())
    tree["data"] = {"path": "parquet", "data_dir": "pictures", "data_files": {"train": "train.parquet"}}
    (tmp_path / "bases/plain.yaml").write_text(yaml.dump(tree))
    (tmp_path / "bases/longer.yaml").write_text("base: plain.yaml\ntraining: {epochs: 7, warmup_epochs: 1}")
    file = tmp_path / "small.yaml"
    file.write_text(
        "base: bases/longer.yaml\n"
        "model: {vision_config: {num_hidden_layers: 1}}\n"
        "data: {data_files: {validation: held_out.parquet}}\n"
        "training: {epochs: 3}\n"
    )
    recipe, plain = load_recipe(file, ["training.batch_size=16"]), load_recipe(tmp_path / "bases/plain.yaml")
    assert recipe.name == "small"
    assert (recipe.training.epochs, recipe.training.warmup_epochs, recipe.training.batch_size) == (3, 1, 16)
    assert recipe.model["vision_config"] == {**plain.model["vision_config"], "num_hidden_layers": 1}
    # A path starts at the folder of the recipe that names it
    assert recipe.data.data_dir == str(tmp_path / "bases/pictures")
    assert recipe.data.data_files == {
        "train": str(tmp_path / "bases/train.parquet"),
        "validation": str(tmp_path / "held_out.parquet"),
    }


def test_missing_and_circular_bases_are_named(tmp_path):
    (tmp_path / "one.yaml").write_text("base: two.yaml")
    with pytest.raises(ValueError, match="There is no recipe .*two.yaml, the base of .*one.yaml"):
        load_recipe(tmp_path / "one.yaml")
    (tmp_path / "two.yaml").write_text("base: one.yaml")
    with pytest.raises(ValueError, match="each other's base: .*one.yaml -> .*two.yaml -> .*one.yaml"):
        load_recipe(tmp_path / "one.yaml")


@pytest.mark.parametrize("model", [{}, {"corruption": "gaussian"}, {"corruption": "mask"}])
def test_the_method_follows_from_the_recipe(model):
    assert recipe_method(model) == ("mdd" if model.get("corruption") == "mask" else "tdd")
    with pytest.raises(ValueError, match="`model.corruption` must be one of gaussian, mask, got 'blur'"):
        recipe_method({**model, "corruption": "blur"})


# ---- Loop and results


@pytest.fixture
def processor():
    return ViTImageProcessor(size={"height": 8, "width": 8}, do_convert_rgb=True)


def test_batch_size_is_reached_by_accumulation():
    recipe = TrainingRecipe(epochs=1, batch_size=32, device_batch_size=8, mixed_precision="no")
    accelerator = make_accelerator(recipe)
    assert accelerator.gradient_accumulation_steps == 4
    with pytest.raises(ValueError, match="must be a multiple .*got 32 and 12 x 1"):
        make_accelerator(TrainingRecipe(epochs=1, batch_size=32, device_batch_size=12, mixed_precision="no"))
    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
    few = Dataset.from_dict({"image": [PILImage.new("RGB", (8, 8))] * 4, "label": [0] * 4}, features=features)
    with pytest.raises(ValueError, match="`training.batch_size` is 32, but there are only 4 images"):
        make_loader(accelerator, recipe, few, lambda batch: batch, shuffle=True)


@pytest.mark.parametrize("warmup", [True, False])
def test_average_after_n_steps_is_the_closed_form(warmup):
    recipe = TrainingRecipe(epochs=1, batch_size=1, ema_decay=0.9, ema_warmup=warmup, mixed_precision="no")
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 5.0)
    state = prepare_training(make_accelerator(recipe), recipe, model, steps_per_epoch=4, seed=0)
    expected = 5.0
    for step, weight in enumerate((1.0, 2.0, 4.0, 8.0)):
        torch.nn.init.constant_(model.weight, weight)
        state.progress.step = step + 1
        update_ema(state)
        decay = min(1 - (1 + step) ** (-2 / 3), 0.9) if warmup else 0.9
        expected = decay * expected + (1 - decay) * weight
    assert state.ema.module.weight.item() == pytest.approx(expected)


def test_failed_save_leaves_the_old_checkpoint(tmp_path, make_model, processor):
    folder = tmp_path / "model"
    model = make_model()
    save_checkpoint(folder, model, processor)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    class BrokenProcessor:
        def save_pretrained(self, folder):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(folder, model, BrokenProcessor())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_results_are_written_and_spread_is_the_standard_deviation(tmp_path):
    write_json(tmp_path / "deep/result.json", {"top1": 0.5})
    assert json.loads((tmp_path / "deep/result.json").read_text()) == {"top1": 0.5}
    assert mean_and_spread([0.97, 0.98, 0.99]) == "98.00 ± 1.00"
    assert mean_and_spread([0.97]) == "97.00"


# ---- The script, as users run it


def run_script(*args: str, launcher: tuple[str, ...] = (), cwd: Path) -> str:
    command = [sys.executable, *launcher, *SCRIPT, *args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_script_trains_compares_resumes_and_classifies(tmp_path):
    settings = ("--set", "training.epochs=25", "training.num_workers=0", "evaluation.num_inference_steps=[1, 10]")
    output = run_script("--methods", "tdd", "mdd", *settings, cwd=tmp_path)
    assert "learning rate 1e-03 = base 4e-03 x batch 64 / 256" in output
    assert "| tdd    | 1.5      |" in output and "| mdd    | 1        |" in output and "true label" in output

    folder = tmp_path / "outputs/digits/tdd-seed0"
    result = json.loads((folder / "result.json").read_text())
    top1 = {(entry["num_inference_steps"], entry["guidance_scale"]): entry["top1"] for entry in result["accuracy"]}
    assert set(top1) == {(1, 1.0), (10, 1.0), (1, 1.5), (10, 1.5)}
    assert top1[10, 1.0] >= 0.90  # 80 epochs reach 97 %
    assert json.loads((tmp_path / "outputs/digits/mdd-seed0/result.json").read_text())["accuracy"][0]["top1"] >= 0.90

    prediction = pipeline("image-classification", model=str(folder))(str(folder / "example.png"), top_k=2)
    assert len(prediction) == 2 and prediction[0]["label"] in {str(digit) for digit in range(10)}

    again = run_script("--methods", "tdd", "mdd", *settings, cwd=tmp_path)
    assert again.count("is done already") == 2 and "parameters" not in again


def test_script_runs_in_two_processes(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    settings = ("training.epochs=1", "training.num_workers=0", "evaluation.num_inference_steps=[1]")
    output = run_script("--set", *settings, launcher=launcher, cwd=tmp_path)
    assert "2 process(es) on cpu, precision no: batch size 64 = 32 x 2 x 1" in output
    result = json.loads((tmp_path / "outputs/digits/tdd-seed0/result.json").read_text())
    # The accuracy is over all 360 held-out images, each counted once, however they are shared between processes.
    assert (result["accuracy"][0]["top1"] * 360) % 1 == pytest.approx(0, abs=1e-9)
