# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Times alternatives side by side in one run and reports medians and their ratios.

Alternatives take turns within each repeat, so that whatever else the machine does falls on all of them alike.
Add a benchmark by writing a function from the parsed arguments to `Result`s and putting it into `BENCHMARKS`.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from modeling_tdd.diffusion_tdd import GaussianCorruption, noise_factor


@dataclass
class Result:
    """A baseline and a candidate for one job: medians of their times, and the size of one draw of their noise."""

    benchmark: str
    job: str
    names: tuple[str, str]
    milliseconds: list[float]
    noise_mib: list[float] = field(default_factory=list)
    speedup: float = field(init=False)

    def __post_init__(self) -> None:
        self.speedup = self.milliseconds[0] / self.milliseconds[1]


def time_in_turns(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Medians, in milliseconds, of `repeats` runs of each function after one run that does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, own_times in zip(functions, times):
            start = time.perf_counter()
            function()
            if repeat > 0:
                own_times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own_times) for own_times in times]


def benchmark_noise(args: argparse.Namespace) -> list[Result]:
    """y_t W from tokens: K-wide noise added to one-hot vectors and projected, against noise drawn in d dimensions."""
    num_categories, width = args.categories, args.width
    weight = (0.02 * torch.randn(num_categories, width)).requires_grad_()
    alpha_bar = torch.linspace(1, 0, 1001)
    with torch.no_grad():
        factor = noise_factor(weight)

    def corrupt(corruption: GaussianCorruption, num_tokens: int) -> Tensor:
        targets = torch.randint(num_categories, (num_tokens, 1))
        timesteps = torch.randint(1, 1001, (num_tokens,))
        return corruption.corrupt(targets, timesteps, corruption.draw_noise(num_tokens, 1)).inputs_embeds

    def dense(num_tokens: int, backward: bool = False) -> None:
        # In chunks: noise, one-hot vectors, y_t and their gradients are K wide, and 8,192 rows would take many GB
        for start in range(0, num_tokens, args.chunk):
            rows = min(args.chunk, num_tokens - start)
            inputs = corrupt(GaussianCorruption(weight, alpha_bar, dense=True), rows)
            if backward:
                inputs.sum().backward()

    def projected(num_tokens: int, ready_factor: Tensor | None = None, backward: bool = False) -> None:
        inputs = corrupt(GaussianCorruption(weight, alpha_bar, factor=ready_factor), num_tokens)
        if backward:
            inputs.sum().backward()

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
            results.append(Result("noise", f"{n} tokens, {job}", ("dense", "projected"), times, noise_mib))
    return results


# What any user of a checkpoint imports of Transformers. Registering takes the Auto classes' modules, which take torch
# and Transformers' base classes: there is next to nothing left that could be imported later.
TRANSFORMERS_PARTS = """from transformers import (
    AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForImageTextToText, AutoProcessor,
    PreTrainedConfig, PreTrainedModel
)"""


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
    args = parser.parse_args()
    if unknown := set(args.benchmarks) - set(BENCHMARKS):
        parser.error(f"unknown benchmarks {sorted(unknown)}: choose from {', '.join(BENCHMARKS)}")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = [result for name in args.benchmarks for result in BENCHMARKS[name](args)]
    print(f"{'job':<62} {'baseline':>30} {'candidate':>24} {'speed-up':>9}   noise tensor, MiB")
    for result in results:
        baseline, candidate = (f"{name} {ms:.1f} ms" for name, ms in zip(result.names, result.milliseconds))
        noise = " to ".join(f"{mib:.1f}" for mib in result.noise_mib)
        print(f"{result.job:<62} {baseline:>30} {candidate:>24} {result.speedup:>8.2f}x   {noise}")
    print("Noise tensor: the bytes of one draw of the noise, computed from its shape; other temporaries come on top.")
    setting = {"threads": args.threads, "torch": torch.__version__, "machine": platform.machine()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"setting": setting, "results": [asdict(r) for r in results]}, indent=2) + "\n")
    print(f"Saved to {args.output}")


if __name__ == "__main__":
    main()
