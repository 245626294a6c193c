# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Model cards, and pushing to and pulling from a server that speaks the Hub's API, as users do it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import HubServer, card_errors
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from test_pipeline import WORDS, make_tokenizer
from transformers import ViTImageProcessor

from modeling_tdd import TDDForCaptioning, TDDForImageClassification, TDDProcessor
from modeling_tdd.evaluation.step_curves import score_table
from modeling_tdd.publishing.model_card import eval_results, make_card, read_runs


ROOT = Path(__file__).parent.parent
PUBLISH = str(ROOT / "scripts/publish.py")
CORE = sorted((ROOT / "modeling_tdd").glob("*_tdd.py"))

# A user's Python that runs the scripts it is told to, one after another: importing Transformers takes seconds.
CLIENT = """
import contextlib, io, json, runpy, sys, time, traceback

time.sleep = lambda seconds: None  # huggingface_hub waits up to 8 seconds before each of 5 retries
blocked = sys.argv[1:]
sys.modules.update({name: None for name in blocked})  # importing them raises an ImportError
for line in sys.stdin:
    sys.argv, code, output = json.loads(line), 0, io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as exit:
            code = exit.code
            if isinstance(code, str):  # as the interpreter does
                print(code)
                code = 1
        except BaseException:
            traceback.print_exc()
            code = 1
    print(json.dumps([code, output.getvalue()]), flush=True)
"""
PULL = """
import sys
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
image, repo_id, output = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(repo_id, trust_remote_code=True, force_download=True)
processor = AutoProcessor.from_pretrained(repo_id, trust_remote_code=True)
outputs = model.generate(**processor(images=Image.open(image), return_tensors="pt"), return_dict_in_generate=True)
save_file({"sequences": outputs.sequences, "log_probs": outputs.log_probs}, output)
"""
PUSH = """
import sys
from modeling_tdd import TDDForCaptioning, TDDProcessor

folder, repo_id = sys.argv[1:]
TDDForCaptioning.from_pretrained(folder).push_to_hub(repo_id)
TDDProcessor.from_pretrained(folder).push_to_hub(repo_id)
"""
VALIDATE = """
import sys
from huggingface_hub import ModelCard

for card in sys.argv[1:]:
    ModelCard.load(card).validate()
"""


class Client:
    """A process whose Hub is `url`, without the packages in `blocked`."""

    def __init__(self, url: str, folder: Path, blocked: tuple[str, ...] = ()):
        self.folder = folder
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": url, "HF_TOKEN": "hf_dummy", "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, *blocked],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )

    def run(self, script: str, *args: Any) -> tuple[int, str]:
        """Runs a script's file, or its text, and returns its exit code and what it printed."""
        if "\n" in script:
            (self.folder / "script.py").write_text(script)
            script = str(self.folder / "script.py")
        self.process.stdin.write(json.dumps([script, *map(str, args)]) + "\n")
        self.process.stdin.flush()
        code, output = json.loads(self.process.stdout.readline())
        return code or 0, output

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(timeout=600) == 0


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def author(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub.url, tmp_path_factory.mktemp("author"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def stranger(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A user without the package."""
    client = Client(hub.url, tmp_path_factory.mktemp("stranger"), blocked=("modeling_tdd",))
    yield client
    client.close()


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "i.png")
    return tmp_path / "i.png"


def write_result(folder: Path, method: str, seed: int, token_f1: float, recipe: dict[str, Any]) -> None:
    scores = [
        {"split": split, "num_inference_steps": steps, "guidance_scale": 1.0, "exact_match": 0.25, "token_f1": score}
        for split in ("validation", "test_combo")
        for steps, score in ((1, token_f1 - 0.1), (10, token_f1))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        shutil.copy(folder.with_name("tdd-seed0") / "config.json", folder)
    result = {"method": method, "seed": seed, "recipe": recipe, "scores": scores}
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def recipe() -> dict[str, Any]:
    """What a run of scripts/recipes/emoji.yaml holds of its recipe, as far as the card reads it."""
    files = {split: str(ROOT / f"scripts/data/emoji_mini/{split}.parquet") for split in ("train", "validation")}
    return {
        "name": "emoji",
        "model": {"freeze_encoder": True},
        "image_processor": {},
        "data": {"path": "parquet", "data_files": files, "data_dir": None, "train_split": "train"},
        "training": make_training_recipe(num_train_epochs=25, base_learning_rate=0.008),
        "encoder": "outputs/emoji_encoder",
    }


def make_training_recipe(**fields: Any) -> dict[str, Any]:
    return {"batch_size": 64, "weight_decay": 0.05, "ema_decay": 0.998, **fields}


@pytest.fixture
def run_folder(make_captioner: Callable[..., TDDForCaptioning], recipe: dict[str, Any], tmp_path: Path) -> Path:
    """A captioner's run folder, with those of two other seeds and of the baseline beside it."""
    folder = tmp_path / "emoji/tdd-seed0"
    make_captioner(vocab_size=len(WORDS)).save_pretrained(folder)
    TDDProcessor(ViTImageProcessor(size={"height": 16, "width": 16}), make_tokenizer()).save_pretrained(folder)
    for seed, token_f1 in enumerate((0.50, 0.52, 0.54)):
        write_result(folder.with_name(f"tdd-seed{seed}"), "tdd", seed, token_f1, recipe)
    write_result(folder.with_name("mdd-seed0"), "mdd", 0, 0.48, recipe)
    return folder


# ---- Cards


def test_scores_are_means_with_their_spread_over_seeds(run_folder: Path) -> None:
    results = read_runs(run_folder)
    assert [(result["method"], result["seed"]) for result in results] == [
        ("tdd", 0),
        ("mdd", 0),
        ("tdd", 1),
        ("tdd", 2),
    ]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in score_table(results, "validation").split("\n")
    ]
    assert rows[0] == ["method", "schedule", "guidance", "metric", "1 step", "10 steps", "10 less 1"]
    assert ["tdd", "projected", "1", "token_f1", "42.00 ± 2.00", "52.00 ± 2.00", "10.00 ± 0.00"] in rows
    assert ["mdd", "projected", "1", "token_f1", "38.00", "48.00", "10.00"] in rows
    # The metadata holds the scores of the published weights, not the mean.
    published = eval_results(results[0], "image-text-to-text", "emoji_mini", num_steps=10)
    values = {(entry.dataset_split, entry.metric_type): entry.metric_value for entry in published}
    assert values["validation", "f1"] == 50.0 and len(values) == 4


def test_runs_with_different_recipes_are_refused(run_folder: Path, recipe: dict[str, Any]) -> None:
    recipe["training"]["num_train_epochs"] = 1
    write_result(run_folder.with_name("tdd-seed3"), "tdd", 3, 0.9, recipe)
    with pytest.raises(ValueError, match="tdd-seed3 was trained by another recipe"):
        read_runs(run_folder)
    assert len(read_runs(run_folder, [run_folder.with_name("tdd-seed1")])) == 2
    with pytest.raises(ValueError, match="has no result.json"):
        read_runs(run_folder.parent)


def test_dry_run_writes_the_card_and_uploads_nothing(
    run_folder: Path, hub: HubServer, author: Client, tmp_path: Path
) -> None:
    repositories = dict(hub.repositories)
    readme = ROOT / "scripts/data/emoji_mini/README.md"
    code, output = author.run(PUBLISH, run_folder, "--dry-run", "--data-readme", readme)
    assert code == 0 and "nothing was uploaded" in output and hub.repositories == repositories
    assert (run_folder / "steps.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(run_folder / "README.md")
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "image-text-to-text" and data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0" and data["datasets"] == ["emoji_mini"] and "tdd" in data["tags"]
    assert len(data["model-index"][0]["results"][0]["metrics"]) == 2 and not card_errors(str(card))
    assert "departs from the paper's diffusion process by a timestep for each token, wrong tokens" in card.text
    assert "52.00 ± 2.00" in card.text and "CC BY-SA 4.0" in card.text and "@article{" in card.text
    assert str(ROOT) not in str(card) and str(tmp_path) not in str(card)


def test_card_of_a_classifier(
    make_model: Callable[..., TDDForImageClassification], author: Client, tmp_path: Path
) -> None:
    folder = tmp_path / "digits/tdd-seed0"
    make_model().save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    grid = [{"num_inference_steps": n, "guidance_scale": g, "top1": 0.9} for g in (1.0, 1.5) for n in (1, 10)]
    scores = [{"split": "validation", **entry} for entry in grid]
    recipe = {
        "name": "digits",
        "model": {},
        "image_processor": {"size": {"height": 8, "width": 8}},
        "data": {"path": "digits", "train_split": "train"},
        "training": make_training_recipe(num_train_epochs=50, base_learning_rate=0.004),
    }
    result = {"method": "tdd", "seed": 0, "recipe": recipe, "scores": scores}
    (folder / "result.json").write_text(json.dumps(result))
    code, output = author.run(PUBLISH, folder, "--dry-run")
    assert code == 0, output
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-classification" and not card_errors(str(card))
    [metric] = card.data.to_dict()["model-index"][0]["results"][0]["metrics"]
    assert metric == {"type": "accuracy", "value": 90.0, "name": "top1, 10 denoising steps"}
    assert "batch size 64, learning rate 0.001, weight decay 0.05" in card.text
    assert "It knows 5 labels" in card.text and "Scores in %, one seed." in card.text
    assert "Its diffusion process is the paper's." in card.text

    # A result from before there was `base_learning_rate`
    del recipe["training"]["base_learning_rate"]
    recipe["training"]["learning_rate"] = 0.25
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "README.md").unlink()
    code, output = author.run(PUBLISH, folder, "--dry-run")
    assert code == 0 and "learning rate 0.25, weight" in ModelCard.load(folder / "README.md").text, output


def test_card_of_a_method_without_steps() -> None:
    folder = ROOT / "docs/results/digits/mdd-seed0"
    results, config = read_runs(folder), json.loads((folder / "config.json").read_text())
    card = make_card(results, config, 1_000, "mdd", num_steps=10)
    [metric] = card.data.to_dict()["model-index"][0]["results"][0]["metrics"]
    [entry] = results[0]["scores"]
    assert metric == {"type": "accuracy", "value": round(100 * entry["top1"], 2), "name": "top1"}


def test_a_card_written_by_hand_is_kept_and_published(run_folder: Path, hub: HubServer, author: Client) -> None:
    card = run_folder / "README.md"
    assert author.run(PUBLISH, run_folder, "--dry-run", "--repo-id", "user/by-hand")[0] == 0
    assert "user/by-hand" in card.read_text()
    by_hand = card.read_text() + "\nBy hand.\n"
    card.write_text(by_hand)
    code, output = author.run(PUBLISH, run_folder, "--dry-run")
    assert code == 0 and f"The card is {card}, as it is." in output and card.read_text() == by_hand
    assert author.run(PUBLISH, run_folder, "--repo-id", "user/by-hand")[0] == 0
    repository = hub.repositories["user/by-hand"]
    assert repository.blobs[repository.revisions[repository.main]["README.md"]].decode() == by_hand


def test_what_is_published_names_no_path_no_password_and_not_the_datas_readme(
    make_captioner: Callable[..., TDDForCaptioning],
    run_folder: Path,
    recipe: dict[str, Any],
    hub: HubServer,
    author: Client,
    tmp_path: Path,
) -> None:
    model = make_captioner(vocab_size=len(WORDS))
    model.config.vision_config._name_or_path = "/home/alice/secret/encoder"
    model.save_pretrained(run_folder)
    data = tmp_path / "alice/pictures"
    data.mkdir(parents=True)
    (data / "README.md").write_text("For our eyes only: secret.")
    recipe["data"] |= {"path": "/home/alice/secret/loader", "data_dir": str(data)}
    recipe["data"]["data_files"] = {
        "train": "https://alice:secret@example.org:8080/a/train.parquet?token=secret#secret",
        "more": "zip://*.jpg::https://alice:se@secret@example.org/more.zip?secret",
        "windows": r"C:\Users\alice\secret\w.parquet",
    }
    recipe["encoder"], recipe["checkpoint"] = "~/alice/encoder", "/alice"
    for seed in range(3):
        write_result(run_folder.with_name(f"tdd-seed{seed}"), "tdd", seed, 0.5, recipe)
    code, output = author.run(PUBLISH, run_folder, "--repo-id", "user/discreet", "--runs", run_folder)
    assert code == 0, output
    repository = hub.repositories["user/discreet"]
    files = {name: repository.blobs[digest] for name, digest in repository.revisions[repository.main].items()}
    assert "config.json" in files and b"example.org:8080/a/train.parquet" in files["README.md"]
    assert b"example.org/more.zip" in files["README.md"] and b"w.parquet" in files["README.md"]
    for name, content in files.items():
        assert not any(word in content for word in (b"secret", b"home/", str(tmp_path).encode())), name
    assert b"/alice" not in files["README.md"] and b"alice" not in files["config.json"]


SHIPPED = ("digits", "emoji_captions")


@pytest.mark.parametrize("path", sorted((ROOT / "model_cards").glob("*.md")), ids=lambda path: path.stem)
def test_model_cards(path: Path, author: Client) -> None:
    data = ModelCard.load(path).data
    for name in ("license", "pipeline_tag", "library_name", "tags", "datasets"):
        assert getattr(data, name), name
    assert author.run(VALIDATE, path) == (0, "")
    text = path.read_text()
    if path.stem in SHIPPED:
        plot = re.search(r"\((\S+\.png)\)", text)[1]
        assert "model-index" in text and (path.parent / plot).exists()
    else:
        assert "No weights are published yet" in text and "the paper's, not ours" in text
        assert "model-index" not in text  # it has no results of ours


def test_an_invalid_card_is_refused(author: Client, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("---\nlicense: apache-2.0\ndatasets: {name: digits}\n---\n# A card\n")
    code, output = author.run(VALIDATE, tmp_path / "card.md")
    assert code == 1 and "`datasets` must be a list of strings." in output


# ---- The Hub


def captions_of(client: Client, image_file: Path, repo_id: str) -> dict[str, torch.Tensor]:
    output = image_file.with_name("pulled.safetensors")
    code, printed = client.run(PULL, image_file, repo_id, output)
    assert code == 0, printed
    return load_file(output)


def assert_same_captions(pulled: dict[str, torch.Tensor], folder: Path, image_file: Path) -> None:
    model, processor = TDDForCaptioning.from_pretrained(folder), TDDProcessor.from_pretrained(folder)
    inputs = processor(images=Image.open(image_file), return_tensors="pt")
    expected = model.generate(**inputs, return_dict_in_generate=True)
    assert torch.equal(pulled["sequences"], expected.sequences) and torch.equal(
        pulled["log_probs"], expected.log_probs
    )


def test_published_checkpoint_gives_the_same_captions_and_a_failed_upload_leaves_it(
    run_folder: Path, image_file: Path, hub: HubServer, author: Client, stranger: Client
) -> None:
    for name in (".env", "training_args.bin", "notes.txt", "other_tdd.py"):  # what lies there stays there
        (run_folder / name).write_text("TOKEN=hf_secret")
    arguments = (PUBLISH, run_folder, "--repo-id", "user/captioner")
    code, output = author.run(*arguments)
    assert code == 0, output
    repository = hub.repositories["user/captioner"]
    published = repository.main
    assert len(repository.revisions) == 2  # the empty one, and all files in one commit
    assert repository.revisions[published].keys() == {path.name for path in CORE} | {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "steps.png",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert author.run(VALIDATE, "user/captioner") == (0, "")
    assert_same_captions(captions_of(stranger, image_file, "user/captioner"), run_folder, image_file)

    model = TDDForCaptioning.from_pretrained(run_folder)
    torch.nn.init.normal_(model.lm_head.weight)
    better = run_folder.with_name("tdd-seed1")
    model.save_pretrained(better)
    TDDProcessor.from_pretrained(run_folder).save_pretrained(better)
    for stage, message in (("lfs", "Error while uploading 'model.safetensors'"), ("commit", "disconnected")):
        hub.fail_at = stage
        code, output = author.run(PUBLISH, better, "--repo-id", "user/captioner")
        assert code == 1 and "Publishing failed: " in output and message in output, output
        assert f"user/captioner is still at revision {published}." in output
        assert repository.main == published
    hub.fail_at = None
    # An adapter of an earlier version, which loading would apply to the merged weights, and code of that version
    stale = {name: repository.add_blob(b"{}") for name in ("adapter_config.json", "adapter_model.bin", "old_tdd.py")}
    files = repository.revisions[published]
    repository.commit({**files, **stale})
    assert author.run(PUBLISH, run_folder, "--repo-id", "user/captioner")[0] == 0
    assert repository.revisions[repository.main].keys() == files.keys()
    assert_same_captions(captions_of(stranger, image_file, "user/captioner"), run_folder, image_file)
    assert author.run(PUBLISH, better, "--repo-id", "user/captioner")[0] == 0  # and then it can be repeated
    assert_same_captions(captions_of(stranger, image_file, "user/captioner"), better, image_file)


def test_push_to_hub_of_model_and_processor(
    run_folder: Path, image_file: Path, author: Client, stranger: Client
) -> None:
    code, output = author.run(PUSH, run_folder, "user/pushed")
    assert code == 0, output
    for client in (author, stranger):
        assert_same_captions(captions_of(client, image_file, "user/pushed"), run_folder, image_file)


def test_publishing_needs_a_name_and_a_finished_run(run_folder: Path, author: Client) -> None:
    code, output = author.run(PUBLISH, run_folder)
    assert code == 2 and "--repo-id is needed to upload" in output
    (run_folder / "result.json").unlink()
    code, output = author.run(PUBLISH, run_folder, "--dry-run")
    assert code == 1 and "has no result.json: give folders of finished runs" in output
