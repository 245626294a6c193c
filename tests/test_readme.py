# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The README and the guides are executed: each of their ```bash and ```python blocks, in their order, in one folder.

- A new block is picked up by itself. `<!-- not run: REASON -->` above a block takes it out, and
  ``<!-- not run `accelerate launch`: REASON -->`` takes out its commands that start so. What is taken out is parsed:
  its script, its arguments, its recipe with the overrides. `pytest tests/test_readme.py -rs` lists the reasons.
- A ```text block is what the block before it prints, with `...` for what is left out. It is compared.
- The Python blocks of a document share a namespace. A document stands by itself, but for `outputs/` of those before.
- Commands that set up an environment (`SET_UP`) are not run here: the project's CI runs them, from the README too.
- Commands of a script in the middle of a sentence are parsed too; calls of a pipeline stand in blocks alone.
- The default run shortens trainings: one epoch on a few pictures (`SHORTER`). `pytest -m slow` runs them in full, and
  compares what they print.
- Blocks find what `workspace` holds, which the documents take for granted: a reader's own pictures.
"""

import argparse
import contextlib
import doctest
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest

from modeling_tdd.training.recipe import load_recipe


ROOT = Path(__file__).parent.parent
# In the order in which a reader meets them; the training guide makes what later ones use
DOCUMENTS = ["README.md", "docs/quickstart.md", "docs/guides/train.md", "docs/guides/finetune.md"]
DOCUMENTS += ["docs/guides/generate.md", "docs/guides/publish.md", "docs/guides/notebooks.md", "docs/comparisons.md"]
DOCUMENTS += ["docs/how_it_works.md", "docs/index.md", "docs/results.md", "docs/performance.md"]
DOCUMENTS += ["docs/newcomer.md", "docs/testing.md"]
EMOJI = ROOT / "scripts/data/emoji_mini"
SET_UP = ("python3 -m venv", ". ", "pip install")

SHORTER = ["training.num_train_epochs=1", "training.warmup_steps=0", "training.dataloader_num_workers=0"]
SHORTER_EMOJI = [
    *SHORTER,
    f"data.data_files={{train: {EMOJI}/validation.parquet, validation: {EMOJI}/validation.parquet}}",
]
# By the recipe's task: fewer pictures, splits and cells of the final table.
SHORTER_BY_TASK = {
    "classification": ["evaluation.num_inference_steps=[1, 2]", "evaluation.guidance_scale=[1.0]"],
    "captioning": ["feature_views=1", "data.eval_splits=[validation]", "evaluation.num_inference_steps=[1, 2]"],
    "encoder": ["data.eval_splits=[validation]"],
}


@dataclass
class Block:
    """A code block. `comments` are the HTML comments right above it, and `printed` is the ```text block behind it."""

    document: str
    line: int
    language: str
    text: str
    comments: list[str]
    printed: str | None = None

    def __str__(self) -> str:
        return f"{self.document}, line {self.line}, {self.language}"

    @property
    def commands(self) -> list[str]:
        """The single commands of a bash block, those that set up an environment left out."""
        text = self.text.replace("\\\n", " ")
        commands = [part.strip() for line in text.splitlines() for part in line.split("&&")]
        return [command for command in commands if command and not command.startswith(("#", *SET_UP))]

    def reason_not_to_run(self, command: str = "") -> str | None:
        for comment in self.comments:
            match = re.fullmatch(r"not run(?: `(?P<prefix>[^`]+)`)?: (?P<reason>.+)", comment)
            if match and command.startswith(match["prefix"] or ""):
                return match["reason"]
        return None


def read_blocks(text: str, document: str) -> list[Block]:
    blocks, comments, lines = [], [], iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if comment := re.fullmatch(r"<!-- (.+) -->", line):
            comments.append(comment[1])
        elif fence := re.fullmatch(r"```(\w*)", line):
            content = []
            while (line := next(lines)[1]) != "```":
                content.append(line)
            if fence[1] == "text" and blocks and not comments:
                blocks[-1].printed = "\n".join(content)
            else:
                blocks.append(Block(document, number, fence[1], "\n".join(content), comments))
            comments = []
        else:
            comments = []
    return blocks


TEXTS = {document: (ROOT / document).read_text() for document in DOCUMENTS}
BLOCKS = [block for document, text in TEXTS.items() for block in read_blocks(text, document)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's folder with room for outputs, and the pictures of the examples."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("scripts", "checkpoints", "model_cards", "docs", "tests"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    pictures = datasets.load_dataset("parquet", data_files=str(EMOJI / "test_vendor.parquet"), split="train[:3]")
    for name, picture in zip(("image.png", "a.png", "b.png"), pictures["image"]):
        picture.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def namespaces() -> dict[str, dict[str, Any]]:
    """What the blocks of each document share."""
    return {document: {"__name__": "__main__"} for document in DOCUMENTS}


def script_arguments(command: str) -> list[str] | None:
    """A command's script and its arguments, without what launches it; None where it runs no script."""
    words = shlex.split(command)
    scripts = [index for index, word in enumerate(words) if re.fullmatch(r"scripts/\w+\.py", word)]
    return words[scripts[0] :] if scripts else None


def shorten(command: str) -> str:
    """A training command with the overrides that make it short; those that it has come last and win."""
    words = script_arguments(command)
    recipes = [word for word in words or [] if word.endswith(".yaml")]
    if not recipes:
        return command
    text = (ROOT / recipes[0]).read_text()
    task = re.search(r"^task: (\w+)", text, re.MULTILINE)
    settings = SHORTER_EMOJI if "emoji_mini" in text else SHORTER
    settings = settings + SHORTER_BY_TASK[task[1] if task else "classification"]
    quoted = " ".join(map(shlex.quote, settings))
    return command.replace("--set", f"--set {quoted}") if "--set" in words else f"{command} --set {quoted}"


def run_command(command: str, folder: Path) -> str:
    """What the command writes to its standard output. A checkout that is not installed has no command `tdd`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    command = f'tdd() {{ python -m modeling_tdd "$@"; }}\n{command}'
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


class Parsed(Exception):
    """Carries a script's arguments out of it, in place of running it."""


def parse_command(command: str, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """A script's arguments as it parses them itself, and its recipe loaded with the overrides."""
    arguments = script_arguments(command)
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser) -> None:
        raise Parsed(parse_args(parser))

    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(ROOT / "scripts")  # as for a script that is started
        patch.setattr(sys, "argv", arguments)
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as parsed:
            runpy.run_path(arguments[0], run_name="__main__")
        namespace = parsed.value.args[0]
        if hasattr(namespace, "recipe"):
            load_recipe(namespace.recipe, namespace.set)
    return namespace


def run_block(block: Block, folder: Path, namespace: dict[str, Any], patch: pytest.MonkeyPatch, full: bool) -> None:
    patch.chdir(folder)
    printed, is_shortened = io.StringIO(), False
    if block.language == "python":
        with contextlib.redirect_stdout(printed):
            exec(compile(block.text, str(block), "exec"), namespace)
    else:
        assert block.language == "bash", f"nobody knows how to run {block}: mark it by <!-- not run: REASON -->"
        for command in block.commands:
            if block.reason_not_to_run(command) is None:
                given = command if full else shorten(command)
                is_shortened |= given != command
                printed.write(run_command(given, folder))
    if block.printed is not None and block.commands and not is_shortened:
        assert_printed(block.printed, printed.getvalue())


def assert_printed(expected: str, printed: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    example = doctest.Example("", f"{expected}\n")
    checker = doctest.OutputChecker()
    if not checker.check_output(example.want, printed, options):
        raise AssertionError(checker.output_difference(example, printed, options))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(
    block: Block, workspace: Path, namespaces: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := block.reason_not_to_run():
        pytest.skip(f"{block}: {reason}")
    run_block(block, workspace, namespaces[block.document], monkeypatch, full=False)


@pytest.mark.slow
def test_all_blocks_in_full(
    workspace: Path, namespaces: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for entry in workspace.iterdir():
        if entry.name != "outputs":  # of the shortened run
            (tmp_path / entry.name).symlink_to(entry.resolve())
    for block in BLOCKS:
        if not block.reason_not_to_run():
            run_block(block, tmp_path, namespaces[block.document], monkeypatch, full=True)


# Commands in the middle of a sentence, which take long: they are parsed as those that are not run
PROSE = re.sub(r"^```.*?^```$", "", "\n".join(TEXTS.values()), flags=re.MULTILINE | re.DOTALL)
IN_PROSE = [(None, command) for command in re.findall(r"`(python scripts/[^`\s]+\s[^`]+)`", PROSE)]
NOT_RUN = IN_PROSE + [
    (block, command)
    for block in BLOCKS
    if block.language == "bash"
    for command in block.commands
    if block.reason_not_to_run(command) and script_arguments(command)
]


@pytest.mark.parametrize(("block", "command"), NOT_RUN, ids=lambda value: str(value)[:60])
def test_commands_that_are_not_run_are_right(
    block: Block | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse_command(command, monkeypatch)


def test_what_stands_in_prose_is_run_or_parsed() -> None:
    assert len(IN_PROSE) > 3
    code = re.findall(r"`([^`]+)`", PROSE)
    assert [span for span in code if re.match(r"pipeline\(.*model=|accelerate launch|pytest .*\.py", span)] == []


def test_what_is_checked_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "accelerate launch scripts/train.py scripts/recipes/digits.yaml --seeds 1"
    assert parse_command(command, monkeypatch).seeds == [1]
    with pytest.raises(SystemExit):
        parse_command(f"{command} --no-such-flag", monkeypatch)
    with pytest.raises(ValueError, match="There is no recipe"):
        parse_command(command.replace("digits", "no_such_recipe"), monkeypatch)
    with pytest.raises(ValueError, match="Unknown keys in `training`: num_epochs"):
        parse_command(f"{command} --set training.num_epochs=1", monkeypatch)


def test_how_blocks_are_read() -> None:
    text = """<!-- test command -->
<!-- not run `accelerate launch`: needs 8 GPUs -->
```bash
python3 -m venv .venv && . .venv/bin/activate && pip install x && python scripts/a.py \\
    --flag
accelerate launch scripts/a.py
```

<!-- not run: no reason -->
text between takes the comment away
```python
print(1)
```
It prints:
```text
1
```
"""
    bash, python = read_blocks(text, "README.md")
    assert (bash.line, bash.language, len(bash.comments)) == (3, "bash", 2) and python.comments == []
    assert (bash.printed, python.printed) == (None, "1")
    assert [shlex.split(command) for command in bash.commands] == [
        ["python", "scripts/a.py", "--flag"],
        ["accelerate", "launch", "scripts/a.py"],
    ]
    assert bash.reason_not_to_run() is None and bash.reason_not_to_run(bash.commands[0]) is None
    assert bash.reason_not_to_run(bash.commands[1]) == "needs 8 GPUs"
    longer = shorten("python scripts/x.py scripts/recipes/digits.yaml --set training.num_train_epochs=3")
    assert shlex.split(longer)[-1] == "training.num_train_epochs=3"


def test_what_a_block_prints_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (block,) = read_blocks("```python\nprint('one', 'two')\n```\nIt prints:\n\n```text\none ...\n```\n", "README.md")
    run_block(block, tmp_path, {}, monkeypatch, full=False)
    block.printed = "two ..."
    with pytest.raises(AssertionError, match="Got:\n +one two"):
        run_block(block, tmp_path, {}, monkeypatch, full=False)


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].split()) <= 900
