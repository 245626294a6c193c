"""Fine-tuning with plain `Trainer`: averaged weights, both tasks, LoRA, and scripts/finetune.py as users run it."""

import json
import os
import signal
import subprocess
import sys
import time
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
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTImageProcessor, ViTModel

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification, TDDProcessor
from modeling_tdd.training.caption_data import CaptionCollator
from modeling_tdd.training.data import EvalCollator, TrainCollator, build_train_transform, load_digits_dataset
from modeling_tdd.training.ema import TRAINING_WEIGHTS_NAME, EMACallback
from modeling_tdd.training.finetuning import (
    CaptionMetrics,
    EpochCallback,
    TrainerDataset,
    classification_metrics,
    last_complete_checkpoint,
)
from modeling_tdd.training.lora import add_lora, merge_lora
from modeling_tdd.training.recipe import AugmentationRecipe, load_recipe
from modeling_tdd.training.tokenization import train_tokenizer


ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/finetune.py"
EMOJI = ROOT / "scripts/data/emoji_mini"

sys.path.insert(0, str(SCRIPT.parent))
import finetune  # noqa: E402 - the scripts
import train_captioning  # noqa: E402


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Transformers' defaults, except for settings that keep a test small."""
    defaults = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(str(folder), **{**defaults, **quiet, **settings})


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


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
def make_classification_trainer(
    tmp_path: Path, make_model: Callable, shapes: Dataset, image_processor: ViTImageProcessor
) -> Callable[..., Trainer]:
    """Returns a function that makes a trainer of a tiny classifier, always the same, from callbacks and arguments."""

    def make(*callbacks: TrainerCallback, model_fields: dict[str, Any] | None = None, **settings: Any) -> Trainer:
        torch.manual_seed(0)
        data = TrainerDataset(shapes, EvalCollator(image_processor))
        return Trainer(
            make_model(**(model_fields or {})),
            arguments(tmp_path / settings.pop("folder", "run"), **settings),
            train_dataset=data,
            eval_dataset=data,
            processing_class=image_processor,
            compute_metrics=classification_metrics,
            callbacks=list(callbacks),
        )

    return make


# ---- EMACallback


class RecordWeights(TrainerCallback):
    """The weights before training and after each step, and their average as timm computes it from them."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.ema = ModelEmaV3(model, decay=0.9, use_warmup=True)
        self.start = weights(model)
        self.raw, self.average = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.ema.update(model, step=state.global_step)
        self.raw.append(weights(model))
        self.average.append(weights(self.ema.module))


def test_the_average_is_evaluated_and_saved_and_stays_in_the_model(make_classification_trainer):
    schedule = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4}
    record = RecordWeights()
    make_classification_trainer(record, folder="without", **schedule).train()
    assert not equal(record.raw[-1], record.average[-1])

    trainer = make_classification_trainer(EMACallback(decay=0.9), save_steps=4, **schedule)
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    for step, loss in zip((4, 8), evaluations):
        folder = Path(trainer.args.output_dir) / f"checkpoint-{step}"
        model = TDDForImageClassification.from_pretrained(folder)
        assert equal(model.state_dict(), record.average[step - 1])
        training = load_file(folder / TRAINING_WEIGHTS_NAME)
        assert all(tensor.equal(record.raw[step - 1][name]) for name, tensor in training.items())
        assert training.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        trainer.model.load_state_dict(model.state_dict())
        assert trainer.evaluate()["eval_loss"] == loss  # what was evaluated in training is what was saved

    trainer = make_classification_trainer(EMACallback(decay=0.9), save_strategy="no", folder="end", **schedule)
    trainer.train()
    assert equal(trainer.model.state_dict(), record.average[-1])


def test_without_warmup_the_decay_is_constant(make_classification_trainer):
    record = RecordWeights()
    make_classification_trainer(record, folder="without", max_steps=4, save_strategy="no").train()
    trainer = make_classification_trainer(EMACallback(0.9, warmup=False), max_steps=4, save_strategy="no")
    trainer.train()
    expected = record.start
    for raw in record.raw:
        expected = {name: 0.9 * average + 0.1 * raw[name] for name, average in expected.items()}
    torch.testing.assert_close(weights(trainer.model), expected)
    moved = torch.cat([(record.average[-1][name] - average).flatten() for name, average in expected.items()])
    assert moved.abs().max() > 1e-3  # with warm-up the average is another one


def test_best_checkpoint_is_the_best_average(make_classification_trainer):
    settings = {"eval_strategy": "steps", "save_strategy": "best", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = make_classification_trainer(EMACallback(0.9), max_steps=8, learning_rate=3e-2, **settings)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == min(losses) == trainer.state.best_metric
    best = Path(trainer.state.best_model_checkpoint)
    assert (best / TRAINING_WEIGHTS_NAME).exists()
    assert equal(trainer.model.state_dict(), TDDForImageClassification.from_pretrained(best).state_dict())


def test_settings_that_the_average_does_not_support_are_refused(make_classification_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\), got 1.5"):
        EMACallback(decay=1.5)
    trainer = make_classification_trainer(EMACallback(), max_steps=1)
    trainer.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="needs float32 weights, got torch.bfloat16"):
        trainer.train()

    make_classification_trainer(max_steps=2, save_steps=1).train()
    with pytest.raises(ValueError, match="checkpoint-1 lacks training_weights.safetensors"):
        make_classification_trainer(EMACallback(), max_steps=2).train(str(tmp_path / "run/checkpoint-1"))
    other = make_classification_trainer(EMACallback(), max_steps=2, folder="other")
    with pytest.raises(ValueError, match="step 1 in .*other/checkpoint-1.* not the one"):
        other.train(str(tmp_path / "run/checkpoint-1"))


class SaveAlways(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = True


def test_a_callback_that_saves_must_come_first(make_classification_trainer):
    with pytest.raises(ValueError, match="must come before it"):
        make_classification_trainer(EMACallback(), SaveAlways(), max_steps=1, save_strategy="no").train()
    make_classification_trainer(SaveAlways(), EMACallback(), max_steps=1, save_strategy="no").train()


# ---- Trainer's own settings


def test_accumulated_gradients_are_those_of_the_whole_batch(make_classification_trainer):
    """With the classifier of MDD, which draws nothing at random, single steps can be compared."""
    norms = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = make_classification_trainer(
            model_fields={"corruption": "mask"},
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
        )
        trainer.train()
        norms.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "grad_norm" in e])
    torch.testing.assert_close(torch.tensor(norms[1]), torch.tensor(norms[0]), rtol=1e-4, atol=1e-5)


def test_half_precision_training_keeps_float32_weights(make_classification_trainer):
    trainer = make_classification_trainer(EMACallback(0.9), max_steps=2, bf16=True, save_strategy="no")
    before = weights(trainer.model)
    trainer.train()
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert not equal(before, trainer.model.state_dict()) and trainer.evaluate()["eval_loss"] > 0
    assert trainer.label_names == ["labels"] and not trainer.model_accepts_loss_kwargs


def test_draws_of_a_row_depend_only_on_seed_epoch_and_row(shapes, image_processor):
    noisy = shapes.map(lambda row, i: {"image": PILImage.effect_noise((16, 16), 60).convert("RGB")}, with_indices=True)
    transform = build_train_transform(AugmentationRecipe(scale=(0.2, 0.6), auto_augment="rand-m9"), image_processor)

    def read(seed: int, epoch: int) -> torch.Tensor:
        data = TrainerDataset(noisy, TrainCollator(transform), seed)
        data.set_epoch(epoch)
        return torch.stack([data[index]["pixel_values"] for index in (3, 5)])

    state = torch.get_rng_state()
    first = read(0, 0)
    assert torch.get_rng_state().equal(state)  # what the model draws is not touched
    torch.rand(7)
    assert read(0, 0).equal(first)
    assert not read(0, 1).equal(first) and not read(1, 0).equal(first)


# ---- Both tasks, on real data


def test_classifier_reaches_93_percent_on_digits(tmp_path):
    digits = load_digits_dataset()
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, do_convert_rgb=True)
    data = {split: TrainerDataset(rows, EvalCollator(processor)) for split, rows in digits.items()}
    data = {split: [rows[index] for index in range(len(rows))] for split, rows in data.items()}  # read once
    size = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "initializer_range": 0.1}
    encoder = ViTConfig(image_size=8, patch_size=2, num_hidden_layers=2, **size)
    config = TDDConfig(vision_config=encoder, num_labels=10, num_hidden_layers=1, **size)
    trainer = Trainer(
        TDDForImageClassification(config),
        arguments(
            tmp_path,
            num_train_epochs=10,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=360,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            logging_steps=50,
            save_strategy="no",
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=classification_metrics,
        callbacks=[EMACallback(decay=0.99)],
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] >= 0.93  # measured: 96.7 %


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
    folder: Path,
    model: nn.Module,
    processor: TDDProcessor,
    emoji: Dataset,
    *callbacks: TrainerCallback,
    **settings: Any,
) -> Trainer:
    data = TrainerDataset(emoji, CaptionCollator(processor))
    metrics = CaptionMetrics(model, processor, emoji["captions"], num_inference_steps=5)
    return Trainer(
        model,
        arguments(folder, **{"per_device_train_batch_size": 8, **settings}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.generate,
        callbacks=list(callbacks),
    )


def test_captioner_learns_eight_emoji_by_heart(tmp_path, emoji, emoji_captioner):
    model, processor = emoji_captioner
    settings = {"max_steps": 200, "learning_rate": 3e-3, "save_strategy": "no", "per_device_eval_batch_size": 3}
    trainer = caption_trainer(tmp_path / "run", model, processor, emoji, EMACallback(0.9), **settings)
    assert trainer.evaluate()["eval_exact_match"] == 0
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_exact_match"] == 1 and metrics["eval_token_f1"] == 1
    trainer.save_model(str(tmp_path / "saved"))
    saved = TDDForCaptioning.from_pretrained(tmp_path / "saved")
    inputs = TDDProcessor.from_pretrained(tmp_path / "saved")(images=list(emoji["image"]), return_tensors="pt")
    captions = processor.batch_decode(saved.generate(**inputs), skip_special_tokens=True)
    assert captions == [captions[0] for captions in emoji["captions"]]


def test_caption_metrics_need_both_hooks(tmp_path, emoji, emoji_captioner):
    trainer = caption_trainer(tmp_path, *emoji_captioner, emoji)
    trainer.preprocess_logits_for_metrics = None
    with pytest.raises(ValueError, match="needs `preprocess_logits_for_metrics=metrics.generate`"):
        trainer.evaluate()
    emoji_captioner[1].tokenizer.model_max_length = int(1e30)
    with pytest.raises(ValueError, match="Set `tokenizer.model_max_length`"):
        CaptionCollator(emoji_captioner[1])


# ---- LoRA


def check_lora(trainer: Trainer, base: nn.Module, before: dict[str, torch.Tensor], inputs: dict[str, Any]) -> None:
    """Trains adapters, and checks that nothing else trains, that they are averaged, and that they load and merge."""
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)
    for name, tensor in trainer.model.state_dict().items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        if "lora_" not in name and "modules_to_save" not in name:
            assert tensor.equal(before[plain]), name
    assert all(tensor.any() for name, tensor in trainer.model.named_parameters() if "lora_B" in name)  # 0 at first
    expected = trainer.model.eval()(**inputs).logits
    torch.manual_seed(0)  # a captioner's loss draws its timesteps
    loss = trainer.evaluate()["eval_loss"]
    merge_lora(trainer)
    assert set(trainer.model.state_dict()) == set(before)
    torch.testing.assert_close(trainer.model.eval()(**inputs).logits, expected, rtol=1e-3, atol=1e-4)
    torch.manual_seed(0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-3)
    adapted = PeftModel.from_pretrained(base, Path(trainer.args.output_dir) / "adapter").eval()
    torch.testing.assert_close(adapted(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("target", "new_modules", "adapted", "whole"),
    [
        ("all", [], {"encoder", "denoiser"}, set()),
        ("denoiser", ["token_embedding", "classifier"], {"denoiser"}, {"token_embedding", "classifier"}),
        ("all", ["connector", "denoiser", "classifier"], {"encoder"}, {"connector", "denoiser", "classifier"}),
    ],
)
def test_lora_of_a_classifier(
    make_classification_trainer, make_model, pixel_values, target, new_modules, adapted, whole
):
    schedule = {"max_steps": 3, "learning_rate": 1e-2}
    trainer = make_classification_trainer(EMACallback(0.5), folder="plain", **schedule)
    before, base = weights(trainer.model), make_model()
    base.load_state_dict(before)
    model = add_lora(trainer.model, 2, target, new_modules)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {
        part for part in ("encoder", "denoiser") if any(f"{part}." in n and "lora_" in n for n in trainable)
    } == adapted
    assert {n.split(".modules_to_save")[0].split(".")[-1] for n in trainable if ".modules_to_save" in n} == whole
    trainer = Trainer(
        model,
        trainer.args,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        compute_metrics=classification_metrics,
        callbacks=[EMACallback(0.5)],
    )
    assert trainer.label_names == ["labels"] and not trainer.model_accepts_loss_kwargs
    check_lora(trainer, base, before, {"pixel_values": pixel_values})


def test_lora_of_a_captioner(tmp_path, emoji, emoji_captioner):
    model, processor = emoji_captioner
    before, base = weights(model), TDDForCaptioning(model.config)
    base.load_state_dict(before)
    trainer = caption_trainer(
        tmp_path, add_lora(model, 2), processor, emoji, EMACallback(0.5), max_steps=3, learning_rate=1e-2
    )
    inputs = processor(images=list(emoji["image"]), return_tensors="pt")
    check_lora(trainer, base, before, inputs)


@pytest.mark.parametrize("rank", [0, 2])
def test_captioner_resumes_from_any_folder(tmp_path, emoji, emoji_captioner, rank):
    """With adapters and without: the callback restores what `Trainer` does not."""
    model, processor = emoji_captioner
    start = weights(model)
    ends = []
    for folder, checkpoint in (("whole", None), ("resumed", str(tmp_path / "whole/checkpoint-3"))):
        model = TDDForCaptioning(model.config)
        model.load_state_dict(start)
        torch.manual_seed(0)
        model = add_lora(model, rank) if rank else model
        settings = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
        trainer = caption_trainer(
            tmp_path / folder,
            model,
            processor,
            emoji,
            EMACallback(0.9),
            resume_from_checkpoint=checkpoint,
            **settings,
        )
        trainer.train(checkpoint)
        ends.append((weights(trainer.model), load_file(tmp_path / folder / f"checkpoint-6/{TRAINING_WEIGHTS_NAME}")))
    assert equal(ends[0][0], ends[1][0]) and equal(ends[0][1], ends[1][1])


def test_lora_without_a_module_to_adapt_is_refused(make_model):
    with pytest.raises(ValueError, match="`target` must be one of denoiser, encoder, all, got 'head'"):
        add_lora(make_model(), 2, "head")
    with pytest.raises(ValueError, match="nothing to adapt"):
        add_lora(make_model(), 2, "denoiser", ["denoiser"])


# ---- The script, as users run it


def run_here(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
    finetune.main()


@pytest.fixture
def digits_checkpoint(tmp_path: Path) -> Path:
    """An untrained tiny classifier of ten digits."""
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = TDDConfig(vision_config=ViTConfig(image_size=8, patch_size=4, **size), num_labels=10, **size)
    folder = tmp_path / "digits"
    TDDForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}, do_convert_rgb=True).save_pretrained(folder)
    return folder


def test_killed_run_ends_as_an_unbroken_one(tmp_path, monkeypatch, digits_checkpoint):
    """The run is killed while or after it writes a checkpoint within an epoch. It has random crops and accumulated
    gradients."""
    settings = [
        *("--task", "classification", "--model", str(digits_checkpoint), "--dataset", "digits"),
        *("--augmentation", '{"scale": [0.5, 1.0]}', "--ema_decay", "0.9", "--learning_rate", "0.001"),
        *("--max_steps", "40", "--save_steps", "5", "--eval_strategy", "steps", "--eval_steps", "15"),
        *("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "2"),
        *("--per_device_eval_batch_size", "360", "--report_to", "none", "--use_cpu", "--disable_tqdm", "true"),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_here(monkeypatch, *settings, "--output_dir", str(whole))

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *settings, "--output_dir", str(killed)]
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process:
        deadline = time.monotonic() + 240
        while not (killed / "checkpoint-10").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL and (killed / "checkpoint-10").exists(), log.read_text()
    assert not (killed / "model.safetensors").exists()
    assert last_complete_checkpoint(killed, with_ema=True) is not None

    run_here(monkeypatch, *settings, "--output_dir", str(killed))
    for name in ("model.safetensors", f"checkpoint-40/{TRAINING_WEIGHTS_NAME}", "checkpoint-40/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    average, last = load_file(whole / "model.safetensors"), load_file(whole / f"checkpoint-40/{TRAINING_WEIGHTS_NAME}")
    assert any(not average[name].equal(tensor) for name, tensor in last.items())
    scores = [json.loads((folder / "eval_results.json").read_text())["eval_accuracy"] for folder in (whole, killed)]
    assert scores[0] == scores[1]


def test_script_can_keep_the_decay_constant(tmp_path, monkeypatch, digits_checkpoint):
    output = tmp_path / "out"
    run_here(
        monkeypatch,
        *("--task", "classification", "--model", str(digits_checkpoint), "--dataset", "digits", "--use_cpu"),
        *("--ema_decay", "0.9", "--ema_warmup", "false", "--learning_rate", "0.001", "--warmup_steps", "0"),
        *("--max_steps", "1", "--save_steps", "1", "--per_device_eval_batch_size", "360"),
        *("--report_to", "none", "--disable_tqdm", "true", "--output_dir", str(output)),
    )
    start, average = load_file(digits_checkpoint / "model.safetensors"), load_file(output / "model.safetensors")
    last = load_file(output / f"checkpoint-1/{TRAINING_WEIGHTS_NAME}")
    for name, trained in last.items():
        torch.testing.assert_close(average[name], 0.9 * start[name] + 0.1 * trained)
    assert any(not average[name].equal(trained) for name, trained in last.items())  # with warm-up it is a copy


def test_incomplete_checkpoints_are_skipped(tmp_path, caplog):
    for step, state in ((5, "{}"), (10, "{}"), (15, '{"epoch": 0.'), (20, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / f"checkpoint-5/{TRAINING_WEIGHTS_NAME}").touch()
    assert last_complete_checkpoint(tmp_path, with_ema=False) == str(tmp_path / "checkpoint-10")
    assert last_complete_checkpoint(tmp_path, with_ema=True) == str(tmp_path / "checkpoint-5")
    assert last_complete_checkpoint(tmp_path / "none", with_ema=True) is None


QUIET = ("--report_to", "none", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", "--max_steps", "2")


def test_script_gives_an_image_folder_a_new_head(tmp_path, monkeypatch, digits_checkpoint, caplog):
    for label, colour in (("day", "white"), ("night", "black")):
        for index in range(6):
            file = tmp_path / f"images/{label}/{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            PILImage.new("RGB", (20, 14), colour).save(file)
    output = tmp_path / "out"
    run_here(
        monkeypatch,
        *("--task", "classification", "--model", str(digits_checkpoint), "--dataset", str(tmp_path / "images")),
        *(
            "--eval_share",
            "0.34",
            "--lora_rank",
            "2",
            "--lora_target",
            "denoiser",
            "--output_dir",
            str(output),
            *QUIET,
        ),
    )
    model = TDDForImageClassification.from_pretrained(output)
    assert model.config.id2label == {0: "day", 1: "night"} and model.classifier.out_features == 2
    assert 0 <= json.loads((output / "eval_results.json").read_text())["eval_accuracy"] <= 1
    old = TDDForImageClassification.from_pretrained(digits_checkpoint)
    assert equal(model.model.encoder.state_dict(), old.model.encoder.state_dict())
    assert (output / "adapter/adapter_model.safetensors").exists()


def test_script_trains_a_captioner_from_an_encoder_and_then_on_other_data(tmp_path, monkeypatch):
    encoder = tmp_path / "encoder"
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(image_size=32, patch_size=16, **size), add_pooling_layer=False).save_pretrained(encoder)
    ViTImageProcessor(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained(encoder)
    for number, split in enumerate(("validation", "test_combo")):
        folder = tmp_path / f"data{number}"
        folder.mkdir()
        first_rows(split, 16).to_parquet(folder / "train.parquet")
    common = ("--task", "captioning", "--eval_share", "0.25", *QUIET)
    overrides = json.dumps({**size, "max_position_embeddings": 12})
    run_here(
        monkeypatch,
        *("--encoder", str(encoder), "--tokenizer_kind", "word", "--config_overrides", overrides),
        *("--dataset", str(tmp_path / "data0"), "--output_dir", str(tmp_path / "first"), *common),
    )
    run_here(
        monkeypatch,
        *("--model", str(tmp_path / "first"), "--dataset", str(tmp_path / "data1")),
        *("--output_dir", str(tmp_path / "second"), *common),
    )
    first, second = (TDDProcessor.from_pretrained(tmp_path / name).tokenizer for name in ("first", "second"))
    assert first.get_vocab() == second.get_vocab() and second.model_max_length == 12
    metrics = json.loads((tmp_path / "second/eval_results.json").read_text())
    assert {"eval_exact_match", "eval_token_f1", "eval_stutter", "eval_fluent"} <= metrics.keys()
    TDDForCaptioning.from_pretrained(tmp_path / "second")


def test_recipe_starts_from_a_captioner(tmp_path, emoji_captioner):
    """So a captioner of VL-enriched is fine-tuned on COCO with scripts/train_captioning.py."""
    model, processor = emoji_captioner
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    fields = "{max_position_embeddings: 10, pooling: null, timesteps_per_image: 3}"
    recipe = load_recipe(
        ROOT / "scripts/recipes/coco_vit_b16.yaml", [f"model_checkpoint={tmp_path}", f"model={fields}"]
    )
    loaded = train_captioning.make_processor(recipe, {})
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab() and loaded.tokenizer.model_max_length == 10
    started = train_captioning.make_model(recipe, "tdd", loaded)
    assert equal(started.state_dict(), model.state_dict()) and started.config.timesteps_per_image == 3


def test_script_needs_either_a_model_or_an_encoder(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="one of --model and --encoder, got None and None"):
        run_here(monkeypatch, "--task", "classification", "--dataset", "digits", "--output_dir", str(tmp_path))


def test_label_smoothing_of_trainer_is_refused(monkeypatch, tmp_path):
    common = ("--task", "classification", "--dataset", "digits", "--model", "any", "--output_dir", str(tmp_path))
    with pytest.raises(ValueError, match="label smoothing in --config_overrides"):
        run_here(monkeypatch, *common, "--label_smoothing_factor", "0.1")


def test_the_data_get_the_epoch(make_classification_trainer):
    epochs = []
    trainer = make_classification_trainer(EpochCallback(), num_train_epochs=3, save_strategy="no")
    trainer.train_dataset.set_epoch = epochs.append
    trainer.train()
    assert set(epochs) == {0, 1, 2}
