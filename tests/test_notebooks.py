# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The notebooks run from the first cell to the last.

Their cells are plain Python, so they are run here in this process, without a kernel and what it needs. `QUICK` in the
environment lets a notebook take few pictures and one epoch; `pytest -m slow` runs it as a reader does.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest


ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(notebook: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the cells in a folder that looks like the project's, so that outputs stay out of that."""
    for name in ("checkpoints", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "notebooks").mkdir()
    monkeypatch.chdir(folder / "notebooks")
    matplotlib.use("Agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), namespace)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK", "1")
    run(notebook, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_notebook_runs_in_full(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUICK", raising=False)
    run(notebook, tmp_path, monkeypatch)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook_is_small_and_clean(notebook: Path) -> None:
    assert notebook.stat().st_size < 300_000
    cells = json.loads(notebook.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert max(len(cell["source"]) for cell in cells) <= 32  # lines
    assert cells[0]["cell_type"] == "markdown" and f"`notebooks/{notebook.name}`" not in cells[0]["source"]
    assert f"`{notebook.name}`" in (ROOT / "docs/guides/notebooks.md").read_text()
