# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Times alternatives side by side in one run and reports medians and their ratios.

Alternatives take turns within each repeat, so that whatever else the machine does falls on all of them alike.
Add a benchmark by writing a function from the parsed arguments to `Result`s and putting it into `BENCHMARKS`.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from modeling_tdd import TDDConfig, TDDForCaptioning
from modeling_tdd.denoiser_tdd import TDDTokenEmbedding
from modeling_tdd.diffusion_tdd import NoiseSchedule


@dataclass
class Result:
    """A baseline and a candidate for one job: medians of their times, and their memory, of the kind that is named."""

    benchmark: str
    job: str
    names: tuple[str, str]
    milliseconds: list[float]
    mebibytes: list[float] = field(default_factory=list)
    memory: str = ""
    speedup: float = field(init=False)

    def __post_init__(self) -> None:
        self.speedup = self.milliseconds[0] / self.milliseconds[1]


def time_in_turns(
    functions: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Medians, in milliseconds, of `repeats` runs of each function after one run that does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, own_times in zip(functions, times):
            start = clock()
            function()
            if repeat > 0:
                own_times.append(1e3 * (clock() - start))
    return [statistics.median(own_times) for own_times in times]


def noisy_embeddings(
    embedding: TDDTokenEmbedding, schedule: NoiseSchedule, noise: Tensor, factor: Tensor | None = None
):
    """y_t W of random tokens at random timesteps, from K-wide or projected noise of shape (rows, N, width)."""
    tokens = torch.randint(embedding.num_embeddings, noise.shape[:2])
    timesteps = torch.randint(1, schedule.num_timesteps + 1, noise.shape[:2])
    if factor is None and noise.shape[-1] != embedding.num_embeddings:
        factor = embedding()
    return embedding(tokens, timesteps, noise, schedule, factor)


def benchmark_noise(args: argparse.Namespace) -> list[Result]:
    """y_t W from tokens: K-wide noise on one-hot vectors, projected by W, against noise drawn in d dimensions."""
    num_categories, width = args.categories, args.width
    embedding = TDDTokenEmbedding(num_categories, width)
    schedule = NoiseSchedule.from_config(caption_config(args, "gaussian"))
    with torch.no_grad():
        factor = embedding()

    def dense(num_tokens: int, backward: bool = False) -> None:
        # In chunks: the noise and its gradient are K wide, and 8,192 rows would take many GB
        for start in range(0, num_tokens, args.chunk):
            noise = torch.randn(min(args.chunk, num_tokens - start), 1, num_categories)
            embeds = noisy_embeddings(embedding, schedule, noise)
            if backward:
                embeds.sum().backward()

    def projected(num_tokens: int, ready_factor: Tensor | None = None, backward: bool = False) -> None:
        embeds = noisy_embeddings(embedding, schedule, torch.randn(num_tokens, 1, width), ready_factor)
        if backward:
            embeds.sum().backward()

    forward_only = torch.no_grad()
    results = []
    for n in args.tokens:
        dense_forward = forward_only(partial(dense, n))
        jobs = {
            "(a) factor ready, as in a denoising loop": (dense_forward, forward_only(partial(projected, n, factor))),
            "(b) factor anew, as in a training step, forward": (dense_forward, forward_only(partial(projected, n))),
            "(c) factor anew, forward and backward": (
                partial(dense, n, backward=True),
                partial(projected, n, backward=True),
            ),
        }
        repeats = max(3, args.repeats * 512 // max(n, 512))
        noise_mib = [4 * min(args.chunk, n) * num_categories / 2**20, 4 * n * factor.shape[0] / 2**20]
        for job, functions in jobs.items():
            times = time_in_turns(functions, repeats)
            results.append(Result("noise", f"{n} tokens, {job}", ("dense", "projected"), times, noise_mib, "noise"))
    return results


def peak_memory(function: Callable[[], object]) -> float:
    """MiB that a call adds to a process at its peak: of resident memory, in a forked child that does nothing else."""

    def measure(connection: Connection) -> None:
        # Of this process from the fork on: Linux starts the peak at what is resident then
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function()
        connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=measure, args=(sender,))
    child.start()
    sender.close()
    mebibytes = receiver.recv()  # raises where the child failed
    child.join()
    return mebibytes


def caption_config(args: argparse.Namespace, corruption: str) -> TDDConfig:
    """The paper's denoiser for captions. Features come ready, so the encoder is there in name only."""
    tiny = {"model_type": "vit", "image_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    return TDDConfig(
        vision_config=tiny,
        freeze_encoder=True,
        pooling=None,
        corruption=corruption,
        hidden_size=args.width,
        vocab_size=args.categories,
        max_position_embeddings=args.caption_length,
        timesteps_per_image=args.timesteps_per_image,
        pad_token_id=0,
        eos_token_id=2,
    )


def benchmark_step(args: argparse.Namespace) -> list[Result]:
    """A captioner's training step (forward, backward, AdamW) from ready image features: TDD with noise drawn in d
    dimensions against dense noise on one-hot vectors, and against MDD on the same network."""
    features = torch.randn(args.batch_size, args.image_tokens, 768)
    labels = torch.randint(3, args.categories, (args.batch_size, args.caption_length))
    models = {name: TDDForCaptioning(caption_config(args, name)).train() for name in ("gaussian", "mask")}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        for name, model in models.items()
    }
    embedding = models["gaussian"].model.denoiser.token_embedding
    schedule = NoiseSchedule.from_config(models["gaussian"].config)
    shape = (args.batch_size, args.timesteps_per_image, args.caption_length)

    def step(name: str, noise_width: int | None = None) -> None:
        noise = None if noise_width is None else torch.randn(*shape, noise_width)
        models[name](image_features=features, labels=labels, noise=noise).loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    def noise_path(noise_width: int) -> None:
        noise = torch.randn(*shape, noise_width).flatten(0, 1)
        noisy_embeddings(embedding, schedule, noise).sum().backward()
        embedding.zero_grad()

    widths = {"TDD": args.width, "dense": args.categories}
    steps = {
        "MDD": partial(step, "mask"),
        "TDD": partial(step, "gaussian"),
        "dense": partial(step, "gaussian", args.categories),
    }
    paths = {name: partial(noise_path, width) for name, width in widths.items()}
    # Time of this process, so that others on the machine do not count
    times = dict(zip(steps, time_in_turns(list(steps.values()), args.step_repeats, time.process_time)))
    path_times = dict(zip(paths, time_in_turns(list(paths.values()), args.step_repeats, time.process_time)))
    memory = {name: peak_memory(run) for name, run in steps.items()}
    path_memory = {name: peak_memory(run) for name, run in paths.items()}

    def result(job: str, names: tuple[str, str], times: dict[str, float], memory: dict[str, float]) -> Result:
        values = [times[name] for name in names], [memory[name] for name in names]
        return Result("step", job, names, *values, "peak of resident memory")

    return [
        result("a training step, TDD against MDD", ("MDD", "TDD"), times, memory),
        result("a training step, against dense noise", ("dense", "TDD"), times, memory),
        result("the noise path, forward and backward", ("dense", "TDD"), path_times, path_memory),
    ]


# What any user of a checkpoint imports of Transformers. Registering takes the Auto classes' modules, which take torch
# and Transformers' base classes: there is next to nothing left that could be imported later.
TRANSFORMERS_PARTS = """from transformers import (
    AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForImageTextToText, AutoProcessor,
    GenerationConfig, LogitsProcessorList, PreTrainedConfig, PreTrainedModel, ProcessorMixin
)
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pipelines import PIPELINE_REGISTRY, ImageTextToTextPipeline
"""


def benchmark_import(args: argparse.Namespace) -> list[Result]:
    """A Python that imports Transformers' parts, against one that imports this package."""
    names = ("Transformers' parts", "modeling_tdd")
    programs = (TRANSFORMERS_PARTS, "import modeling_tdd")
    imports = [
        partial(subprocess.run, [sys.executable, "-c", program], check=True, capture_output=True)
        for program in programs
    ]
    return [Result("import", "a fresh Python and the import", names, time_in_turns(imports, args.repeats))]


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[Result]]] = {
    "noise": benchmark_noise,
    "step": benchmark_step,
    "import": benchmark_import,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "benchmarks", nargs="*", default=list(BENCHMARKS), help=f"which to run: {', '.join(BENCHMARKS)}"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/benchmark.json"), help="where to save the results"
    )
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each alternative; fewer for many tokens")
    # With several, short products wait for whichever core another process holds: ratios then say little
    parser.add_argument("--threads", type=int, default=1, help="threads that PyTorch uses")
    noise = parser.add_argument_group("noise")
    noise.add_argument("--categories", type=int, default=30_522, help="K; BERT's vocabulary by default")
    noise.add_argument("--width", type=int, default=768, help="d, the denoiser's width")
    noise.add_argument("--tokens", type=int, nargs="+", default=[512, 8192], help="noisy tokens at a time")
    noise.add_argument(
        "--chunk", type=int, default=1024, help="rows of the dense path at a time, which bound its memory"
    )
    step = parser.add_argument_group("step")
    step.add_argument("--batch-size", type=int, default=64, help="images per step")
    step.add_argument("--caption-length", type=int, default=32, help="N, tokens per caption")
    step.add_argument("--timesteps-per-image", type=int, default=1, help="1 is the hardest for TDD: its factor's cost")
    step.add_argument("--image-tokens", type=int, default=49, help="image tokens, those of a ViT-B/32 by default")
    step.add_argument("--step-repeats", type=int, default=3, help="timed runs of each step")
    args = parser.parse_args()
    if unknown := set(args.benchmarks) - set(BENCHMARKS):
        parser.error(f"unknown benchmarks {sorted(unknown)}: choose from {', '.join(BENCHMARKS)}")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = [result for name in args.benchmarks for result in BENCHMARKS[name](args)]
    print(f"{'job':<62} {'baseline':>30} {'candidate':>24} {'speed-up':>9}   memory, MiB")
    for result in results:
        baseline, candidate = (f"{name} {ms:.1f} ms" for name, ms in zip(result.names, result.milliseconds))
        memory = " to ".join(f"{mib:.1f}" for mib in result.mebibytes)
        memory += f" ({result.memory})" if memory else ""
        print(f"{result.job:<62} {baseline:>30} {candidate:>24} {result.speedup:>8.2f}x   {memory}")
    print("noise: the bytes of one draw of it, computed from its shape; other temporaries come on top.")
    print("peak of resident memory: what a call adds, measured in a process of its own. Steps: processor time.")
    setting = {"threads": args.threads, "torch": torch.__version__, "machine": platform.machine()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"setting": setting, "results": [asdict(r) for r in results]}, indent=2) + "\n")
    print(f"Saved to {args.output}")


if __name__ == "__main__":
    main()
