# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""CLIP scores of captions, in the format of the package `evaluate`: plain cosines, by any CLIP of Transformers."""

from collections.abc import Callable, Iterable, Sequence

import datasets
import evaluate
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer


DESCRIPTION = """
The CLIP score: the cosine similarity, in [-1, 1], of the features that a CLIP has of a picture and of its caption. It
is the plain cosine. (CLIPScore of Hessel et al. is 2.5 times as much, and 0 where the cosine is negative.)
"""
INPUTS = """
Args:
    predictions (`list[str]`): The caption of each image. What is longer than CLIP's text is cut.
    references (`list[PIL.Image.Image]`): The images.
    model (`str`): A CLIP of Transformers with its image processor and tokenizer, by folder or model id.
    batch_size (`int`, *optional*, defaults to 64): Pairs per batch.

Returns:
    `dict`: `clip_score`, the mean over the images, and `clip_scores`, that of each image.
"""
CITATION = """
@inproceedings{radford2021clip,
  title     = {Learning Transferable Visual Models From Natural Language Supervision},
  author    = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others},
  booktitle = {ICML},
  year      = {2021}
}
"""


class ClipScore(evaluate.Metric):
    """The cosine similarity of pictures and captions by a CLIP."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Image()}),
        )

    @staticmethod
    @torch.inference_mode()
    def embed(
        model: str, images: Sequence[Image.Image], captions: Sequence[str], batch_size: int = 64
    ) -> tuple[Tensor, Tensor]:
        """The features of images and of captions, of unit length and shape `(number, projection_dim)`."""
        clip = AutoModel.from_pretrained(model).eval()
        processor, tokenizer = AutoImageProcessor.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        length = clip.config.text_config.max_position_embeddings

        def see(batch: list[Image.Image]) -> Tensor:
            pixels = processor(images=[to_rgb(image) for image in batch], return_tensors="pt")["pixel_values"]
            return clip.get_image_features(pixel_values=pixels).pooler_output

        def read(batch: list[str]) -> Tensor:
            tokens = tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
            names = ("input_ids", "attention_mask")
            return clip.get_text_features(**{name: tokens[name] for name in names}).pooler_output

        return in_batches(see, images, batch_size), in_batches(read, captions, batch_size)

    def _compute(
        self, predictions: list[str], references: list[Image.Image], model: str, batch_size: int = 64
    ) -> dict[str, float | list[float]]:
        if not predictions:
            raise ValueError("`predictions` must have at least one caption, got none.")
        images, texts = self.embed(model, references, predictions, batch_size)
        scores = (images * texts).sum(-1)
        return {"clip_score": scores.mean().item(), "clip_scores": scores.tolist()}


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright as its EXIF data say, and on white where it is transparent, as the captioners see it. The package does
    the same, which this module does not need."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def in_batches(encode: Callable[[list], Tensor], inputs: Iterable, batch_size: int) -> Tensor:
    inputs = list(inputs)
    features = [encode(inputs[start : start + batch_size]) for start in range(0, len(inputs), batch_size)]
    return torch.nn.functional.normalize(torch.cat(features), dim=-1)
