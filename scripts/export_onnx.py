# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Writes a checkpoint as two ONNX graphs, and checks that they compute what the model does.

`encoder.onnx` computes an image's keys and values, once per image. `denoiser_step.onnx` computes logits of clean
tokens from tokens, their timesteps, standard normal noise, and these keys and values, once per step. Guidance calls it
twice, the second time with the keys and values of the null condition, which `null_condition.safetensors` holds. The
loop around the step, choosing tokens and drawing noise, is left to the caller.

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


TOLERANCE = 1e-4

Model = TDDForCaptioning | TDDForImageClassification


def denoiser_inputs(model: Model, rows: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
    """Random tokens, timesteps and, for Gaussian noise, the noise of a step."""
    config = model.config
    shape = (rows, config.max_position_embeddings)
    tokens = torch.randint(config.num_categories, shape, generator=generator)
    timesteps = torch.randint(1, config.num_timesteps + 1, shape, generator=generator)
    if config.corruption == "mask":
        return tokens, timesteps
    return tokens, timesteps, torch.randn(*shape, config.noise_width, generator=generator)


def projection_of_noise(model: Model) -> Tensor | None:
    """The factor of the noise: of weights that no longer change it is a constant of the graphs."""
    inputs = denoiser_inputs(model, rows=1)
    return model.model.denoiser(*inputs, use_cache=True).cache.noise_factor


class PrefixEncoder(nn.Module):
    """From images to the keys and values of their prefix: key and value of the first layer, of the second, ..."""

    def __init__(self, model: Model):
        super().__init__()
        self.model, self.config = model.model, model.config
        self.cache = DenoiserCache(None, projection_of_noise(model))
        self.step = denoiser_inputs(model, rows=1)

    def forward(self, pixel_values: Tensor | None) -> tuple[Tensor, ...]:
        """Without images, of the null condition."""
        prefix = None if pixel_values is None else self.model.get_prefix(pixel_values)
        rows = 1 if prefix is None else prefix.shape[0]
        # What is denoised does not matter to the prefix, and leaves the graph as dead code
        step = (tensor.expand(rows, *tensor.shape[1:]) for tensor in self.step)
        outputs = self.model.denoiser(*step, prefix=prefix, cache=self.cache, use_cache=True)
        return tuple(tensor for pair in outputs.cache.key_values for tensor in pair)


class DenoiserStep(nn.Module):
    """From tokens (rows, N), their timesteps (rows, N), with Gaussian noise also the noise (rows, N, noise_width), and
    keys and values, to logits (rows, N, K)."""

    def __init__(self, model: Model):
        super().__init__()
        self.denoiser, self.head = model.model.denoiser, model.get_output_embeddings()
        self.noise_factor = projection_of_noise(model)

    def forward(self, inputs: list[Tensor], key_values: list[Tensor]) -> Tensor:
        pairs = tuple(zip(key_values[0::2], key_values[1::2]))
        return self.head(self.denoiser(*inputs, cache=DenoiserCache(pairs, self.noise_factor)).last_hidden_state)


def load_model(checkpoint: str) -> Model:
    """The checkpoint's model, in float32.

    Raises:
        `ValueError`: for MDD's classifier, which has no denoiser.
    """
    is_captioner = AutoConfig.from_pretrained(checkpoint).vocab_size is not None
    model_class = TDDForCaptioning if is_captioner else TDDForImageClassification
    model = model_class.from_pretrained(checkpoint, dtype=torch.float32).eval()
    if model.model.denoiser is None:
        raise ValueError(f"{checkpoint} is a linear head on an encoder and has no denoising step to export.")
    return model


def image_size(model: Model) -> tuple[int, int]:
    """Height and width of the encoder's images, or of its image processor's where the encoder takes any."""
    size = getattr(model.config.vision_config, "image_size", None)
    if size is None:
        processor = AutoImageProcessor.from_pretrained(model.name_or_path)
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else tuple(size)


def sample_inputs(model: Model, rows: int) -> tuple[Tensor, list[Tensor]]:
    """Random images, and the inputs of a step."""
    height, width = image_size(model)
    generator = torch.Generator().manual_seed(rows)
    channels = getattr(model.config.vision_config, "num_channels", 3)
    pixel_values = torch.randn(rows, channels, height, width, generator=generator)
    return pixel_values, list(denoiser_inputs(model, rows, generator))


@torch.no_grad()
def export_onnx(model: Model, output: Path) -> float:
    """Writes the graphs and returns the largest difference from the model, over batches of another size than the one
    that was traced.

    Raises:
        `RuntimeError`: if a graph differs by more than 1e-4; nothing is written then.
    """
    encoder, step = PrefixEncoder(model).eval(), DenoiserStep(model).eval()
    pixel_values, inputs = sample_inputs(model, rows=2)
    input_names = ["tokens", "timesteps", "noise"][: len(inputs)]
    key_values = list(encoder(pixel_values))
    names = [f"{name}_{layer}" for layer in range(len(key_values) // 2) for name in ("prefix_key", "prefix_value")]
    rows = {0: Dim("rows")}
    # The null condition is one token long, a caption's condition many
    of_prefix = rows if key_values[0].shape[2] == 1 else {**rows, 2: Dim("prefix_length")}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        torch.onnx.export(
            encoder,
            (pixel_values,),
            folder / "encoder.onnx",
            input_names=["pixel_values"],
            output_names=names,
            dynamic_shapes=(rows,),
            dynamo=True,
            verbose=False,
        )
        torch.onnx.export(
            step,
            (inputs, key_values),
            folder / "denoiser_step.onnx",
            input_names=[*input_names, *names],
            output_names=["logits"],
            dynamic_shapes=([rows] * len(inputs), [of_prefix] * len(names)),
            dynamo=True,
            verbose=False,
        )
        save_file(
            {name: tensor.contiguous() for name, tensor in zip(names, encoder(None))},
            folder / "null_condition.safetensors",
        )
        difference = max(compare(model, folder, names, rows=rows) for rows in (1, 3))
        if difference > TOLERANCE:
            raise RuntimeError(f"The ONNX graphs differ from the model by {difference:.1e}, more than {TOLERANCE}.")
        shutil.rmtree(output, ignore_errors=True)
        folder.rename(output)
    return difference


def compare(model: Model, folder: Path, names: list[str], rows: int) -> float:
    """The largest difference between graphs and model: keys and values, scores with a condition and without."""
    pixel_values, inputs = sample_inputs(model, rows)
    step, encoder = DenoiserStep(model), PrefixEncoder(model)
    conditional = list(encoder(pixel_values))
    unconditional = [tensor.expand(rows, -1, -1, -1) for tensor in encoder(None)]
    expected = [*conditional, *(step(inputs, given) for given in (conditional, unconditional))]

    made = onnxruntime.InferenceSession(folder / "encoder.onnx").run(names, {"pixel_values": pixel_values.numpy()})
    session = onnxruntime.InferenceSession(folder / "denoiser_step.onnx")
    arrays = dict(zip(["tokens", "timesteps", "noise"], (tensor.numpy() for tensor in inputs)))
    for given in (list(made), [tensor.numpy() for tensor in unconditional]):
        made += session.run(["logits"], {**arrays, **dict(zip(names, given))})
    return max(float(np.abs(array - tensor.numpy()).max()) for array, tensor in zip(made, expected, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id of a classifier or captioner")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, replaced where it exists")
    arguments = parser.parse_args()
    difference = export_onnx(load_model(arguments.checkpoint), arguments.output)
    print(f"wrote {arguments.output}: largest difference from the model {difference:.1e}")


if __name__ == "__main__":
    main()
