# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Writes a checkpoint as two ONNX graphs, and checks that they compute what the model does.

`encoder.onnx` computes an image's keys and values, once per image. `denoiser_step.onnx` computes logits of clean
tokens from tokens, their timesteps, standard normal noise, and these keys and values, once per step. Guidance calls it
twice, the second time with the keys and values of the null condition, in `null_condition.safetensors`. The loop around
the step, choosing tokens and drawing noise, is left to the caller.

    python scripts/export_onnx.py CHECKPOINT --output FOLDER
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor

from modeling_tdd import TDDForCaptioning, TDDForImageClassification, TDDPreTrainedModel
from modeling_tdd.denoiser_tdd import DenoiserCache


class PrefixEncoder(nn.Module):
    """From images, or nothing for the null condition, to the prefix's keys and values: a pair for each layer."""

    def __init__(self, model: TDDPreTrainedModel):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: Tensor | None) -> tuple[Tensor, ...]:
        prefix = None if pixel_values is None else self.model.get_prefix(pixel_values)
        # Without tokens the denoiser encodes the prefix. The loop's timesteps do not matter to it: dead code
        cache = self.model.denoiser(timesteps=torch.ones(1, dtype=torch.long), prefix=prefix).cache
        return tuple(tensor for pair in cache.key_values for tensor in pair)


class DenoiserStep(nn.Module):
    """From tokens (rows, N), their timesteps (rows, N), with Gaussian noise also the noise (rows, N, noise_width), and
    keys and values, to logits (rows, N, K)."""

    def __init__(self, model: TDDPreTrainedModel):
        super().__init__()
        self.denoiser, self.head = model.model.denoiser, model.get_output_embeddings()
        # What projects the noise is a constant, since the weights no longer change
        noise = None if model.config.corruption != "gaussian" else torch.eye(model.config.noise_width)
        self.noise_factor = None if noise is None else self.denoiser.token_embedding(noise=noise)

    def forward(self, inputs: list[Tensor], key_values: list[Tensor]) -> Tensor:
        tokens, timesteps, *noise = inputs
        noise_embeds = noise[0] @ self.noise_factor if noise else None
        cache = DenoiserCache(tuple(zip(key_values[0::2], key_values[1::2])))
        return self.head(self.denoiser(tokens, timesteps, noise_embeds=noise_embeds, cache=cache).last_hidden_state)


def load_model(checkpoint: str) -> TDDPreTrainedModel:
    """The checkpoint's model, in float32. MDD's classifier, which has no denoiser, raises a `ValueError`."""
    is_captioner = AutoConfig.from_pretrained(checkpoint).vocab_size is not None
    model_class = TDDForCaptioning if is_captioner else TDDForImageClassification
    model = model_class.from_pretrained(checkpoint, dtype=torch.float32).eval()
    if model.model.denoiser is None:
        raise ValueError(f"{checkpoint} is a linear head on an encoder and has no denoising step to export.")
    return model


def sample_inputs(model: TDDPreTrainedModel, image_shape: tuple[int, ...], rows: int) -> tuple[Tensor, list[Tensor]]:
    """Random images, and the inputs of a step: tokens, timesteps and, where it is Gaussian, noise."""
    config, generator = model.config, torch.Generator().manual_seed(rows)
    pixel_values = torch.randn(rows, *image_shape, generator=generator)
    shape = (rows, config.max_position_embeddings)
    tokens = torch.randint(config.num_categories, shape, generator=generator)
    timesteps = torch.randint(1, config.num_timesteps + 1, shape, generator=generator)
    noise = [] if config.corruption != "gaussian" else [torch.randn(*shape, config.noise_width, generator=generator)]
    return pixel_values, [tokens, timesteps, *noise]


@torch.no_grad()
def export_onnx(model: TDDPreTrainedModel, image_shape: tuple[int, ...], output: Path) -> None:
    """Writes the graphs, traced with two rows. If they differ from the model by more than 1e-4 for one row or three,
    that is an `AssertionError`, and nothing is written."""
    encoder, step = PrefixEncoder(model).eval(), DenoiserStep(model).eval()
    pixel_values, inputs = sample_inputs(model, image_shape, rows=2)
    key_values, null_condition = list(encoder(pixel_values)), encoder(None)
    names = [f"{name}_{layer}" for layer in range(len(key_values) // 2) for name in ("prefix_key", "prefix_value")]
    rows, prefix = {0: "rows"}, {0: "rows", 2: "prefix_length"}  # many tokens, or one of the null condition
    options = {"dynamo": True, "verbose": False, "input_names": ["pixel_values"], "output_names": names}
    encoder_graph = torch.onnx.export(encoder, (pixel_values,), dynamic_shapes=(rows,), **options)
    options["input_names"] = ["tokens", "timesteps", "noise"][: len(inputs)] + names
    options["output_names"] = ["logits"]
    shapes = ([rows] * len(inputs), [prefix] * len(names))
    step_graph = torch.onnx.export(step, (inputs, key_values), dynamic_shapes=shapes, **options)
    assert_close = partial(torch.testing.assert_close, atol=1e-4, rtol=0)
    for images in (1, 3):
        pixel_values, inputs = sample_inputs(model, image_shape, images)
        made, expected = encoder_graph(pixel_values), encoder(pixel_values)
        assert_close(made, expected)
        assert_close(step_graph(inputs, list(made))[0], step(inputs, expected))
        of_nothing = [tensor.expand(images, -1, -1, -1) for tensor in null_condition]
        assert_close(step_graph(inputs, of_nothing)[0], step(inputs, of_nothing))
    output.mkdir(parents=True, exist_ok=True)
    encoder_graph.save(output / "encoder.onnx")
    step_graph.save(output / "denoiser_step.onnx")
    save_file(dict(zip(names, null_condition)), output / "null_condition.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id of a classifier or captioner")
    parser.add_argument("--output", type=Path, required=True, help="folder for the three files")
    args = parser.parse_args()
    image_processor = AutoImageProcessor.from_pretrained(args.checkpoint)
    image = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"][0]
    export_onnx(load_model(args.checkpoint), image.shape, args.output)
    print(f"{args.output}: both graphs agree with the model to 1e-4")


if __name__ == "__main__":
    main()
