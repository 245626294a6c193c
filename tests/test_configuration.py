# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Tests of the configuration: what is saved, what is loaded, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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

# Every field of our own with a value that is not its default: a captioner's, and those that go together with other
# fields or with classifiers alone. (`corruption="mask"` excludes some of them and has its own test.)
CAPTIONER = {"vocab_size": 77, "max_position_embeddings": 9}
CAPTIONER_FIELDS = {
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
    "noise_schedule": "linear",
    "input_weighting": "none",
    "loss_weighting": "alpha_bar",
    "one_hot_scale": 0.5,
    "condition_dropout": 0.25,
    "timesteps_per_image": 2,
    "timestep_sampling": "shared",
    "mistaken_share": 0.05,
    "label_smoothing": 0.2,
    "freeze_encoder": True,
    "pad_token_id": 3,
    "eos_token_id": 4,
    "pad_loss_weight": 0.5,
}
CLASSIFIER_FIELDS = {
    "prediction_type": "epsilon",
    "num_inference_steps": 5,
    "guidance_scale": 3.0,
    "guidance_schedule": "linear",
    "sampling_strategy": "multinomial",
    "num_noise_samples": 4,
    "stability_threshold": 3,
    "confidence_threshold": 0.9,
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


@pytest.mark.parametrize(("task", "fields"), [(CAPTIONER, CAPTIONER_FIELDS), ({}, CLASSIFIER_FIELDS)])
def test_non_default_fields_are_saved(task: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    for name, value in fields.items():
        assert getattr(TDDConfig(**task), name) != value, f"{name}: the test needs another value than the default"
    TDDConfig(**task, **fields).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    loaded = TDDConfig.from_pretrained(tmp_path)
    for name, value in {**task, **fields}.items():
        if value is not None:  # JSON configurations leave None out where it is not needed; what is loaded counts
            assert saved[name] == value
        assert getattr(loaded, name) == value


def test_the_test_above_covers_every_field() -> None:
    own_fields = set(TDDConfig.__annotations__) - {"sub_configs_defaults", "vision_config", "corruption"}
    assert own_fields == {*CAPTIONER, *CAPTIONER_FIELDS, *CLASSIFIER_FIELDS}


# ---- Defaults


# What the paper states (arXiv 2510.01047)
PAPER = {
    "loss_weighting": "alpha_bar",  # Section 3.2, the timestep-conditioned coefficient
    "input_weighting": "none",  # Section 3.2: the network reads y_t
    "timestep_sampling": "shared",  # Section 3.2: one t
    "mistaken_share": 0.0,  # Section 3.2: y_t is the noisy version of y_0 itself
    "label_smoothing": 0.1,  # Appendix A.1
    "sampling_strategy": "argmax",  # Section 3.2 and appendix A.2
    "prediction_type": "sample",  # Section 3.2: cross-entropy on y_0
    "corruption": "gaussian",  # Section 3.2
    "one_hot_scale": 1.0,  # Section 3.2: one-hot labels are lambda-hot ones with lambda = 1
    "max_position_embeddings": 1,  # Section 3.4: a label is one token
    "pooling": "cls",  # Section 3.3: one feature is the condition
}


def test_defaults_are_the_papers_classifier() -> None:
    config = TDDConfig()
    for name, value in PAPER.items():
        assert getattr(config, name) == value, name
    # Section 4.1: ViT-B/16 at 224 pixels; tests/test_modeling.py counts the 111 M parameters of `num_labels=1000`
    assert isinstance(config.vision_config, ViTConfig)
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16}
    for name, value in {**sizes, "image_size": 224}.items():
        assert getattr(config.vision_config, name) == value, name
    # Section 4.2.1: strong at about 10 steps. Guidance is the caller's to ask for.
    assert config.num_inference_steps == 10
    assert (config.guidance_scale, config.guidance_schedule, config.num_noise_samples) == (1.0, "constant", 1)
    assert config.noise_schedule == "cosine"


SEQUENCE = {"vocab_size": 30, "max_position_embeddings": 8}
TASK_DEFAULTS = [
    (
        SEQUENCE,
        {
            "noise_schedule": "projected",
            "input_weighting": "visibility",
            "timestep_sampling": "per_token",
            "mistaken_share": 0.1,
            "label_smoothing": 0.0,
            "loss_weighting": "none",  # Section 3.4
        },
    ),
    (
        {**SEQUENCE, "timestep_sampling": "shared"},
        {"mistaken_share": 0.0, "input_weighting": "visibility", "loss_weighting": "none"},
    ),
    (
        {**SEQUENCE, "corruption": "mask"},
        {
            "noise_schedule": "projected",
            "input_weighting": "none",
            "timestep_sampling": "shared",
            "mistaken_share": 0.0,
            "label_smoothing": 0.0,
            "loss_weighting": "none",
        },
    ),
    (
        {"corruption": "mask"},
        {"input_weighting": "none", "timestep_sampling": "shared", "mistaken_share": 0.0, "label_smoothing": 0.1},
    ),
    ({"prediction_type": "epsilon"}, {"label_smoothing": 0.0, "loss_weighting": "alpha_bar"}),
    ({**SEQUENCE, "prediction_type": "epsilon"}, {"label_smoothing": 0.0, "input_weighting": "visibility"}),
]


@pytest.mark.parametrize(("fields", "expected"), TASK_DEFAULTS, ids=str)
def test_defaults_by_task(fields: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    config = TDDConfig(**fields)
    config.save_pretrained(tmp_path)
    saved, loaded = json.loads((tmp_path / "config.json").read_text()), TDDConfig.from_pretrained(tmp_path)
    for name, value in expected.items():
        assert getattr(config, name) == getattr(loaded, name) == value, name
        assert saved[name] == value, name  # resolved: what a checkpoint does may not change with the defaults


PAPERS_CAPTIONER = {
    "noise_schedule": "cosine",
    "input_weighting": "none",
    "timestep_sampling": "shared",
    "mistaken_share": 0.0,
    "label_smoothing": 0.1,
    "loss_weighting": "alpha_bar",
}
OURS_AS_CLASSIFIER = {
    "noise_schedule": "projected",
    "input_weighting": "visibility",
    "label_smoothing": 0.0,
    "loss_weighting": "none",
}


@pytest.mark.parametrize(
    ("task", "fields"), [(SEQUENCE, PAPERS_CAPTIONER), ({}, OURS_AS_CLASSIFIER)], ids=["captioner", "classifier"]
)
def test_values_that_are_the_other_tasks_defaults_are_kept(
    task: dict[str, Any], fields: dict[str, Any], tmp_path: Path
) -> None:
    other = TDDConfig() if task else TDDConfig(**SEQUENCE)
    for name, value in fields.items():
        assert getattr(other, name) == value != getattr(TDDConfig(**task), name), name
    TDDConfig(**task, **fields).save_pretrained(tmp_path)
    loaded = TDDConfig.from_pretrained(tmp_path)
    for name, value in fields.items():
        assert getattr(loaded, name) == value, name
    copied = TDDConfig.from_dict(loaded.to_dict())
    assert all(getattr(copied, name) == value for name, value in fields.items())


INFERENCE_FIELDS = {
    "num_inference_steps": 5,
    "guidance_scale": 1.0,
    "guidance_schedule": "constant",
    "sampling_strategy": "argmax",
    "num_noise_samples": 1,
    "stability_threshold": 2,
    "confidence_threshold": 0.9,
}


def test_a_captioners_configuration_has_no_inference_fields() -> None:
    """They are those of its TDDGenerationConfig; here nothing would read them."""
    config = TDDConfig(**SEQUENCE)
    assert all(getattr(config, name) is None for name in INFERENCE_FIELDS)
    for name, value in INFERENCE_FIELDS.items():
        with pytest.raises(ValueError, match=f"whose `{name}` belong in `TDDGenerationConfig`"):
            TDDConfig(**SEQUENCE, **{name: value})
    with pytest.raises(ValueError, match="whose `num_inference_steps`, `guidance_scale`"):
        TDDConfig(**SEQUENCE, num_inference_steps=5, guidance_scale=2.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_labels": 10}, 10),
        ({"num_labels": 1000}, 768),
        ({"vocab_size": 30_522, "hidden_size": 96, "max_position_embeddings": 8}, 96),
        ({"num_labels": 1000, "prediction_type": "epsilon"}, 1000),
        ({"vocab_size": 100, "max_position_embeddings": 8, "corruption": "mask"}, 1),
    ],
    ids=str,
)
def test_width_of_the_noise(fields: dict[str, Any], expected: int) -> None:
    assert TDDConfig(**fields).noise_width == expected


def test_corruption_is_saved(tmp_path: Path) -> None:
    TDDConfig(corruption="mask").save_pretrained(tmp_path)
    assert TDDConfig.from_pretrained(tmp_path).corruption == "mask"


def test_num_categories_are_the_labels_unless_there_is_a_vocabulary() -> None:
    assert TDDConfig(num_labels=12).num_categories == 12
    assert TDDConfig(num_labels=12, vocab_size=30).num_categories == 30


BAD_FIELDS = [
    ("vocab_size", 0, "an integer in [1, "),
    ("num_labels", 0, "an integer in [1, "),
    ("max_position_embeddings", 0, "an integer in [1, "),
    ("hidden_size", 0, "an integer in [1, "),
    ("hidden_size", 770, "multiple of `num_attention_heads`"),
    ("num_hidden_layers", 0, "an integer in [1, "),
    ("num_attention_heads", 0, "an integer in [1, "),
    ("num_attention_heads", -2, "an integer in [1, "),
    ("intermediate_size", 0, "an integer in [1, "),
    ("hidden_dropout_prob", 1.0, "in [0, 1)"),
    ("attention_probs_dropout_prob", -0.1, "in [0, 1)"),
    ("pooling", "max", "'cls', 'mean', None"),
    ("num_timesteps", 0, "an integer in [1, "),
    ("num_timesteps", -5, "an integer in [1, "),
    ("num_timesteps", 10.5, "int"),
    ("num_timesteps", "ten", "int"),
    ("noise_schedule", "quadratic", "'linear', 'cosine', 'calibrated', 'projected'"),
    ("input_weighting", "sigma", "'none', 'visibility'"),
    ("corruption", "poisson", "'gaussian', 'mask'"),
    ("prediction_type", "velocity", "'sample', 'epsilon'"),
    ("loss_weighting", "snr", "'alpha_bar', 'none'"),
    ("one_hot_scale", 0.0, "in [0.001, 1]"),
    ("one_hot_scale", 1.5, "in [0.001, 1]"),
    ("condition_dropout", 1.1, "in [0, 1]"),
    ("condition_dropout", float("nan"), "in [0, 1]"),
    ("timesteps_per_image", 0, "at least 1"),
    ("timesteps_per_image", 1001, "at most `num_timesteps`, got 1001 and 1000"),
    ("timestep_sampling", "random", "'shared', 'per_token'"),
    ("mistaken_share", 1.0, "in [0, 1)"),
    ("label_smoothing", 1.0, "in [0, 1)"),
    ("pad_loss_weight", 1.5, "in [0, 1]"),
    ("num_inference_steps", 0, "at least 1"),
    ("num_inference_steps", 1001, "in [1, 1000]"),
    ("guidance_scale", 0.5, "in [1, 1000000]"),
    ("guidance_scale", float("inf"), "in [1, 1000000]"),
    ("guidance_scale", float("nan"), "in [1, 1000000]"),
    ("layer_norm_eps", -1e-6, "in (0, 1]"),
    ("layer_norm_eps", 1e308, "in (0, 1]"),
    ("layer_norm_eps", float("nan"), "in (0, 1]"),
    ("guidance_schedule", "sine", "'constant', 'linear', 'cosine'"),
    ("sampling_strategy", "greedy", "'argmax', 'multinomial'"),
    ("num_noise_samples", 0, "an integer in [1, "),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD_FIELDS)
def test_bad_field_is_refused_by_name(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError) as error:
        TDDConfig(**{name: value})
    message = str(error.value)
    assert name in message
    assert str(value) in message
    assert allowed in message


def test_bad_field_is_refused_when_it_is_set_and_bad_pairs_when_saved(tmp_path: Path) -> None:
    config = TDDConfig()
    with pytest.raises(ValueError, match="`noise_schedule` must be one of .* got 'quadratic'"):
        config.noise_schedule = "quadratic"
    config.timesteps_per_image = 2000
    with pytest.raises(ValueError, match="`timesteps_per_image` must be at most `num_timesteps`, got 2000 and 1000"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prediction_type", "epsilon"),
        ("input_weighting", "visibility"),
        ("timestep_sampling", "per_token"),
        ("one_hot_scale", 0.5),
    ],
)
def test_masks_have_no_noise(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}={value!r}` needs `corruption='gaussian'`"):
        TDDConfig(**SEQUENCE, corruption="mask", **{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timestep_sampling": "per_token"}, "needs `max_position_embeddings` above 1, got 1"),
        ({"mistaken_share": 0.1}, "`mistaken_share=0.1` needs `max_position_embeddings` above 1, got 1"),
        (
            {**SEQUENCE, "timestep_sampling": "per_token", "loss_weighting": "alpha_bar"},
            "`timestep_sampling='per_token'` needs `loss_weighting='none'`",
        ),
        (
            {"prediction_type": "epsilon", "label_smoothing": 0.1},
            "`label_smoothing=0.1` needs `prediction_type='sample'`",
        ),
        ({"num_labels": 1}, "`corruption='gaussian'` needs at least 2 categories, got 1"),
    ],
    ids=str,
)
def test_fields_that_exclude_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TDDConfig(**fields)


def test_bad_field_of_a_saved_config_is_refused_when_loaded(
    make_config: Callable[..., TDDConfig], tmp_path: Path
) -> None:
    make_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_timesteps": 0}))
    with pytest.raises(ValueError, match=r"`num_timesteps` must be an integer in \[1, 1048576\], got 0"):
        TDDConfig.from_pretrained(tmp_path)
