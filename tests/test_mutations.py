# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Random damage to the files of a checkpoint, to images, to recipes and to checkpoints of a training: each ends in an
answer or in an error of a known kind, in bounded time, and runs no code."""

import io
import json
import shutil
import string
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError
from test_pipeline import WORDS, make_tokenizer
from transformers import ViTConfig, ViTImageProcessor

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDProcessor
from modeling_tdd.images_tdd import open_image
from modeling_tdd.training.checkpoints import find_damage, write_checksums
from modeling_tdd.training.data import read_image
from modeling_tdd.training.recipe import load_recipe


ROOT = Path(__file__).parent.parent
SECONDS = 20  # far more than any example takes, on a busy machine

bounded = settings(
    deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
thorough = settings(bounded, max_examples=500, derandomize=False)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are changed, left out, doubled or put in."""
    start = draw(st.integers(0, len(content)))
    end = start + draw(st.integers(0, 16))
    middle = draw(st.sampled_from([b"", content[start:end] * 2]) | st.binary(max_size=16))
    return content[:start] + middle + content[draw(st.sampled_from([end, len(content)])) :]


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths to all values of a tree of dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def changed(tree: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    copy = tree.copy()
    copy[path[0]] = changed(tree[path[0]], path[1:], value)
    return copy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner with its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokens = {"vocab_size": len(WORDS), "max_position_embeddings": 8, "pad_token_id": 0, "eos_token_id": 2}
    config = TDDConfig(vision_config=ViTConfig(image_size=16, patch_size=8, **small), pooling=None, **tokens, **small)
    torch.manual_seed(0)
    TDDForCaptioning(config).save_pretrained(folder)
    TDDProcessor(ViTImageProcessor(size={"height": 16, "width": 16}), make_tokenizer()).save_pretrained(folder)
    return folder


def caption(folder: Path) -> list[str]:
    model, processor = TDDForCaptioning.from_pretrained(folder).eval(), TDDProcessor.from_pretrained(folder)
    inputs = processor(images=Image.new("RGB", (8, 8)), return_tensors="pt")
    sequences = model.generate(pixel_values=inputs["pixel_values"], num_inference_steps=1)
    return processor.batch_decode(sequences)


def check(run: Callable[[], Any], *errors: type[Exception]) -> None:
    """Runs something to an answer or to one of some errors."""
    start = time.process_time()
    with suppress(*errors):
        assert run() is not None
    assert time.process_time() - start < SECONDS


# ---- Checkpoints


# Of Transformers' own fields in our files a few raise what they like; of its files all do
ERRORS = (ValueError, TypeError, OSError, KeyError, AttributeError, RuntimeError, SafetensorError)
OURS = ("config.json", "generation_config.json", "model.safetensors")


def check_json(folder: Path, name: str, data: st.DataObject) -> None:
    tree = json.loads((folder / name).read_text())
    tree = changed(tree, data.draw(st.sampled_from(places(tree))), data.draw(VALUES))
    original = (folder / name).read_bytes()
    (folder / name).write_text(json.dumps(tree))
    try:
        check(lambda: caption(folder), *(ERRORS if name in OURS else [Exception]))
    finally:
        (folder / name).write_bytes(original)


NAMES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", NAMES[:2])
@bounded
@given(data=st.data())
def test_any_value_in_a_checkpoints_json(checkpoint: Path, name: str, data: st.DataObject) -> None:
    check_json(checkpoint, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@thorough
@given(data=st.data())
def test_many_values_in_a_checkpoints_json(checkpoint: Path, name: str, data: st.DataObject) -> None:
    check_json(checkpoint, name, data)


def check_bytes(folder: Path, name: str, data: st.DataObject) -> None:
    original = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(damaged(original)))
    try:
        check(lambda: caption(folder), *(ERRORS if name in OURS else [Exception]))
    finally:
        (folder / name).write_bytes(original)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@bounded
@given(data=st.data())
def test_damaged_files_of_a_checkpoint(checkpoint: Path, name: str, data: st.DataObject) -> None:
    check_bytes(checkpoint, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "model.safetensors", "tokenizer.json"])
@thorough
@given(data=st.data())
def test_many_damaged_files_of_a_checkpoint(checkpoint: Path, name: str, data: st.DataObject) -> None:
    check_bytes(checkpoint, name, data)


@bounded
@given(data=st.data())
def test_any_damage_to_a_trainings_checkpoint_is_found(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "checkpoint-3"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("model.safetensors", "optimizer.pt"):
        (folder / name).write_bytes(string.ascii_letters.encode())
    write_checksums(folder)
    assert find_damage(folder) == ""
    file = folder / data.draw(st.sampled_from(["checksums.json", "model.safetensors", "optimizer.pt"]))
    before = file.read_bytes()
    file.write_bytes(after := data.draw(damaged(before)))
    is_same = file.name == "checksums.json" and _load(after) == _load(before)  # but for white space
    assert (find_damage(folder) == "") == (after == before or is_same)


def _load(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


# ---- Images


def encode(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((16, 16), 50).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


IMAGES = [encode(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]


def check_image(content: bytes) -> None:
    check(lambda: open_image(content), ValueError)
    picture, problem = read_image({"bytes": content, "path": None})
    assert (picture is None) == bool(problem)


@bounded
@given(content=st.sampled_from(IMAGES).flatmap(damaged))
def test_damaged_images(content: bytes) -> None:
    check_image(content)


@pytest.mark.slow
@settings(thorough, max_examples=5000)
@given(content=st.sampled_from(IMAGES).flatmap(damaged))
def test_many_damaged_images(content: bytes) -> None:
    check_image(content)


# ---- Recipes


RECIPE = (ROOT / "scripts/recipes/digits.yaml").read_bytes()


def check_recipe(folder: Path, content: bytes) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    check(lambda: load_recipe(folder / "recipe.yaml"), ValueError)


@bounded
@given(content=damaged(RECIPE))
def test_damaged_recipes(tmp_path: Path, content: bytes) -> None:
    check_recipe(tmp_path, content)


@pytest.mark.slow
@thorough
@given(content=damaged(RECIPE))
def test_many_damaged_recipes(tmp_path: Path, content: bytes) -> None:
    check_recipe(tmp_path, content)


SECTIONS = ("augmentation", "checkpoint", "data", "evaluation", "image_processor", "lora", "model", "task", "training")


@bounded
@given(section=st.sampled_from(SECTIONS), key=st.text(string.ascii_lowercase + "._", max_size=12), value=VALUES)
def test_any_override(section: str, key: str, value: Any) -> None:
    name = f"{section}.{key}".rstrip(".")
    check(lambda: load_recipe(ROOT / "scripts/recipes/digits.yaml", [f"{name}={json.dumps(value)}"]), ValueError)
