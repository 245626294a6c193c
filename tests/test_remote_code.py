# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The Auto classes with this package, and a saved checkpoint on a machine without it."""

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    pipeline,
)

import modeling_tdd
from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification, TDDModel, TDDProcessor
from modeling_tdd.modeling_tdd import AUTO_MAP
from modeling_tdd.pipeline_tdd import CUSTOM_PIPELINES


PROBE = Path(__file__).parent / "remote_code_probe.py"
ROOT = Path(__file__).parent.parent
CODE = {path.name: path for path in Path(modeling_tdd.__file__).parent.glob("*_tdd.py")}
SHIPPED = [ROOT / "checkpoints/digits", ROOT / "checkpoints/emoji-captions"]
# What Transformers itself needs to run PyTorch models on images
NEEDED = {"PIL", "huggingface_hub", "numpy", "torch", "transformers"}
# What the environment has beside it. A line of Python that makes all of it unknown
OTHERS = ("modeling_tdd", "accelerate", "datasets", "evaluate", "matplotlib", "peft", "scipy", "sklearn", "timm")
HIDE = f"import sys; sys.modules.update(dict.fromkeys({OTHERS}))\n"


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
        timeout=1200,
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
        assert {path.name for path in folder.glob("*.py")} == set(CODE)
    processor_config = json.loads((captioner / "processor_config.json").read_text())
    assert processor_config["auto_map"] == {"AutoProcessor": "processing_tdd.TDDProcessor"}


def test_the_code_of_a_checkpoint_imports_nothing_but_what_transformers_needs() -> None:
    imported = set()
    for path in CODE.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == NEEDED


@pytest.mark.parametrize(
    "line",
    [
        "AutoModel.from_pretrained(captioner, trust_remote_code=True)",
        "AutoProcessor.from_pretrained(captioner, trust_remote_code=True)(images=image)",
        "pipeline('image-to-text', model=captioner, trust_remote_code=True)(image)",
    ],
)
def test_each_part_is_loaded_alone_with_nothing_but_transformers(
    checkpoints: tuple[str, str], image_file: str, line: str, tmp_path: Path
) -> None:
    name = line.partition("(")[0].partition(".")[0]
    names = f"from transformers import {name}\ncaptioner, image = {(checkpoints[1], image_file)!r}\n"
    done = run_without_package(tmp_path, "-c", HIDE + names + line)
    assert done.returncode == 0, done.stderr


# ---- The checkpoints of this repository


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_checkpoint_has_the_code_of_today(folder: Path) -> None:
    renew = "for folder in checkpoints/*; do cp modeling_tdd/*_tdd.py $folder; done"
    assert {path.name for path in folder.glob("*.py")} == set(CODE), renew
    for name, path in CODE.items():
        assert (folder / name).read_bytes() == path.read_bytes(), f"{name} is of another version: {renew}"
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert "_name_or_path" not in config["vision_config"]  # a folder of the machine on which it was trained
    if folder.name == "emoji-captions":
        assert config["custom_pipelines"] == CUSTOM_PIPELINES
        processor = json.loads((folder / "processor_config.json").read_text())
        assert processor["auto_map"] == {"AutoProcessor": "processing_tdd.TDDProcessor"}


def test_shipped_checkpoints_answer_without_the_package(tmp_path: Path) -> None:
    script = f"""
import sys
sys.modules["modeling_tdd"] = None
from transformers import pipeline
digits, emoji = map(str, {[str(folder) for folder in SHIPPED]!r})
print(pipeline("image-to-text", model=emoji, trust_remote_code=True)(emoji + "/example.png"))
print(pipeline("image-classification", model=digits, trust_remote_code=True)(digits + "/example.png", top_k=1))
"""
    done = run_without_package(tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    captions, label = done.stdout.splitlines()
    assert captions == "[{'generated_text': 'woman climbing: dark skin tone'}]" and "'label': '7'" in label


# ---- Pipelines


TASKS = ["image-classification", "image-text-to-text", "image-to-text"]


def run_pipeline(folder: str, task: str, image_file: str, again: Path | None = None) -> Any:
    """What a pipeline says of an image. With `again` it is saved there."""
    pipe = pipeline(task, model=folder, trust_remote_code=True)
    outputs = pipe(image_file) if task != "image-text-to-text" else pipe(image_file, text="the red")
    if again is not None:
        pipe.save_pretrained(again)
    return json.loads(json.dumps(outputs))


def save_pipelines_without_package(tmp_path: Path, jobs: list[tuple[str, str, str | None]], image_file: str) -> Any:
    """The same for several folders, tasks and new folders in another process, which has no package."""
    source = inspect.getsource(run_pipeline)
    script = f"""{HIDE}
import json
from pathlib import Path
from typing import Any
from transformers import pipeline
{source}
print(json.dumps([run_pipeline(folder, task, {image_file!r}, again) for folder, task, again in {jobs!r}]))
"""
    done = run_without_package(tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("with_package", [True, False])
def test_what_a_pipeline_saves_needs_no_package(
    checkpoints: tuple[str, str], image_file: str, tmp_path: Path, with_package: bool
) -> None:
    """Saved by a pipeline of each kind, with the package or without it, and then once more without it."""
    sources = {task: checkpoints[task != "image-classification"] for task in TASKS}
    first = {task: tmp_path / f"first-{task}" for task in TASKS}
    if with_package:
        expected = [run_pipeline(sources[task], task, image_file, first[task]) for task in TASKS]
    else:
        jobs = [(sources[task], task, str(first[task])) for task in TASKS]
        expected = save_pipelines_without_package(tmp_path, jobs, image_file)
    again = [(str(first[task]), task, str(tmp_path / f"second-{task}")) for task in TASKS]
    last = [(folder, task, None) for _, task, folder in again]
    outputs = save_pipelines_without_package(tmp_path, [*again, *last], image_file)
    assert outputs == expected * 2
    for task in TASKS:
        folder = tmp_path / f"second-{task}"
        assert {path.name for path in folder.glob("*.py")} == set(CODE)


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
