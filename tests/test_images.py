# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Every kind of image, through every door: the same pixels in pipelines, processor, training and cached features."""

import base64
import logging
import os
import resource
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from test_pipeline import WORDS, make_tokenizer
from torch import Tensor
from transformers import BaseImageProcessor, ImageClassificationPipeline, ViTConfig, ViTImageProcessor, pipeline

from modeling_tdd import TDDForCaptioning, TDDForImageClassification, TDDProcessor
from modeling_tdd.evaluation.scoring import predict
from modeling_tdd.images_tdd import logger, open_image, to_rgb
from modeling_tdd.training.batches import Augmentation, ImageCollator, build_train_transform, pixels_of
from modeling_tdd.training.data import read_labelled
from modeling_tdd.training.features import AugmentedViews, cache_features


SIDE = 16
RANDOM = np.random.default_rng(0)
COLORS = RANDOM.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
ALPHA = np.repeat([[0, 128, 255, 255]], SIDE, axis=0).repeat(SIDE // 4, axis=1).astype(np.uint8)
PALETTE = np.array([[200, 30, 30], [0, 0, 90], [10, 200, 40], [0, 0, 0]], np.uint8)
INDICES = RANDOM.integers(0, 4, (SIDE, SIDE), dtype=np.uint8)


def on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colors * share + 255 * (1 - share)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def paletted() -> Image.Image:
    image = Image.frombytes("P", (SIDE, SIDE), INDICES.tobytes())
    image.putpalette(PALETTE.tobytes())
    return image


def turned() -> tuple[Image.Image, dict[str, Any]]:
    """A picture that is to be turned by a quarter, clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return Image.fromarray(np.rot90(COLORS).copy()), {"exif": exif}


def grey_and_alpha(grey: np.ndarray, alpha: np.ndarray) -> Image.Image:
    image = Image.fromarray(grey)
    image.putalpha(Image.fromarray(alpha))
    return image


BLACK = Image.new("L", (SIDE, SIDE))
RGBA = Image.fromarray(np.dstack([COLORS, ALPHA]))
ANIMATION = {"save_all": True, "append_images": [Image.new("RGB", (SIDE, SIDE), "red")]}
# Name of a file: picture, arguments of `save`, and the colours that a reader must see
KINDS: dict[str, tuple[Image.Image, dict[str, Any], np.ndarray]] = {
    "rgb.png": (Image.fromarray(COLORS), {}, COLORS),
    "grey.png": (Image.fromarray(GREY), {}, three(GREY)),
    "transparent.png": (RGBA, {}, on_white(COLORS, ALPHA)),
    "transparent.webp": (RGBA, {"lossless": True}, on_white(COLORS, ALPHA)),
    "grey_and_alpha.png": (grey_and_alpha(GREY, ALPHA), {}, on_white(three(GREY), ALPHA)),
    "palette.gif": (paletted(), {}, PALETTE[INDICES]),
    "transparent_palette.png": (
        paletted(),
        {"transparency": 3},
        on_white(PALETTE[INDICES], 255 * (INDICES != 3)),
    ),
    "16_bits.png": (Image.fromarray(GREY.astype(np.uint16) * 257), {}, three(GREY)),
    "float.tiff": (Image.fromarray(GREY.astype(np.float32) / 255), {}, three(GREY)),
    "cmyk.tiff": (
        Image.merge("CMYK", [*Image.fromarray(255 - COLORS).split(), Image.new("L", (SIDE, SIDE))]),
        {},
        COLORS,
    ),
    "turned.png": (*turned(), COLORS),
    "animation.png": (Image.fromarray(COLORS), ANIMATION, COLORS),
}


@pytest.fixture
def image_processor() -> ViTImageProcessor:
    """Pixels from 0 to 1."""
    return ViTImageProcessor(size={"height": SIDE, "width": SIDE}, do_normalize=False)


@pytest.fixture
def processor(image_processor: ViTImageProcessor) -> TDDProcessor:
    return TDDProcessor(image_processor, make_tokenizer())


def seen_pixels(model: torch.nn.Module, call: Callable[[], Any]) -> Tensor:
    """The pixels that reach a model's encoder during a call."""
    seen: list[Tensor] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["pixel_values"])

    handle = model.model.encoder.register_forward_pre_hook(note, with_kwargs=True)
    call()
    handle.remove()
    return torch.cat(seen)


# ---- The matrix


DOORS = ["captioning", "image-text-to-text", "classification", "processor", "collator", "features", "views", "scoring"]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pixels_through_every_door(
    kind: str,
    door: str,
    processor: TDDProcessor,
    make_captioner: Callable[..., TDDForCaptioning],
    make_model: Callable[..., TDDForImageClassification],
    tmp_path: Path,
) -> None:
    picture, arguments, expected = KINDS[kind]
    file = str(tmp_path / kind)
    picture.save(file, **arguments)
    image_processor = processor.image_processor
    captioner = make_captioner(vocab_size=len(WORDS))
    columns = {"image": [file], "label": [0], "captions": [["a"]]}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    if door == "captioning":
        pipe = pipeline("image-captioning", model=captioner, processor=processor)
        pixels = seen_pixels(captioner, lambda: pipe(file))
    elif door == "image-text-to-text":
        pipe = pipeline("image-text-to-text", model=captioner, processor=processor)
        pixels = seen_pixels(captioner, lambda: pipe(file, text="a"))
    elif door == "classification":
        model = make_model()
        pipe = pipeline("image-classification", model=model, image_processor=image_processor)
        pixels = seen_pixels(model, lambda: pipe(file))
    elif door == "processor":
        pixels = processor(images=file, return_tensors="pt")["pixel_values"]
    elif door == "collator":
        row = data.select_columns(["image", "label"]).cast_column("image", datasets.Image(decode=False))[0]
        pixels = ImageCollator(image_processor)([read_labelled(row, codes={0: 0})[0]])["pixel_values"]
    elif door == "scoring":
        pixels = seen_pixels(captioner, lambda: predict(captioner, processor, data, batch_size=1))
    else:
        views = AugmentedViews(Augmentation(mixup_alpha=0.1), image_processor, num_views=1)
        encoding = views if door == "views" else image_processor
        pixels = seen_pixels(captioner, lambda: cache_features(captioner.model, encoding, data, tmp_path / "features"))
    assert pixels.shape == (1, 3, SIDE, SIDE)
    assert np.abs(pixels[0].permute(1, 2, 0).numpy() * 255 - expected).max() <= 1 + 1e-3


def test_other_models_keep_transformers_pipeline(image_processor: ViTImageProcessor, vision_config: ViTConfig) -> None:
    vit = transformers.ViTForImageClassification(vision_config)
    assert type(pipeline("image-classification", model=vit, image_processor=image_processor)) is (
        ImageClassificationPipeline
    )


# ---- Modes and arrays


@pytest.mark.parametrize("mode", ["1", "L", "LA", "PA", "RGBX", "RGBa", "YCbCr", "HSV", "I", "I;16B", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (4, 3))).mode == "RGB"


def test_grey_of_16_bits_may_have_a_transparent_value(tmp_path: Path) -> None:
    grey = np.array([[0, 30000], [65535, 257 * 7]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png", transparency=30000)
    assert np.asarray(open_image(tmp_path / "grey.png"))[..., 0].tolist() == [[0, 255], [255, 7]]


ARRAYS = {
    "8 bits": COLORS,
    "channels first": torch.from_numpy(COLORS).permute(2, 0, 1),
    "floats to 1": COLORS / 255,
    "half precision": torch.from_numpy(COLORS / 255).bfloat16(),
    "floats to 255": COLORS.astype(np.float32),
    "integers": torch.from_numpy(COLORS).long(),
    "16 bits": COLORS.astype(np.uint16) * 257,
    "16 bits as integers": COLORS.astype(np.int32) * 257,
    "transparent": np.dstack([COLORS, ALPHA]),
    "transparent floats": np.dstack([COLORS, ALPHA]) / 255,
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays(kind: str, processor: TDDProcessor) -> None:
    expected = on_white(COLORS, ALPHA) if "transparent" in kind else COLORS
    pixels = processor(images=ARRAYS[kind], return_tensors="pt")["pixel_values"]
    assert np.abs(pixels[0].permute(1, 2, 0).numpy() * 255 - expected).max() <= 1 + 1e-3


def test_grey_and_black_and_white_arrays() -> None:
    for array in (GREY, GREY[None], GREY[..., None], torch.from_numpy(GREY)):
        assert np.array_equal(np.asarray(open_image(array)), three(GREY))
    assert np.array_equal(np.asarray(open_image(GREY > 99)), three(np.where(GREY > 99, 255, 0)))


def test_the_channels_of_an_array_can_be_said(processor: TDDProcessor) -> None:
    array = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    last, first = (
        processor(images=array, input_data_format=layout, do_resize=False)["pixel_values"][0]
        for layout in ("channels_last", "channels_first")
    )
    assert np.allclose(last * 255, np.moveaxis(array, -1, 0))
    assert np.allclose(first * 255, array)


def test_several_images_in_an_array_or_a_nested_list(processor: TDDProcessor) -> None:
    several = np.stack([COLORS, three(GREY)])
    expected = processor(images=list(several), return_tensors="pt")["pixel_values"]
    for images in (several, torch.from_numpy(several).permute(0, 3, 1, 2), [[COLORS], [three(GREY)]]):
        assert torch.equal(processor(images=images, return_tensors="pt")["pixel_values"], expected)


def test_arrays_that_are_not_to_be_rescaled_stay_as_they_are(processor: TDDProcessor) -> None:
    array = RANDOM.random((3, SIDE, SIDE)).astype(np.float32)
    pixels = processor(images=array, do_rescale=False, do_resize=False)["pixel_values"][0]
    assert np.array_equal(pixels, array)


@pytest.mark.parametrize(
    "array",
    [COLORS / 127.5 - 1, COLORS * 1000.0, COLORS.astype(int) % 2],
    ids=["from -1 to 1", "to 255000", "0 and 1"],
)
def test_one_warning_of_an_unknown_range(
    array: np.ndarray, processor: TDDProcessor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    type(logger).warning_once.cache_clear()
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        processor(images=[COLORS, COLORS / 255, COLORS.astype(np.uint16)])
        assert not caplog.records
        pixels = processor(images=array)["pixel_values"]
        processor(images=[array * 1.5 + 0.1] * 2)
    assert len(caplog.records) == 1 and "range of an image's values is not known" in caplog.text
    assert pixels.min() == 0 and pixels.max() == 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 5, 5)), r"1 to 4 channels, got \(5, 5, 5\)"),
        (np.zeros((2, 3, 5, 5, 1)), r"1 to 4 channels, got \(2, 3, 5, 5, 1\)"),
        (np.full((5, 5), np.nan), "not finite"),
        (np.zeros((0, 5)), r"must hold numbers, got float64 of shape \(0, 5\)"),
        (np.array([["a"]]), "must hold numbers"),
    ],
    ids=["channels", "axes", "nan", "empty", "strings"],
)
def test_bad_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"Unreadable image .*{message}"):
        open_image(array)


# ---- What an image may come in


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a server of the folder."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def sources(file: Path, server: str) -> list[Any]:
    content = file.read_bytes()
    text = base64.b64encode(content).decode()
    cells = [{"bytes": content, "path": None}, {"bytes": None, "path": str(file)}]
    return [file, str(file), content, text, f"data:image/png;base64,{text}", f"{server}/{file.name}", *cells]


def test_sources(tmp_path: Path, server: str, processor: TDDProcessor) -> None:
    file = tmp_path / "transparent.png"
    RGBA.save(file)
    expected = np.asarray(to_rgb(RGBA))
    for source in sources(file, server):
        assert np.array_equal(np.asarray(open_image(source, timeout=60)), expected)
    pixels = processor(images=sources(file, server), return_tensors="pt")["pixel_values"]
    assert len(pixels) == 8 and (pixels == pixels[0]).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "no_such.png",
            r"Unreadable image \(no_such.png\): There is no such file, .* neither a URL nor base64",
        ),
        ("A" * 4000, r"Unreadable image \(A{40}\.\.\.\): There is no such file"),
        (b"no image", r"Unreadable image \(in memory\): cannot identify"),
    ],
    ids=["missing", "base64", "bytes"],
)
def test_unreadable_sources(source: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_image(source)


def test_a_url_that_is_not_found(server: str) -> None:
    with pytest.raises(ValueError, match=r"Unreadable image \(http://.*/none.png\): HTTP Error 404"):
        open_image(f"{server}/none.png", timeout=60)


@pytest.mark.parametrize(
    "image", [3, None, object(), {"a": 1, "b": 2}, {1, 2}], ids=lambda image: type(image).__name__
)
def test_what_is_no_image_is_refused_by_name(image: Any, processor: TDDProcessor) -> None:
    name = "a dictionary of 'a', 'b'" if isinstance(image, dict) else type(image).__name__
    with pytest.raises(TypeError, match=f"An image must be a PIL image, a path, .*, got {name}"):
        open_image(image)
    with pytest.raises(TypeError, match=f"got {name}"):
        processor(images=[COLORS, image])


# ---- Augmentation reads the image processor


PROCESSORS = [
    "AriaImageProcessor",
    "BeitImageProcessor",
    "BitImageProcessor",
    "BlipImageProcessor",
    "BridgeTowerImageProcessor",
    "CLIPImageProcessor",
    "ChineseCLIPImageProcessor",
    "ConvNextImageProcessor",
    "DINOv3ViTImageProcessor",
    "DPTImageProcessor",
    "DeiTImageProcessor",
    "EfficientNetImageProcessor",
    "FlavaImageProcessor",
    "LevitImageProcessor",
    "MobileNetV1ImageProcessor",
    "MobileNetV2ImageProcessor",
    "OwlViTImageProcessor",
    "PerceiverImageProcessor",
    "PoolFormerImageProcessor",
    "PvtImageProcessor",
    "SegGptImageProcessor",
    "SegformerImageProcessor",
    "SiglipImageProcessor",
    "ViTImageProcessor",
    "ViltImageProcessor",
]
REFUSED = {
    "DonutImageProcessor": "RGB images without borders",
    "GLPNImageProcessor": "Give `augmentation.size`",
    "MobileViTImageProcessor": "RGB images without borders",
    "Pix2StructImageProcessor": "RGB images without borders",
    "PixtralImageProcessor": "Give `augmentation.size`",
    "Siglip2ImageProcessor": "RGB images without borders",
    "ZoeDepthImageProcessor": "Give `augmentation.size`",
}


def check_same_range(image_processor: BaseImageProcessor) -> None:
    """A picture of two halves, without any noise of the augmentation, has the same size and colours in training and in
    evaluation. The edge between the halves depends on the interpolation."""
    picture = Image.new("RGB", (96, 96), (30, 90, 200))
    picture.paste((250, 160, 60), (48, 0, 96, 96))
    training = build_train_transform(Augmentation(mixup_alpha=0.1), image_processor)(picture)
    evaluation = pixels_of([{"image": picture}], image_processor, None)[0].float()
    assert training.shape == evaluation.shape
    scale = max(1.0, float(evaluation.abs().max()))
    width = training.shape[-1]
    for columns in (slice(0, width // 4), slice(-width // 4, None)):
        assert torch.allclose(training[..., columns], evaluation[..., columns], atol=2e-2 * scale)
    assert torch.allclose(training.mean((1, 2)), evaluation.mean((1, 2)), atol=5e-3 * scale)


@pytest.mark.parametrize("name", PROCESSORS)
def test_training_has_the_range_of_evaluation(name: str) -> None:
    check_same_range(getattr(transformers, name)())


@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_normalize": False, "do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}},
        {"size": {"shortest_edge": 20}},
    ],
    ids=str,
)
def test_training_has_the_settings_of_evaluation(settings: dict[str, Any]) -> None:
    check_same_range(transformers.CLIPImageProcessor(**{"do_center_crop": False, "size": 16, **settings}))


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_processor_that_augmentation_cannot_follow(name: str) -> None:
    image_processor = getattr(transformers, name)()
    with pytest.raises(ValueError, match=f"{REFUSED[name]}.*{name}"):
        build_train_transform(Augmentation(hflip=0.5), image_processor)
    assert callable(build_train_transform(Augmentation(), image_processor))
    if "size" in REFUSED[name]:
        transform = build_train_transform(Augmentation(size=24), image_processor)
        assert transform(Image.new("RGB", (50, 40))).shape == (3, 24, 24)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(processor: TDDProcessor, tmp_path: Path) -> None:
    """177 million pixels, of which Pillow only warns: they took 3 GB."""
    image = Image.new("1", (13_300, 13_300))
    image.save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = r"Unreadable image \d? ?\(.*\): 13300 x 13300 pixels are more than `PIL.Image.MAX_IMAGE_PIXELS`"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for source in (str(tmp_path / "bomb.png"), (tmp_path / "bomb.png").read_bytes(), image):
            with pytest.raises(ValueError, match=message):
                open_image(source, index=3)
        with pytest.raises(ValueError, match=message):
            processor(images=str(tmp_path / "bomb.png"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # KiB


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    for source in (path, str(path), {"bytes": None, "path": str(path)}):
        with pytest.raises(ValueError, match=r"Unreadable image \(.*pipe.png\): There is no such file"):
            open_image(source)
