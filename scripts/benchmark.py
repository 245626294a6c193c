# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Compares TDD with its alternatives in one run on one thread: medians of processor time, and peaks of memory.

    python scripts/benchmark.py step

`step` compares a captioner's training step by MDD and by TDD, and TDD's noise with the noise of one-hot vectors.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from modeling_tdd import TDDConfig, TDDForCaptioning


# K of BERT's vocabulary, d, N, and the images of a step with the image tokens of a ViT-B/32
CATEGORIES, WIDTH, LENGTH, IMAGES, IMAGE_TOKENS = 30_522, 768, 32, 64, 49
REPEATS = 3


def step_jobs() -> dict[str, dict[str, Callable[[], None]]]:
    """A captioner's training step (forward, backward, AdamW) by MDD and by TDD, on one network and from ready image
    features. One timestep per image is the hardest for TDD, as the noise's factor costs the same for any number. And
    the path of the noise, y_t W, forward and backward: with the noise of one-hot vectors, of width K (dense), and with
    noise of width d."""
    features, labels = torch.randn(IMAGES, IMAGE_TOKENS, 768), torch.randint(3, CATEGORIES, (IMAGES, LENGTH))
    fields = {"freeze_encoder": True, "pooling": None, "pad_token_id": 0, "eos_token_id": 2, "timesteps_per_image": 1}
    fields.update(vocab_size=CATEGORIES, hidden_size=WIDTH, max_position_embeddings=LENGTH)
    models = {name: TDDForCaptioning(TDDConfig(**fields, corruption=name)).train() for name in ("mask", "gaussian")}
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    denoiser = models["gaussian"].model.denoiser
    embedding, schedule = denoiser.token_embedding, denoiser.schedule_on(labels.device)
    timesteps = torch.randint(1, schedule.num_timesteps + 1, labels.shape)

    def step(corruption: str) -> None:
        models[corruption](image_features=features, labels=labels).loss.backward()
        optimizers[corruption].step()
        optimizers[corruption].zero_grad()

    def noise_path(width: int) -> None:
        factor = embedding() if width == WIDTH else None
        embedding(labels, timesteps, torch.randn(*labels.shape, width), schedule, factor).sum().backward()
        embedding.zero_grad()

    return {
        "a training step": {"MDD": partial(step, "mask"), "TDD": partial(step, "gaussian")},
        "the path of the noise": {"dense": partial(noise_path, CATEGORIES), "TDD": partial(noise_path, WIDTH)},
    }


def peak_memory(run: Callable[[], None]) -> float:
    """MiB of PyTorch's tensors at the peak of a call, beyond those from before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in events)) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["step"])
    parser.parse_args()
    torch.set_num_threads(1)  # with several, short products wait for whichever core another process holds
    torch.manual_seed(0)
    for job, runs in step_jobs().items():
        times = {name: [] for name in runs}
        for name in [*runs] * (REPEATS + 1):  # in turns, so that a busy machine slows all of them alike
            start = time.process_time()
            runs[name]()
            times[name].append(time.process_time() - start)
        seconds = {name: statistics.median(own_times[1:]) for name, own_times in times.items()}  # the first warms up
        baseline, candidate = seconds.values()
        mebibytes = {name: peak_memory(run) for name, run in runs.items()}
        result = {"job": job, "seconds": seconds, "ratio": candidate / baseline, "mebibytes": mebibytes}
        print(json.dumps(result, indent=2), flush=True)


if __name__ == "__main__":
    main()
