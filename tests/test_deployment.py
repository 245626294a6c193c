# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Deployment: torch.compile, torch.export, ONNX and int8."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import Dim
from torch.onnx import ONNXProgram
from torchao.core.config import AOBaseConfig
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from torchao.utils import TorchAOBaseTensor
from transformers import TorchAoConfig, ViTImageProcessor

from modeling_tdd import TDDForCaptioning, TDDModel


SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.append(str(SCRIPTS))

from export_onnx import DenoiserStep, PrefixEncoder, export_onnx, load_model, sample_inputs  # noqa: E402


MakeModel = Callable[..., nn.Module]
IMAGE_SHAPE = (3, 16, 16)


@pytest.fixture(params=["classifier", "captioner"])
def model(request: pytest.FixtureRequest, make_model: MakeModel, make_captioner: MakeModel) -> nn.Module:
    return make_model() if request.param == "classifier" else make_captioner()


@torch.no_grad()
def answer(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """What a user asks for: a classifier's logits, or captions."""
    return model.generate(pixel_values) if isinstance(model, TDDForCaptioning) else model(pixel_values).logits


# ---- torch.compile: that it is traced is what is ours; the code that inductor makes of the trace is PyTorch's


@pytest.fixture(autouse=True)
def forget_compiled_code() -> None:
    torch._dynamo.reset()


def test_compiled_denoiser(model: nn.Module, pixel_values: Tensor) -> None:
    """One graph without a break, which `generate` and the classifier's loop then call at each step."""
    expected = answer(model, pixel_values)
    model.model.denoiser.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(answer(model, pixel_values), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["base model", "classifier", "captioner"])
def test_compiled_forward(make_model: MakeModel, make_captioner: MakeModel, pixel_values: Tensor, name: str) -> None:
    model = make_model() if name == "classifier" else make_captioner()
    model = model.model if name == "base model" else model
    assert isinstance(model, TDDModel) == (name == "base model")
    expected = model(pixel_values)
    compiled = torch.compile(model, backend="aot_eager")(pixel_values)
    key = "last_hidden_state" if name == "base model" else "logits"
    torch.testing.assert_close(compiled[key], expected[key], atol=1e-5, rtol=1e-5)


def test_compiled_training(make_captioner: MakeModel, pixel_values: Tensor) -> None:
    model = make_captioner(condition_dropout=0.0).train()
    inputs = {
        "labels": torch.tensor([[5, 6, 7, 2]] * 4),
        "timesteps": torch.arange(1, 13).view(4, 3),
        "noise": torch.randn(4, 3, 8, 20),
    }
    model(pixel_values, **inputs).loss.backward()
    compiled = copy.deepcopy(model)
    compiled.zero_grad()
    torch.compile(compiled, backend="aot_eager")(pixel_values, **inputs).loss.backward()
    for name, parameter in model.named_parameters():
        gradient = compiled.get_parameter(name).grad
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


# ---- torch.export and ONNX


@torch.no_grad()
def test_exported_encoder_and_step(model: nn.Module) -> None:
    encoder, step = PrefixEncoder(model).eval(), DenoiserStep(model).eval()
    pixel_values, inputs = sample_inputs(model, IMAGE_SHAPE, rows=2)
    key_values = list(encoder(pixel_values))
    rows = {0: Dim("rows")}
    exported_encoder = torch.export.export(encoder, (pixel_values,), dynamic_shapes=(rows,)).module()
    exported_step = torch.export.export(
        step, (inputs, key_values), dynamic_shapes=([rows] * len(inputs), [rows] * len(key_values))
    ).module()
    pixel_values, inputs = sample_inputs(model, IMAGE_SHAPE, rows=5)
    key_values = list(encoder(pixel_values))
    torch.testing.assert_close(list(exported_encoder(pixel_values)), key_values, atol=1e-5, rtol=1e-5)
    logits = step(inputs, key_values)
    torch.testing.assert_close(exported_step(inputs, key_values), logits, atol=1e-5, rtol=1e-5)
    assert logits.std(0).min() > 1e-3  # images and noisy tokens matter
    # And they are those of the model itself
    expected = step.head(model.model.denoiser(*inputs, model.model.get_prefix(pixel_values)).last_hidden_state)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_model_works_after_it_was_exported_first(make_model: MakeModel, pixel_values: Tensor) -> None:
    """Its schedules are cached for all models, and the tracer's tensors must not be."""
    model = make_model(num_timesteps=17)  # a schedule that no other test has asked for
    _, inputs = sample_inputs(model, IMAGE_SHAPE, rows=2)
    key_values = list(PrefixEncoder(model)(pixel_values[:2]))
    torch.export.export(DenoiserStep(model).eval(), (inputs, key_values))
    assert type(model(pixel_values).logits.sum().item()) is float


@pytest.mark.parametrize("kind", ["classifier", "captioner", "mask captioner"])
@torch.no_grad()
def test_onnx(make_model: MakeModel, make_captioner: MakeModel, tmp_path: Path, kind: str) -> None:
    """The script checks the parity; here a guided step is made of its files alone. With more categories than the width
    the factor of the noise is a constant of the graph."""
    if kind == "classifier":
        model = make_model(num_labels=50)
    else:
        model = make_captioner(vocab_size=50, corruption="mask" if kind == "mask captioner" else "gaussian")
    model.save_pretrained(tmp_path / "checkpoint")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "checkpoint")
    output = tmp_path / "onnx"
    program = [sys.executable, SCRIPTS / "export_onnx.py", tmp_path / "checkpoint", "--output", output]
    printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    assert "both graphs agree with the model to 1e-4" in printed
    assert {path.name for path in output.iterdir()} >= {"encoder.onnx", "denoiser_step.onnx"}
    assert sorted(tmp_path.iterdir()) == [tmp_path / "checkpoint", output]

    pixel_values, inputs = sample_inputs(model, IMAGE_SHAPE, rows=4)
    denoiser, head = model.model.denoiser, model.get_output_embeddings()
    conditional = head(denoiser(*inputs, prefix=model.model.get_prefix(pixel_values)).last_hidden_state)
    unconditional = head(denoiser(*inputs).last_hidden_state)
    expected = unconditional + 2 * (conditional - unconditional)

    encoder = onnxruntime.InferenceSession(output / "encoder.onnx")
    step = onnxruntime.InferenceSession(output / "denoiser_step.onnx")
    names = [made.name for made in encoder.get_outputs()]
    of_images = dict(zip(names, encoder.run(names, {"pixel_values": pixel_values.numpy()})))
    of_nothing = {
        name: np.repeat(tensor.numpy(), 4, axis=0)
        for name, tensor in load_file(output / "null_condition.safetensors").items()
    }
    arrays = dict(zip(("tokens", "timesteps", "noise"), (tensor.numpy() for tensor in inputs)))
    (conditional,), (unconditional,) = (step.run(["logits"], {**arrays, **made}) for made in (of_images, of_nothing))
    guided = torch.from_numpy(unconditional + 2 * (conditional - unconditional))
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)


def test_a_graph_that_differs_is_not_written(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ONNXProgram.__call__
    monkeypatch.setattr(ONNXProgram, "__call__", lambda *inputs: tuple(made + 2e-4 for made in call(*inputs)))
    with pytest.raises(AssertionError, match="not close"):
        export_onnx(make_model(), IMAGE_SHAPE, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_mdds_classifier_has_no_step_to_export(make_model: MakeModel, tmp_path: Path) -> None:
    make_model(corruption="mask").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no denoising step to export"):
        load_model(str(tmp_path))


# ---- int8


INT8 = [Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()]


def assert_close_to(quantised: nn.Module, model: nn.Module, pixel_values: Tensor, tolerance: float = 0.05) -> None:
    """One step's logits, to a share of their spread, and not equal, or nothing was quantised. After one step the
    argmax may turn rounding into another token, as it may in any loop of choices."""
    steps = {} if isinstance(model, TDDForCaptioning) else {"num_inference_steps": 1}
    with torch.no_grad():
        expected, logits = model(pixel_values, **steps).logits, quantised(pixel_values, **steps).logits
    assert 0 < (logits - expected).square().mean().sqrt() < tolerance * expected.std()
    assert answer(quantised, pixel_values).shape == answer(model, pixel_values).shape


@pytest.mark.parametrize("config", INT8, ids=lambda config: type(config).__name__)
def test_torchao(model: nn.Module, pixel_values: Tensor, config: AOBaseConfig) -> None:
    quantised = copy.deepcopy(model)
    quantize_(quantised, config)
    assert isinstance(quantised.model.denoiser.layers[0].mlp.fc1.weight, TorchAOBaseTensor)
    assert_close_to(quantised, model, pixel_values)


def test_torchao_while_loading(model: nn.Module, pixel_values: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "float")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantised = type(model).from_pretrained(tmp_path / "float", quantization_config=config, device_map="cpu")
    assert isinstance(quantised.model.denoiser.layers[0].mlp.fc1.weight, TorchAOBaseTensor)
    assert_close_to(quantised, model, pixel_values)
    quantised.save_pretrained(tmp_path / "int8")
    loaded = type(model).from_pretrained(tmp_path / "int8", device_map="cpu")
    assert torch.equal(answer(loaded, pixel_values), answer(quantised, pixel_values))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_dynamic_quantisation(model: nn.Module, pixel_values: Tensor) -> None:
    """PyTorch's own, older than torchao and coarser: one scale for a whole matrix."""
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantised.model.denoiser.layers[0].mlp.fc1, nn.Linear)
    assert_close_to(quantised, model, pixel_values, tolerance=0.1)
