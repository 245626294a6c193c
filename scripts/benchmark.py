# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Times alternatives side by side in one run on one thread, and prints medians and their ratio as JSON.

Alternatives take turns within each repeat, so that whatever else the machine does falls on all of them alike.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from modeling_tdd import TDDConfig, TDDForCaptioning


# K of BERT's vocabulary, d, N, and the images of a step with the image tokens of a ViT-B/32
CATEGORIES, WIDTH, LENGTH, IMAGES, IMAGE_TOKENS = 30_522, 768, 32, 64, 49

# What any user of a checkpoint imports of Transformers. Registering takes the Auto classes' modules, which take torch
# and Transformers' base classes: there is next to nothing left that could be imported later.
TRANSFORMERS_PARTS = """
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForImageTextToText
from transformers import AutoProcessor, GenerationConfig, LogitsProcessorList
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pipelines import PIPELINE_REGISTRY, ImageTextToTextPipeline
"""

Runs = dict[str, Callable[[], object]]


def time_in_turns(runs: Runs, repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """The median time of `repeats` calls of each function, after one call that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: statistics.median(own_times[1:]) for name, own_times in times.items()}


def peak_memory(run: Callable[[], object]) -> float:
    """MiB of PyTorch's tensors at the peak of a call, beyond those from before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]")) / 2**20


def step_jobs() -> dict[str, Runs]:
    """A captioner's training step (forward, backward, AdamW) by MDD and by TDD, on one network and from ready image
    features. One timestep per image is the hardest for TDD, as the noise's factor costs the same for any number. And
    the path of the noise, y_t W, forward and backward, with noise of width K (dense) and of width d."""
    features, labels = torch.randn(IMAGES, IMAGE_TOKENS, 768), torch.randint(3, CATEGORIES, (IMAGES, LENGTH))
    sizes = {"vocab_size": CATEGORIES, "hidden_size": WIDTH, "max_position_embeddings": LENGTH}
    fields = {"freeze_encoder": True, "pooling": None, "pad_token_id": 0, "eos_token_id": 2, "timesteps_per_image": 1}
    # The encoder is there in name only, and with its usual width
    fields["vision_config"] = {"model_type": "vit", "image_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    configs = {name: TDDConfig(**sizes, **fields, corruption=name) for name in ("mask", "gaussian")}
    models = {name: TDDForCaptioning(config).train() for name, config in configs.items()}
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


def import_jobs() -> dict[str, Runs]:
    """A fresh Python that imports Transformers' parts, and one that imports this package."""
    programs = {"Transformers' parts": TRANSFORMERS_PARTS, "modeling_tdd": "import modeling_tdd"}
    runs = {name: partial(subprocess.check_call, [sys.executable, "-c", code]) for name, code in programs.items()}
    return {"import": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["step", "import"], nargs="?", help="default: both")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each alternative; default: 3")
    args = parser.parse_args()
    torch.set_num_threads(1)  # with several, short products wait for whichever core another process holds
    torch.manual_seed(0)
    results = []
    for benchmark, make_jobs in {"step": step_jobs, "import": import_jobs}.items():
        for job, runs in make_jobs().items() if args.benchmark in (None, benchmark) else ():
            # The time of this process and its children, so that others on the machine do not count
            seconds = time_in_turns(runs, args.repeats, lambda: time.process_time() + sum(os.times()[2:4]))
            baseline, candidate = seconds.values()
            results.append({"job": job, "seconds": seconds, "ratio": candidate / baseline})
            if benchmark == "step":
                results[-1]["mebibytes"] = {name: peak_memory(run) for name, run in runs.items()}
    setting = {"threads": 1, "torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps({"setting": setting, "results": results}, indent=2))


if __name__ == "__main__":
    main()
