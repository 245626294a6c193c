# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are whole or not there, at whatever moment a process is killed.

What is written lies out of sight until it is moved into its place. It is created anew, so that no link is followed,
and it has the rights that the umask gives.
"""

import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

# What Transformers and peft read: a file of an old model would change what is loaded of a new one
LOADED = ("*.bin", "*.jinja", "*.json", "*.model", "*.pt", "*.py", "*.safetensors", "merges.txt", "vocab.*")


def write_text(path: Path, text: str) -> None:
    """Writes a file, and the folders above it if they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(path, secrets.token_hex(8))
    try:
        with open(temporary, "x") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which then takes the place of `folder`, see [`put_in_place`]. After an error `folder`
    is as it was."""
    folder = folder.resolve()  # if it is a link: what it points to
    new = make_hidden(folder)
    try:
        yield new
        put_in_place(new, folder)
    finally:
        remove(new)


def make_hidden(folder: Path) -> Path:
    """An empty folder beside `folder`, out of sight. One that a killed process has left there is removed."""
    new = _hidden(folder, "new")
    remove(new)
    new.mkdir(parents=True)
    return new


def put_in_place(new: Path, folder: Path) -> None:
    """Moves a folder of [`make_hidden`] to `folder`. Files that an old folder has there and the new one has not are
    moved into the new one; an old folder with other parts of a model is kept whole as `old-<name>`. A process that is
    killed meanwhile leaves the old folder in its place or as `.<name>.old`, from where the next call takes it."""
    mode = stat.S_IMODE(new.stat().st_mode) & 0o666
    for file in new.rglob("*"):  # safetensors gives no rights to others
        if file.is_file():
            file.chmod(mode)
    old = _hidden(folder, "old")
    for path in (old, folder):
        if path.is_symlink() or path.is_file():  # no folder of ours
            path.unlink()
    if os.path.lexists(old):
        _carry(old, folder) if os.path.lexists(folder) else os.replace(old, folder)
    if os.path.lexists(folder):
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        os.replace(old, folder)
        raise
    if os.path.lexists(old):
        _carry(old, folder)


def _carry(old: Path, folder: Path) -> None:
    theirs = [path for path in old.iterdir() if not os.path.lexists(folder / path.name)]
    if any(fnmatch(path.name, pattern) for path in theirs for pattern in LOADED):
        kept = folder.with_name(f"old-{folder.name}")
        kept = kept if not os.path.lexists(kept) else kept.with_name(f"{kept.name}-{secrets.token_hex(4)}")
        os.replace(old, kept)
        logger.warning(f"{folder} held {', '.join(sorted(path.name for path in theirs))}: it is kept as {kept}.")
        return
    for path in theirs:
        os.replace(path, folder / path.name)
    remove(old)


def remove(path: Path) -> None:
    """Deletes a folder, a file, or a link alone. A folder is moved out of sight first: nobody finds a part of it."""
    if not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink():
        removed = path if path.name.startswith(".") else _hidden(path, secrets.token_hex(8))
        os.replace(path, removed)
        shutil.rmtree(removed, ignore_errors=True)
    else:
        path.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock file beside `folder`. Raises a `ValueError` if another process holds it. The lock ends with the
    process, however that ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(_hidden(folder, "lock"), os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise ValueError(f"Another process trains {folder}. Wait for it, or give another --output-dir.") from error
    try:
        yield
    finally:
        os.close(file)


def _hidden(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")
