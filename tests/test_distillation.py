# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Distillation: a student must do in one step what its teacher does in many, and be an ordinary checkpoint."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from datasets import load_dataset
from torch import Tensor

from modeling_tdd import TDDForCaptioning
from modeling_tdd.training.arguments import TDDTrainingArguments
from modeling_tdd.training.distillation import DistillationTrainer, make_student


ROOT = Path(__file__).parent.parent


def test_a_student_learns_the_captions_of_its_teachers_loop(
    make_captioner: Callable[..., TDDForCaptioning], tmp_path: Path
) -> None:
    """A random teacher, whose one step differs from its loop with guidance on most of the images."""
    torch.manual_seed(0)
    teacher = make_captioner(timesteps_per_image=1, hidden_dropout_prob=0.0, initializer_range=0.5)
    settings = {"num_inference_steps": 8, "guidance_scale": 3.0}
    pixels = torch.randn(24, 3, 16, 16)
    target = teacher.generate(pixels, **settings)
    before = (teacher.generate(pixels, num_inference_steps=1) == target).double().mean()
    weights = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = make_student(teacher, num_inference_steps=1)
    data = [{"pixel_values": image, "labels": torch.tensor([5, 2])} for image in pixels]  # labels that nobody reads
    trainer = DistillationTrainer(
        student,
        TDDTrainingArguments(
            output_dir=str(tmp_path / "run"),
            num_train_epochs=120,
            per_device_train_batch_size=24,
            learning_rate=3e-3,
            ema_decay=0.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data,
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
        teacher=teacher,
        teacher_settings=settings,
        num_inference_steps=1,
    )
    trainer.train()
    assert all(torch.equal(weights[name], tensor) for name, tensor in teacher.state_dict().items())
    student.eval().save_pretrained(tmp_path / "student")
    loaded = TDDForCaptioning.from_pretrained(tmp_path / "student").eval()
    outputs = loaded.generate(pixels, return_dict_in_generate=True)
    assert (outputs.num_steps == 1).all() and loaded.generation_config.guidance_scale == 1.0
    after = (outputs.sequences == target).double().mean()
    assert before < 0.2 and after > 0.8, f"{before:.2f} before, {after:.2f} after"


@pytest.mark.parametrize(
    ("timestep_sampling", "steps", "expected"),
    [("shared", 1, {20}), ("shared", 2, {20, 10}), ("per_token", 1, {20}), ("per_token", 2, {20, 1})],
)
def test_only_the_timesteps_of_the_short_loop_are_trained(
    make_captioner: Callable[..., TDDForCaptioning],
    pixel_values: Tensor,
    tmp_path: Path,
    timestep_sampling: str,
    steps: int,
    expected: set,
) -> None:
    teacher = make_captioner(timesteps_per_image=3, timestep_sampling=timestep_sampling)
    student, seen = make_student(teacher, steps), set()
    trainer = DistillationTrainer(
        student,
        TDDTrainingArguments(output_dir=str(tmp_path), report_to="none", ema_decay=0.0),
        train_dataset=[0],
        teacher=teacher,
        teacher_settings={},
        num_inference_steps=steps,
    )
    student.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs["timesteps"].flatten().tolist()), with_kwargs=True
    )
    in_loop: set[int] = set()  # what the student's own loop reads
    make_network = student.make_network

    def record(prefix: Tensor) -> Any:
        network = make_network(prefix)

        def call(state: Any, *args: Any) -> Tensor:
            in_loop.update(state.timesteps.flatten().tolist())
            return network(state, *args)

        return Mock(wraps=network, side_effect=call)

    student.make_network = record
    student.eval().generate(pixel_values)
    labels = torch.tensor([[5, 2]] * 4)
    for _ in range(4):
        assert trainer.compute_loss(student.train(), {"pixel_values": pixel_values, "labels": labels}).requires_grad
    assert seen == in_loop == expected


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    import distill

    for split, count in (("train", 64), ("validation", 20)):
        rows = load_dataset("parquet", data_files=f"{ROOT}/scripts/data/emoji_mini/{split}.parquet", split="train")
        rows.select(range(count)).to_parquet(f"{split}.parquet")
    files = "train: train.parquet, validation: validation.parquet"
    changes = (f"checkpoint={ROOT / 'checkpoints/emoji-captions'}", f"data.data_files={{{files}}}")
    changes += ("data.eval_splits=[validation]", "training.num_train_epochs=1", "training.batch_size=32")
    recipe = str(ROOT / "scripts/recipes/emoji_distill.yaml")
    monkeypatch.setattr(sys, "argv", ["distill.py", recipe, "--output-dir", "out/student", "--set", *changes])
    distill.main()
    table = capsys.readouterr().out
    result = json.loads((tmp_path / "out/student/result.json").read_text())
    assert [(row["model"], row["split"]) for row in result["scores"]] == [
        ("teacher", "validation"),
        ("student", "validation"),
    ]
    assert "| student | validation |" in table and result["scores"][0]["exact_match"] > 0.3
    student = TDDForCaptioning.from_pretrained(tmp_path / "out/student")
    assert student.generation_config.num_inference_steps == 1
    with pytest.raises(SystemExit, match="is done already"):
        distill.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--steps", "2"])
    with pytest.raises(ValueError, match="student is a run with other settings: steps was 1, is 2"):
        distill.main()
