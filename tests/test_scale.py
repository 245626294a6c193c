"""The training loop with several processes, after interruptions, and after errors."""

import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import is_tensorboard_available
from safetensors.torch import load_file

from modeling_tdd.training.arguments import TDDTrainingArguments
from modeling_tdd.training.trainer import TDDTrainer


ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "scripts/accelerate").glob("*.yaml"))
NUM_STEPS = 20
DEVICE_BATCHES = NUM_STEPS * tiny_training.BATCH_SIZE // tiny_training.DEVICE_BATCH_SIZE
TIMEOUT = 1200  # a process that hangs, and not a busy machine

# A forked process has all imports done: a run takes a second, and dies alone.
fork = multiprocessing.get_context("fork")


def _child(folder: Path, options: dict[str, Any], environment: dict[str, str], max_file_size: int | None) -> None:
    os.setsid()
    folder.mkdir(parents=True, exist_ok=True)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)  # in place of those that pytest captures
    logging.getLogger().handlers.clear()  # they are pytest's
    if max_file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    os.environ.update(environment)
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    tiny_training.run(folder, **{"events": {}, **options})


def start(folder: Path, max_file_size: int | None = None, rank: int | None = None, **options: Any) -> BaseProcess:
    environment = options.pop("environment", {})
    if rank is not None:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    process = fork.Process(target=_child, args=(folder, options, environment, max_file_size))
    process.start()
    return process


def finish(*processes: BaseProcess) -> list[int]:
    try:
        for process in processes:
            process.join(TIMEOUT)
        assert all(process.exitcode is not None for process in processes), "a process hangs"
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


def train(folder: Path, **options: Any) -> int:
    """Runs tiny_training.py in a process of its own and returns its exit code."""
    return finish(start(folder, **options))[0]


def train_in_two_processes(folder: Path, **options: Any) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = {"MASTER_PORT": str(free.getsockname()[1])}
    return finish(*(start(folder, rank=rank, environment=dict(environment), **options) for rank in range(2)))


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def log(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The averaged final weights and, from the optimiser's state, those that train, in the order of its parameters."""
    averaged = load_file(folder / f"checkpoint-{NUM_STEPS}/model.safetensors")
    assert averaged.keys() == load_file(folder / "ema.safetensors").keys()
    optimizer = torch.load(folder / f"checkpoint-{NUM_STEPS}/optimizer.pt", weights_only=True)
    assert all(group["holds_average"] for group in optimizer["param_groups"])
    return averaged | {f"trains.{index}": state["other_weights"] for index, state in optimizer["state"].items()}


def assert_same_weights(folder: Path, other: Path) -> None:
    torch.testing.assert_close(weights(folder), weights(other), rtol=0, atol=0)


def assert_equal_but_for_rounding(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(weights, others, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps without incident, in one process."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert train(folder, report_to="tensorboard") == 0, output(folder)
    return folder


# ---- Several processes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path: Path):
    config = load_config_from_file(str(path))
    processes = {"single": 1, "cpu_2": 2, "multi_node": 32}
    assert config.num_processes == processes.get(path.stem, 8)


def test_two_processes_end_with_the_weights_of_one(unbroken: Path, tmp_path: Path):
    launcher = ("accelerate.commands.launch", "--config_file", str(ROOT / "scripts/accelerate/cpu_2.yaml"))
    command = [sys.executable, "-m", *launcher, tiny_training.__file__, str(tmp_path), '{"events": {}}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es) on cpu, float32: batch size 16 = 4 x 2 x 2 accumulation step(s)" in done.stdout
    assert "batch size 16 = 4 x 1 x 4 accumulation step(s)" in output(unbroken)
    assert_equal_but_for_rounding(weights(tmp_path), weights(unbroken))


def test_two_sharded_processes_end_with_the_weights_of_one_and_resume(unbroken: Path, tmp_path: Path):
    assert train_in_two_processes(tmp_path, fsdp=True, events=None) == [0, 0], output(tmp_path)
    averaged, expected = load_file(tmp_path / "ema.safetensors"), load_file(unbroken / "ema.safetensors")
    assert_equal_but_for_rounding(averaged, expected)
    config = json.loads((tmp_path / f"checkpoint-{NUM_STEPS}/config.json").read_text())
    assert config["architectures"] == ["TDDForImageClassification"] and "FSDP" not in str(config)
    shutil.rmtree(tmp_path / f"checkpoint-{NUM_STEPS}")  # as if it had been killed after step 18
    assert train_in_two_processes(tmp_path, fsdp=True, events=None) == [0, 0], output(tmp_path)
    assert f"Resuming from {tmp_path}/checkpoint-18" in output(tmp_path)
    assert_equal_but_for_rounding(load_file(tmp_path / "ema.safetensors"), averaged)


def test_a_signal_to_one_of_two_processes_stops_both_and_they_resume(unbroken: Path, tmp_path: Path):
    stopped = train_in_two_processes(tmp_path, events={"13": "SIGTERM to one"})
    assert stopped == [143, 143], output(tmp_path)
    assert checkpoints(tmp_path)[-1] == 7  # the step of device batch 13, with two per process
    assert train_in_two_processes(tmp_path) == [0, 0], output(tmp_path)
    assert_equal_but_for_rounding(weights(tmp_path), weights(unbroken))


# ---- Interruptions


def kill_and_resume(folder: Path, attempt: int, unbroken: Path) -> None:
    place = random.Random(attempt).randrange(DEVICE_BATCHES)
    num_workers = attempt % 2
    assert train(folder, events={str(place): "SIGKILL"}, dataloader_num_workers=num_workers) == -9, output(folder)
    # As another program leaves a checkpoint that it was killed at
    partial = folder / "checkpoint-19"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert train(folder, dataloader_num_workers=num_workers) == 0, output(folder)
    assert f"{partial} is damaged: it has no checksums.json that could be read; " in output(folder)
    assert (folder / "damaged-checkpoint-19/model.safetensors").read_bytes() == b"half"
    assert_same_weights(folder, unbroken)
    assert checkpoints(folder) == checkpoints(unbroken)
    assert [line["step"] for line in log(folder)] == [line["step"] for line in log(unbroken)]


@pytest.mark.parametrize("attempt", range(3))
def test_a_killed_run_resumes_to_the_same_weights(unbroken: Path, tmp_path: Path, attempt: int):
    kill_and_resume(tmp_path, attempt, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10, 20))
def test_ten_killed_runs_of_ten_resume_to_the_same_weights(unbroken: Path, tmp_path: Path, attempt: int):
    kill_and_resume(tmp_path, attempt, unbroken)


@pytest.mark.parametrize(("event", "code"), [("SIGTERM to all", 143), ("SIGINT", 130)])
def test_a_signal_saves_a_checkpoint_and_the_message_says_how_to_resume(
    unbroken: Path, tmp_path: Path, event: str, code: int
):
    # Device batch 29 is in step 8, which is no multiple of 3; the signal to all reaches the data worker too.
    assert train(tmp_path, events={"29": event}, dataloader_num_workers=1) == code, output(tmp_path)
    assert checkpoints(tmp_path) == [6, 8]
    folder = tmp_path / "checkpoint-8"
    assert f"Stopped by a signal. The same command resumes from {folder}." in output(tmp_path)
    assert train(tmp_path, dataloader_num_workers=1) == 0, output(tmp_path)
    assert f"Resuming from {folder}." in output(tmp_path)
    assert_same_weights(tmp_path, unbroken)


def test_the_last_checkpoints_are_kept_and_resume_takes_a_path(unbroken: Path, tmp_path: Path):
    assert checkpoints(unbroken) == [18, 20]
    copy = tmp_path / "run"
    shutil.copytree(unbroken, copy)
    before = weights(copy)
    assert train(copy, resume=str(copy / "checkpoint-18"), save_total_limit=1) == 0, output(copy)
    assert checkpoints(copy) == [20]
    assert all(weight.equal(before[name]) for name, weight in weights(copy).items())


# ---- Errors


def test_steps_that_are_not_finite_are_skipped_in_all_processes_and_counted(tmp_path: Path):
    codes = train_in_two_processes(tmp_path, events={"6": "nan", "21": "inf"})
    assert codes == [0, 0], output(tmp_path)
    assert [line for line in log(tmp_path) if "loss" in line][-1]["skipped_steps"] == 2
    assert all(weight.isfinite().all() for weight in weights(tmp_path).values())
    assert all(line["loss"] > 0 for line in log(tmp_path) if "loss" in line)


def test_too_many_skipped_steps_stop_the_run_and_name_the_last_good_checkpoint(tmp_path: Path):
    events = {str(place): "nan" for place in range(17, DEVICE_BATCHES)}
    assert train(tmp_path, events=events, max_skipped_steps=3) == 1
    message = "was not finite in 4 steps in a row, up to step 8. The last good checkpoint is "
    assert message + str(tmp_path / "checkpoint-6") in output(tmp_path)


def check_full_disk(folder: Path, before: dict[str, bytes]) -> None:
    assert f"{folder / 'checkpoint-6'} could not be written, where " in output(folder), output(folder)
    assert f"The last good checkpoint is {folder / 'checkpoint-3'}" in output(folder)
    assert checkpoints(folder) == [3]
    after = {path.name: path.read_bytes() for path in (folder / "checkpoint-3").iterdir()}
    assert after == before


@pytest.fixture
def until_step_3(tmp_path: Path) -> dict[str, bytes]:
    """A run that was killed in step 5, and its checkpoint's files."""
    assert train(tmp_path, events={"17": "SIGKILL"}) == -9, output(tmp_path)
    assert checkpoints(tmp_path) == [3]
    return {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-3").iterdir()}


def test_a_file_that_cannot_grow_leaves_the_previous_checkpoint(until_step_3: dict[str, bytes], tmp_path: Path):
    # Enough for the weights and the log, too little for the optimiser's state of twice their size
    limit = len(until_step_3["optimizer.pt"]) * 3 // 4
    assert train(tmp_path, max_file_size=limit) == 1
    check_full_disk(tmp_path, until_step_3)
    assert train(tmp_path) == 0, output(tmp_path)  # with enough space it resumes


def can_mount() -> bool:
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this system lets no user mount a file system of their own")
def test_a_full_disk_leaves_the_previous_checkpoint(
    until_step_3: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    size = int(1.1 * sum(map(len, until_step_3.values()))) + 2**16  # it is full while the weights are written
    disc = tmp_path_factory.mktemp("disc")
    options = json.dumps({"events": {}})
    script = (
        f"mount -t tmpfs -o size={size} tmpfs {disc} && cp -r {tmp_path}/checkpoint-3 {disc} && "
        f"{{ {sys.executable} {tiny_training.__file__} {disc} '{options}' > {tmp_path}/output.txt 2>&1; "
        f"code=$?; rm -r {tmp_path}/checkpoint-*; cp -r {disc}/checkpoint-* {tmp_path}; exit $code; }}"
    )
    done = subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", script], timeout=2 * TIMEOUT)
    assert done.returncode == 1
    (tmp_path / "output.txt").write_text(output(tmp_path).replace(str(disc), str(tmp_path)))
    check_full_disk(tmp_path, until_step_3)


@pytest.mark.skipif(not can_mount(), reason="this system lets no user mount a file system of their own")
@pytest.mark.skipif(not is_tensorboard_available(), reason="TensorBoard is not installed")
def test_a_disk_that_is_full_of_logs_is_named(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path):
    disc = tmp_path_factory.mktemp("disc")
    settings = {"report_to": "tensorboard", "save_strategy": "no", "logging_steps": 1, "num_train_epochs": 60}
    command = f"{sys.executable} {tiny_training.__file__} {disc} '{json.dumps(settings)}' > {tmp_path}/output.txt 2>&1"
    script = f"mount -t tmpfs -o size=96k tmpfs {disc} && {command}"
    done = subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", script], timeout=2 * TIMEOUT)
    assert done.returncode == 1
    assert f"The log in {disc} could not be written: [Errno 28] No space left" in output(tmp_path), output(tmp_path)
    assert "There is no earlier checkpoint." in output(tmp_path)


# ---- Evaluation


def test_each_data_set_is_predicted_with_a_loader_of_its_own(tmp_path: Path):
    args = TDDTrainingArguments(str(tmp_path), dataloader_num_workers=1, report_to="none", disable_tqdm=True)
    trainer = TDDTrainer(
        tiny_training.make_model(),
        args,
        data_collator=tiny_training.augment,
        eval_collator=tiny_training.stack,
        eval_dataset=tiny_training.Images(8),
        compute_metrics=tiny_training.accuracy,
    )
    trainer.evaluate()  # its loader's worker persists
    assert [len(trainer.predict(tiny_training.Images(number)).label_ids) for number in (11, 5)] == [11, 5]


# ---- Logs


def test_content_of_the_log(unbroken: Path):
    steps = [line for line in log(unbroken) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(2, NUM_STEPS + 1, 2))
    scores = [(line["epoch"], line["step"]) for line in log(unbroken) if "eval_top1" in line]
    assert scores == [(2, 8), (4, 16), (5, 20)]
    for line in steps:
        assert line["loss"] > 0 and line["grad_norm"] > 0 and line["images_per_second"] > 0
        assert 0 <= line["data_wait_share"] < 1 and 0.05 < line["memory_gib"] < 64 and line["skipped_steps"] == 0
        tenths = [line[f"loss_by_timestep/{tenth}"] for tenth in range(10) if f"loss_by_timestep/{tenth}" in line]
        assert len(tenths) >= 5 and min(tenths) > 0
    rates = [line["learning_rate"] for line in steps]
    assert rates[0] == pytest.approx(1e-3 * 1 / 4) and max(rates) <= 1e-3 and rates[-1] < 1e-4
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.skipif(not is_tensorboard_available(), reason="TensorBoard is not installed")
def test_tensorboard_gets_the_same(unbroken: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in unbroken.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    losses = [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")]
    expected = [(line["step"], line["loss"]) for line in log(unbroken) if "loss" in line]
    assert [step for step, _ in losses] == [step for step, _ in expected]
    torch.testing.assert_close([value for _, value in losses], [value for _, value in expected], rtol=1e-6, atol=0)
    assert {"train/images_per_second", "train/loss_by_timestep/0", "eval/top1"} <= set(events.Tags()["scalars"])
