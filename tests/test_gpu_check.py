# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""scripts/gpu_check.sh, in the small form that runs without a GPU."""

import os
import re
import subprocess
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parent.parent / "scripts/gpu_check.sh"
# Those that run beside each other on a GPU, and those that are timed and run one by one
SIDE_BY_SIDE = ["captions", "labels", "bf16", "fp16", "distributed", "sharded"]
ONE_BY_ONE = ["loops", "classify", "caption", "train"]
MOST_SECONDS = 8 * 60


def test_the_script_parses_and_its_deadlines_fit_into_eight_minutes() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    text = SCRIPT.read_text()
    names = re.findall(r"^for benchmark in (.*); do$", text, re.MULTILINE)[0].split()
    beside = {name: int(seconds) for name, seconds in re.findall(r"^beside (\w+) (\d+) ", text, re.MULTILINE)}
    alone = dict(re.findall(r"^ *part (loops|\$benchmark) (\d+) ", text, re.MULTILINE))
    assert list(beside) == SIDE_BY_SIDE and ["loops", *names] == ONE_BY_ONE
    assert max(beside.values()) + int(alone["loops"]) + len(names) * int(alone["$benchmark"]) <= MOST_SECONDS


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path)}
    done = subprocess.run([SCRIPT, "--small", "loop"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not any(tmp_path.iterdir())
    assert done.stderr == f"There is no part loop. There are: {' '.join([*SIDE_BY_SIDE, *ONE_BY_ONE])}\n"


@pytest.mark.slow
def test_a_named_part_runs_alone(tmp_path: Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path)}
    done = subprocess.run([SCRIPT, "--small", "labels"], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert {file.stem for file in tmp_path.glob("*.status")} == {"labels"}


@pytest.mark.slow
def test_every_part_passes_in_the_small_form(tmp_path: Path) -> None:
    environment = os.environ | {"OUT": str(tmp_path)}
    done = subprocess.run([SCRIPT, "--small"], env=environment, capture_output=True, text=True, timeout=3600)
    logs = {file.stem: file.read_text()[-2000:] for file in tmp_path.glob("*.log")}
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    summary = dict(line.split(maxsplit=1) for line in (tmp_path / "summary.txt").read_text().splitlines())
    assert summary.keys() == {*SIDE_BY_SIDE, *ONE_BY_ONE}
    assert all(status.startswith("passed") for status in summary.values())
    measured = {file.stem for file in tmp_path.glob("*.json")}
    assert measured == summary.keys() - {"sharded"}
