"""The training loop with several processes, after interruptions, and after errors."""

import json
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

from modeling_tdd.loss_tdd import sum_by_timestep


ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "scripts/accelerate").glob("*.yaml"))
NUM_STEPS = 20
DEVICE_BATCHES = NUM_STEPS * tiny_training.BATCH_SIZE // tiny_training.DEVICE_BATCH_SIZE
TIMEOUT = 300

# A forked process has all imports done: a run takes a second, and dies alone.
fork = multiprocessing.get_context("fork")


def _child(folder: Path, options: dict[str, Any], environment: dict[str, str], max_file_size: int | None) -> None:
    os.setsid()
    folder.mkdir(parents=True, exist_ok=True)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)  # in place of those that pytest captures
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
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The final weights and their moving average."""
    model = load_file(folder / f"checkpoints/step-{NUM_STEPS:08d}/model.safetensors")
    model = {name.removeprefix("module."): weight for name, weight in model.items()}
    return model | {f"ema.{name}": weight for name, weight in load_file(folder / "ema.safetensors").items()}


def assert_same_weights(folder: Path, other: Path) -> None:
    torch.testing.assert_close(weights(folder), weights(other), rtol=0, atol=0)


def assert_equal_but_for_rounding(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(weights, others, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps without incident, in one process."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert train(folder, trackers=None) == 0, output(folder)
    return folder


# ---- Loss by timestep


def test_losses_are_summed_by_tenths_of_the_timesteps():
    losses = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    weight = torch.tensor([[1.0, 0.5], [2.0, 0.0]])
    sums = sum_by_timestep(losses, weight, torch.tensor([[1, 1], [20, 20]]), num_timesteps=20)
    assert sums[0].tolist() == [2.0, 1.5] and sums[9].tolist() == [8.0, 2.0] and sums.sum() == 13.5
    sums = sum_by_timestep(losses, weight, torch.tensor([[1, 2], [3, 20]]), num_timesteps=20)
    assert sums[0].tolist() == [2.0, 1.5] and sums[1].tolist() == [8.0, 2.0] and sums[9].tolist() == [0.0, 0.0]


# ---- Processes


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
    assert "2 process(es) on cpu, precision no: batch size 16 = 4 x 2 x 2 accumulation step(s)" in done.stdout
    assert "batch size 16 = 4 x 1 x 4 accumulation step(s)" in output(unbroken)
    assert_equal_but_for_rounding(weights(tmp_path), weights(unbroken))


def test_two_sharded_processes_end_with_the_weights_of_one_and_resume(unbroken: Path, tmp_path: Path):
    assert train_in_two_processes(tmp_path, fsdp=True, events=None) == [0, 0], output(tmp_path)
    averaged, expected = load_file(tmp_path / "ema.safetensors"), load_file(unbroken / "ema.safetensors")
    expected = {name.removeprefix("model."): weight for name, weight in expected.items()}
    assert_equal_but_for_rounding(averaged, expected)
    shutil.rmtree(tmp_path / f"checkpoints/step-{NUM_STEPS:08d}")  # as if it had been killed after step 18
    assert train_in_two_processes(tmp_path, fsdp=True, events=None) == [0, 0], output(tmp_path)
    assert "step-00000018: step 18, epoch 5" in output(tmp_path)
    assert_equal_but_for_rounding(load_file(tmp_path / "ema.safetensors"), averaged)


def test_a_signal_to_one_of_two_processes_stops_both_and_they_resume(unbroken: Path, tmp_path: Path):
    stopped = train_in_two_processes(tmp_path, events={"13": "SIGTERM to one"})
    assert stopped == [143, 143], output(tmp_path)
    assert checkpoints(tmp_path)[-1] == "step-00000007"  # the step of device batch 13, with two per process
    assert train_in_two_processes(tmp_path) == [0, 0], output(tmp_path)
    assert_equal_but_for_rounding(weights(tmp_path), weights(unbroken))


# ---- Interruptions


def kill_and_resume(folder: Path, attempt: int, unbroken: Path) -> None:
    place = random.Random(attempt).randrange(DEVICE_BATCHES)
    num_workers = attempt % 2
    assert train(folder, events={str(place): "SIGKILL"}, num_workers=num_workers) == -9, output(folder)
    # As if killed while it wrote a checkpoint and a line of the log
    (folder / "checkpoints/.partial").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints/.partial/model.safetensors").write_bytes(b"half")
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": ')
    assert train(folder, num_workers=num_workers) == 0, output(folder)
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
    assert train(tmp_path, events={"29": event}, num_workers=1) == code, output(tmp_path)
    assert checkpoints(tmp_path) == ["step-00000006", "step-00000008"]
    folder = tmp_path / "checkpoints/step-00000008"
    assert f"Stopped by a signal. The same command resumes from {folder}." in output(tmp_path)
    assert train(tmp_path, num_workers=1) == 0, output(tmp_path)
    assert f"Resuming from {folder}: step 8, epoch 2." in output(tmp_path)
    assert_same_weights(tmp_path, unbroken)


def test_the_last_checkpoints_are_kept_and_resume_takes_none_or_a_path(unbroken: Path, tmp_path: Path):
    assert checkpoints(unbroken) == ["step-00000018", "step-00000020"]
    copy = tmp_path / "run"
    shutil.copytree(unbroken, copy)
    before = weights(copy)
    assert train(copy, resume=str(copy / "checkpoints/step-00000018"), keep_checkpoints=1) == 0, output(copy)
    assert checkpoints(copy) == ["step-00000020"]
    assert all(weight.equal(before[name]) for name, weight in weights(copy).items())
    assert train(copy, resume="none", epochs=1) == 0, output(copy)
    assert checkpoints(copy) == ["step-00000003", "step-00000004"] and log(copy)[-1]["step"] == 4


def test_a_checkpoint_of_other_settings_is_refused(unbroken: Path, tmp_path: Path):
    source = str(unbroken / "checkpoints/step-00000020")
    assert train(tmp_path, resume=source, base_learning_rate=3.2e-2, ema_warmup=False, seed=1, eval_every=1) == 1
    differences = "base_learning_rate was 0.016, is 0.032; ema_warmup was True, is False; seed was 0, is 1"
    assert f"other settings: {differences}. Use the same settings" in output(tmp_path)
    assert train(tmp_path, resume=str(unbroken)) == 1
    assert f"`resume` must be 'auto', 'none' or a checkpoint's folder, got '{unbroken}'" in output(tmp_path)


# ---- Errors


def test_steps_that_are_not_finite_are_skipped_in_all_processes_and_counted(tmp_path: Path):
    codes = train_in_two_processes(tmp_path, events={"6": "nan", "21": "inf"})
    assert codes == [0, 0], output(tmp_path)
    assert log(tmp_path)[-2]["skipped_steps"] == 2
    assert all(weight.isfinite().all() for weight in weights(tmp_path).values())
    assert all(line["loss"] is None or line["loss"] > 0 for line in log(tmp_path) if "loss" in line)


def test_too_many_skipped_steps_stop_the_run_and_name_the_last_good_checkpoint(tmp_path: Path):
    events = {str(place): "nan" for place in range(17, DEVICE_BATCHES)}
    assert train(tmp_path, events=events, max_skipped_steps=3) == 1
    message = "was not finite in 4 steps in a row, up to step 8. The last good checkpoint is "
    assert message + str(tmp_path / "checkpoints/step-00000006") in output(tmp_path)


def check_full_disk(folder: Path, before: dict[str, bytes]) -> None:
    assert "The checkpoint of step 6 could not be written to" in output(folder), output(folder)
    assert f"The last good checkpoint is {folder / 'checkpoints/step-00000003'}" in output(folder)
    assert checkpoints(folder) == ["step-00000003"]
    after = {path.name: path.read_bytes() for path in (folder / "checkpoints/step-00000003").iterdir()}
    assert after == before


@pytest.fixture
def until_step_3(tmp_path: Path) -> dict[str, bytes]:
    """A run that was killed in step 5, and its checkpoint's files."""
    assert train(tmp_path, events={"17": "SIGKILL"}) == -9, output(tmp_path)
    assert checkpoints(tmp_path) == ["step-00000003"]
    return {path.name: path.read_bytes() for path in (tmp_path / "checkpoints/step-00000003").iterdir()}


def test_a_file_that_cannot_grow_leaves_the_previous_checkpoint(until_step_3: dict[str, bytes], tmp_path: Path):
    # Enough for the weights and the log, too little for the optimiser's state of twice their size
    limit = len(until_step_3["optimizer.bin"]) * 3 // 4
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
        f"mount -t tmpfs -o size={size} tmpfs {disc} && cp -r {tmp_path}/checkpoints {disc} && "
        f"{{ {sys.executable} {tiny_training.__file__} {disc} '{options}' > {tmp_path}/output.txt 2>&1; "
        f"code=$?; rm -r {tmp_path}/checkpoints; cp -r {disc}/checkpoints {tmp_path}; exit $code; }}"
    )
    done = subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", script], timeout=2 * TIMEOUT)
    assert done.returncode == 1
    (tmp_path / "output.txt").write_text(output(tmp_path).replace(str(disc), str(tmp_path)))
    check_full_disk(tmp_path, until_step_3)


# ---- Streams


STREAM = {"stream": [32, 24], "steps_per_epoch": 5, "epochs": 2}  # the second process has 3 steps' images, of 4 x 2


def test_an_epoch_of_streams_ends_for_all_when_one_ends(tmp_path: Path):
    assert train_in_two_processes(tmp_path, **STREAM) == [0, 0], output(tmp_path)
    assert log(tmp_path)[-1]["step"] == 6


def test_a_stream_resumes_within_an_epoch(tmp_path: Path):
    options = {"stream": [64], "steps_per_epoch": 4}
    assert train(tmp_path / "unbroken", **options) == 0, output(tmp_path / "unbroken")
    assert train(tmp_path / "killed", events={"41": "SIGKILL"}, **options) == -9
    assert checkpoints(tmp_path / "killed")[-1] == "step-00000009"
    assert train(tmp_path / "killed", **options) == 0, output(tmp_path / "killed")
    assert_same_weights(tmp_path / "killed", tmp_path / "unbroken")


# ---- Logs


def test_content_of_the_log(unbroken: Path):
    lines = log(unbroken)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(2, NUM_STEPS + 1, 2))
    assert [(line["epoch"], line["step"]) for line in lines if "eval" in line] == [(2, 8), (4, 16), (5, 20)]
    for line in steps:
        assert line["loss"] > 0 and line["grad_norm"] > 0 and line["images_per_second"] > 0
        assert 0 <= line["data_wait_share"] < 1 and 0.05 < line["memory_gib"] < 64 and line["skipped_steps"] == 0
        tenths = [loss for loss in line["loss_by_timestep"] if loss is not None]
        assert len(line["loss_by_timestep"]) == 10 and len(tenths) >= 5 and min(tenths) > 0
    rates = [line["learning_rate"] for line in steps]
    assert rates[0] == pytest.approx(1e-3 * 1 / 4) and max(rates) <= 1e-3 and rates[-1] < 1e-4
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.skipif(not is_tensorboard_available(), reason="TensorBoard is not installed")
def test_tensorboard_gets_the_same(unbroken: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(unbroken / "modeling_tdd")).Reload()
    losses = [(scalar.step, scalar.value) for scalar in events.Scalars("loss")]
    expected = [(line["step"], line["loss"]) for line in log(unbroken) if "loss" in line]
    assert [step for step, _ in losses] == [step for step, _ in expected]
    torch.testing.assert_close([value for _, value in losses], [value for _, value in expected], rtol=1e-6, atol=0)
    assert {"grad_norm", "images_per_second", "loss_by_timestep/0", "eval"} <= set(events.Tags()["scalars"])
