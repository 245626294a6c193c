# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""How the time of captions grows with N, K, images and steps, and what the hardware allows at best."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import ViTConfig

from ..configuration_tdd import TDDConfig
from ..modeling_tdd import TDDForCaptioning
from .benchmarks import IMAGE_TOKENS, WIDTH, medians


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One of these grows while the others stay
BASE = {"num_tokens": 16, "vocabulary": 8192, "batch_size": 2, "num_inference_steps": 4}
GROWTH = {
    "num_tokens": [4, 8, 16, 32, 64],
    "vocabulary": [2048, 8192, 16_384, 32_768, 65_536],
    "batch_size": [1, 2, 4, 8],
    "num_inference_steps": [1, 2, 4, 8, 16],
}
LABELS = {
    "num_tokens": "N, tokens of a caption",
    "vocabulary": "K, tokens of the vocabulary",
    "batch_size": "images",
    "num_inference_steps": "denoising steps",
}
# Vendors' figures: operations a second in bfloat16 without sparsity, and bytes a second
ACCELERATORS = {"H100 SXM": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}


def measure_growth(device: torch.device, repeats: int = 5) -> dict[str, list[dict[str, float]]]:
    """Milliseconds of `generate` from ready features with the paper's denoiser, for each of [`GROWTH`]'s axes."""
    return {
        axis: [
            {axis: value, "milliseconds": _time_captions(device, repeats, **BASE | {axis: value})} for value in grown
        ]
        for axis, grown in GROWTH.items()
    }


@torch.no_grad()
def _time_captions(
    device: torch.device, repeats: int, num_tokens: int, vocabulary: int, batch_size: int, num_inference_steps: int
) -> float:
    config = TDDConfig(
        vision_config=ViTConfig(num_hidden_layers=1),
        pooling=None,
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        max_position_embeddings=num_tokens,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = TDDForCaptioning(config).to(device).eval()
    features = torch.randn(batch_size, IMAGE_TOKENS, WIDTH, device=device)
    job = partial(model.generate, image_features=features, num_inference_steps=num_inference_steps)
    return medians({"captions": job}, repeats, device)["captions"]


def plot_growth(growth: dict[str, list[dict[str, float]]], hardware: str) -> "Figure":
    """A panel for each axis, with the share that does not grow as a dashed line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(10, 2.8), layout="constrained")
    panels = figure.subplots(1, len(growth), sharey=True)
    for panel, (axis, points) in zip(panels, growth.items()):
        values, times = [point[axis] for point in points], [point["milliseconds"] for point in points]
        panel.plot(values, times, marker="o", color="#0072B2")
        slope = (times[-1] - times[0]) / (values[-1] - values[0])
        panel.axhline(times[0] - slope * values[0], color="#D55E00", linestyle="--", linewidth=1)
        panel.set_xlabel(LABELS[axis])
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("ms of a call")
    figure.suptitle(
        f"{hardware}: N = {BASE['num_tokens']}, K = {BASE['vocabulary']:,}, {BASE['batch_size']} images, "
        f"{BASE['num_inference_steps']} steps, where not said otherwise (dashed: what does not grow)",
        fontsize=9,
    )
    return figure


def measure_peaks(device: torch.device) -> tuple[float, float]:
    """Operations a second of a large product, and bytes a second of reading a large matrix once, in float32."""
    left, right = torch.randn(2048, 2048, device=device), torch.randn(2048, 2048, device=device)
    matrix, vector = torch.randn(16_384, 8192, device=device), torch.randn(8192, device=device)
    times = medians({"product": lambda: left @ right, "reading": lambda: matrix @ vector}, 5, device)
    return 2 * 2048**3 / times["product"] * 1000, matrix.nbytes / times["reading"] * 1000


def bounds_of_a_step(rows: int, peaks: tuple[float, float], bytes_per_number: int, head: int = 1000) -> dict[str, Any]:
    """What a denoiser step with `rows` noisy tokens takes at best: its products' operations at full speed, or the
    reading of its weights, whichever is longer."""
    weights = 3 * 12 * WIDTH**2 + head * WIDTH
    compute, memory = 2 * rows * weights / peaks[0], bytes_per_number * weights / peaks[1]
    return {"milliseconds": 1000 * max(compute, memory), "bound": "compute" if compute > memory else "memory"}
