# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What docs/security.md promises of a checkpoint: it runs no code and reads nothing but itself."""

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from test_pipeline import WORDS, make_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    TimmWrapperConfig,
    ViTImageProcessor,
    pipeline,
)

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification, TDDModel, TDDProcessor


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.folder),)


@pytest.fixture
def vision_config() -> TimmWrapperConfig:
    return TimmWrapperConfig(architecture="test_vit", model_args={"img_size": 32})


@pytest.fixture
def checkpoints(make_model: Callable, make_captioner: Callable, tmp_path: Path) -> dict[str, Path]:
    """A classifier's and a captioner's folder, each with a pickle that makes the folder `tmp_path / "ran"`."""
    folders = {"classifier": tmp_path / "classifier", "captioner": tmp_path / "captioner"}
    image_processor = ViTImageProcessor(size={"height": 32, "width": 32})
    make_model().save_pretrained(folders["classifier"])
    image_processor.save_pretrained(folders["classifier"])
    make_captioner(vocab_size=len(WORDS)).save_pretrained(folders["captioner"])
    TDDProcessor(image_processor, make_tokenizer()).save_pretrained(folders["captioner"])
    for folder in folders.values():
        (folder / "weights.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    return folders


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


DOORS = {
    "AutoConfig": AutoConfig.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "TDDModel": TDDModel.from_pretrained,
    "AutoModelForImageClassification": AutoModelForImageClassification.from_pretrained,
    "TDDForImageClassification": TDDForImageClassification.from_pretrained,
    "image-classification": lambda folder: pipeline("image-classification", model=str(folder)),
    "AutoModelForImageTextToText": AutoModelForImageTextToText.from_pretrained,
    "TDDForCaptioning": TDDForCaptioning.from_pretrained,
    "image-captioning": lambda folder: pipeline("image-captioning", model=str(folder)),
    "image-text-to-text": lambda folder: pipeline("image-text-to-text", model=str(folder)),
}


@pytest.mark.parametrize("door", DOORS)
def test_no_pickle_that_a_configuration_names_is_loaded(checkpoints: dict[str, Path], door: str) -> None:
    """timm 1.0.15 to 1.0.25 ran it, and later ones read it."""
    is_captioner = any(word in door for word in ("Text", "Captioning", "captioning", "text"))
    folder = checkpoints["captioner" if is_captioner else "classifier"]
    assert DOORS[door](folder) is not None
    file = str(folder / "weights.pth")
    change_config(folder, lambda content: content["vision_config"]["model_args"].update(checkpoint_path=file))
    with pytest.raises(ValueError, match=r"`vision_config.model_args.checkpoint_path` must not be given"):
        DOORS[door](folder)
    assert not (folder.parent / "ran").exists()


LOCATIONS = [
    {"model_args": {"checkpoint_path": "weights.pth"}},
    {"model_args": {"pretrained": True}},
    {"model_args": {"pretrained_cfg": {"file": "weights.pth"}}},
    {"model_args": {"pretrained_cfg_overlay": {"url": "weights.pth"}}},
    {"model_args": {"cache_dir": "here"}},
    {"model_args": {"act_layer": "../weights"}},
    {"model_args": {"anything": ["https://example.org/weights.pth"]}},
    {"architecture": "local-dir:here"},
    {"architecture": "hf-hub:user/model"},
    {"attn_implementation": "user/kernel"},
    {"_attn_implementation": "user/kernel"},
    {"model_type": "detr", "backbone": "user/model", "use_timm_backbone": False},
    {"model_type": "dpt", "backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:user/model"}},
]


@pytest.mark.parametrize("fields", LOCATIONS, ids=str)
def test_an_encoder_names_no_file_url_or_repository(vision_config: TimmWrapperConfig, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`vision_config.*(must not be given|must name no file, URL or repository)"):
        TDDConfig(vision_config={**vision_config.to_dict(), **fields})


def test_an_encoder_that_is_changed_later_is_checked_when_it_is_built(make_config: Callable) -> None:
    config = make_config()
    config.vision_config.model_args = {"checkpoint_path": "weights.pth"}
    with pytest.raises(ValueError, match=r"`vision_config.model_args.checkpoint_path` must not be given"):
        TDDForImageClassification(config)


def test_a_configuration_names_no_repository_with_kernels(checkpoints: dict[str, Path]) -> None:
    change_config(checkpoints["classifier"], lambda content: content.update(attn_implementation="user/kernel"))
    with pytest.raises(ValueError, match="`attn_implementation` must name no file, URL or repository"):
        AutoConfig.from_pretrained(checkpoints["classifier"])


def test_arguments_of_timm_that_name_nothing_are_kept(vision_config: TimmWrapperConfig) -> None:
    arguments = {"pretrained": False, "drop_path_rate": 0.1, "act_layer": "gelu", "pretrained_window_sizes": [1, 1]}
    notes = {"pretrained_cfg": {"url": "https://example.org"}, "label_names": ["a/b"], "_name_or_path": "/a/b"}
    config = TDDConfig(vision_config={**vision_config.to_dict(), "model_args": arguments, **notes})
    assert config.vision_config.model_args == arguments


def test_timm_is_one_that_loads_no_pickles() -> None:
    assert tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 26)


# ---- Sizes


SIZES = [
    {"num_hidden_layers": 100_000},
    {"image_size": 2**20},
    {"image_size": 8192, "patch_size": 1},
    {"model_type": "resnet", "depths": [20_000, 2, 2, 2]},
    {"model_type": "timm_wrapper", "architecture": "resnet18", "model_args": {"layers": [20_000, 1, 1, 1]}},
    {"model_type": "timm_wrapper", "architecture": "test_vit", "model_args": {"depth": 20_000}},
    {"model_type": "timm_wrapper", "architecture": "test_vit", "model_args": {"img_size": 4096, "patch_size": 2}},
]


@pytest.mark.parametrize("fields", SIZES, ids=str)
def test_an_encoder_that_would_be_built_for_minutes_is_refused_at_once(fields: dict[str, Any]) -> None:
    small = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    start = time.process_time()
    with pytest.raises(ValueError, match="`vision_config.*must have (at most|images of at most)"):
        TDDForImageClassification(TDDConfig(vision_config={**small, **fields}))
    assert time.process_time() - start < 5
