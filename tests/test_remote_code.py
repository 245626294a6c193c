# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The Auto classes with this package, and a saved checkpoint on a machine without it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from remote_code_probe import probe
from test_pipeline import WORDS, make_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
    ViTImageProcessor,
)

import modeling_tdd
from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification, TDDModel, TDDProcessor
from modeling_tdd.modeling_tdd import AUTO_MAP


PROBE = Path(__file__).parent / "remote_code_probe.py"
# A classifier needs no processor of ours
CODE = {path.name for path in Path(modeling_tdd.__file__).parent.glob("*_tdd.py")} - {"processing_tdd.py"}


@pytest.fixture
def checkpoints(
    make_model: Callable[..., TDDForImageClassification],
    make_captioner: Callable[..., TDDForCaptioning],
    tmp_path: Path,
) -> tuple[str, str]:
    """Folders of a classifier and a captioner."""
    image_processor = ViTImageProcessor(size={"height": 16, "width": 16})
    classifier, captioner = tmp_path / "classifier", tmp_path / "captioner"
    make_model(num_inference_steps=3, guidance_scale=1.5).save_pretrained(classifier)
    image_processor.save_pretrained(classifier)
    make_captioner(vocab_size=len(WORDS)).save_pretrained(captioner)
    TDDProcessor(image_processor, make_tokenizer()).save_pretrained(captioner)
    return str(classifier), str(captioner)


@pytest.fixture
def image_file(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def run_without_package(tmp_path: Path, *args: str) -> subprocess.CompletedProcess:
    """A Python that sees neither PYTHONPATH nor the working directory, with an empty cache of remote code."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-I", *args],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def test_auto_classes_are_registered(checkpoints: tuple[str, str], make_config: Callable[..., TDDConfig]) -> None:
    classifier, captioner = checkpoints
    assert type(AutoConfig.from_pretrained(classifier)) is type(AutoConfig.for_model("tdd")) is TDDConfig
    assert type(AutoModel.from_pretrained(classifier)) is type(AutoModel.from_config(make_config())) is TDDModel
    assert type(AutoModelForImageClassification.from_pretrained(classifier)) is TDDForImageClassification
    assert type(AutoModelForImageTextToText.from_pretrained(captioner)) is TDDForCaptioning
    assert type(AutoProcessor.from_pretrained(captioner)) is TDDProcessor
    # A classifier's processor is its image processor, as of any classifier in Transformers
    assert type(AutoProcessor.from_pretrained(classifier)) is ViTImageProcessor


def test_checkpoint_names_every_auto_class_and_brings_their_code(checkpoints: tuple[str, str]) -> None:
    classifier, captioner = map(Path, checkpoints)
    for folder in (classifier, captioner):
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == AUTO_MAP
        for reference in AUTO_MAP.values():
            module, name = reference.split(".")
            assert f"class {name}(" in (folder / f"{module}.py").read_text()
    processor_config = json.loads((captioner / "processor_config.json").read_text())
    assert processor_config["auto_map"] == {"AutoProcessor": "processing_tdd.TDDProcessor"}
    assert {path.name for path in classifier.glob("*.py")} == CODE
    assert {path.name for path in captioner.glob("*.py")} == CODE | {"processing_tdd.py"}


def test_outputs_without_the_package_are_the_same_bit_for_bit(
    checkpoints: tuple[str, str], image_file: str, tmp_path: Path
) -> None:
    done = run_without_package(tmp_path, str(PROBE), *checkpoints, image_file, str(tmp_path / "outputs.pt"))
    assert done.returncode == 0, done.stderr
    remote = torch.load(tmp_path / "outputs.pt", weights_only=True)
    local = probe(*checkpoints, image_file)
    assert remote["tensors"].keys() == local["tensors"].keys()
    for name, tensor in local["tensors"].items():
        assert torch.equal(remote["tensors"][name], tensor), name
    assert remote["pipelines"] == local["pipelines"]
    assert len({label["score"] for label in local["pipelines"]["image-classification"][0]}) == 5


def test_without_the_package_a_checkpoint_saves_itself_whole_again(
    checkpoints: tuple[str, str], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    script = f"""
import sys
sys.modules["modeling_tdd"] = None
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
for auto_class in (AutoModelForImageTextToText, AutoProcessor):
    auto_class.from_pretrained({checkpoints[1]!r}, trust_remote_code=True).save_pretrained({str(again)!r})
AutoModel.from_pretrained({str(again)!r}, trust_remote_code=True)
AutoProcessor.from_pretrained({str(again)!r}, trust_remote_code=True)
"""
    done = run_without_package(tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    for path in Path(checkpoints[1]).iterdir():
        if path.suffix == ".json":  # Transformers notes in some what it knows since loading, such as the dtype
            saved, first = json.loads((again / path.name).read_text()), json.loads(path.read_text())
            assert all(saved.get(key) == first.get(key) for key in ("auto_map", "custom_pipelines")), path.name
        else:
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoModelForImageClassification", "AutoProcessor"])
def test_no_code_runs_unless_trusted(checkpoints: tuple[str, str], auto_class: str, tmp_path: Path) -> None:
    folder = checkpoints[auto_class == "AutoProcessor"]
    for file in Path(folder).glob("*.py"):
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    script = f"""
import sys
sys.modules["modeling_tdd"] = None
import transformers
transformers.{auto_class}.from_pretrained({folder!r})
"""
    done = run_without_package(tmp_path, "-c", script)
    assert done.returncode == 1
    assert "contains custom code which must be executed" in done.stderr and "trust_remote_code=True" in done.stderr
    assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("modules/**/*_tdd.py"))
