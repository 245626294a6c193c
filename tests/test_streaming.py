# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The stream of training batches: sharding, order, position, and broken data."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, Value
from samples import halve, noise_bytes, picture_bytes, write_coco, write_tar, write_webdataset

from modeling_tdd.training.caption_data import open_caption_shards
from modeling_tdd.training.examples import Batch, Example, ReadCaptioned
from modeling_tdd.training.recipe import CaptionDataRecipe, TrainingRecipe
from modeling_tdd.training.shards import ShardedRows
from modeling_tdd.training.streaming import ImageStream, StreamLoader, make_stream_loader


ROOT = Path(__file__).parent.parent
NUM_SHARDS, ROWS = 6, 8
EVERYTHING = list(range(NUM_SHARDS * ROWS))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ShardedRows:
    """48 pictures in 6 parquet shards; the caption of picture i is "i"."""
    folder = tmp_path_factory.mktemp("shards")
    features = Features({"image": Image(), "caption": Value("string")})
    for shard in range(NUM_SHARDS):
        ids = range(shard * ROWS, (shard + 1) * ROWS)
        images = [{"bytes": picture_bytes(i), "path": None} for i in ids]
        table = Dataset.from_dict({"image": images, "caption": [str(i) for i in ids]}, features=features)
        table.to_parquet(folder / f"train-{shard}.parquet")
    return open_caption_shards(CaptionDataRecipe("parquet", data_dir=str(folder), streaming=True))


def collate(examples: list[Example]) -> Batch:
    """The numbers of the pictures, and random numbers in place of an augmentation."""
    return {"ids": torch.tensor([int(e["captions"][0]) for e in examples]), "draw": torch.rand(len(examples))}


def make_loader(rows: ShardedRows, process: int = 0, processes: int = 1, workers: int = 0, **fields) -> StreamLoader:
    fields = {"batch_size": 4, "seed": 0, "shuffle_buffer": 10, **fields}
    stream = ImageStream(rows, ReadCaptioned(), collate, process_index=process, num_processes=processes, **fields)
    return StreamLoader(stream, workers, torch.device("cpu"), num_batches=3)


def read_ids(loader: StreamLoader) -> list[int]:
    return [index for batch in loader for index in batch["ids"].tolist()]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 2), (4, 0), (8, 0)])
def test_an_epoch_has_every_image_once_over_processes_and_workers(rows, processes, workers):
    """Eight readers share six shards; four have one or two of their own."""
    shares = [read_ids(make_loader(rows, p, processes, workers, batch_size=1)) for p in range(processes)]
    assert sorted(sum(shares, [])) == EVERYTHING
    assert all(shares)


def test_order_depends_on_seed_and_epoch(rows):
    loader = make_loader(rows)
    first, second = read_ids(loader), read_ids(loader)  # without `set_epoch` the next pass is the next epoch
    assert sorted(first) == sorted(second) == EVERYTHING
    assert first != EVERYTHING and first != second
    assert read_ids(make_loader(rows)) == first and read_ids(make_loader(rows, seed=1)) != first
    loader = make_loader(rows)
    loader.dataset.set_epoch(1)
    assert read_ids(loader) == second


def test_a_block_mixes_shards(rows):
    batches = [batch["ids"] // ROWS for batch in make_loader(rows, shuffle_buffer=24)]
    assert sum(len(set(shards.tolist())) > 1 for shards in batches) >= 6


def test_batches_neither_depend_on_the_global_random_state_nor_change_it(rows):
    torch.manual_seed(1)
    first = [batch["draw"] for batch in make_loader(rows)]
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.rand(3).equal(after)
    assert all(a["draw"].equal(b) for a, b in zip(make_loader(rows), first))


@pytest.mark.parametrize(("workers", "taken"), [(0, 1), (0, 7), (2, 3), (2, 10)])
def test_resuming_within_an_epoch_is_exact(rows, workers, taken):
    """It does not matter what the workers had read ahead. The position goes through JSON, as in a checkpoint, and the
    run continues to the next epoch."""

    def batches(loader: StreamLoader) -> list[tuple[list[int], list[float]]]:
        return [(batch["ids"].tolist(), batch["draw"].tolist()) for batch in loader]

    whole = make_loader(rows, workers=workers)
    whole.dataset.set_epoch(3)
    expected = batches(whole) + batches(whole)

    broken = make_loader(rows, workers=workers)
    broken.dataset.set_epoch(3)
    before = [(batch["ids"].tolist(), batch["draw"].tolist()) for _, batch in zip(range(taken), broken)]
    state = json.loads(json.dumps(broken.dataset.state_dict()))
    resumed = make_loader(rows, workers=workers)
    resumed.dataset.load_state_dict(state)
    resumed.dataset.set_epoch(3)  # as a loop does, and must not start the epoch again
    assert before + batches(resumed) + batches(resumed) == expected


def test_a_position_is_only_valid_for_the_same_readers(rows):
    state = make_loader(rows, process=0, processes=2).dataset.state_dict()
    for other in ({"process": 1, "processes": 2}, {"workers": 2, "processes": 2}, {"processes": 2, "seed": 5}):
        with pytest.raises(
            ValueError, match="only valid for the same readers: it was saved with .*'num_processes': 2"
        ):
            make_loader(rows, **other).dataset.load_state_dict(state)


def test_length_of_an_epoch(rows):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    training = TrainingRecipe(epochs=1, batch_size=16)
    data = CaptionDataRecipe("parquet", streaming=True)
    arguments = (rows, ReadCaptioned(), collate)
    with pytest.raises(ValueError, match="`data.num_examples` must be given"):
        make_stream_loader(accelerator, training, data, *arguments)
    data.num_examples = 15
    with pytest.raises(ValueError, match="`training.batch_size` is 16, but there are only 15 images"):
        make_stream_loader(accelerator, training, data, *arguments)
    data.num_examples = 47
    loader = make_stream_loader(accelerator, training, data, *arguments)
    assert len(loader) == 4 and next(iter(loader))["ids"].shape == (8,)  # 2 steps of 2 batches


# ---- What is broken


def break_webdataset(folder: Path) -> None:
    """Breaks some of twelve pictures: a truncated shard, a truncated picture, a missing one and an empty caption."""
    write_webdataset(folder)
    halve(folder / "train-000002.tar")  # pictures 8 and 9 come before the break
    members = {}
    for index, picture, caption in [
        (4, picture_bytes(4), "picture 4"),
        (5, noise_bytes()[:400], "picture 5"),
        (6, None, "picture 6"),
        (7, picture_bytes(7), "  "),
    ]:
        members |= {} if picture is None else {f"{index:09d}.jpg": picture}
        members |= {f"{index:09d}.txt": caption.encode(), f"{index:09d}.cls": b"0", f"{index:09d}.json": b"{}"}
    write_tar(folder / "train-000001.tar", members)


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (1, 2), (4, 0)])
def test_broken_data_of_a_webdataset_are_skipped_and_reported(tmp_path, processes, workers):
    break_webdataset(tmp_path)
    fields = {"data_dir": str(tmp_path), "image_column": "jpg", "caption_column": "txt", "streaming": True}
    rows = open_caption_shards(CaptionDataRecipe("webdataset", **fields))

    def ids(examples: list[Example]) -> Batch:
        return {"ids": torch.tensor([int(e["captions"][0].split()[1]) for e in examples])}

    seen, problems = [], Counter()
    for process in range(processes):
        arguments = {"batch_size": 1, "process_index": process, "num_processes": processes}
        stream = ImageStream(rows, ReadCaptioned(), ids, **arguments)
        loader = StreamLoader(stream, workers, torch.device("cpu"), num_batches=1)
        seen += read_ids(loader) + read_ids(loader)  # a second epoch counts nothing twice
        problems.update(list(stream.problems))
    assert set(seen) == {0, 1, 2, 3, 4, 8, 9}
    assert set(problems.values()) == {1} and len(problems) == 4
    text = "\n".join(problems)
    assert "train-000002.tar: broken after 2 examples (ReadError: unexpected end of data)" in text
    for index, problem in [(1, "unreadable image (OSError)"), (2, "no image"), (3, "no caption")]:
        assert any(f"train-000001.tar, example {index}" in p and p.endswith(f": {problem}") for p in problems), text


def test_missing_files_of_coco_are_skipped_and_reported(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "train2017/000000000007.jpg").unlink()
    recipe = CaptionDataRecipe("coco", data_dir=str(tmp_path), train_split="train2017", streaming=True)
    stream = ImageStream(open_caption_shards(recipe), ReadCaptioned(), lambda e: {"n": torch.tensor(len(e))}, 1)
    assert len(list(StreamLoader(stream, 0, torch.device("cpu"), 1))) == 11
    (problem,) = stream.problems
    assert "000000000007.jpg): unreadable image (FileNotFoundError)" in problem


def test_broken_data_stop_the_run_if_asked_to_or_if_no_batch_is_left(tmp_path):
    break_webdataset(tmp_path)
    fields = {"data_dir": str(tmp_path), "image_column": "jpg", "caption_column": "txt", "streaming": True}
    rows = open_caption_shards(CaptionDataRecipe("webdataset", **fields))
    with pytest.raises(ValueError, match="train-00000"):
        read_ids(make_loader(rows, on_bad_example="raise"))
    with pytest.raises(
        ValueError, match="Process 0 cannot fill one batch of 50 valid examples per worker. 4 problems: "
    ):
        read_ids(make_loader(rows, batch_size=50))


# ---- Two processes, and the script as users run it


TWO_PROCESSES = """
import sys, torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from modeling_tdd.training.caption_data import open_caption_shards
from modeling_tdd.training.examples import ReadCaptioned
from modeling_tdd.training.recipe import CaptionDataRecipe, TrainingRecipe
from modeling_tdd.training.streaming import make_stream_loader, report_problems

accelerator = Accelerator(cpu=True)
data = CaptionDataRecipe("webdataset", data_dir=sys.argv[1], image_column="jpg", caption_column="txt",
                         streaming=True, num_examples=12)
collate = lambda examples: {"ids": torch.tensor([int(e["captions"][0].split()[1]) for e in examples])}
training = TrainingRecipe(epochs=1, batch_size=2, num_workers=1)
loader = make_stream_loader(accelerator, training, data, open_caption_shards(data), ReadCaptioned(), collate)
own = [index for batch in loader for index in batch["ids"].tolist()]
shares = gather_object([own])
problems = report_problems(accelerator, loader)
if accelerator.is_main_process:
    print("SHARES", sorted(sum(shares, [])), min(map(len, shares)) > 0, len(problems))
accelerator.end_training()
"""


def test_two_processes_have_disjoint_shares_and_one_report(tmp_path):
    break_webdataset(tmp_path)
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SHARES [0, 1, 2, 3, 4, 8, 9] True 4" in done.stdout
    assert done.stderr.count("4 broken shards and bad examples were skipped: ") == 1


def test_captioning_script_trains_on_a_broken_stream_to_its_end(tmp_path):
    break_webdataset(tmp_path / "data")
    vision = {"model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "intermediate_size": 64}
    settings = [
        *("encoder=null", "model.freeze_encoder=false", f"model.vision_config={json.dumps(vision)}"),
        *("image_processor={size: {height: 16, width: 16}}", "augmentation.size=16"),
        *("model.hidden_size=32", "model.num_hidden_layers=1", "model.intermediate_size=64"),
        *("data.path=webdataset", "data.data_files=null", f"data.data_dir={tmp_path}/data", "data.streaming=true"),
        *("data.image_column=jpg", "data.caption_column=txt", "data.num_examples=8", "data.eval_splits=[validation]"),
        *("training.epochs=2", "training.batch_size=2", "training.warmup_epochs=0", "training.num_workers=1"),
        "evaluation.num_inference_steps=[1]",
    ]
    script, recipe = ROOT / "scripts/train_captioning.py", ROOT / "scripts/recipes/emoji.yaml"
    command = [sys.executable, str(script), str(recipe), "--set", *settings]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "4 broken shards and bad examples were skipped: " in done.stderr and "train-000002.tar: broken" in done.stderr
    )
    result = json.loads((tmp_path / "outputs/emoji/tdd-seed0/result.json").read_text())
    assert [entry["split"] for entry in result["scores"]] == ["validation"]
