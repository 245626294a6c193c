"""Estimate what training by a recipe costs on a machine: parameters, operations, memory per device, and time.

    python scripts/estimate.py scripts/recipes/table1/tdd_vit_b16.yaml --machine a100x8
    python scripts/estimate.py scripts/recipes/digits.yaml --measure

The formula of the time is printed too. `--measure` times a few steps on this machine, smaller than those of the
recipe, and predicts from them.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, ViTImageProcessor

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification
from modeling_tdd.training.cost import (
    EMA_BYTES,
    EMA_TRAFFIC,
    GRADIENT_BYTES,
    MACHINES,
    OPTIMIZER_BYTES,
    UPDATE_TRAFFIC,
    WEIGHT_BYTES,
    Machine,
    Model,
    StepCost,
    measure_machine,
    training_cost,
)
from modeling_tdd.training.recipe import CaptionRecipe, EncoderRecipe, Recipe, load_recipe
from modeling_tdd.training.results import markdown_table


def make_config(recipe: Recipe, num_categories: int | None) -> TDDConfig:
    """The configuration of the training. `num_categories`, if given, replaces the number of labels or tokens."""
    if isinstance(recipe, EncoderRecipe):
        raise ValueError("This is a recipe for an encoder: give one for a classifier or a captioner.")
    if isinstance(recipe, CaptionRecipe):
        vocab_size = num_categories or recipe.tokenizer.get("vocab_size")
        if vocab_size is None:
            raise ValueError("The size of the recipe's tokenizer depends on the data: give `--categories`.")
        fields = {"vocab_size": vocab_size, "pad_token_id": 0, "eos_token_id": 2}
        if recipe.encoder is not None:
            fields["vision_config"] = AutoConfig.from_pretrained(recipe.encoder)
        return TDDConfig(**{**recipe.model, **fields})
    num_labels = num_categories or recipe.data.num_labels
    if num_labels is None:
        raise ValueError(
            "The recipe does not say how many labels there are: give `--categories` or `data.num_labels`."
        )
    return TDDConfig(**recipe.model, num_labels=num_labels)


def make_model(config: TDDConfig, device: str) -> Model:
    with torch.device(device):
        return TDDForImageClassification(config) if config.vocab_size is None else TDDForCaptioning(config)


def view_size(recipe: Recipe, config: TDDConfig) -> tuple[int, int]:
    """Height and width of the training views."""
    size = recipe.augmentation.size or getattr(config.vision_config, "image_size", None)
    if isinstance(size, int):
        return size, size
    processor = ViTImageProcessor(**recipe.image_processor)
    size = processor.crop_size if processor.do_center_crop else processor.size
    return size["height"], size["width"]


def example_batch(config: TDDConfig, size: tuple[int, int], images: int, device: str) -> dict[str, torch.Tensor]:
    """A batch of random arguments of `forward`."""
    pixels = torch.randn(images, getattr(config.vision_config, "num_channels", 3), *size, device=device)
    shape = (images,) if config.vocab_size is None else (images, config.max_position_embeddings)
    return {"pixel_values": pixels, "labels": torch.randint(3, config.num_categories, shape, device=device)}


def measure(config: TDDConfig, size: tuple[int, int], cost: StepCost, images: int) -> Machine:
    """Measures this machine with steps of a quarter and of half the device batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(config, device).train()
    batches = [example_batch(config, size, max(1, images // 4 * part), device) for part in (1, 2)]
    if config.freeze_encoder:  # training reads the features from disk
        for batch in batches:
            batch["image_features"] = model.model.get_image_features(batch.pop("pixel_values")).pooler_output
    return measure_machine(model, batches, cost, time.perf_counter)


def giga(operations: float) -> str:
    return f"{operations / 1e9:,.3f}"


def print_cost(config: TDDConfig, cost: StepCost) -> None:
    print(
        f"Parameters: {cost.parameters / 1e6:.1f} M, of which encoder with connector "
        f"{cost.encoder_parameters / 1e6:.1f} M; {cost.trainable / 1e6:.1f} M are trained.\n"
    )
    repeats = config.timesteps_per_image
    rows = [
        [name, giga(part.forward), giga(part.backward), giga(part.total)]
        for name, part in {
            "encoder, per image": cost.encoder,
            "connector and prefix, per image": cost.prefix,
            f"denoiser and head x {repeats} timesteps, per image": cost.denoiser,
            "noise factor, per device batch": cost.noise,
        }.items()
    ]
    print(markdown_table(["GFLOP", "forward", "backward", "both"], rows) + "\n")


def print_memory(cost: StepCost, images: int, devices: int, precision: str) -> None:
    ways = {"DDP": cost.memory(images), f"FSDP over {devices}": cost.memory(images, devices, shard=True)}
    header = [f"GiB per device, {images} images, {precision}", *ways]
    names = list(ways["DDP"])
    rows = [[name, *(f"{way[name] / 2**30:.2f}" for way in ways.values())] for name in names]
    rows.append(["sum", *(f"{sum(way.values()) / 2**30:.2f}" for way in ways.values())])
    print(markdown_table(header, rows))
    print(
        f"\nBytes per parameter: {WEIGHT_BYTES} weight + {GRADIENT_BYTES} gradient + {OPTIMIZER_BYTES} AdamW + "
        f"{EMA_BYTES} moving average. Activations: what autograd keeps, counted for each operation.\n"
    )


def print_time(recipe: Recipe, cost: StepCost, machine: Machine, images: int, num_examples: int | None) -> None:
    batch_size = recipe.training.batch_size
    accumulation = max(1, batch_size // (images * machine.devices))
    seconds = machine.step_seconds(cost, images, accumulation)
    print(
        f"Machine: {machine.devices} x {machine.name}, {machine.operations_per_second / 1e12:.3g} TFLOP/s and "
        f"{machine.bytes_per_second / 1e9:.3g} GB/s per device ({machine.basis}).\n"
        "step = accumulation x ((images x GFLOP per image + GFLOP per device batch) / GFLOP/s + overhead)\n"
        f"       + (trained parameters x {UPDATE_TRAFFIC} B + parameters x {EMA_TRAFFIC} B) / GB/s\n"
        f"     = {accumulation} x (({images} x {giga(cost.per_image)} + {giga(cost.noise.total)}) / "
        f"{giga(machine.operations_per_second)} + {machine.overhead:.4f}) + {cost.update_bytes() / 1e9:.3f} / "
        f"{machine.bytes_per_second / 1e9:.3g}\n"
        f"     = {seconds:.4g} s for {images * accumulation * machine.devices} images: "
        f"{images * accumulation * machine.devices / seconds:,.0f} images per second\n"
        "It is assumed that communication and waiting for data overlap with the computation."
    )
    if num_examples is not None:
        epoch = num_examples // batch_size * seconds
        total = epoch * recipe.training.epochs
        print(f"epoch = {num_examples // batch_size} steps x step = {epoch / 60:.1f} minutes")
        print(f"training = {recipe.training.epochs} epochs = {total / 3600:.1f} hours, without the evaluations.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file, such as scripts/recipes/table1/tdd_vit_b16.yaml")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--machine", choices=list(MACHINES), default="a100x8", help="default: the paper's, a100x8")
    how.add_argument("--measure", action="store_true", help="measure this machine with steps of the recipe")
    parser.add_argument("--devices", type=int, help="number of devices; default: the machine's")
    parser.add_argument("--categories", type=int, help="number of labels or tokens; default: the recipe's")
    parser.add_argument("--num-examples", type=int, help="number of training images; default: the recipe's")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="such as training.epochs=5")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    recipe = load_recipe(args.recipe, args.set)
    config = make_config(recipe, args.categories)
    size = view_size(recipe, config)
    machine = MACHINES[args.machine]
    precision = "no" if args.measure else machine.precision  # here steps are measured in float32
    cost = training_cost(make_model(config, "meta"), size, precision)
    devices = 1 if args.measure else args.devices or machine.devices
    images = recipe.training.device_batch_size or max(1, recipe.training.batch_size // devices)
    if args.measure:
        torch.set_num_threads(recipe.training.cpu_threads or torch.get_num_threads())
        machine = measure(config, size, cost, images)
    else:
        machine = replace(machine, devices=devices)
    print_cost(config, cost)
    print_memory(cost, images, devices, "float32" if precision == "no" else precision)
    print_time(recipe, cost, machine, images, args.num_examples or recipe.data.num_examples)


if __name__ == "__main__":
    main()
