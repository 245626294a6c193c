"""Estimate what training by a recipe costs on a machine: parameters, operations, memory per device, and time.

    python scripts/estimate.py scripts/recipes/table1/tdd_vit_b16.yaml --machine a100x8
    python scripts/estimate.py scripts/recipes/digits.yaml --measure

`--measure` times steps with one device batch on this machine. The formula of the time is printed too.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark import time_in_turns
from transformers import AutoConfig, ViTImageProcessor

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification
from modeling_tdd.training.cost import GRADIENT_BYTES, OPTIMIZER_BYTES, WEIGHT_BYTES, Model, StepCost, training_cost
from modeling_tdd.training.recipe import load_recipe


# Number and name of devices, and the peak of one in bf16
MACHINES = {"h100x8": (8, "H100 80 GB SXM", 989e12), "a100x8": (8, "A100 80 GB SXM", 312e12)}


def make_model(recipe: Any) -> Model:
    """The model that the recipe trains, on the meta device. A `ValueError` says what is missing."""
    if recipe.task == "encoder":
        raise ValueError("This is a recipe for an encoder: give one for a classifier or a captioner.")
    fields = dict(recipe.model)
    if recipe.encoder is not None:
        encoder = AutoConfig.from_pretrained(recipe.encoder)
        fields["vision_config"] = getattr(encoder, "vision_config", encoder)
    if recipe.task == "captioning":
        model_class, key, size = TDDForCaptioning, "tokenizer.vocab_size", recipe.tokenizer.get("vocab_size")
        fields.update(vocab_size=size, pad_token_id=0, eos_token_id=2)
    else:
        model_class, key, size = TDDForImageClassification, "data.num_labels", recipe.data.num_labels
        fields.update(num_labels=size)
    if size is None:
        raise ValueError(f"The recipe lacks `{key}`, which depends on the data: give `--set {key}=NUMBER`.")
    with torch.device("meta"):
        return model_class(TDDConfig(**fields))


def view_size(recipe: Any, config: TDDConfig) -> tuple[int, int]:
    """Height and width of the training views."""
    size = recipe.augmentation.size or getattr(config.vision_config, "image_size", None)
    if isinstance(size, int):
        return size, size
    processor = ViTImageProcessor(**recipe.image_processor)
    size = processor.crop_size if processor.do_center_crop else processor.size
    return size["height"], size["width"]


def measure_step(model: Model, image_size: tuple[int, int], images: int, clock: Callable[[], float]) -> float:
    """Seconds of a training step with one device batch, in float32, of a new model that is configured as `model`."""
    device, config = "cuda" if torch.cuda.is_available() else "cpu", model.config
    model = type(model)(config).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    shape = (images,) if config.vocab_size is None else (images, config.max_position_embeddings)
    batch = {"labels": torch.randint(config.num_categories, shape, device=device)}
    batch["pixel_values"] = torch.randn(images, model.model.encoder_layout.num_channels, *image_size, device=device)
    if config.freeze_encoder:  # training reads the features from disk
        batch["image_features"] = model.model.get_image_features(batch.pop("pixel_values")).pooler_output

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return time_in_turns({"step": step}, repeats=5, clock=clock)["step"]


def print_cost(cost: StepCost, images: int, devices: int, dtype: torch.dtype) -> None:
    """Parameters, operations and memory."""
    for part, count in cost.parameters.items():
        print(f"{part}: {count / 1e6:.1f} M parameters, {cost.per_image[part] / 1e9:.3f} GFLOP per image forward")
    print(f"all: {sum(cost.parameters.values()) / 1e6:.1f} M parameters, {cost.trainable / 1e6:.1f} M are trained")
    for way, memory in {"DDP": cost.memory(images), "FSDP2": cost.memory(images, devices)}.items():
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
        print(f"{way} over {devices}, {images} images each: {sum(memory.values()) / 2**30:.2f} GiB each ({parts})")
    print(f"bytes per parameter: {WEIGHT_BYTES} weight, {GRADIENT_BYTES} gradient, {OPTIMIZER_BYTES} AdamW and EMA")
    print(f"activations: what autograd keeps in {dtype}")


def print_time(recipe: Any, cost: StepCost, images: int, devices: int, rate: float) -> None:
    """The time, with its formula, where each device does `rate` operations per second."""
    batch_size, epochs = recipe.training["batch_size"], recipe.training["num_train_epochs"]
    accumulation = max(1, batch_size // (images * devices))
    seconds = accumulation * cost.operations(images) / rate
    per_image, per_batch = sum(cost.per_image.values()) / 1e9, cost.per_batch / 1e9
    print("step = accumulation x (images x GFLOP per image + GFLOP per device batch) / GFLOP/s, forward and backward")
    print(f"     = {accumulation} x ({images} x {per_image:.3f} + {per_batch:.3f}) / {rate / 1e9:.4g}")
    print(f"     = {seconds:.4g} s for {images * accumulation * devices} images")
    if recipe.data.num_examples is not None:
        steps = int(epochs * (recipe.data.num_examples // batch_size))
        print(f"training = {epochs} epochs = {steps} steps = {steps * seconds / 3600:.2f} hours, without evaluations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file, such as scripts/recipes/table1/tdd_vit_b16.yaml")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--machine", choices=list(MACHINES), default="a100x8", help="default: the paper's, a100x8")
    how.add_argument("--measure", action="store_true", help="time steps on one device of this machine, in float32")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="such as training.batch_size=512")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.set)
    model = make_model(recipe)
    size = view_size(recipe, model.config)
    devices, name, peak = MACHINES[args.machine]
    devices, dtype = (1, torch.float32) if args.measure else (devices, torch.bfloat16)
    images = recipe.training.get("device_batch_size") or max(1, recipe.training["batch_size"] // devices)
    cost = training_cost(model, size, dtype)
    print_cost(cost, images, devices, dtype)
    if args.measure:
        torch.set_num_threads(recipe.training.get("cpu_threads") or torch.get_num_threads())
        rate = cost.operations(images) / measure_step(model, size, images, time.perf_counter)
        print("this machine: measured now, in float32")
    else:
        rate = peak / 3
        print(f"{devices} x {name}: {rate / 1e12:.0f} TFLOP/s each, a third of the peak (assumed, not measured).")
        print("Communication, waiting for data and updates of the weights are assumed to take no time.")
    print_time(recipe, cost, images, devices, rate)


if __name__ == "__main__":
    main()
