# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Checks of `gpu_check.sh`, which calls it: a GPU against the CPU, and what a denoising loop asks of the host."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import load_dataset
from torch import Tensor

from modeling_tdd import to_rgb
from modeling_tdd.evaluation.benchmarks import count_work_of_a_step
from modeling_tdd.evaluation.scoring import Model, load_checkpoint
from modeling_tdd.sampling_tdd import DenoisingStep, denoise
from modeling_tdd.training.data import load_digits_dataset
from modeling_tdd.training.folders import write_json


EMOJI = "scripts/data/emoji_mini/validation.parquet"
MODES = {"plain": {}, "guided": {"guidance_scale": 1.5}, "adaptive": {"confidence_threshold": 0.95}}
LARGEST_DIFFERENCE = 1e-4  # of a logit in float32
SMALLEST_SHARE = 0.9  # of equal captions or labels in bf16

Result = dict[str, Any]  # with `passed`
Checks = Iterator[tuple[str, Callable[[], Result]]]


def load(name: str, num_images: int) -> tuple[Model, Tensor]:
    """A shipped checkpoint, and the pixels of images like those that it was trained on."""
    model, processor = load_checkpoint(f"checkpoints/{name}")
    is_captioner = model.can_generate()
    data = load_dataset("parquet", data_files=EMOJI)["train"] if is_captioner else load_digits_dataset()["validation"]
    images = [to_rgb(image) for image in data[:num_images]["image"]]
    return model, processor(images=images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def predict(model: Model, pixels: Tensor, batch_size: int = 32, **settings: Any) -> Tensor:
    """Captions' tokens or labels' logits, on the CPU; the noise comes from a generator on the CPU."""
    call = model.generate if model.can_generate() else lambda *args, **kwargs: model(*args, **kwargs).logits
    batches = pixels.to(model.device, model.dtype).split(batch_size)
    results = [call(batch, generator=torch.Generator().manual_seed(3), **settings) for batch in batches]
    return torch.cat([result.cpu() for result in results])


def compare(model: Model, pixels: Tensor, batch_size: int, settings: dict[str, Any], on_cpu: Tensor) -> Result:
    """A model's predictions against those of the CPU in float32."""
    predicted, on_cpu, difference = predict(model, pixels, batch_size, **settings), on_cpu[: len(pixels)], 0.0
    if on_cpu.is_floating_point():
        difference = (predicted - on_cpu).abs().max().item()
        predicted, on_cpu = predicted.argmax(-1, keepdim=True), on_cpu.argmax(-1, keepdim=True)
    share = (predicted == on_cpu).all(1).float().mean().item()
    is_exact = share == 1 and difference <= LARGEST_DIFFERENCE
    passed = is_exact if model.dtype == torch.float32 else share >= SMALLEST_SHARE
    return {"passed": passed, "equal": share, "largest_difference": difference, "images": len(pixels)}


def check_checkpoint(name: str, device: torch.device, compiler: dict[str, Any], num_images: int) -> Checks:
    """Each mode, in batches of 32 and of one; compiled comes last, since it takes the longest."""
    model, pixels = load(name, num_images)
    on_cpu = {mode: predict(model, pixels, **settings) for mode, settings in MODES.items()}
    half, model = load(name, 1)[0].to(device, torch.bfloat16), model.to(device)
    for title, own, alone in (("float32", model, MODES), ("bf16", half, {}), ("compiled", model, {"plain": {}})):
        if title == "compiled":
            model.compile_denoising(**compiler)
        for mode, settings in MODES.items():
            yield f"{title}, {mode}, batch 32", partial(compare, own, pixels, 32, settings, on_cpu[mode])
        for mode, settings in alone.items():
            yield f"{title}, {mode}, batch 1", partial(compare, own, pixels[:8], 1, settings, on_cpu[mode])


@contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """Within it, a denoising loop that waits for the GPU between its first and its last step raises an error."""

    def watched(*args: Any, **kwargs: Any) -> Iterator[DenoisingStep]:
        steps = denoise(*args, **kwargs)
        yield next(steps)
        set_mode = torch.cuda.set_sync_debug_mode if device.type == "cuda" else lambda mode: None
        set_mode("error")
        try:
            yield from steps
        finally:
            set_mode("default")

    with patch("modeling_tdd.modeling_tdd.denoise", watched), patch("modeling_tdd.generation_tdd.denoise", watched):
        yield


def check_loop(run: Callable[..., Tensor], device: torch.device) -> Result:
    """Kernels, copies and host reads of a step. A captioner on a CPU reads how many tokens are open, to save work."""
    work = count_work_of_a_step(lambda steps: run(num_inference_steps=steps))
    print(work, flush=True)  # whatever comes
    with no_synchronisation(device):  # by now a compiled step has recorded its CUDA graph
        run()
    return {"passed": device.type == "cpu" or work["host_reads"] == 0, **work}


def check_loops(device: torch.device, compiler: dict[str, Any], num_images: int) -> Checks:
    for name in ("digits", "emoji-captions"):
        model, pixels = load(name, min(num_images, 32))  # one batch
        run = partial(predict, model.to(device), pixels)
        yield f"{name}, eager", partial(check_loop, run, device)
        model.compile_denoising(**compiler)
        yield f"{name}, compiled", partial(check_loop, run, device)


def main() -> None:
    parser = argparse.ArgumentParser(description="The checks of gpu_check.sh that are not a program of their own.")
    parser.add_argument("part", choices=["captions", "labels", "loops"])
    parser.add_argument("--output", type=Path, required=True, help="a JSON file, written anew after each check")
    parser.add_argument("--small", action="store_true", help="on the CPU: few images, no compiler")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # convolutions would be less exact than the CPU's
    size: tuple[Any, ...] = (torch.device("cuda"), {}, 128)
    if args.small:
        size = (torch.device("cpu"), {"backend": "eager", "mode": "default"}, 4)
    checks = {
        "captions": partial(check_checkpoint, "emoji-captions", *size),
        "labels": partial(check_checkpoint, "digits", *size),
        "loops": partial(check_loops, *size),
    }[args.part]
    results: dict[str, Result] = {}
    for name, check in checks():
        try:
            results[name] = check()
        except Exception as error:  # the other checks go on
            results[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"[:1000]}
        print(name, results[name], flush=True)
        write_json(args.output, results)
    raise SystemExit(not all(result["passed"] for result in results.values()))


if __name__ == "__main__":
    main()
