# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Corrupted images in five severities, by torchvision and Pillow; the strengths are close to CIFAR-10-C's."""

import io
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional


NUM_SEVERITIES = 5
STRENGTHS = {
    "gaussian noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation, of values in [0, 1]
    "blur": (0.4, 0.6, 0.8, 1.0, 1.3),  # standard deviation in pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor
    "jpeg": (80, 65, 58, 50, 40),  # quality
}
# Of pixels in [0, 1], of shape (channels, height, width)
TRANSFORMS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "gaussian noise": lambda pixels, sigma: functional.gaussian_noise(pixels, sigma=sigma),
    "blur": lambda pixels, sigma: functional.gaussian_blur(pixels, kernel_size=[7, 7], sigma=[sigma, sigma]),
    "contrast": functional.adjust_contrast,
}


def corrupt(image: Image.Image, name: str, severity: int, seed: int) -> Image.Image:
    r"""
    Corrupts an image.

    Args:
        image (`PIL.Image.Image`): An image in RGB.
        name (`str`): One of `STRENGTHS`.
        severity (`int`): From 1 to 5.
        seed (`int`): Seed of the noise.

    Raises:
        `ValueError`: for another name or severity.
    """
    if name not in STRENGTHS:
        raise ValueError(f"`name` must be one of {', '.join(STRENGTHS)}, got {name!r}.")
    if severity not in range(1, NUM_SEVERITIES + 1):
        raise ValueError(f"`severity` must be from 1 to {NUM_SEVERITIES}, got {severity}.")
    strength = STRENGTHS[name][severity - 1]
    if name == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=strength)
        return Image.open(file).convert("RGB")
    pixels = functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pixels = TRANSFORMS[name](pixels, strength)
    return functional.to_pil_image(functional.to_dtype(pixels.clamp(0, 1), torch.uint8, scale=True))
