# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Writes a checkpoint as two ONNX graphs, and checks that they compute what the model does.

`encoder.onnx` computes an image's keys and values, once per image. `denoiser_step.onnx` computes logits of clean
tokens from tokens, their timesteps, standard normal noise, and these keys and values, once per step. Guidance calls it
twice, the second time with the keys and values of the null condition, in `null_condition.safetensors`. The loop around
the step, choosing tokens and drawing noise, is left to the caller.

    python scripts/export_onnx.py CHECKPOINT --output FOLDER
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim
from transformers import AutoConfig, AutoImageProcessor

from modeling_tdd import TDDForCaptioning, TDDForImageClassification
from modeling_tdd.denoiser_tdd import DenoiserCache


Model = TDDForCaptioning | TDDForImageClassification


class PrefixEncoder(nn.Module):
    """From images, or nothing for the null condition, to the prefix's keys and values: a pair for each layer."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: Tensor | None) -> tuple[Tensor, ...]:
        prefix = None if pixel_values is None else self.model.get_prefix(pixel_values)
        # What is denoised does not matter to the prefix, and leaves the graph as dead code
        token = torch.ones(1 if prefix is None else prefix.shape[0], 1, dtype=torch.long)
        outputs = self.model.denoiser(token, token, prefix=prefix, use_cache=True)
        return tuple(tensor for pair in outputs.cache.key_values for tensor in pair)


class DenoiserStep(nn.Module):
    """From tokens (rows, N), their timesteps (rows, N), with Gaussian noise also the noise (rows, N, noise_width), and
    keys and values, to logits (rows, N, K)."""

    def __init__(self, model: Model):
        super().__init__()
        self.denoiser, self.head = model.model.denoiser, model.get_output_embeddings()
        # Of weights that no longer change it is a constant of the graph
        self.noise_factor = self.denoiser(*sample_inputs(model, rows=1)[1], use_cache=True).cache.noise_factor

    def forward(self, inputs: list[Tensor], key_values: list[Tensor]) -> Tensor:
        cache = DenoiserCache(tuple(zip(key_values[0::2], key_values[1::2])), self.noise_factor)
        return self.head(self.denoiser(*inputs, cache=cache).last_hidden_state)


def load_model(checkpoint: str) -> Model:
    """The checkpoint's model, in float32. MDD's classifier, which has no denoiser, raises a `ValueError`."""
    is_captioner = AutoConfig.from_pretrained(checkpoint).vocab_size is not None
    model_class = TDDForCaptioning if is_captioner else TDDForImageClassification
    model = model_class.from_pretrained(checkpoint, dtype=torch.float32).eval()
    if model.model.denoiser is None:
        raise ValueError(f"{checkpoint} is a linear head on an encoder and has no denoising step to export.")
    return model


def sample_inputs(model: Model, rows: int) -> tuple[Tensor, list[Tensor]]:
    """Random images, and the inputs of a step: tokens, timesteps and, where it is Gaussian, noise."""
    config, generator = model.config, torch.Generator().manual_seed(rows)
    size = getattr(config.vision_config, "image_size", None)
    if size is None:  # the encoder takes any
        processor = AutoImageProcessor.from_pretrained(model.name_or_path)
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        size = size["height"], size["width"]
    height, width = (size, size) if isinstance(size, int) else size
    pixel_values = torch.randn(rows, model.model.encoder_layout.num_channels, height, width, generator=generator)
    shape = (rows, config.max_position_embeddings)
    tokens = torch.randint(config.num_categories, shape, generator=generator)
    timesteps = torch.randint(1, config.num_timesteps + 1, shape, generator=generator)
    noise = [] if config.corruption == "mask" else [torch.randn(*shape, config.noise_width, generator=generator)]
    return pixel_values, [tokens, timesteps, *noise]


@torch.no_grad()
def export_onnx(model: Model, output: Path) -> float:
    """Writes the graphs, traced with two rows, and returns the largest difference from the model for one and three. If
    it is above 1e-4, that is a `RuntimeError`, and nothing is written."""
    encoder, step = PrefixEncoder(model).eval(), DenoiserStep(model).eval()
    pixel_values, inputs = sample_inputs(model, rows=2)
    key_values = list(encoder(pixel_values))
    names = [f"{name}_{layer}" for layer in range(len(key_values) // 2) for name in ("prefix_key", "prefix_value")]
    rows = {0: Dim("rows")}
    # The null condition is one token long, a caption's condition many
    of_prefix = rows if key_values[0].shape[2] == 1 else {**rows, 2: Dim("prefix_length")}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        options = {"dynamo": True, "verbose": False, "input_names": ["pixel_values"], "output_names": names}
        torch.onnx.export(encoder, (pixel_values,), folder / "encoder.onnx", dynamic_shapes=(rows,), **options)
        options["input_names"] = ["tokens", "timesteps", "noise"][: len(inputs)] + names
        options["output_names"] = ["logits"]
        shapes = ([rows] * len(inputs), [of_prefix] * len(names))
        torch.onnx.export(step, (inputs, key_values), folder / "denoiser_step.onnx", dynamic_shapes=shapes, **options)
        null_condition = {name: tensor.contiguous() for name, tensor in zip(names, encoder(None))}
        save_file(null_condition, folder / "null_condition.safetensors")
        difference = max(compare(encoder, step, folder, *sample_inputs(model, rows)) for rows in (1, 3))
        if difference > 1e-4:
            raise RuntimeError(f"The ONNX graphs differ from the model by {difference:.1e}, more than 1e-4.")
        shutil.rmtree(output, ignore_errors=True)
        folder.rename(output)
    return difference


def compare(encoder: nn.Module, step: nn.Module, folder: Path, pixel_values: Tensor, inputs: list[Tensor]) -> float:
    """The largest difference between graphs and model: keys and values, scores with a condition and without."""
    conditional = list(encoder(pixel_values))
    unconditional = [tensor.expand(len(pixel_values), -1, -1, -1) for tensor in encoder(None)]
    expected = [*conditional, *(step(inputs, given) for given in (conditional, unconditional))]
    made = onnxruntime.InferenceSession(folder / "encoder.onnx").run(None, {"pixel_values": pixel_values.numpy()})
    session = onnxruntime.InferenceSession(folder / "denoiser_step.onnx")
    names = [argument.name for argument in session.get_inputs()]
    for given in (list(made), [tensor.numpy() for tensor in unconditional]):
        arguments = [*(tensor.numpy() for tensor in inputs), *given]
        made += session.run(None, dict(zip(names, arguments, strict=True)))
    return max(float(np.abs(array - tensor.numpy()).max()) for array, tensor in zip(made, expected, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id of a classifier or captioner")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, replaced where it exists")
    args = parser.parse_args()
    difference = export_onnx(load_model(args.checkpoint), args.output)
    print(f"wrote {args.output}: largest difference from the model {difference:.1e}")


if __name__ == "__main__":
    main()
