# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Shared fixtures: tiny configurations and models that run in milliseconds, and deterministic seeds."""

import os
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"  # before Transformers is imported: no test may reach the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, for the reason below
if "HF_DATASETS_CACHE" not in os.environ:  # the tests' data sets, which would fill the user's disk
    datasets_cache = tempfile.TemporaryDirectory(prefix="datasets-", ignore_cleanup_errors=True)
    os.environ["HF_DATASETS_CACHE"] = datasets_cache.name  # the workers of pytest-xdist inherit it

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification


# At these sizes handing work to a second thread takes far longer than the work.
torch.set_num_threads(1)

# Weights larger than at a usual start, so that what a test compares differs by more than rounding.
INITIALIZER_RANGE = 0.2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--transformers-src", help="source tree of Transformers, for the tests in tests/common")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def vision_config() -> ViTConfig:
    return ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=INITIALIZER_RANGE,
    )


@pytest.fixture
def make_config(vision_config: ViTConfig) -> Callable[..., TDDConfig]:
    """A function from fields of `TDDConfig` to a tiny configuration."""

    def make(**fields: Any) -> TDDConfig:
        defaults = {
            "vision_config": vision_config,
            "num_labels": 5,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "initializer_range": INITIALIZER_RANGE,
            "num_timesteps": 20,
            "timesteps_per_image": 3,
        }
        return TDDConfig(**{**defaults, **fields})

    return make


@pytest.fixture
def make_model(make_config: Callable[..., TDDConfig]) -> Callable[..., TDDForImageClassification]:
    """A function from fields of `TDDConfig` to a tiny classifier in eval mode."""

    def make(**fields: Any) -> TDDForImageClassification:
        return TDDForImageClassification(make_config(**fields)).eval()

    return make


@pytest.fixture
def make_captioner(make_config: Callable[..., TDDConfig]) -> Callable[..., TDDForCaptioning]:
    """A function from fields of `TDDConfig` to a tiny captioner in eval mode: 20 tokens (0 pads, 2 ends), 8 places."""

    def make(**fields: Any) -> TDDForCaptioning:
        defaults = {
            "pooling": None,
            "vocab_size": 20,
            "max_position_embeddings": 8,
            "pad_token_id": 0,
            "eos_token_id": 2,
        }
        return TDDForCaptioning(make_config(**{**defaults, **fields})).eval()

    return make


@pytest.fixture
def run_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable[..., Any]:
    """A function that runs scripts/train.py in this process, with `tmp_path` as its working directory. The arguments
    are those of the command; the first is the name of a recipe. It returns its output, as `out` and `err`."""
    scripts = Path(__file__).parent.parent / "scripts"
    monkeypatch.syspath_prepend(scripts)
    monkeypatch.chdir(tmp_path)

    def run(recipe: str, *arguments: str) -> Any:
        import train

        monkeypatch.setattr(sys, "argv", ["train.py", str(scripts / f"recipes/{recipe}.yaml"), *arguments])
        capfd.readouterr()
        train.main()
        return capfd.readouterr()

    return run


@pytest.fixture
def pixel_values() -> Tensor:
    """Four images."""
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> Tensor:
    """The labels of `pixel_values`."""
    return torch.tensor([0, 3, 4, 1])
