# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Encoders from repositories in timm's format, which have their image processor's settings in timm's `config.json`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from test_finetuning import SHORT, arguments
from test_pipeline import WORDS, make_tokenizer
from timm.models import save_for_hf
from transformers import AutoImageProcessor, AutoProcessor, CLIPImageProcessor, ViTImageProcessor, pipeline

from modeling_tdd import TDDForCaptioning, TDDForImageClassification, TDDProcessor, saveable_image_processor
from modeling_tdd.training.batches import ImageCollator
from modeling_tdd.training.trainer import TDDTrainer


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SETTINGS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}


@pytest.fixture
def make_repository(tmp_path: Path) -> Callable[..., str]:
    """A function from fields of timm's `pretrained_cfg` to the folder of a small network as timm pushes it."""

    def make(name: str = "test_resnet", **fields: Any) -> str:
        torch.manual_seed(0)
        settings = {**SETTINGS, "input_size": (3, 32, 32), **fields}
        model = timm.create_model(name, num_classes=3, pretrained_cfg_overlay=settings)
        save_for_hf(model, tmp_path / name, safe_serialization=True)
        return str(tmp_path / name)

    return make


@pytest.fixture
def image() -> Image.Image:
    """A smooth picture: a pixel is much like the next one."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(8))


@pytest.mark.parametrize(
    "fields",
    [
        {"crop_pct": 0.8, "interpolation": "bicubic"},
        {"crop_pct": 1.0, "interpolation": "bilinear"},
        {"crop_pct": 0.9, "crop_mode": "squash", "input_size": (3, 32, 48)},
    ],
)
def test_the_pixels_are_timms(make_repository: Callable[..., str], image: Image.Image, fields: Any) -> None:
    theirs = AutoImageProcessor.from_pretrained(make_repository(**fields))
    ours = saveable_image_processor(theirs)
    assert type(theirs).__name__ == "TimmWrapperImageProcessor" and type(ours) is CLIPImageProcessor
    for picture in (image, image.transpose(Image.Transpose.ROTATE_90), image.resize((32, 32))):
        expected = theirs(picture)["pixel_values"]
        pixels = ours(picture, return_tensors="pt")["pixel_values"]
        assert pixels.shape == expected.shape
        assert (pixels - expected).abs().mean() < 2 / 255 / 0.2  # the crop may lie one pixel aside
    assert saveable_image_processor(ours) is ours


def test_another_transform_is_refused(make_repository: Callable[..., str]) -> None:
    for fields in ({"crop_mode": "border"}, {"input_size": (3, 32, 48)}, {"input_size": (1, 32, 32)}):
        image_processor = AutoImageProcessor.from_pretrained(make_repository(**fields))
        with pytest.raises(ValueError, match="An image processor of timm must make RGB images"):
            saveable_image_processor(image_processor)
    other = ViTImageProcessor()
    assert saveable_image_processor(other) is other


def test_classification(make_repository: Callable[..., str], image: Image.Image, tmp_path: Path) -> None:
    repository = make_repository()
    image_processor = AutoImageProcessor.from_pretrained(repository)
    model = TDDForImageClassification.from_encoder_pretrained(repository, num_labels=2, pooling="mean", **SMALL)
    theirs = load_file(f"{repository}/model.safetensors")
    encoder = {name.removeprefix("timm_model."): tensor for name, tensor in model.model.encoder.state_dict().items()}
    assert all(tensor.equal(theirs[name]) for name, tensor in encoder.items())
    rows = [{"image": image, "label": label} for label in (0, 1, 0, 1)]
    trainer = TDDTrainer(
        model,
        arguments(tmp_path / "run", max_steps=1),
        train_dataset=rows,
        data_collator=ImageCollator(image_processor),
        processing_class=image_processor,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    expected = pipeline("image-classification", model=model.eval(), image_processor=trainer.processing_class)(image)
    assert pipeline("image-classification", model=str(tmp_path / "saved"))(image) == expected


def test_captioning(make_repository: Callable[..., str], image: Image.Image, tmp_path: Path) -> None:
    repository = make_repository("test_vit", input_size=(3, 160, 160))
    processor = TDDProcessor(AutoImageProcessor.from_pretrained(repository), make_tokenizer())
    fields = {"vocab_size": len(WORDS), "max_position_embeddings": 8, "pad_token_id": 0, "eos_token_id": 2}
    model = TDDForCaptioning.from_encoder_pretrained(repository, pooling=None, **fields, **SMALL).eval()
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    inputs = processor(images=image, return_tensors="pt")
    assert again(images=image, return_tensors="pt")["pixel_values"].equal(inputs["pixel_values"])
    caption = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0]
    for source in ({"model": str(tmp_path / "saved")}, {"model": model, "processor": processor}):
        assert pipeline("image-captioning", **source)(image) == [{"generated_text": caption}]


def test_the_script_fine_tunes_one(make_repository: Callable[..., str], tmp_path: Path, run_train: Callable) -> None:
    model = ", ".join(f"{name}: {value}" for name, value in {**SMALL, "pooling": "mean"}.items())
    run_train("finetune", "--set", f"encoder={make_repository()}", "data.path=digits", f"model={{{model}}}", *SHORT)
    folder = tmp_path / "outputs/finetune/tdd-seed0"
    image_processor = AutoImageProcessor.from_pretrained(folder)
    assert list(image_processor.image_mean) == list(SETTINGS["mean"]) and image_processor.crop_size["height"] == 32
    assert len(pipeline("image-classification", model=str(folder))(Image.new("RGB", (8, 8)), top_k=10)) == 10
