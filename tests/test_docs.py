# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Tests of the documents: they name every field, what they and the code refer to exists, and the site is built."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_tdd import TDDConfig
from modeling_tdd.configuration_tdd import CLASSIFIER_INFERENCE
from modeling_tdd.generation_configuration_tdd import TDDGenerationConfig


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modeling_tdd"
PAPER = (ROOT / "docs/paper.md").read_text()
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "model_cards").glob("*.md")]
# Where files are that the documents name
FOLDERS = (ROOT, PACKAGE, PACKAGE / "training", ROOT / "scripts", ROOT / "scripts/recipes")
# Which rooms of the package a room may import, as docs/architecture.md says
ROOMS = {
    "core": set(),
    "evaluation": {"core"},
    "publishing": {"core", "evaluation"},
    "training": {"core", "evaluation"},
}

OWN_FIELDS = [name for name, kind in TDDConfig.__annotations__.items() if "ClassVar" not in str(kind)]

# "decision 3", "decisions 11 and 26", "decisions 12, 13 and 15", "docs/decisions.md, 12 to 14"
NUMBERS = r"\d+(?:(?:,\s|\sand\s|\sto\s)\d+)*"
CITATION = re.compile(rf"(?:\bdecisions?|decisions\.md,)\s({NUMBERS})", re.IGNORECASE)
# "`name` (`file.py`)", "`name` and `Class.name` (`folder/file.py`)"
DEFINITION = re.compile(r"((?:`[\w.]+`(?:,\s|\sand\s)?)+)\s\(`([\w/]+\.py)`\)")


def named_files(text: str) -> set[str]:
    """The files in backticks: `file.py`, `folder/file.yaml`."""
    return set(re.findall(r"`([\w/]+\.(?:py|yaml))`", text))


def cited_decisions(text: str) -> set[int]:
    """The numbers of the decisions that a text cites. A comment or a quotation may break a line."""
    text = re.sub(r"\n[\s#>*]*", " ", text)
    cited = set()
    for numbers in CITATION.findall(text):
        first_to_last = re.fullmatch(r"(\d+)\sto\s(\d+)", numbers)
        if first_to_last:
            cited |= set(range(int(first_to_last[1]), int(first_to_last[2]) + 1))
        else:
            cited |= {int(number) for number in re.findall(r"\d+", numbers)}
    return cited


def defined_names(text: str) -> list[tuple[str, str]]:
    """Pairs of a name and the file that a text says it is in."""
    return [(name, file) for names, file in DEFINITION.findall(text) for name in re.findall(r"`([\w.]+)`", names)]


def texts_that_cite() -> dict[str, str]:
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.md"), *(ROOT / "scripts").rglob("*.py")]
    files += [*(ROOT / "scripts").rglob("*.yaml"), *DOCUMENTS]
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


@pytest.mark.parametrize("field", [*OWN_FIELDS, *TDDGenerationConfig._DEFAULTS])
def test_every_field_stands_in_the_table_of_the_paper(field: str) -> None:
    assert re.search(rf"^\| `{field}` \|", PAPER, re.MULTILINE)


def test_every_cited_decision_has_an_entry() -> None:
    entries = [int(number) for number in re.findall(r"^## (\d+)\. ", (ROOT / "docs/decisions.md").read_text(), re.M)]
    assert entries == list(range(1, len(entries) + 1))
    cited = {file: cited_decisions(text) for file, text in texts_that_cite().items()}
    assert {file: numbers - set(entries) for file, numbers in cited.items() if numbers - set(entries)} == {}
    assert cited["modeling_tdd/configuration_tdd.py"] >= {3, 12, 23, 24, 26}  # the search finds them


def test_citations_are_found_in_all_forms() -> None:
    text = (
        'see decision 3, decisions 11 and 26;\n    """(docs/decisions.md,\n    # 12 to 14)."""  Decisions 1, 2 and 9'
    )
    assert cited_decisions(text) == {1, 2, 3, 9, 11, 12, 13, 14, 26}


@pytest.mark.parametrize("option", sorted({*TDDGenerationConfig._DEFAULTS, *CLASSIFIER_INFERENCE}))
def test_every_option_stands_in_the_guide_to_generation(option: str) -> None:
    guide = (ROOT / "docs/guides/generate.md").read_text()
    assert re.search(rf"\b{option}\b", guide)


@pytest.mark.parametrize("document", ["paper", "design", "architecture", "guides/train"])
def test_every_named_file_exists(document: str) -> None:
    files = named_files((ROOT / f"docs/{document}.md").read_text())
    assert len(files) > 5
    assert {file for file in files if not any((folder / file).exists() for folder in FOLDERS)} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Links between files. Those to headings are checked where the site is built."""
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", document.read_text())
    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # that is about the next version of MkDocs
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Docstrings are read as Transformers writes them: arguments as a list, links where there is something to link to
    page = (tmp_path / "reference/generation.html").read_text()
    assert "<li><strong>num_draws</strong> (<code>int</code>, <em>optional</em>, defaults to 16)" in page
    assert re.search(
        r'<a [^>]*href="configuration.html#[^>]*TDDGenerationConfig"><code>TDDGenerationConfig</code>', page
    )
    pages = [file.read_text() for file in (tmp_path / "reference").glob("*.html")]
    assert not [text for text in pages if "[<code>" in text or "autoref" in re.sub(r'class="autorefs[^"]*"', "", text)]


def test_every_named_function_is_in_its_file() -> None:
    names = defined_names(PAPER)
    assert len(names) > 20
    missing = []
    for name, file in names:
        source = next(folder / file for folder in FOLDERS if (folder / file).exists()).read_text()
        if not re.search(rf"^\s*(?:def|class) {name.split('.')[-1]}\b", source, re.MULTILINE):
            missing.append((name, file))
    assert missing == []


def imported_rooms(file: Path) -> set[str]:
    """The rooms of the package from which a file imports, wherever in the file."""
    modules = set()
    parts = file.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join((*parts[: len(parts) - node.level], node.module or "")) if node.level else node.module
            modules |= {f"{start}.{alias.name}".replace("..", ".") for alias in node.names}
    names = [module.split(".") for module in modules if module.split(".")[0] == "modeling_tdd"]
    return {name[1] if len(name) > 1 and name[1] in ROOMS else "core" for name in names}


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_one_way(room: str) -> None:
    files = sorted(PACKAGE.glob("*.py")) if room == "core" else sorted((PACKAGE / room).rglob("*.py"))
    assert len(files) > 1
    assert {file.name: imported_rooms(file) - ROOMS[room] - {room} for file in files} == {f.name: set() for f in files}
    assert any(imported_rooms(file) == {room} for file in files) or room == "publishing"  # imports are found at all


@pytest.mark.parametrize("file", sorted((ROOT / "scripts").glob("*.py")), ids=lambda file: file.name)
def test_scripts_are_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 150


def test_training_and_scripts_stay_small() -> None:
    files = [*(PACKAGE / "training").glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    # 2,800 lines train and use models. 520 reproduce the paper: plan, evaluation and script, a CLIP to score captions
    # with, and the import of an encoder. 160 are gpu_check.py and the benchmarks beside a GPU. 280 came with
    # docs/security.md: checkpoints that are trusted by their content, whole savings, locks, checks of recipes and
    # data. 110 are the load test of the demo and the animation of a denoising. 200 distil captioners and compare what
    # they can do under constraints. 30 refuse what had been ignored.
    assert sum(len(file.read_text().splitlines()) for file in files) <= 2800 + 520 + 160 + 280 + 110 + 200 + 30
