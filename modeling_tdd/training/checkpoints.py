# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""A run's checkpoints, which are trusted by their content: each holds the hashes of its files."""

import hashlib
import json
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from .folders import remove, write_json


logger = logging.get_logger(__name__)

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Writes the hashes of all files of a checkpoint, the last thing that is written to it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    write_json(folder / CHECKSUMS, {file.relative_to(folder).as_posix(): _hash(file) for file in files})


def find_damage(folder: Path) -> str:
    """What is wrong with a checkpoint, or an empty string."""
    try:
        hashes = json.loads((folder / CHECKSUMS).read_text())
        files = {folder / name: digest for name, digest in hashes.items()}
    except (OSError, ValueError, AttributeError):
        return f"it has no {CHECKSUMS} that could be read"
    for file, digest in files.items():
        if not file.is_file():
            return f"{file.name} is missing"
        if _hash(file) != digest:
            return f"{file.name} is not as it was saved"
    return "" if files else f"{CHECKSUMS} is empty"


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The latest checkpoint whose files are as they were saved. Later ones are named in a warning, with the one that
    is taken instead."""
    damaged = []
    for folder in reversed(sort_checkpoints(str(output_dir))):
        if not (problem := find_damage(Path(folder))):
            break
        damaged.append(f"{folder} is damaged: {problem}")
    else:
        folder = None
    if damaged:
        instead = f"{folder} is taken instead" if folder else "there is no earlier one"
        logger.warning(f"{'; '.join(damaged)}; {instead}.")
    return folder


def set_damaged_aside(output_dir: str | Path, last: str | None) -> None:
    """Renames the checkpoints after `last`, which are damaged, so that they do not count as the newest."""
    for folder in map(Path, reversed(sort_checkpoints(str(output_dir)))):
        if str(folder) == last:
            break
        aside = folder.with_name(f"damaged-{folder.name}")
        remove(aside)
        folder.rename(aside)


def remove_old_checkpoints(output_dir: Path, limit: int | None, kept: set[str]) -> None:
    """Removes the oldest checkpoints so that there are at most `limit`, or as many as there are in `kept`."""
    others = [folder for folder in sort_checkpoints(str(output_dir), use_mtime=True) if folder not in kept]
    for folder in others[: max(0, len(others) - max(0, limit - len(kept)))] if limit else []:
        remove(Path(folder))


def describe_last_checkpoint(output_dir: str | Path) -> str:
    last = last_complete_checkpoint(output_dir)
    return f"The last good checkpoint is {last}." if last else "There is no earlier checkpoint."


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
