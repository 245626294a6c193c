# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Whatever image a user brings becomes a PIL image in RGB, in one way for training, evaluation and use."""

import base64
import io
import os
from collections.abc import Sequence
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.utils import logging


logger = logging.get_logger(__name__)

KINDS = "a PIL image, a path, a URL, base64, bytes, a NumPy array or a tensor"
ROUNDING = 1e-3  # by which floats may lie outside of 0 ... 1


def to_rgb(image: Image.Image) -> Image.Image:
    """
    A PIL image of any mode in RGB: turned as its EXIF data say, and on a white background where it is transparent.
    Grey values of 16 bits, integers and floats are scaled as those of an array in [`open_image`]. Of an animation it
    is the current frame, which in a file just opened is the first. Raises a `ValueError` as [`check_size`] does.
    """
    check_size(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(_to_uint8(values))
        if transparent is not None:
            image.putalpha(Image.fromarray((values != transparent).astype(np.uint8) * 255))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_size(image: Image.Image) -> None:
    """Raises a `ValueError` for an image of more pixels than `PIL.Image.MAX_IMAGE_PIXELS`: a small file of one colour
    would take gigabytes. Pillow itself warns, and refuses twice as many."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels are more than `PIL.Image.MAX_IMAGE_PIXELS`, {limit}.")


def open_image(
    image: Any, timeout: float | None = None, input_data_format: str | None = None, index: int | None = None
) -> Image.Image:
    r"""
    Reads an image, whatever it comes in, and converts it by [`to_rgb`].

    Args:
        image:
            A PIL image, a path, a URL, base64, the bytes of a file, a cell `{"bytes": ..., "path": ...}` of a data
            set, or an array or tensor of shape `(height, width)`, `(height, width, channels)` or `(channels, height,
            width)`, with 1 to 4 channels (grey, grey and alpha, RGB, RGBA). White is 255 in `uint8`, 65535 in
            `uint16`, and 1 in booleans and in floats from 0 to 1; other numbers from 0 to 255 are taken as 8 bits, and
            integers up to 65535 as 16 bits. The smallest and largest of any others become black and white, with a
            warning.
        timeout (`float`, *optional*): Seconds to wait for a URL.
        input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, where an array could be both.
        index (`int`, *optional*): The image's number, for errors.

    Raises:
        `TypeError`: for any other object.
        `ValueError`: for an image that cannot be read, an array of another shape, or values that are not finite.
    """
    check_image(image, index)
    if isinstance(image, dict):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    try:
        if isinstance(image, (np.ndarray, Tensor)):
            return to_rgb(_from_array(image, input_data_format))
        if isinstance(image, Image.Image):
            return to_rgb(image)
        with Image.open(_find(image, timeout)) as opened:
            return to_rgb(opened)
    except Exception as error:  # Pillow's decoders raise many kinds
        number = "" if index is None else f" {index}"
        raise ValueError(f"Unreadable image{number} ({_name_of(image)}): {error}") from error


def is_image(image: Any) -> bool:
    """Whether [`open_image`] takes it."""
    if isinstance(image, dict):
        return isinstance(image.get("bytes"), bytes) or isinstance(image.get("path"), str)
    return isinstance(image, (str, os.PathLike, bytes, Image.Image, np.ndarray, Tensor))


def check_image(image: Any, index: int | None = None) -> None:
    """Raises a `TypeError` for what [`open_image`] does not take. `index` is the image's number, for the error."""
    if not is_image(image):
        given = f"a dictionary of {', '.join(map(repr, image))}" if isinstance(image, dict) else type(image).__name__
        name = "An image" if index is None else f"Image {index}"
        raise TypeError(f"{name} must be {KINDS}, got {given}.")


def list_images(images: Any) -> list[Any]:
    """One image, an array of several, or a list, also a nested one, as a flat list of what [`open_image`] takes."""
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        return [image for entry in images for image in list_images(entry)]
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return list(images)
    check_image(images)
    return [images]


def _name_of(image: Any) -> str:
    """What an error says of an image: its path or URL, or the beginning of base64."""
    name = getattr(image, "filename", "") if isinstance(image, Image.Image) else image
    name = str(name or "in memory") if isinstance(name, (str, os.PathLike)) else "in memory"
    return name if len(name) <= 200 else f"{name[:40]}..."


def _find(image: str | os.PathLike | bytes, timeout: float | None) -> str | os.PathLike | io.BytesIO:
    """What Pillow can open. (Transformers' `load_image` drops the transparency.)"""
    if isinstance(image, bytes):
        return io.BytesIO(image)
    if isinstance(image, os.PathLike) or os.path.isfile(image):
        if not os.path.isfile(image):  # a pipe would be waited for
            raise ValueError("There is no such file.")
        return image
    if image.startswith(("http://", "https://")):
        with urlopen(Request(image, headers={"User-Agent": "modeling_tdd"}), timeout=timeout) as response:
            return io.BytesIO(response.read())
    try:
        content = base64.b64decode("".join(image.split(",")[-1].split()), validate=True)
        Image.open(io.BytesIO(content)).close()
    except (ValueError, OSError) as error:
        raise ValueError("There is no such file, and it is neither a URL nor base64 of an image.") from error
    return io.BytesIO(content)


def _from_array(array: np.ndarray | Tensor, input_data_format: str | None) -> Image.Image:
    if isinstance(array, Tensor):
        array = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    channels = (1, 2, 3, 4)
    if array.ndim == 3 and (array.shape[0] in channels or array.shape[2] in channels):
        layout = ChannelDimension(input_data_format or infer_channel_dimension_format(array, channels))
        array = np.moveaxis(array, 0, -1) if layout == ChannelDimension.FIRST else array
        array = array[..., 0] if array.shape[2] == 1 else array
    elif array.ndim != 2:
        raise ValueError(
            "An array must be of shape (height, width), (height, width, channels) or (channels, height, width) with "
            f"1 to 4 channels, got {tuple(array.shape)}."
        )
    return Image.fromarray(np.ascontiguousarray(_to_uint8(array)))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """Scales values to 0 ... 255. Which one is white is said by their type or else guessed by their range."""
    kind, low, high = array.dtype.kind, 0.0, 255.0
    if array.dtype == np.uint8:
        return array
    if kind not in "biuf" or array.size == 0:
        raise ValueError(f"An array must hold numbers, got {array.dtype} of shape {tuple(array.shape)}.")
    smallest, largest = float(array.min()), float(array.max())
    if not np.isfinite([smallest, largest]).all():
        raise ValueError("The array holds values that are not finite.")
    if kind == "b" or (kind == "f" and smallest >= -ROUNDING and largest <= 1 + ROUNDING):
        high = 1.0
    elif (kind == "u" and array.dtype.itemsize == 2) or (kind in "iu" and smallest >= 0 and 255 < largest <= 65535):
        high = 65535.0
    elif smallest < 0 or not (1 < largest <= 255 or largest == 0):
        low, high = smallest, max(largest, smallest + 1e-6)
        logger.warning_once(
            "The range of an image's values is not known, since they are neither `uint8`, `uint16` nor from 0 to 1, "
            "255 or 65535: the smallest is taken as black and the largest as white. This warning is shown once."
        )
    return np.rint(((array.astype(np.float64) - low) / (high - low)).clip(0, 1) * 255).astype(np.uint8)


__all__ = ["check_size", "open_image", "to_rgb"]
