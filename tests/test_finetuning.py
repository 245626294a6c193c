# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""`TDDTrainer` in one process: averaged weights, both tasks, LoRA; and fine-tuning by scripts/train.py."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from peft import PeftModel
from PIL import Image as PILImage
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from transformers import (
    MobileViTConfig,
    TimmWrapperConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    default_data_collator,
)

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification, TDDProcessor
from modeling_tdd.evaluation.compute_metrics import CaptionMetrics, top1
from modeling_tdd.training.arguments import TDDTrainingArguments
from modeling_tdd.training.batches import CaptionCollator, ImageCollator, TrainingRows
from modeling_tdd.training.data import load_digits_dataset
from modeling_tdd.training.lora import LoraRecipe, add_lora
from modeling_tdd.training.recipe import load_recipe
from modeling_tdd.training.tasks import load_processor, model_fields, start_model
from modeling_tdd.training.tokenization import train_tokenizer
from modeling_tdd.training.trainer import TDDTrainer


ROOT = Path(__file__).parent.parent
EMOJI = ROOT / "scripts/data/emoji_mini"
Weights = dict[str, Tensor]


def arguments(folder: Path, **settings: Any) -> TDDTrainingArguments:
    """Our defaults, except for settings that keep a test small."""
    defaults = {"batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "mixed_precision": "no", "ema_decay": 0.9}
    return TDDTrainingArguments(str(folder), **{**defaults, "report_to": "none", "disable_tqdm": True, **settings})


def assert_equal(first: Weights, second: Weights) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def assert_equal_but_for_rounding(first: Weights, second: Weights) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def weights(model: nn.Module) -> Weights:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained_weights(trainer: TDDTrainer) -> Weights:
    """The weights that train, of an optimiser that holds the average, by the names of the parameters."""
    state = trainer.optimizer.state
    return {name: state[p]["other_weights"].clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture
def shapes() -> Dataset:
    """24 pictures of 5 classes. Each class has its own colour."""
    colours = ["red", "green", "blue", "white", "black"]
    images = [PILImage.new("RGB", (16, 16), colours[i % 5]) for i in range(24)]
    features = Features({"image": Image(), "label": ClassLabel(names=colours)})
    return Dataset.from_dict({"image": images, "label": [i % 5 for i in range(24)]}, features=features)


@pytest.fixture
def image_processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 16, "width": 16}, do_convert_rgb=True)


@pytest.fixture
def make_trainer(
    tmp_path: Path, make_model: Callable, shapes: Dataset, image_processor: ViTImageProcessor
) -> Callable[..., TDDTrainer]:
    """A function from callbacks and settings to a trainer of a tiny classifier, which always starts alike."""

    def make(
        *callbacks: TrainerCallback, model: nn.Module | None = None, folder: str = "run", **settings: Any
    ) -> TDDTrainer:
        torch.manual_seed(0)
        return TDDTrainer(
            model or make_model(),
            arguments(tmp_path / folder, **settings),
            train_dataset=shapes,
            eval_dataset=shapes,
            data_collator=ImageCollator(image_processor),
            processing_class=image_processor,
            compute_metrics=top1,
            callbacks=list(callbacks),
        )

    return make


# ---- The average


class RecordWeights(TrainerCallback):
    """The weights after each step, and their average as timm computes it from them."""

    def __init__(self, use_warmup: bool = True):
        self.use_warmup = use_warmup

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.ema = ModelEmaV3(model, decay=0.9, use_warmup=self.use_warmup)
        self.raw, self.average = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.ema.update(model, step=state.global_step if self.use_warmup else None)
        self.raw.append(weights(model))
        self.average.append(weights(self.ema.module))


def test_the_average_is_evaluated_and_saved_and_stays_in_the_model(make_trainer: Callable):
    schedule = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4}
    record = RecordWeights()
    make_trainer(record, folder="without", ema_decay=0, **schedule).train()
    moved = max((record.raw[-1][name] - average).abs().max() for name, average in record.average[-1].items())
    assert moved > 1e-4

    trainer = make_trainer(save_steps=4, **schedule)
    trainer.train()
    assert_equal_but_for_rounding(weights(trainer.model), record.average[-1])
    assert_equal_but_for_rounding(trained_weights(trainer), record.raw[-1])
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    for step, loss in zip((4, 8), evaluations):
        model = TDDForImageClassification.from_pretrained(f"{trainer.args.output_dir}/checkpoint-{step}")
        assert_equal_but_for_rounding(weights(model), record.average[step - 1])
        trainer.model.load_state_dict(model.state_dict())
        assert trainer.evaluate()["eval_loss"] == loss  # what was evaluated in training is what was saved

    trainer = make_trainer(save_strategy="no", folder="end", **{**schedule, "eval_strategy": "no"})
    trainer.train()
    assert_equal_but_for_rounding(weights(trainer.model), record.average[-1])


def test_without_warmup_the_decay_is_constant(make_trainer: Callable):
    record = RecordWeights(use_warmup=False)
    make_trainer(record, ema_decay=0, max_steps=4, save_strategy="no").train()
    trainer = make_trainer(ema_warmup=False, max_steps=4, save_strategy="no")
    trainer.train()
    assert_equal_but_for_rounding(weights(trainer.model), record.average[-1])


class StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("last_step", [8, 7])  # an evaluation is the last thing before the end, or a step
def test_best_checkpoint_is_the_best_average(make_trainer: Callable, last_step: int):
    settings = {"eval_strategy": "steps", "save_strategy": "best", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = make_trainer(StopAfter(last_step), max_steps=8, learning_rate=3e-2, **settings)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == last_step // 2
    assert trainer.evaluate()["eval_loss"] == min(losses) == trainer.state.best_metric
    best = TDDForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert_equal(weights(trainer.model), weights(best))


# ---- Trainer's own settings


def test_accumulated_gradients_are_those_of_the_whole_batch(make_trainer: Callable, make_model: Callable):
    """With the classifier of MDD, which draws nothing at random, single steps can be compared."""
    norms = []
    for device_batch_size in (8, 2):
        torch.manual_seed(0)
        settings = {"max_steps": 3, "batch_size": 8, "device_batch_size": device_batch_size, "save_strategy": "no"}
        trainer = make_trainer(model=make_model(corruption="mask"), **settings)
        trainer.train()
        norms.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "grad_norm" in e])
    assert len(norms[0]) == 3
    torch.testing.assert_close(torch.tensor(norms[1]), torch.tensor(norms[0]), rtol=1e-4, atol=1e-5)


def test_half_precision_training_keeps_float32_weights(make_trainer: Callable):
    trainer = make_trainer(max_steps=2, bf16=True, save_strategy="no")
    dtypes = set()
    projection = trainer.model.model.denoiser.layers[0].attention.q_proj
    projection.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    before = weights(trainer.model)
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert any(not tensor.equal(before[name]) for name, tensor in weights(trainer.model).items())
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_data_get_the_epoch(make_trainer: Callable, monkeypatch: pytest.MonkeyPatch):
    epochs = []
    monkeypatch.setattr(TrainingRows, "set_epoch", lambda self, epoch: epochs.append(epoch))
    make_trainer(num_train_epochs=3, save_strategy="no").train()
    assert epochs == sorted(epochs) and set(epochs) == {0, 1, 2}


@pytest.mark.parametrize("task", ["classification", "captioning"])
def test_plain_trainer_works_as_it_is(
    tmp_path: Path, make_model: Callable, make_captioner: Callable, pixel_values: Tensor, task: str
):
    model = make_model() if task == "classification" else make_captioner()
    labels = torch.tensor([0, 3, 4, 1]) if task == "classification" else torch.tensor([[5, i, 2] for i in range(3, 7)])
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixel_values, labels)]
    settings = {"max_steps": 30, "learning_rate": 3e-3, "logging_steps": 10, "save_steps": 30, "report_to": "none"}
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, **settings),
        train_dataset=rows,
        eval_dataset=rows,
    )
    assert trainer.label_names == ["labels"] and not trainer.model_accepts_loss_kwargs
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    saved = type(model).from_pretrained(tmp_path / "checkpoint-30")
    assert_equal(weights(saved), weights(trainer.model))


# ---- Both tasks, on real data


def test_classifier_reaches_93_percent_on_digits(tmp_path: Path):
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, do_convert_rgb=True)
    data = {}
    for split, rows in load_digits_dataset().items():  # all images are read once
        batch = ImageCollator(processor)(list(rows))
        data[split] = [dict(zip(batch, values)) for values in zip(*batch.values())]
    size = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "initializer_range": 0.1}
    encoder = ViTConfig(image_size=8, patch_size=2, num_hidden_layers=2, **size)
    config = TDDConfig(vision_config=encoder, num_labels=10, num_hidden_layers=1, **size)
    trainer = TDDTrainer(
        TDDForImageClassification(config),
        arguments(
            tmp_path,
            num_train_epochs=10,
            batch_size=32,
            per_device_eval_batch_size=360,
            learning_rate=2e-3,
            warmup_steps=0.1,
            ema_decay=0.99,
            logging_steps=50,
            save_strategy="no",
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=default_data_collator,
        compute_metrics=top1,
    )
    trainer.train()
    assert trainer.evaluate()["eval_top1"] >= 0.93  # measured: 96.7 %
    trainer.settings = {"num_inference_steps": 0}
    with pytest.raises(ValueError, match="num_inference_steps"):  # the settings reach the model
        trainer.evaluate()


def first_rows(split: str, count: int) -> Dataset:
    """The first rows of a split of the embedded emoji."""
    return load_dataset("parquet", data_files=str(EMOJI / f"{split}.parquet"), split="train").select(range(count))


@pytest.fixture
def emoji() -> Dataset:
    """Eight real emoji, their names as lists of one caption."""
    data = first_rows("train", 8)
    captions = [[caption] for caption in data["caption"]]
    return data.select_columns("image").add_column("captions", captions)


@pytest.fixture
def emoji_captioner(emoji: Dataset) -> tuple[TDDForCaptioning, TDDProcessor]:
    """An untrained captioner of the emoji, with a tokenizer of their words."""
    tokenizer = train_tokenizer([captions[0] for captions in emoji["captions"]])
    tokenizer.model_max_length = 10
    size = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "initializer_range": 0.1}
    config = TDDConfig(
        vision_config=ViTConfig(image_size=32, patch_size=16, num_hidden_layers=1, **size),
        vocab_size=len(tokenizer),
        max_position_embeddings=10,
        pooling=None,
        num_hidden_layers=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        condition_dropout=0.0,
        **size,
    )
    image_processor = ViTImageProcessor(size={"height": 32, "width": 32}, do_convert_rgb=True)
    return TDDForCaptioning(config), TDDProcessor(image_processor, tokenizer)


def caption_trainer(
    folder: Path, model: nn.Module, processor: TDDProcessor, emoji: Dataset, **settings: Any
) -> TDDTrainer:
    texts = [captions[0] for captions in emoji["captions"]]
    trainer = TDDTrainer(
        model,
        arguments(folder, **{"batch_size": 8, **settings}),
        train_dataset=emoji,
        eval_dataset=emoji,
        data_collator=CaptionCollator(processor),
        processing_class=processor,
        compute_metrics=CaptionMetrics(processor, emoji["captions"], texts),
    )
    trainer.settings = {"num_inference_steps": 5}
    return trainer


def test_captioner_learns_eight_emoji_by_heart(
    tmp_path: Path, emoji: Dataset, emoji_captioner: tuple[TDDForCaptioning, TDDProcessor]
):
    model, processor = emoji_captioner
    settings = {"max_steps": 200, "learning_rate": 3e-3, "save_strategy": "no", "per_device_eval_batch_size": 3}
    trainer = caption_trainer(tmp_path / "run", model, processor, emoji, lr_scheduler_type="linear", **settings)
    assert trainer.evaluate()["eval_exact_match"] == 0
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_exact_match"] == 1 and metrics["eval_token_f1"] == 1
    trainer.save_model(str(tmp_path / "saved"))
    saved = TDDForCaptioning.from_pretrained(tmp_path / "saved")
    inputs = TDDProcessor.from_pretrained(tmp_path / "saved")(images=list(emoji["image"]), return_tensors="pt")
    captions = processor.batch_decode(saved.generate(**inputs), skip_special_tokens=True)
    assert captions == [captions[0] for captions in emoji["captions"]]


# ---- LoRA


def check_lora(trainer: TDDTrainer, base: nn.Module, before: Weights, inputs: dict[str, Any]) -> None:
    """Trains adapters, and checks that nothing else trains, that they are averaged, and that they load and merge."""
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)
    for name, tensor in trainer.model.state_dict().items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        if "lora_" not in name and "modules_to_save" not in name:
            assert tensor.equal(before[plain]), name
    averages = {name: tensor for name, tensor in trainer.model.named_parameters() if "lora_B" in name}
    assert all(tensor.any() for tensor in averages.values())  # 0 at first
    trained = trained_weights(trainer)
    assert trained.keys() == changed and all(not trained[name].equal(tensor) for name, tensor in averages.items())
    expected = trainer.model.eval()(**inputs).logits
    loss = trainer.evaluate()["eval_loss"]
    trainer.model.save_pretrained(Path(trainer.args.output_dir) / "adapter")
    trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
    assert set(trainer.model.state_dict()) == set(before)
    torch.testing.assert_close(trainer.model.eval()(**inputs).logits, expected, rtol=1e-3, atol=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-3)
    adapted = PeftModel.from_pretrained(base, Path(trainer.args.output_dir) / "adapter").eval()
    torch.testing.assert_close(adapted(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("target", "new_modules", "adapted", "whole"),
    [
        ("all", [], {"encoder", "denoiser"}, set()),
        ("encoder", [], {"encoder"}, set()),
        ("denoiser", ["token_embedding", "classifier"], {"denoiser"}, {"token_embedding", "classifier"}),
        ("all", ["connector", "denoiser", "classifier"], {"encoder"}, {"connector", "denoiser", "classifier"}),
    ],
)
def test_lora_of_a_classifier(
    make_trainer: Callable,
    make_model: Callable,
    pixel_values: Tensor,
    target: str,
    new_modules: list[str],
    adapted: set[str],
    whole: set[str],
):
    model, base = make_model(), make_model()
    before = weights(model)
    base.load_state_dict(before)
    model = add_lora(model, LoraRecipe(2, target), new_modules)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {
        part for part in ("encoder", "denoiser") if any(f"{part}." in n and "lora_" in n for n in trainable)
    } == adapted
    assert {n.split(".modules_to_save")[0].split(".")[-1] for n in trainable if ".modules_to_save" in n} == whole
    trainer = make_trainer(model=model, max_steps=3, learning_rate=1e-2)
    assert trainer.label_names == ["labels"] and not trainer.model_accepts_loss_kwargs
    check_lora(trainer, base, before, {"pixel_values": pixel_values})


def test_lora_of_a_captioner(tmp_path: Path, emoji: Dataset, emoji_captioner: tuple[TDDForCaptioning, TDDProcessor]):
    model, processor = emoji_captioner
    before, base = weights(model), TDDForCaptioning(model.config)
    base.load_state_dict(before)
    settings = {"max_steps": 3, "learning_rate": 1e-2}
    trainer = caption_trainer(tmp_path, add_lora(model, LoraRecipe(2)), processor, emoji, **settings)
    inputs = processor(images=list(emoji["image"]), return_tensors="pt")
    check_lora(trainer, base, before, inputs)


@pytest.mark.parametrize("rank", [0, 2])
def test_captioner_resumes_from_any_folder(
    tmp_path: Path, emoji: Dataset, emoji_captioner: tuple[TDDForCaptioning, TDDProcessor], rank: int
):
    """With adapters and without."""
    model, processor = emoji_captioner
    start = weights(model)
    ends = []
    for folder, checkpoint in (("whole", None), ("resumed", str(tmp_path / "whole/checkpoint-3"))):
        model = TDDForCaptioning(model.config)
        model.load_state_dict(start)
        torch.manual_seed(0)
        model = add_lora(model, LoraRecipe(rank)) if rank else model
        settings = {"max_steps": 6, "save_steps": 3, "batch_size": 2, "learning_rate": 1e-2}
        trainer = caption_trainer(tmp_path / folder, model, processor, emoji, **settings)
        trainer.train(checkpoint)
        assert trainer.state.global_step == 6
        ends.append((weights(trainer.model), trained_weights(trainer)))
    for first, second in zip(*ends):
        assert_equal(first, second)


def test_lora_without_a_module_to_adapt_is_refused(make_model: Callable):
    with pytest.raises(ValueError, match="nothing to adapt"):
        add_lora(make_model(), LoraRecipe(2, "denoiser"), ["denoiser"])


def test_lora_leaves_the_configuration_and_an_encoder_without_adapters_as_they_are(
    make_trainer: Callable, make_model: Callable, tmp_path: Path
):
    model = make_model(vision_config=TimmWrapperConfig(architecture="test_resnet"), pooling="mean")
    before = weights(model.model.encoder)
    trainer = make_trainer(model=add_lora(model, LoraRecipe(2, "denoiser")), max_steps=2)
    trainer.train()
    merged = trainer.model.merge_and_unload()
    assert_equal(weights(merged.model.encoder), before)  # batch statistics too
    merged.save_pretrained(tmp_path / "merged")
    again = TDDForImageClassification.from_pretrained(tmp_path / "merged")
    assert not again.config.freeze_encoder
    start = weights(again.model.encoder)
    make_trainer(model=again, folder="full", max_steps=2, learning_rate=1e-2).train()  # all of it trains
    assert not [name for name, parameter in again.model.encoder.named_parameters() if parameter.equal(start[name])]


def test_lora_adapts_the_encoder_or_names_it(make_model: Callable):
    resnet = {"vision_config": TimmWrapperConfig(architecture="test_resnet"), "pooling": "mean"}
    for target in ("all", "encoder"):
        with pytest.raises(ValueError, match=f"{target}.*`test_resnet` has no query and value projections.*denoiser'"):
            add_lora(make_model(**resnet), LoraRecipe(2, target))
        with pytest.raises(ValueError, match=f"{target}'` adapts the encoder.*freeze_encoder=False"):
            add_lora(make_model(freeze_encoder=True), LoraRecipe(2, target))


def test_batch_statistics_stay_where_adapters_train(make_model: Callable, pixel_values: Tensor, labels: Tensor):
    """An adapter is saved without them: with it the base model must say what the trained one says."""
    settings = {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8] * 7, "num_attention_heads": 2}
    model = make_model(vision_config=MobileViTConfig(**settings, image_size=64, patch_size=2), pooling="mean")
    before = weights(model)
    model = add_lora(model, LoraRecipe(2, "encoder")).train()
    assert any("encoder" in name and "lora_" in name for name, _ in model.named_parameters())
    model(pixel_values=torch.nn.functional.interpolate(pixel_values, 64), labels=labels).loss.backward()
    merged = model.merge_and_unload().state_dict()
    statistics = [name for name in before if "running_" in name]
    assert statistics and all(merged[name].equal(before[name]) for name in statistics)


def test_whole_weights_are_not_saved_beside_an_adapter(make_model: Callable, tmp_path: Path):
    """Loading would apply the adapter once more."""
    model = add_lora(make_model(), LoraRecipe(2))
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match="holds a LoRA adapter"):
        merged.save_pretrained(tmp_path / "adapter")
    merged.save_pretrained(tmp_path / "merged")
    assert_equal(weights(TDDForImageClassification.from_pretrained(tmp_path / "merged")), weights(merged))


@pytest.mark.parametrize(
    ("folder", "name"), [("models--user--tiny_tdd/snapshots/0123", "user/tiny_tdd"), ("own/tdd", "own/tdd")]
)
def test_an_adapter_names_its_base_by_its_id(
    make_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str
):
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained(folder)
    for base in (folder, str(tmp_path / folder)):
        model = add_lora(TDDForImageClassification.from_pretrained(base), LoraRecipe(2))
        model.save_pretrained("adapter")
        saved = json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"]
        assert saved == (name if "snapshots" in folder else base)
        assert str(tmp_path) not in Path("adapter/README.md").read_text() or "snapshots" not in folder


# ---- Half precision, bad arguments


@pytest.mark.parametrize("setting", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_in_half_precision_saves_float32(make_trainer: Callable, tmp_path: Path, setting: str):
    trainer = make_trainer(max_steps=2, eval_strategy="steps", eval_steps=1, **{setting: True})
    trainer.train()
    before = weights(trainer.model)
    kinds = {parameter.dtype for parameter in before.values()}
    seen = []
    trainer.model.register_forward_hook(lambda model, args, outputs: seen.append(model.dtype))
    assert 0 <= trainer.evaluate()["eval_top1"] <= 1
    assert set(seen) == {torch.bfloat16 if "bf16" in setting else torch.float16}
    assert_equal(weights(trainer.model), before)
    assert {tensor.dtype for tensor in weights(trainer.model).values()} == kinds
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(tensor.equal(before[name]) for name, tensor in saved.items())


def test_an_encoder_in_half_precision_trains_in_float32(
    make_trainer: Callable, vision_config: ViTConfig, tmp_path: Path
):
    encoder = ViTModel(vision_config, add_pooling_layer=False).to(torch.bfloat16)
    encoder.save_pretrained(tmp_path / "encoder")
    size = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 5}
    model = TDDForImageClassification.from_encoder_pretrained(tmp_path / "encoder", **size)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.model.encoder.layernorm.weight.equal(encoder.layernorm.weight.float())
    model.save_pretrained(tmp_path / "model")
    again = TDDForImageClassification.from_pretrained(tmp_path / "model")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    make_trainer(model=model, max_steps=1).train()
    half = TDDForImageClassification.from_encoder_pretrained(
        tmp_path / "encoder", encoder_kwargs={"dtype": torch.bfloat16}, **size
    )
    assert half.dtype == torch.bfloat16  # as it is asked for
    with pytest.raises(ValueError, match="must be float32 to be averaged"):
        make_trainer(model=half, max_steps=1).train()


def test_a_checkpoint_in_half_precision_is_fine_tuned_in_float32(
    tmp_path: Path, digits_checkpoint: Path, run_train: Callable
):
    model = TDDForImageClassification.from_pretrained(digits_checkpoint).to(torch.bfloat16)
    model.save_pretrained(digits_checkpoint)
    run_train("finetune", "--set", f"checkpoint={digits_checkpoint}", "data.path=digits", *SHORT)
    saved = load_file(tmp_path / "outputs/finetune/tdd-seed0/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_paths_and_wrong_types_as_arguments(make_trainer: Callable, tmp_path: Path):
    checkpoint = tmp_path / "run/checkpoint-1"
    make_trainer(max_steps=2, save_steps=1).train()
    trainer = make_trainer(max_steps=2, resume_from_checkpoint=checkpoint)
    assert trainer.args.resume_from_checkpoint == str(checkpoint) and str(checkpoint) in trainer.args.to_json_string()
    trainer.train(checkpoint)
    assert trainer.state.global_step == 2
    for wrong in (5, 0.5, [checkpoint]):
        with pytest.raises(TypeError, match="`resume_from_checkpoint` must be a folder or a boolean, got"):
            trainer.train(wrong)


# ---- The script


@pytest.fixture
def digits_checkpoint(tmp_path: Path) -> Path:
    """An untrained tiny classifier of ten digits."""
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    names = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
    config = TDDConfig(vision_config=ViTConfig(image_size=8, patch_size=4, **size), **names, **size)
    folder = tmp_path / "digits"
    TDDForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}, do_convert_rgb=True).save_pretrained(folder)
    return folder


class Killed(BaseException):
    """Ends a training as SIGKILL does: at once, without a further checkpoint. (tests/test_scale.py truly kills.)"""


class KillAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            raise Killed


def test_killed_fine_tuning_ends_as_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits_checkpoint: Path, run_train: Callable
):
    """In mid-epoch, with random crops and accumulated gradients."""
    settings = [
        *("--set", f"checkpoint={digits_checkpoint}", "data.path=digits", "augmentation.scale=[0.5, 1.0]"),
        *("training.max_steps=40", "training.save_steps=5", "training.eval_strategy=steps", "training.eval_steps=15"),
        *("training.device_batch_size=16", "training.ema_decay=0.9", "training.learning_rate=1e-3"),
    ]
    run_train("finetune", "--output-dir", "whole", *settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        prepare = TDDTrainer.__init__

        def prepare_to_be_killed(self: TDDTrainer, *args: Any, **kwargs: Any) -> None:
            prepare(self, *args, callbacks=[KillAt(13)], **kwargs)

        patch.setattr(TDDTrainer, "__init__", prepare_to_be_killed)
        run_train("finetune", "--output-dir", "killed", *settings)
    assert not (tmp_path / "killed/tdd-seed0").exists()
    output = run_train("finetune", "--output-dir", "killed", *settings).out
    assert "Resuming from killed/tdd-seed0-training/checkpoint-10." in output
    whole, killed = tmp_path / "whole/tdd-seed0", tmp_path / "killed/tdd-seed0"
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert any(
        not tensor.equal(before)
        for tensor, before in zip(
            load_file(whole / "model.safetensors").values(),
            load_file(digits_checkpoint / "model.safetensors").values(),
        )
    )
    scores = [json.loads((folder / "result.json").read_text())["scores"] for folder in (whole, killed)]
    assert scores[0] == scores[1] and scores[0][0]["num_inference_steps"] == 10


SHORT = ("training.max_steps=2", "training.batch_size=4", "training.eval_strategy=no", "training.save_strategy=no")


def test_script_gives_an_image_folder_a_new_head_and_adapters(
    tmp_path: Path, digits_checkpoint: Path, run_train: Callable, caplog: pytest.LogCaptureFixture
):
    for label, colour in (("day", "white"), ("night", "black")):
        for index in range(6):
            file = tmp_path / f"images/{label}/{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            PILImage.new("RGB", (20, 14), colour).save(file)
    changes = (f"checkpoint={digits_checkpoint}", "data.data_dir=images", "data.eval_share=0.34")
    changes += ("lora={rank: 2, target: denoiser}", "training.learning_rate=0.01")
    warning = "has 10 labels (0, 1, 2, 3, 4 ...), the data 2 labels (day, night ...): label embedding and classifier "
    warning += "are initialised anew"
    run_train("finetune", "--set", *changes, *SHORT)
    assert warning in caplog.text
    folder = tmp_path / "outputs/finetune/tdd-seed0"
    model = TDDForImageClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "day", 1: "night"} and model.classifier.out_features == 2
    (entry,) = json.loads((folder / "result.json").read_text())["scores"]
    assert entry["split"] == "validation" and (5 * entry["top1"]) % 1 == pytest.approx(0, abs=1e-9)  # of 5 images
    old = TDDForImageClassification.from_pretrained(digits_checkpoint)
    assert_equal(weights(model.model.encoder), weights(old.model.encoder))
    assert not model.model.denoiser.layers[0].attention.q_proj.weight.equal(
        old.model.denoiser.layers[0].attention.q_proj.weight
    )
    assert not any("lora" in name for name in load_file(folder / "model.safetensors"))
    assert not (folder / "adapter_config.json").exists()
    adapter = load_file(folder.with_name("tdd-seed0-adapter") / "adapter_model.safetensors")
    assert any("lora_A" in name for name in adapter) and any("classifier" in name for name in adapter)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"corruption": "mask"}], ids=str)
def test_a_head_is_kept_where_the_names_of_the_labels_agree(
    tmp_path: Path,
    make_model: Callable,
    pixel_values: Tensor,
    caplog: pytest.LogCaptureFixture,
    fields: dict[str, Any],
):
    """In another order, its rows are moved. Other names, even as many, get a new head."""
    names = ["a", "b", "c", "d", "e"]

    def labels(names: list[str]) -> dict[str, Any]:
        return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}

    old = make_model(**fields, **labels(names))
    old.save_pretrained(tmp_path)
    recipe = load_recipe(ROOT / "scripts/recipes/finetune.yaml", [f"checkpoint={tmp_path}"])
    method = {"corruption": fields.get("corruption", "gaussian")}

    def start(names: list[str]) -> tuple[TDDForImageClassification, list[str]]:
        return start_model(TDDForImageClassification, recipe, {**method, **labels(names)}, [])

    same, new_modules = start(names)
    assert_equal(weights(same), weights(old))
    assert new_modules == [] and caplog.text == ""

    moved, new_modules = start(["e", "c", "a", "d", "b"])
    assert moved.config.id2label[0] == "e" and new_modules == [] and "in the order of the data" in caplog.text
    order, expected = [names.index(name) for name in ("e", "c", "a", "d", "b")], weights(old)
    for name in expected:
        if name.startswith("classifier.") or "token_embedding" in name:
            expected[name] = expected[name][order]
    assert_equal(weights(moved), expected)
    if method["corruption"] == "mask":  # whose forward draws nothing
        with torch.no_grad():
            torch.testing.assert_close(moved.eval()(pixel_values).logits, old(pixel_values).logits[:, order])

    other, new_modules = start(["a", "b", "c", "d", "f"])
    assert new_modules == ["token_embedding", "classifier"] and "are initialised anew" in caplog.text
    assert other.config.id2label[4] == "f" and not other.classifier.weight.equal(old.classifier.weight)
    assert_equal(weights(other.model.encoder), weights(old.model.encoder))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (0, 0.9, "The state holds no average of the weights, as with `ema_decay=0`"),
        (0.9, 0, "checkpoint-2 holds the average of the weights. Resume it with its `ema_decay`, got 0"),
    ],
)
def test_a_run_does_not_resume_with_an_average_that_it_did_not_have(
    make_trainer: Callable, first: float, second: float, message: str
):
    make_trainer(max_steps=2, save_steps=2, ema_decay=first).train()
    with pytest.raises(ValueError, match=message):
        make_trainer(max_steps=4, ema_decay=second).train(resume_from_checkpoint=True)


def test_script_trains_on_labels_that_are_strings(tmp_path: Path, digits_checkpoint: Path, run_train: Callable):
    """Names of digits, in other splits and another order, keep the head of the checkpoint."""
    (tmp_path / "data").mkdir()
    for split, rows in load_digits_dataset().items():
        rows = rows.select(range(40))
        strings = rows.remove_columns("label").add_column("label", [str(label) for label in rows["label"]])
        strings.to_parquet(tmp_path / f"data/{split}.parquet")
    changes = (f"checkpoint={digits_checkpoint}", "data.path=parquet", "data.data_dir=data")
    run_train("finetune", "--set", *changes, *SHORT)
    model = TDDForImageClassification.from_pretrained(tmp_path / "outputs/finetune/tdd-seed0")
    assert model.config.id2label == {i: str(i) for i in range(10)}
    old = TDDForImageClassification.from_pretrained(digits_checkpoint)
    torch.testing.assert_close(model.classifier.weight, old.classifier.weight, rtol=0, atol=0.01)


def test_script_trains_a_captioner_from_an_encoder_and_then_on_other_data(tmp_path: Path, run_train: Callable):
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(image_size=32, patch_size=16, **size), add_pooling_layer=False).save_pretrained("encoder")
    ViTImageProcessor(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained("encoder")
    for number, split in enumerate(("validation", "test_combo")):
        folder = tmp_path / f"data{number}"
        folder.mkdir()
        first_rows(split, 16).to_parquet(folder / "train.parquet")
    model = json.dumps({**size, "max_position_embeddings": 12, "pooling": None})
    first = ("--set", "encoder=encoder", "data.path=data0", "data.eval_share=0.25", *SHORT)
    with pytest.raises(ValueError, match="`model.max_position_embeddings`"):
        run_train("finetune_captions", "--output-dir", "bad", *first)
    run_train("finetune_captions", "--output-dir", "first", *first, f"model={model}", "tokenizer.kind=word")
    second = ("--set", "checkpoint=first/tdd-seed0", "data.path=data1", "data.eval_share=0.25", *SHORT)
    table = run_train("finetune_captions", "--output-dir", "second", *second).out
    assert "exact_match" in table and "10 steps" in table
    tokenizers = [TDDProcessor.from_pretrained(tmp_path / f"{n}/tdd-seed0").tokenizer for n in ("first", "second")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab() and tokenizers[1].model_max_length == 12
    (entry,) = json.loads((tmp_path / "second/tdd-seed0/result.json").read_text())["scores"]
    assert {"exact_match", "token_f1", "stutter", "fluent"} <= entry.keys()
    captioner = TDDForCaptioning.from_pretrained(tmp_path / "second/tdd-seed0")
    assert captioner.config.max_position_embeddings == 12 and not math.isnan(captioner.lm_head.weight.sum().item())


def test_recipe_starts_from_a_captioner(tmp_path: Path, emoji_captioner: tuple[TDDForCaptioning, TDDProcessor]):
    """So a captioner of VL-enriched is fine-tuned on COCO."""
    model, processor = emoji_captioner
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    fields = "{max_position_embeddings: 10, pooling: null, timesteps_per_image: 3}"
    changes = [f"checkpoint={tmp_path}", "encoder=null", "tokenizer={}", f"model={fields}"]
    recipe = load_recipe(ROOT / "scripts/recipes/coco_vit_b16.yaml", changes)
    loaded = load_processor(recipe, [])
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab() and loaded.tokenizer.model_max_length == 10
    started, new_modules = start_model(TDDForCaptioning, recipe, model_fields(recipe, "tdd"), ["lm_head"])
    assert_equal(weights(started), weights(model))
    assert started.config.timesteps_per_image == 3 and new_modules == []


def test_a_recipe_without_anything_to_start_from_is_refused(run_train: Callable):
    with pytest.raises(ValueError, match="`checkpoint`, `encoder` or `model`"):
        run_train("finetune", "--set", "data.path=digits", *SHORT)


def test_the_trainer_uploads_nothing(make_trainer: Callable, monkeypatch: pytest.MonkeyPatch):
    """Trainer would upload whatever lies in the output folder, and its arguments with the token."""
    trainer = make_trainer()
    with pytest.raises(ValueError, match="training uploads nothing"):
        trainer.push_to_hub(token="hf_secret")
    arguments = trainer.args.set_push_to_hub("user/model", token="hf_secret")
    with pytest.raises(ValueError, match="training uploads nothing"):
        TDDTrainer(trainer.model, arguments, train_dataset=trainer.train_dataset)
