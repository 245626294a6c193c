# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Tests of the configuration: what is saved, what is loaded, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    Dinov2Config,
    PreTrainedConfig,
    SiglipVisionConfig,
    TimmWrapperConfig,
    ViTConfig,
)

from modeling_tdd import TDDConfig


VISION_CONFIGS = [
    ViTConfig(hidden_size=32, num_attention_heads=2),
    Dinov2Config(hidden_size=32, num_attention_heads=2),
    SiglipVisionConfig(hidden_size=32, num_attention_heads=2),
    TimmWrapperConfig(architecture="test_vit"),
]

# Every field of our own, with a value that is not its default.
NON_DEFAULT_FIELDS = {
    "vocab_size": 77,
    "max_position_embeddings": 9,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.2,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "pooling": None,
    "num_timesteps": 50,
    "noise_schedule": "cosine",
    "prediction_type": "epsilon",
    "loss_weighting": "none",
    "one_hot_scale": 0.5,
    "condition_dropout": 0.25,
    "timesteps_per_image": 2,
    "timestep_sampling": "shared",
    "mistaken_share": 0.05,
    "label_smoothing": 0.1,
    "freeze_encoder": True,
    "pad_token_id": 3,
    "eos_token_id": 4,
    "pad_loss_weight": 0.5,
    "num_inference_steps": 5,
    "guidance_scale": 3.0,
    "guidance_schedule": "linear",
    "sampling_strategy": "multinomial",
    "num_noise_samples": 4,
}


@pytest.mark.parametrize("vision_config", VISION_CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("auto_class", [TDDConfig, AutoConfig])
def test_round_trip_keeps_the_vision_config(vision_config: PreTrainedConfig, auto_class: type, tmp_path: Path) -> None:
    config = TDDConfig(vision_config=vision_config, num_labels=7)
    config.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert isinstance(loaded, TDDConfig)
    assert type(loaded.vision_config) is type(vision_config)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    assert loaded.vision_config.to_dict() == vision_config.to_dict()


def test_vision_config_may_be_a_dict_or_left_out() -> None:
    config = TDDConfig(vision_config={"model_type": "dinov2", "hidden_size": 48})
    assert isinstance(config.vision_config, Dinov2Config) and config.vision_config.hidden_size == 48
    assert isinstance(TDDConfig().vision_config, ViTConfig)


def test_non_default_fields_are_saved(tmp_path: Path) -> None:
    for name, value in NON_DEFAULT_FIELDS.items():
        assert getattr(TDDConfig(), name) != value, f"{name}: the test needs another value than the default"
    TDDConfig(**NON_DEFAULT_FIELDS).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    loaded = TDDConfig.from_pretrained(tmp_path)
    for name, value in NON_DEFAULT_FIELDS.items():
        if value is not None:  # JSON configurations leave None out where it is not needed; what is loaded counts
            assert saved[name] == value
        assert getattr(loaded, name) == value


def test_the_test_above_covers_every_field() -> None:
    own_fields = set(TDDConfig.__annotations__) - {"sub_configs_defaults", "vision_config", "corruption"}
    assert own_fields == set(NON_DEFAULT_FIELDS)  # `corruption="mask"` excludes "epsilon": it has its own test


def test_corruption_is_saved(tmp_path: Path) -> None:
    TDDConfig(corruption="mask").save_pretrained(tmp_path)
    assert TDDConfig.from_pretrained(tmp_path).corruption == "mask"


def test_num_categories_are_the_labels_unless_there_is_a_vocabulary() -> None:
    assert TDDConfig(num_labels=12).num_categories == 12
    assert TDDConfig(num_labels=12, vocab_size=30).num_categories == 30


BAD_FIELDS = [
    ("vocab_size", 0, "at least 1"),
    ("num_labels", 0, "at least 1"),
    ("max_position_embeddings", 0, "at least 1"),
    ("hidden_size", 0, "at least 1"),
    ("hidden_size", 770, "multiple of `num_attention_heads`"),
    ("num_hidden_layers", 0, "at least 1"),
    ("num_attention_heads", 0, "at least 1"),
    ("num_attention_heads", -2, "at least 1"),
    ("intermediate_size", 0, "at least 1"),
    ("hidden_dropout_prob", 1.0, "in [0, 1)"),
    ("attention_probs_dropout_prob", -0.1, "in [0, 1)"),
    ("pooling", "max", "'cls', 'mean', None"),
    ("num_timesteps", 0, "at least 1"),
    ("num_timesteps", -5, "at least 1"),
    ("num_timesteps", 10.5, "int"),
    ("num_timesteps", "ten", "int"),
    ("noise_schedule", "quadratic", "'linear', 'cosine', 'calibrated'"),
    ("corruption", "uniform", "'gaussian', 'mask'"),
    ("prediction_type", "velocity", "'sample', 'epsilon'"),
    ("loss_weighting", "snr", "'alpha_bar', 'none'"),
    ("one_hot_scale", 0.0, "(0, 1]"),
    ("one_hot_scale", 1.5, "(0, 1]"),
    ("condition_dropout", 1.1, "in [0, 1]"),
    ("condition_dropout", float("nan"), "in [0, 1]"),
    ("timesteps_per_image", 0, "in [1, 1000]"),
    ("timesteps_per_image", 1001, "in [1, 1000]"),
    ("timestep_sampling", "random", "'shared', 'per_token'"),
    ("mistaken_share", 1.0, "in [0, 1)"),
    ("label_smoothing", 1.0, "in [0, 1)"),
    ("pad_loss_weight", 1.5, "in [0, 1]"),
    ("num_inference_steps", 0, "in [1, 1000]"),
    ("guidance_scale", 0.5, "at least 1"),
    ("guidance_scale", float("nan"), "at least 1"),
    ("guidance_schedule", "sine", "'constant', 'linear', 'cosine'"),
    ("sampling_strategy", "greedy", "'argmax', 'multinomial'"),
    ("num_noise_samples", 0, "at least 1"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD_FIELDS)
def test_bad_field_is_refused_by_name(name: str, value: Any, allowed: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        TDDConfig(**{name: value})
    message = str(error.value)
    assert name in message
    assert str(value) in message
    assert allowed in message


def test_bad_field_is_refused_when_saved(tmp_path: Path) -> None:
    config = TDDConfig()
    config.noise_schedule = "quadratic"
    with pytest.raises((ValueError, StrictDataclassError), match="noise_schedule"):
        config.save_pretrained(tmp_path)


def test_masks_have_no_noise_to_regress() -> None:
    with pytest.raises((ValueError, StrictDataclassError), match="`prediction_type='epsilon'` needs `corruption="):
        TDDConfig(corruption="mask", prediction_type="epsilon")


def test_bad_field_of_a_saved_config_is_refused_when_loaded(
    make_config: Callable[..., TDDConfig], tmp_path: Path
) -> None:
    make_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_timesteps": 0}))
    with pytest.raises((ValueError, StrictDataclassError), match="`num_timesteps` must be at least 1, got 0"):
        TDDConfig.from_pretrained(tmp_path)
