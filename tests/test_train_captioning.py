"""scripts/train_captioning.py as users run it, on a few embedded emoji."""

import json
import subprocess
import sys
from pathlib import Path

from transformers import ViTConfig, ViTImageProcessor, ViTModel, pipeline

import modeling_tdd  # noqa: F401 - registers the Auto classes and the pipeline


ROOT = Path(__file__).parent.parent
EMOJI = ROOT / "scripts/data/emoji_mini"


def run_script(cwd: Path, *settings: str) -> str:
    command = [
        sys.executable,
        str(ROOT / "scripts/train_captioning.py"),
        str(ROOT / "scripts/recipes/emoji.yaml"),
        *("--methods", "tdd", "mdd", "--set"),
        f"data.data_files={{train: {EMOJI}/validation.parquet, validation: {EMOJI}/test_combo.parquet}}",
        "data.eval_splits=[validation]",
        "evaluation.num_inference_steps=[1, 4]",
        "training.epochs=2",
        "training.warmup_epochs=0",
        *("model.hidden_size=32", "model.num_hidden_layers=1", "model.intermediate_size=64"),
        *settings,
    ]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tiny_encoder() -> ViTConfig:
    return ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )


def check_results(folder: Path) -> None:
    for method in ("tdd", "mdd"):
        result = json.loads((folder / f"{method}-seed0/result.json").read_text())
        assert [(entry["split"], entry["num_inference_steps"]) for entry in result["scores"]] == [
            ("validation", 1),
            ("validation", 4),
        ]
        assert all(0 <= entry[name] <= 1 for entry in result["scores"] for name in ("exact_match", "token_f1"))
    captioner = pipeline("image-captioning", model=str(folder / "tdd-seed0"))
    image = captioner.image_processor  # loads from the checkpoint, as the tokenizer does
    assert image is not None and captioner.tokenizer.eos_token == "[EOS]"


def test_from_a_frozen_encoder_with_cached_features_and_a_repeated_command(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    ViTModel(tiny_encoder(), add_pooling_layer=False).save_pretrained(encoder)
    ViTImageProcessor(size={"height": 16, "width": 16}, do_convert_rgb=True).save_pretrained(encoder)
    settings = (f"encoder={encoder}", "feature_views=2", "augmentation.size=16")
    output = run_script(tmp_path, *settings)
    assert (
        "### validation" in output
        and "| mdd    | projected | 1        | token_f1" in output
        and "| 4 less 1" in output
    )
    check_results(tmp_path / "outputs/emoji")
    cached = {path.name for path in (tmp_path / "outputs/emoji/features").iterdir()}
    assert cached == {"train-1.safetensors", "train-2.safetensors", "validation-0.safetensors"}
    assert run_script(tmp_path, *settings).count("is done already") == 2


def test_with_an_encoder_that_is_trained_too(tmp_path: Path) -> None:
    vision_config = {**tiny_encoder().to_diff_dict(), "model_type": "vit"}
    vision_config.pop("transformers_version", None)
    run_script(
        tmp_path,
        "encoder=null",
        "model.freeze_encoder=false",
        f"model.vision_config={json.dumps(vision_config)}",
        "image_processor={size: {height: 16, width: 16}}",
        "augmentation.size=16",
    )
    check_results(tmp_path / "outputs/emoji")
