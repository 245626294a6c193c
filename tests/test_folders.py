# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Savings that are whole at whatever moment the process ends, checkpoints that are trusted by their content, locks."""

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_training
from safetensors.torch import load_file
from transformers import ViTImageProcessor

from modeling_tdd import TDDForImageClassification
from modeling_tdd.training.checkpoints import last_complete_checkpoint, logger
from modeling_tdd.training.folders import locked, new_folder, remove, write_json
from modeling_tdd.training.results import save_checkpoint


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def contents(folder: Path, *names: str) -> list[str]:
    return [(folder / name).read_text() for name in names]


NAMES = ("config.json", "model.safetensors")


def save(folder: Path, text: str) -> None:
    with new_folder(folder) as new:
        for name in NAMES:
            (new / name).write_text(text)


def save_and_be_killed(folder: Path, countdown: int) -> int:
    """Saves in a process of its own, which ends at one of its changes of the file system. Returns its exit code."""
    process = os.fork()
    if process == 0:
        changes = iter(range(countdown))

        def make_killing(change: Callable) -> Callable:
            def killing(*args: Any, **kwargs: Any) -> Any:
                if next(changes, None) is None:
                    os._exit(9)
                return change(*args, **kwargs)

            return killing

        for name in ("chmod", "mkdir", "open", "replace", "rmdir", "unlink"):
            setattr(os, name, make_killing(getattr(os, name)))
        save(folder, "new")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def is_whole(model: Path) -> bool:
    return contents(model, *NAMES) in (["old", "old"], ["new", "new"])


def test_an_old_folder_and_the_users_files_survive_a_kill_at_any_moment(tmp_path: Path) -> None:
    codes: list[int] = []
    while 0 not in codes:
        folder = tmp_path / str(len(codes)) / "model"
        save(folder, "old")
        (folder / "notes").mkdir()
        (folder / "notes/mine.txt").write_text("mine")
        (folder / "README.md").write_text("by hand")
        codes.append(save_and_be_killed(folder, len(codes)))
        assert is_whole(folder) if folder.exists() else is_whole(folder.with_name(".model.old"))
        for name, text in (("mine.txt", "mine"), ("README.md", "by hand")):
            assert [file.read_text() for file in folder.parent.rglob(name)] == [text]
        save(folder, "newest")  # whatever the kill has left
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        assert contents(folder, *NAMES, "notes/mine.txt", "README.md") == ["newest", "newest", "mine", "by hand"]
    assert len(codes) > 8 and set(codes) == {0, 9}


def test_parts_of_another_model_are_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An adapter that the user put there would be applied to the new weights."""
    folder = tmp_path / "model"
    for number in range(2):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text("mine")
        save(folder, "new")
        assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(NAMES, "new")
        kept = [path for path in tmp_path.iterdir() if path.name.startswith("old-model")]
        assert len(kept) == number + 1 and all(contents(path, "adapter_config.json") == ["mine"] for path in kept)


def test_a_run_folder_that_is_a_link(tmp_path: Path, make_model: Callable) -> None:
    """`shutil.rmtree` refused it after the training."""
    for target in ("there", "to come"):
        link, disc = tmp_path / f"link {target}", tmp_path / "disc" / target
        link.symlink_to(disc)
        if target == "there":
            save(disc, "old")
        save_checkpoint(link, make_model(), ViTImageProcessor())
        assert link.is_symlink() and TDDForImageClassification.from_pretrained(disc)
        assert [path.name for path in disc.parent.iterdir() if path.name.startswith(".")] == []


def test_no_link_at_a_temporary_name_is_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    for name in ("result.json.tmp", ".result.json.tmp", ".model.new", ".model.old"):
        (tmp_path / "out" / name).symlink_to(victim)
    write_json(tmp_path / "out/result.json", {"top1": 0.5})
    save(tmp_path / "out/model", "new")
    save(tmp_path / "out/model", "newer")
    assert victim.read_text() == "precious"
    assert contents(tmp_path / "out/model", *NAMES) == ["newer", "newer"]
    remove(tmp_path / "out/.result.json.tmp")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(("mask", "folder_mode"), [(0o022, 0o755), (0o027, 0o750), (0o002, 0o775)])
def test_savings_follow_the_umask(
    tmp_path: Path, make_model: Callable, umask: Callable[[int], int], mask: int, folder_mode: int
) -> None:
    umask(mask)
    folder = tmp_path / "model"
    save_checkpoint(folder, make_model(), ViTImageProcessor())
    write_json(folder / "result.json", {})
    tiny_training.run(tmp_path / "run", max_steps=3)
    for saved in (folder, tmp_path / "run/checkpoint-3"):
        assert stat.S_IMODE(saved.stat().st_mode) == folder_mode
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
        assert set(modes.values()) == {folder_mode & 0o666}, modes


# ---- Locks


def lock_in_another_process(folder: Path) -> str:
    """The error of another process that trains a run, or an empty string."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with locked(folder):
                os._exit(0)
        except ValueError as error:
            os.write(writer, str(error).encode())
        os._exit(1)
    os.close(writer)
    os.waitpid(process, 0)
    with os.fdopen(reader) as message:
        return message.read()


def test_two_processes_do_not_train_the_same_run(tmp_path: Path) -> None:
    folder = tmp_path / "outputs/tdd-seed0"
    with locked(folder):
        assert f"Another process trains {folder}. Wait for it" in lock_in_another_process(folder)
        assert lock_in_another_process(folder.with_name("tdd-seed1")) == ""  # another seed may be
    assert lock_in_another_process(folder) == ""


# ---- Checkpoints


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after steps 3 and 6."""
    folder = tmp_path_factory.mktemp("run") / "run"
    tiny_training.run(folder, max_steps=6)
    return folder


FILES = ("config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")
DAMAGES = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    run: Path, tmp_path: Path, warnings: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    shutil.copytree(run, tmp_path / "run")
    last, before = (tmp_path / f"run/checkpoint-{step}" for step in (6, 3))
    assert last_complete_checkpoint(tmp_path / "run") == str(last) and not warnings.text
    content = DAMAGES[damage]((last / name).read_bytes())
    (last / name).unlink() if content is None else (last / name).write_bytes(content)
    assert last_complete_checkpoint(tmp_path / "run") == str(before)
    assert f"{last} is damaged: " in warnings.text and f"; {before} is taken instead." in warnings.text


def test_a_run_with_a_damaged_checkpoint_ends_as_if_nothing_had_been(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for name in ("model.safetensors", "optimizer.pt"):
        (folder / "checkpoint-6" / name).write_bytes(b"")
    tiny_training.run(folder, max_steps=6)
    expected, weights = (load_file(path / "checkpoint-6/model.safetensors") for path in (run, folder))
    assert all(weights[name].equal(weight) for name, weight in expected.items())
    names = [path.name for path in folder.glob("*checkpoint-*")]
    assert sorted(names) == ["checkpoint-3", "checkpoint-6", "damaged-checkpoint-6"]


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    last = tmp_path / "run/checkpoint-6"
    (last / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=f"{last} is damaged: optimizer.pt is missing"):
        tiny_training.run(tmp_path / "run", max_steps=6, resume=str(last))


def test_the_best_checkpoint_is_named_by_its_place(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "save_steps": 4, "eval_steps": 4, "save_total_limit": 1}
    tiny_training.run(tmp_path, max_steps=8, **best)
    for folder in tmp_path.glob("checkpoint-*"):
        state = json.loads((folder / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]).name in ("checkpoint-4", "checkpoint-8")
        assert Path(state["best_model_checkpoint"]).parent == tmp_path
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
