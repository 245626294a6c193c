# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Compares TDD with its alternatives, side by side in one run, on whatever device is there.

    python scripts/benchmark.py classify   # a ViT-B/16 classifier, and TDD's loop around the same encoder
    python scripts/benchmark.py caption    # an autoregressive decoder of the same size; K = 30,522, N = 32
    python scripts/benchmark.py train      # a training step of a ViT-B/16 classifier, and of TDD
    python scripts/benchmark.py step       # a captioner's training step by MDD and by TDD, and the path of the noise
    python scripts/benchmark.py growth     # captions by N, K, images and steps as a plot, and what the hardware allows

Times are medians. `--output FOLDER` also writes them as JSON and Markdown. On a CPU one thread is used: with several,
short products wait for whichever core another process holds.
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from modeling_tdd.evaluation.benchmarks import (
    BENCHMARKS,
    UNUSED,
    count_work_of_a_step,
    format_benchmark,
    make_classifier,
    medians,
    peak_memory,
    run_benchmark,
    step_jobs,
)
from modeling_tdd.evaluation.figures import save_figure
from modeling_tdd.evaluation.growth import ACCELERATORS, bounds_of_a_step, measure_growth, measure_peaks, plot_growth
from modeling_tdd.training.folders import write_json


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "step", "growth"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="default: 1 and 8, on a GPU 1, 32 and 256")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32, on a GPU bfloat16")
    parser.add_argument("--compile", action="store_true", help="also time compiled steps, which takes minutes to make")
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder for BENCHMARK.json and BENCHMARK.md")
    args = parser.parse_args()
    unused = [name for name in UNUSED.get(args.benchmark, ()) if getattr(args, name) != parser.get_default(name)]
    if unused:
        parser.error(f"{args.benchmark} does not use {', '.join(f'--{name}' for name in unused).replace('_', '-')}")
    return args


def compare_steps(repeats: int) -> None:
    """The benchmark `step`, which also measures memory, on a CPU."""
    for job, runs in step_jobs().items():
        milliseconds = medians(runs, repeats, torch.device("cpu"))
        baseline, candidate = milliseconds.values()
        mebibytes = {name: peak_memory(run) for name, run in runs.items()}
        result = {"job": job, "milliseconds": milliseconds, "ratio": candidate / baseline, "mebibytes": mebibytes}
        print(json.dumps(result, indent=2), flush=True)


def show_growth(device: torch.device, hardware: str, output: Path | None) -> None:
    """The benchmark `growth`."""
    peaks = measure_peaks(device)
    result = {"hardware": hardware, "peak_operations": peaks[0], "peak_bytes": peaks[1], "bounds_of_a_step": {}}
    for name, own in {hardware: peaks, **ACCELERATORS}.items():
        size = 4 if own is peaks else 2
        result["bounds_of_a_step"][name] = {rows: bounds_of_a_step(rows, own, size) for rows in (1, 2, 16, 64, 512)}
    result["growth"] = measure_growth(device)
    print(json.dumps(result, indent=2))
    if output is not None:
        write_json(output / "growth.json", result)
        save_figure(plot_growth(result["growth"], hardware), output / "growth")


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    if args.benchmark == "step":
        return compare_steps(args.repeats)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    hardware = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU, one thread"
    if args.benchmark == "growth":
        return show_growth(device, hardware, args.output)
    rows = []
    for batch_size in args.batch_sizes or ([1, 32, 256] if on_gpu else [1, 8]):
        rows += run_benchmark(args.benchmark, batch_size, device, dtype, args.compile, args.repeats)
        print(format_benchmark(rows), flush=True)
    result = {"hardware": hardware, "torch": torch.__version__, "dtype": str(dtype), "rows": rows}
    if args.benchmark == "classify":
        model = make_classifier().to(device, dtype).eval()
        pixels = torch.randn(1, 3, 224, 224, device=device, dtype=dtype)
        with torch.no_grad():
            run = lambda steps: model(pixels, num_inference_steps=steps, guidance_scale=2.0)  # noqa: E731
            result["work_of_a_guided_step"] = count_work_of_a_step(run)
        print(json.dumps(result["work_of_a_guided_step"]))
    if args.output is not None:
        write_json(args.output / f"{args.benchmark}.json", result)
        (args.output / f"{args.benchmark}.md").write_text(f"{hardware}, {dtype}\n\n{format_benchmark(rows)}\n")


if __name__ == "__main__":
    main()
