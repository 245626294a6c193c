"""The stream of training examples: its shares, order and draws, and broken data."""

import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from samples import halve, noise_bytes, picture_bytes, write_tar, write_webdataset
from torch.utils.data import DataLoader

from modeling_tdd.training import streaming
from modeling_tdd.training.batches import Batch, Example
from modeling_tdd.training.data import CaptionData, load_captions


ROOT = Path(__file__).parent.parent
NUM_SHARDS, ROWS = 6, 8
EVERYTHING = list(range(NUM_SHARDS * ROWS))


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SHUFFLE_BUFFER", 10)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CaptionData:
    """48 pictures in 6 parquet shards; the caption of picture i is "i"."""
    folder = tmp_path_factory.mktemp("shards")
    features = Features({"image": Image(), "caption": Value("string")})
    for shard in range(NUM_SHARDS):
        ids = range(shard * ROWS, (shard + 1) * ROWS)
        images = [{"bytes": picture_bytes(i), "path": None} for i in ids]
        table = Dataset.from_dict({"image": images, "caption": [str(i) for i in ids]}, features=features)
        table.to_parquet(folder / f"train-{shard}.parquet")
    return CaptionData("parquet", data_dir=str(folder), streaming=True, num_examples=48, eval_splits=[])


def collate(examples: list[Example]) -> Batch:
    """The numbers of the pictures, and random numbers in place of an augmentation."""
    ids = torch.tensor([int(e["captions"][0].removeprefix("picture ")) for e in examples])
    return {"ids": ids, "draw": torch.rand(len(examples))}


def make_loader(
    data: CaptionData, process: int = 0, processes: int = 1, workers: int = 0, batch_size: int = 4, seed: int = 0
) -> DataLoader:
    stream = load_captions(data)[data.train_split]
    stream.configure(seed, batch_size, data.num_examples // (batch_size * processes), process, processes)
    return DataLoader(
        stream, batch_size, drop_last=True, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )


def read_ids(loader: DataLoader) -> list[int]:
    return [index for batch in loader for index in batch["ids"].tolist()]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (3, 2), (2, 3), (2, 0), (8, 0), (4, 3)])
def test_an_epoch_has_every_image_once_over_processes_and_workers(data, processes, workers):
    """In the last two cases more readers than shards share them."""
    loaders = [make_loader(data, process, processes, workers, batch_size=2) for process in range(processes)]
    shares = [read_ids(loader) for loader in loaders]
    assert sorted(sum(shares, [])) == EVERYTHING
    assert {len(loader) for loader in loaders} == {24 // processes}


def test_readers_with_less_data_start_again(data):
    """Four readers have two or one of six shards, but all read 12 images."""
    shares = [read_ids(make_loader(data, process, processes=4)) for process in range(4)]
    assert [len(share) for share in shares] == [12] * 4
    assert [len(set(share)) for share in shares] == [12, 12, 8, 8]
    assert not any(set(shares[i]) & set(shares[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_draws_depend_on_seed_and_epoch_alone(data, workers):
    def read(loader: DataLoader) -> list[tuple[list[int], list[float]]]:
        batches = []
        for batch in loader:
            batches.append((batch["ids"].tolist(), batch["draw"].tolist()))
            torch.rand(3)  # the model draws too
        return batches

    loader = make_loader(data, workers=workers)
    first = read(loader)
    assert read(loader) == first and first[0][1] != first[1][1]
    loader.dataset.set_epoch(1)  # persistent workers see it
    second = read(loader)
    assert sorted(sum((ids for ids, _ in first), [])) == sorted(sum((ids for ids, _ in second), [])) == EVERYTHING
    assert first != second and first[0][1] != second[0][1]
    torch.manual_seed(1)
    assert read(make_loader(data, workers=workers)) == first != read(make_loader(data, workers=workers, seed=1))


def test_the_buffer_mixes_shards_and_holds_no_decoded_images(data, monkeypatch):
    batches = [batch["ids"] // ROWS for batch in make_loader(data)]
    assert sum(len(set(shards.tolist())) > 1 for shards in batches) >= 6
    decoded = []
    loader = make_loader(data)
    read = loader.dataset.read
    loader.dataset.read = lambda row: decoded.append(row) or read(row)
    next(iter(loader))
    assert len(decoded) == 4


def test_length_of_an_epoch(data):
    stream = load_captions(data)["train"]
    stream.configure(0, batch_size=8, batches_per_epoch=5)
    assert len(DataLoader(stream, 8, drop_last=True)) == 5
    with pytest.raises(ValueError, match="There are only 48 images, too few for the batch size"):
        stream.configure(0, batch_size=64, batches_per_epoch=0)


def test_a_stream_can_be_sent_to_workers_that_are_not_forked(data):
    stream = load_captions(data)["train"]
    assert len(list(pickle.loads(pickle.dumps(stream)))) == 48


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


def webdataset(folder: Path, **fields) -> CaptionData:
    fields = {"image_column": "jpg", "caption_column": "txt", "num_examples": 8, "eval_splits": [], **fields}
    return CaptionData("webdataset", data_dir=str(folder), streaming=True, **fields)


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (1, 2), (4, 0), (1, 4)])
def test_broken_data_of_a_webdataset_are_skipped_and_counted(tmp_path, processes, workers):
    break_webdataset(tmp_path)
    seen, first, later = [], [], []
    for process in range(processes):
        loader = make_loader(webdataset(tmp_path), process, processes, workers, batch_size=1)
        loader.dataset.batches_per_epoch = 24  # each reader reads its share several times
        seen += read_ids(loader)
        first.append(loader.dataset.skipped)
        seen += read_ids(loader)
        later.append(loader.dataset.skipped)
    assert set(seen) == {0, 1, 2, 3, 4, 8, 9}
    assert sum(later) > sum(first) >= 4  # what is met again is counted again


def test_broken_data_are_named(tmp_path, caplog):
    break_webdataset(tmp_path)
    logging.getLogger("transformers").propagate = True
    loader = make_loader(webdataset(tmp_path), batch_size=1)
    with caplog.at_level(logging.WARNING):
        read_ids(loader)
    assert caplog.text.count("Skipped: ") == loader.dataset.skipped >= 4
    assert "train-000002.tar: broken after 2 examples (ReadError: unexpected end of data)" in caplog.text
    for index, problem in [
        (1, "unreadable image 000000005.jpg (OSError)"),
        (2, "no image"),
        (3, "no caption in UTF-8"),
    ]:
        assert f"train-000001.tar, example {index}: {problem}\n" in caplog.text


def test_at_most_ten_problems_are_named_by_a_reader(tmp_path, caplog):
    members = {}
    for i in range(20):
        members |= {f"{i:02d}.jpg": picture_bytes(i), f"{i:02d}.txt": b"picture" if i < 3 else b""}
    write_tar(tmp_path / "train-0.tar", members)
    logging.getLogger("transformers").propagate = True
    stream = load_captions(webdataset(tmp_path, num_examples=6))["train"]
    with caplog.at_level(logging.WARNING):
        assert len(list(stream)) == 6  # it starts again
    assert stream.skipped > 10 and caplog.text.count("Skipped: ") == 10


def test_a_reader_that_finds_nothing_stops_the_run(tmp_path):
    break_webdataset(tmp_path)
    for shard in (0, 1, 2):
        write_tar(tmp_path / f"train-{shard:06d}.tar", {f"{i}.{end}": b"" for i in range(9) for end in ("jpg", "txt")})
    with pytest.raises(ValueError, match="Reader 0 of 1 has found no valid example"):
        read_ids(make_loader(webdataset(tmp_path)))


# ---- Two processes, and the script as users run it


TWO_PROCESSES = """
import sys, torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from modeling_tdd.training.data import CaptionData, load_captions

accelerator = Accelerator(cpu=True)
data = CaptionData("webdataset", data_dir=sys.argv[1], image_column="jpg", caption_column="txt", streaming=True,
                   num_examples=12, eval_splits=[])
stream = load_captions(data)["train"]
stream.configure(0, 2, 3, accelerator.process_index, accelerator.num_processes)
loader = DataLoader(stream, 2, drop_last=True, num_workers=1, collate_fn=lambda examples: examples)
own = [int(example["captions"][0].split()[1]) for batch in loader for example in batch]
total = accelerator.reduce(torch.tensor(float(sum(own))))  # as a training step, which all processes take together
shares, skipped = gather_object([own]), gather_object([stream.skipped])
if accelerator.is_main_process:
    print("SHARES", sorted(set(sum(shares, []))), [len(share) for share in shares],
          len(set(shares[0]) & set(shares[1])), sum(skipped))
accelerator.end_training()
"""


def test_two_processes_have_disjoint_shares_and_equally_many_batches(tmp_path):
    """Of three shards one is broken, another has a single good picture. So one process starts its share again."""
    break_webdataset(tmp_path)
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SHARES [0, 1, 2, 3, 4, 8, 9] [6, 6] 0 7" in done.stdout
    assert done.stderr.count("Skipped: ") == 7  # four problems, some of which are met again


def test_captioning_script_trains_on_a_broken_stream_to_its_end(tmp_path):
    break_webdataset(tmp_path / "data")
    vision = {"model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "intermediate_size": 64}
    settings = [
        *(
            "encoder=null",
            "model.freeze_encoder=false",
            f"model.vision_config={json.dumps(vision)}",
            "feature_views=1",
        ),
        *("image_processor={size: {height: 16, width: 16}}", "augmentation.size=16"),
        *("model.hidden_size=32", "model.num_hidden_layers=1", "model.intermediate_size=64"),
        *("data.path=webdataset", "data.data_files=null", f"data.data_dir={tmp_path}/data", "data.streaming=true"),
        *("data.image_column=jpg", "data.caption_column=txt", "data.num_examples=8", "data.eval_splits=[validation]"),
        *("training.num_train_epochs=2", "training.batch_size=2", "training.warmup_steps=0"),
        *("training.dataloader_num_workers=1", "training.logging_steps=1", "evaluation.num_inference_steps=[1]"),
    ]
    script, recipe = ROOT / "scripts/train.py", ROOT / "scripts/recipes/emoji.yaml"
    command = [sys.executable, str(script), str(recipe), "--set", *settings]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Skipped: " in done.stderr and "train-000002.tar: broken" in done.stderr
    state = json.loads((tmp_path / "outputs/emoji/tdd-seed0-training/trainer_state.json").read_text())
    assert state["global_step"] == 8
    assert max(entry.get("skipped_examples", 0) for entry in state["log_history"]) >= 4
    result = json.loads((tmp_path / "outputs/emoji/tdd-seed0/result.json").read_text())
    assert [entry["split"] for entry in result["scores"]] == ["validation"]
