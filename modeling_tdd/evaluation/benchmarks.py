# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What TDD costs beside its alternatives: jobs that are timed in turns, and what a step asks of the host."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from transformers import ViTConfig, ViTForImageClassification

from ..configuration_tdd import TDDConfig
from ..diffusion_tdd import add_noise
from ..modeling_tdd import TDDForCaptioning, TDDForImageClassification
from .baselines import AutoregressiveCaptioner, AutoregressiveConfig
from .tables import markdown_table


Job = Callable[[], Any]

# ImageNet's classes; K of BERT's vocabulary, N, d, and the image tokens of a ViT-B/32
NUM_LABELS, VOCABULARY, LENGTH, WIDTH, IMAGE_TOKENS = 1000, 30_522, 32, 768, 50
# Images of a captioner's training step
IMAGES = 64
# By how much a random captioner's logits are widened, so that its adaptive loop takes about as many steps as that of a
# trained one (2.7 to 2.9 on emoji, docs/decisions.md, 41)
SHARPNESS = 120
# Operations of PyTorch that compute nothing on a device
NO_KERNEL = {"view", "as_strided", "transpose", "expand", "empty", "empty_strided", "select", "slice", "unsqueeze"}
NO_KERNEL |= {"_unsafe_view", "detach", "empty_like", "resize_", "_reshape_alias", "narrow", "alias", "t", "to"}
NO_KERNEL |= {"as_strided_", "dropout", "resolve_conj", "resolve_neg", "result_type", "real"}
# What waits for a device: a number or a size that the host needs
HOST_READS = {"aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize"}


# ---- Timing and counting


def medians(jobs: dict[str, Job], repeats: int, device: torch.device) -> dict[str, float]:
    """The median milliseconds of each job. They run in turns, so that a busy machine slows all of them alike; on a
    CPU it is the processor's time that counts. The first turn warms up."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for name in [*jobs] * (repeats + 1):
        start = clock()
        jobs[name]()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times[name].append(1000 * (clock() - start))
    return {name: statistics.median(own[1:]) for name, own in times.items()}


def count_work(job: Job) -> dict[str, int]:
    """Kernels, host reads and copies of a call, after one that warms up. On a CPU the operations that would be kernels
    stand for them."""
    job()
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        job()
    counts = {"kernels": 0, "host_reads": 0, "copies": 0}
    for event in profiler.events():
        if event.name in HOST_READS:
            counts["host_reads"] += 1
        elif event.device_type == DeviceType.CUDA and event.name.startswith(("Memcpy", "Memset")):
            counts["copies"] += 1
        elif event.device_type == DeviceType.CUDA or (not on_gpu and is_kernel(event)):
            counts["kernels"] += 1
    return counts


def is_kernel(event: FunctionEvent) -> bool:
    """Whether an operation on a CPU computes by itself, and not by others that it calls."""
    namespace, _, name = event.name.partition("::")
    return namespace == "aten" and name not in NO_KERNEL and not any(map(is_kernel, event.cpu_children))


def count_work_of_a_step(run: Callable[[int], Any], few: int = 4, many: int = 12) -> dict[str, float]:
    """What each further step of a denoising loop takes; `run` is given the number of steps."""
    fewer, more = (count_work(partial(run, steps)) for steps in (few, many))
    return {name: (more[name] - fewer[name]) / (many - few) for name in more}


def peak_memory(run: Job) -> float:
    """MiB of PyTorch's tensors at the peak of a call, beyond those from before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in events)) / 2**20


# ---- What is compared


def classify_jobs(batch_size: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, Job]:
    """A ViT-B/16 classifier at 224 x 224, and TDD's loop around the same encoder with the paper's denoiser."""
    vit = make_vit().to(device, dtype).eval()
    tdd = make_classifier().to(device, dtype).eval()
    pixels = torch.randn(batch_size, 3, 224, 224, device=device, dtype=dtype)
    guided = {"num_inference_steps": 20, "guidance_scale": 2.0}
    jobs: dict[str, Job] = {
        "ViT alone": partial(vit, pixels),
        "TDD, 10 steps": partial(tdd, pixels, num_inference_steps=10),
        "TDD, 20 steps, guided": partial(tdd, pixels, **guided),
        # What `stability_threshold=2` takes on average with a trained classifier (docs/decisions.md, 42)
        "TDD, 3 steps, guided": partial(tdd, pixels, num_inference_steps=3, guidance_scale=2.0),
    }
    if compiled:
        fast = make_classifier().to(device, dtype).eval()
        fast.compile_denoising()
        jobs["TDD, 20 steps, guided, compiled"] = partial(fast, pixels, **guided)
    return jobs


def caption_jobs(batch_size: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, Job]:
    """Captions from ready image features: greedy decoding with its cache, and TDD's loop."""
    # Images in turn, since adaptive steps are not the same for all of them
    pool = torch.randn(8 * batch_size, IMAGE_TOKENS, WIDTH, device=device, dtype=dtype)
    batches = cycle(pool.split(batch_size))
    autoregressive = AutoregressiveCaptioner(captioner_config(AutoregressiveConfig)).to(device, dtype).eval()
    tdd = TDDForCaptioning(captioner_config()).to(device, dtype).eval()
    unsure = TDDForCaptioning(captioner_config()).to(device, dtype).eval()
    unsure.lm_head.weight.data *= SHARPNESS
    adaptive = {"confidence_threshold": 0.9}
    num_steps = unsure.generate(image_features=pool[:64], **adaptive, return_dict_in_generate=True).num_steps

    def caption(model: Any, **settings: Any) -> Tensor:
        return model.generate(image_features=next(batches), **settings)

    jobs: dict[str, Job] = {
        f"autoregressive, {LENGTH} tokens": partial(caption, autoregressive, min_new_tokens=LENGTH),
        "TDD, 10 steps": partial(caption, tdd),
        "TDD, 4 steps": partial(caption, tdd, num_inference_steps=4),
        f"TDD, adaptive ({num_steps.float().mean():.1f} steps)": partial(caption, unsure, **adaptive),
    }
    if compiled:
        fast = TDDForCaptioning(captioner_config()).to(device, dtype).eval()
        fast.compile_denoising()
        jobs["TDD, 4 steps, compiled"] = partial(caption, fast, num_inference_steps=4)
    return jobs


def train_jobs(batch_size: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, Job]:
    """A training step, in mixed precision where `dtype` says so: forward, backward and AdamW."""
    pixels = torch.randn(batch_size, 3, 224, 224, device=device)
    labels = torch.randint(NUM_LABELS, (batch_size,), device=device)
    models: dict[str, nn.Module] = {"ViT alone": make_vit()}
    models |= {f"TDD, K = {repeats}": make_classifier(timesteps_per_image=repeats) for repeats in (1, 4, 8)}
    return {name: training_step(model.to(device).train(), dtype, pixels, labels) for name, model in models.items()}


def training_step(model: nn.Module, dtype: torch.dtype, pixels: Tensor, labels: Tensor) -> Job:
    """A step of AdamW on the model's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.enable_grad(), torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(pixel_values=pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_vit() -> Any:  # Transformers' types do not know its own `num_labels`
    return ViTForImageClassification(ViTConfig(num_labels=NUM_LABELS))  # type: ignore[call-arg]


def make_classifier(**fields: Any) -> TDDForImageClassification:
    """ViT-B/16 and the paper's denoiser: 111 M parameters."""
    return TDDForImageClassification(
        TDDConfig(vision_config=ViTConfig(), num_labels=NUM_LABELS, hidden_size=WIDTH, **fields)
    )


def captioner_config(config_class: type = TDDConfig) -> Any:
    """The paper's denoiser, or a decoder of the same size, with BERT's vocabulary. The encoder is not run."""
    return config_class(
        vision_config=ViTConfig(num_hidden_layers=1),
        pooling=None,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        eos_token_id=102,
    )


def step_jobs() -> dict[str, dict[str, Job]]:
    """A captioner's training step (forward, backward, AdamW) by MDD and by TDD, on one network and from ready image
    features. One timestep per image is the hardest for TDD, as the noise's factor costs the same for any number. And
    the path of the noise, y_t W, forward and backward: with the noise of one-hot vectors, of width K (dense), and with
    noise of width d."""
    features, labels = torch.randn(IMAGES, IMAGE_TOKENS, WIDTH), torch.randint(3, VOCABULARY, (IMAGES, LENGTH))
    fields: dict[str, Any] = {"freeze_encoder": True, "pooling": None, "timesteps_per_image": 1}
    fields.update(
        pad_token_id=0, eos_token_id=2, vocab_size=VOCABULARY, hidden_size=WIDTH, max_position_embeddings=LENGTH
    )
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
        noise_embeds = embedding(noise=torch.randn(*labels.shape, width))
        add_noise(embedding(labels), noise_embeds, schedule, timesteps).sum().backward()
        embedding.zero_grad()

    return {
        "a training step": {"MDD": partial(step, "mask"), "TDD": partial(step, "gaussian")},
        "the path of the noise": {"dense": partial(noise_path, VOCABULARY), "TDD": partial(noise_path, WIDTH)},
    }


BENCHMARKS = {"classify": classify_jobs, "caption": caption_jobs, "train": train_jobs}
# Arguments of `scripts/benchmark.py` that have no effect on a benchmark
UNUSED = {
    "train": ("compile",),
    "step": ("batch_sizes", "device", "dtype", "compile", "output"),
    "growth": ("batch_sizes", "dtype", "compile", "repeats"),
}


def run_benchmark(
    name: str, batch_size: int, device: torch.device, dtype: torch.dtype, compiled: bool = False, repeats: int = 7
) -> list[dict[str, Any]]:
    r"""
    Times the jobs of a benchmark.

    Args:
        name (`str`): `"classify"`, `"caption"` or `"train"`.
        batch_size (`int`): Images of a call.
        device (`torch.device`): Where.
        dtype (`torch.dtype`): Of weights and images; in training, of autocast.
        compiled (`bool`, *optional*, defaults to `False`): Whether to time compiled steps too.
        repeats (`int`, *optional*, defaults to 7): How often.

    Returns:
        `list[dict]`: of each job its name, the batch size, milliseconds, and the throughput against the first job.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        jobs = BENCHMARKS[name](batch_size, device, dtype, compiled)
        milliseconds = medians(jobs, repeats, device)
    baseline = next(iter(milliseconds.values()))
    return [
        {"job": job, "batch_size": batch_size, "milliseconds": round(time, 2), "throughput": round(baseline / time, 3)}
        for job, time in milliseconds.items()
    ]


def format_benchmark(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: a row for each job, two columns for each batch size."""
    sizes = sorted({row["batch_size"] for row in rows})
    header = ["", *(f"{title}, batch {size}" for size in sizes for title in ("ms", "throughput"))]
    # A job's name may give its steps, which differ between batches
    table: dict[str, list[str]] = {}
    for row in rows:
        cells = table.setdefault(row["job"], ["-"] * (2 * len(sizes)))
        place = 2 * sizes.index(row["batch_size"])
        cells[place : place + 2] = [f"{row['milliseconds']:.1f}", f"{row['throughput']:.2f}"]
    return markdown_table(header, [[job, *cells] for job, cells in table.items()])
