# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Writes a checkpoint as two ONNX graphs, and checks that they compute what the model does.

`encoder.onnx` makes an image's keys and values, once an image. `denoiser_step.onnx` makes scores of clean tokens from
noisy embeddings, timesteps and these keys and values, once a step. Guidance calls it twice, the second time with the
keys and values of the null condition, which `null_condition.safetensors` holds. The loop around the step, drawing
noise and re-noising, is left to the caller.

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


TOLERANCE = 1e-4


class PrefixEncoder(nn.Module):
    """From images to the keys and values of their prefix: key and value of the first layer, of the second, ..."""

    def __init__(self, model: TDDForCaptioning | TDDForImageClassification):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        key_values = self.model.denoiser.encode_prefix(self.model.get_prefix(pixel_values))
        return tuple(tensor for pair in key_values for tensor in pair)


class DenoiserStep(nn.Module):
    """From noisy embeddings of shape (rows, N, d), timesteps (rows, N) and keys and values to scores (rows, N, K)."""

    def __init__(self, model: TDDForCaptioning | TDDForImageClassification):
        super().__init__()
        self.denoiser = model.model.denoiser
        self.head = model.get_output_embeddings()

    def forward(self, inputs_embeds: Tensor, timesteps: Tensor, key_values: list[Tensor]) -> Tensor:
        pairs = tuple(zip(key_values[0::2], key_values[1::2]))
        return self.head(self.denoiser(inputs_embeds, timesteps, pairs).last_hidden_state)


def load_model(checkpoint: str) -> TDDForCaptioning | TDDForImageClassification:
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


def image_size(model: TDDForCaptioning | TDDForImageClassification) -> tuple[int, int]:
    """Height and width of the encoder's images, or of its image processor's where the encoder takes any."""
    size = getattr(model.config.vision_config, "image_size", None)
    if size is None:
        processor = AutoImageProcessor.from_pretrained(model.name_or_path)
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else tuple(size)


def sample_inputs(model: TDDForCaptioning | TDDForImageClassification, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random images, noisy embeddings and timesteps."""
    config, vision = model.config, model.config.vision_config
    height, width = image_size(model)
    generator = torch.Generator().manual_seed(rows)
    places = config.max_position_embeddings
    return (
        torch.randn(rows, getattr(vision, "num_channels", 3), height, width, generator=generator),
        torch.randn(rows, places, config.hidden_size, generator=generator),
        torch.randint(1, config.num_timesteps + 1, (rows, places), generator=generator),
    )


@torch.no_grad()
def export_onnx(model: TDDForCaptioning | TDDForImageClassification, output: Path) -> float:
    """Writes the graphs and returns the largest difference from the model, over batches of another size than the one
    that was traced.

    Raises:
        `RuntimeError`: if a graph differs by more than 1e-4; nothing is written then.
    """
    encoder, step = PrefixEncoder(model).eval(), DenoiserStep(model).eval()
    pixel_values, inputs_embeds, timesteps = sample_inputs(model, rows=2)
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
            (inputs_embeds, timesteps, key_values),
            folder / "denoiser_step.onnx",
            input_names=["inputs_embeds", "timesteps", *names],
            output_names=["logits"],
            dynamic_shapes=(rows, rows, [of_prefix] * len(names)),
            dynamo=True,
            verbose=False,
        )
        denoiser = model.model.denoiser
        null_condition = [tensor for pair in denoiser.encode_prefix(denoiser.null_prefix) for tensor in pair]
        save_file(
            {name: tensor.contiguous() for name, tensor in zip(names, null_condition)},
            folder / "null_condition.safetensors",
        )
        difference = max(compare(model, folder, names, rows=rows) for rows in (1, 3))
        if difference > TOLERANCE:
            raise RuntimeError(f"The ONNX graphs differ from the model by {difference:.1e}, more than {TOLERANCE}.")
        shutil.rmtree(output, ignore_errors=True)
        folder.rename(output)
    return difference


def compare(model: TDDForCaptioning | TDDForImageClassification, folder: Path, names: list[str], rows: int) -> float:
    """The largest difference between graphs and model: keys and values, scores with a condition and without."""
    pixel_values, inputs_embeds, timesteps = sample_inputs(model, rows)
    step, denoiser = DenoiserStep(model), model.model.denoiser
    conditional = list(PrefixEncoder(model)(pixel_values))
    null_prefix = denoiser.null_prefix.expand(rows, -1, -1)
    unconditional = [tensor for pair in denoiser.encode_prefix(null_prefix) for tensor in pair]
    expected = [*conditional, *(step(inputs_embeds, timesteps, given) for given in (conditional, unconditional))]

    made = onnxruntime.InferenceSession(folder / "encoder.onnx").run(names, {"pixel_values": pixel_values.numpy()})
    session = onnxruntime.InferenceSession(folder / "denoiser_step.onnx")
    inputs = {"inputs_embeds": inputs_embeds.numpy(), "timesteps": timesteps.numpy()}
    for given in (list(made), [tensor.numpy() for tensor in unconditional]):
        made += session.run(["logits"], {**inputs, **dict(zip(names, given))})
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
