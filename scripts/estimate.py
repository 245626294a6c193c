"""Estimate what training by a recipe costs on a machine: parameters, operations, memory per device, and time.

    python scripts/estimate.py scripts/recipes/table1/tdd_vit_b16.yaml --machine a100x8
    python scripts/estimate.py scripts/recipes/digits.yaml --measure

`--measure` times steps with one device batch on this machine. The formula of the time is printed too.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification
from modeling_tdd.evaluation.cost import Model, device_memory, measure_step, training_cost
from modeling_tdd.training.arguments import TDDTrainingArguments
from modeling_tdd.training.averaging import AveragedAdamW
from modeling_tdd.training.batches import build_train_transform
from modeling_tdd.training.recipe import Recipe, load_recipe
from modeling_tdd.training.tasks import load_image_processor


# Number and name of devices, and the peak of one in bf16
MACHINES = {"h100x8": (8, "H100 80 GB SXM", 989e12), "a100x8": (8, "A100 80 GB SXM", 312e12)}


def make_model(recipe: Recipe, recipe_folder: Path) -> Model:
    """The model that the recipe trains, on the meta device. `SystemExit` says what is missing."""
    if recipe.task == "encoder" or recipe.lora is not None or recipe.checkpoint is not None:
        raise SystemExit("Give a recipe for a classifier or a captioner, without `checkpoint` and `lora`.")
    fields = dict(recipe.model)
    if recipe.encoder is not None:
        try:
            encoder = AutoConfig.from_pretrained(recipe.encoder)
        except OSError as error:  # our own encoders are in outputs/<name of the recipe>
            recipes = [recipe_folder / f"{part}.yaml" for part in Path(recipe.encoder).parts]
            commands = [f"Train it first: python scripts/train.py {path}" for path in recipes if path.exists()]
            raise SystemExit(f"There is no encoder {recipe.encoder}. {commands[0] if commands else error}") from error
        fields["vision_config"] = getattr(encoder, "vision_config", encoder)
    if recipe.task == "captioning":
        model_class, key, size = TDDForCaptioning, "tokenizer.vocab_size", recipe.tokenizer.get("vocab_size")
        fields.update(vocab_size=size, pad_token_id=0, eos_token_id=2)
    else:
        model_class, key, size = TDDForImageClassification, "data.num_labels", recipe.data.num_labels
        fields["num_labels"] = size
    for name, value in {key: size, "training.batch_size": recipe.training.get("batch_size")}.items():
        if value is None:
            raise SystemExit(f"The recipe lacks `{name}`: give `--set {name}=NUMBER`.")
    with torch.device("meta"):
        return model_class(TDDConfig(**fields))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file, such as scripts/recipes/table1/tdd_vit_b16.yaml")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--machine", choices=list(MACHINES), default="a100x8", help="default: the paper's, a100x8")
    how.add_argument("--measure", action="store_true", help="time steps on one device of this machine, in float32")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="recipe settings")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.set)
    model = make_model(recipe, args.recipe.parent)
    make_view = build_train_transform(recipe.augmentation, load_image_processor(recipe))
    size = make_view(Image.new("RGB", (64, 64))).shape[-2:]
    devices, name, peak = MACHINES[args.machine]
    devices, dtype = (1, torch.float32) if args.measure else (devices, torch.bfloat16)
    batch_size = recipe.training["batch_size"]
    images = recipe.training.get("device_batch_size") or max(1, batch_size // devices)
    operations, activations = training_cost(model, images, size, dtype)
    total, trained = (model.num_parameters(only_trainable=only) / 1e6 for only in (False, True))
    print(f"{total:.1f} M parameters, {trained:.1f} M are trained")
    print(f"{operations / images / 1e9:.3f} GFLOP per image, forward and backward")
    ddp, fsdp = (device_memory(model, activations, shards) / 2**30 for shards in (1, devices))
    print(f"{images} images on each device: {ddp:.2f} GiB with DDP, {fsdp:.2f} GiB with FSDP2 over {devices},")
    print(f"    of these {activations / 2**30:.2f} GiB are activations in {dtype}, the rest is float32")
    if args.measure:
        settings = TDDTrainingArguments(**{**recipe.training, "mixed_precision": "no"})
        optimizer = AveragedAdamW if settings.ema_decay > 0 else torch.optim.AdamW
        rate = operations / measure_step(model, images, size, optimizer, settings.device)
        print("this machine: measured now, in float32")
    else:
        rate = peak / 3
        print(f"{devices} x {name}: {rate / 1e12:.0f} TFLOP/s each, a third of the peak (assumed, not measured)")
    batches = max(1, batch_size // (images * devices))
    seconds = batches * operations / rate
    print("step = batches on each device x GFLOP of one / GFLOP/s")
    print(f"     = {batches} x {operations / 1e9:.3f} / {rate / 1e9:.4g} = {seconds:.4g} s")
    if recipe.data.num_examples is not None:
        epochs = recipe.training.get("num_train_epochs", TDDTrainingArguments.num_train_epochs)
        steps = int(epochs * (recipe.data.num_examples // batch_size))
        print(f"training = {epochs} epochs = {steps} steps = {steps * seconds / 3600:.2f} hours")
        print("Evaluations, communication and waiting for data come on top.")


if __name__ == "__main__":
    main()
