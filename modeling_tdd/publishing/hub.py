# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Uploads to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi


def upload(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads `folder` as one commit and returns its URL. The error after a failure says what the repository holds. An
    earlier version's code and adapters, which loading would apply to the new weights, are removed by that commit."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    before = api.model_info(repo_id).sha
    try:
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Publish checkpoint",
            delete_patterns=["adapter_*", "*_tdd.py"],
        ).commit_url
    except Exception as error:
        try:
            now = api.model_info(repo_id).sha
        except Exception as state_error:
            state = f"It is not known whether {repo_id} changed: {state_error}"
        else:
            state = f"{repo_id} {'is still at' if now == before else 'moved to'} revision {now}."
        cause = f" {error.__cause__}" if error.__cause__ else ""
        raise RuntimeError(f"Publishing failed: {error}{cause}\n{state}") from error
