# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""FSDP2 on two processes: weights are sharded, and training ends with the weights of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsdp_probe import MODELS, make_batch, make_model


def run_probe(folder: Path, processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = Path(__file__).with_name("fsdp_probe.py")
    done = subprocess.run([*command, program, folder], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of each model, `NAME-1` of one process and `NAME-2` of two, which assert that they are sharded."""
    folder = tmp_path_factory.mktemp("fsdp")
    for processes in (1, 2):
        run_probe(folder, processes)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_two_sharded_processes_end_with_the_weights_of_one(folder: Path, name: str) -> None:
    model_class, _ = MODELS[name]
    one, two = (model_class.from_pretrained(folder / f"{name}-{processes}") for processes in (1, 2))
    start = make_model(name)
    moved = max((one.get_parameter(n) - p).abs().max().item() for n, p in start.named_parameters())
    assert moved > 1e-2  # five steps of AdamW at a rate of 1e-2
    for parameter_name, parameter in two.named_parameters():
        torch.testing.assert_close(parameter, one.get_parameter(parameter_name), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_what_was_sharded_loads_unsharded_and_works(folder: Path, name: str) -> None:
    model_class, _ = MODELS[name]
    model = model_class.from_pretrained(folder / f"{name}-2").eval()
    batch = make_batch(model.config)
    with torch.no_grad():
        assert model(batch["pixel_values"], batch["labels"]).loss.isfinite()
        if name == "classifier":
            assert model(batch["pixel_values"]).logits.shape == (4, 40)
        else:
            assert model.generate(batch["pixel_values"]).shape == (4, 6)
