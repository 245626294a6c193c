# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The wheel and the sdist: what is in them, and that they work without the checkout. `.ci/clean` does the latter with
their dependencies installed anew, too."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import modeling_tdd


ROOT = Path(__file__).parent.parent
NAME = f"modeling_tdd-{modeling_tdd.__version__}"
# What a checkout holds that is no source, or too large to copy
IGNORED = (".git", ".venv*", "outputs", "data", "results", "__pycache__", "*.egg-info", "build", "dist", ".*_cache")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a copy of the checkout, and the wheel that is built from that sdist."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*IGNORED))
    # Without isolation nothing is downloaded
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"{NAME}-py3-none-any.whl"
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "modeling_tdd").rglob("*.py")}
    files |= {"modeling_tdd/py.typed", "modeling_tdd/publishing/card_template.md", "tdd_cli.py"}
    assert "modeling_tdd/evaluation/metrics/top1/top1.py" in files  # in no package: `evaluate` loads it as a file
    metadata = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == files | {f"{NAME}.dist-info/{file}" for file in metadata}
        described = archive.read(f"{NAME}.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0" in described and "Requires-Python: >=3.11" in described
    required = set(re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", described, re.MULTILINE))  # without the extras'
    assert required == {
        "huggingface_hub",
        "numpy",
        "pillow",
        "safetensors",
        "timm",
        "torch",
        "torchvision",
        "transformers",
    }


def test_the_sdist_holds_what_builds_the_wheel(built: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        files = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    folders = {"modeling_tdd", "modeling_tdd.egg-info"}
    assert {file for file in files if "." in Path(file).name and file.split("/")[0] not in folders} == {
        *("CHANGELOG.md", "CITATION.cff", "MANIFEST.in", "README.md"),
        *("pyproject.toml", "setup.cfg", "setup.py", "tdd_cli.py"),
        NAME,
    }


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel. It sees this one's packages, so nothing else is installed."""
    environment = tmp_path_factory.mktemp("installed") / "env"
    venv.create(environment)
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "-q", "--no-deps", wheel]
    subprocess.run(pip, check=True, env=without_checkout())
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return environment / "bin"


def without_checkout() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_first_example_runs_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints")
    options = {"cwd": tmp_path, "env": without_checkout(), "capture_output": True, "text": True}
    example = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert example
    script = f"{example[1]}\nprint(modeling_tdd.__file__)"
    done = subprocess.run([installed / "python", "-c", script], **options)
    assert done.returncode == 0, done.stderr
    *printed, file = done.stdout.splitlines()
    assert "woman climbing: dark skin tone" in printed[0]
    assert Path(file).is_relative_to(installed.parent)

    command = ["caption", "checkpoints/emoji-captions/example.png", "--model", "checkpoints/emoji-captions"]
    done = subprocess.run([installed / "tdd", *command], **options)
    assert (done.returncode, done.stdout) == (0, "woman climbing: dark skin tone\n"), done.stderr
    command = ["classify", "checkpoints/digits/example.png", "--model", "checkpoints/digits", "--top-k", "1"]
    done = subprocess.run([installed / "tdd", *command], **options)
    assert (done.returncode, done.stdout[:4]) == (0, "7 (0"), done.stderr
    done = subprocess.run([installed / "tdd", "--version"], **options)
    assert done.stdout == f"tdd {modeling_tdd.__version__}\n"
