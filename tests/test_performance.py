# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What makes the loops fast must not change what they compute, and must not be lost: a slow loop as the reference,
compiled steps, and the work of a step as PyTorch's profiler counts it."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from modeling_tdd import TDDForCaptioning, TDDForImageClassification
from modeling_tdd.evaluation.benchmarks import count_work, count_work_of_a_step, format_benchmark, medians
from modeling_tdd.modeling_tdd import ConditionedDenoiser
from modeling_tdd.samplers_tdd import (
    SETTLED_TIMESTEP,
    ConfidenceSampler,
    KnownTokens,
    RenoiseSampler,
    UnmaskingSampler,
    follows_end,
    inference_timesteps,
)
from modeling_tdd.sampling_tdd import DenoisingStep, RandomNumbers, denoise


MakeModel = Callable[..., nn.Module]
PAD, EOS = 0, 2


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# ---- The reference: a call with the condition and one without it, and nothing kept from step to step


def predict(
    model: nn.Module, prefix: Tensor, tokens: Tensor, timesteps: Tensor, noise: Tensor, scale: float
) -> Tensor:
    """Guided logits by equation 1, from two calls of the denoiser."""
    denoiser, head = model.model.denoiser, model.get_output_embeddings()
    conditional = head(denoiser(tokens, timesteps, noise, prefix).last_hidden_state)
    unconditional = head(denoiser(tokens, timesteps, noise).last_hidden_state)
    return unconditional + scale * (conditional - unconditional)


def draw_noise(model: nn.Module, rows: int, generator: torch.Generator) -> Tensor:
    shape = (1, model.config.max_position_embeddings, model.config.noise_width)
    return torch.randn(shape, generator=generator).expand(rows, -1, -1)


@torch.no_grad()
def classify_slowly(model: TDDForImageClassification, pixel_values: Tensor, steps: int, scale: float) -> Tensor:
    prefix, generator = model.model.get_prefix(pixel_values), torch.Generator().manual_seed(0)
    tokens = torch.zeros(len(pixel_values), 1, dtype=torch.long)
    for timestep in inference_timesteps(model.config.num_timesteps, steps)[:-1]:
        noise = draw_noise(model, len(tokens), generator)
        logits = predict(model, prefix, tokens, torch.full_like(tokens, timestep), noise, scale)
        tokens = logits.argmax(-1)
    return logits[:, 0]


@torch.no_grad()
def caption_slowly(model: TDDForCaptioning, pixel_values: Tensor, steps: int, scale: float) -> Tensor:
    """The confidence sampler, a row at a time."""
    prefix, generator = model.model.get_prefix(pixel_values), torch.Generator().manual_seed(0)
    highest, places = model.config.num_timesteps, model.config.max_position_embeddings
    tokens = torch.zeros(len(prefix), places, dtype=torch.long)
    timesteps = torch.full_like(tokens, highest)
    for next_timestep in inference_timesteps(highest, steps)[1:]:
        noise = draw_noise(model, len(tokens), generator)
        log_probs, tokens = predict(model, prefix, tokens, timesteps, noise, scale).log_softmax(-1).max(-1)
        timesteps = torch.full_like(tokens, highest)
        beyond_end = follows_end(tokens, (EOS, PAD))
        for row in range(len(tokens)):
            for group in (beyond_end[row], ~beyond_end[row]):
                order = sorted(group.nonzero().flatten().tolist(), key=lambda place: -log_probs[row, place].item())
                settled = order[: round((1 - next_timestep / highest) * len(order))]
                timesteps[row, settled] = max(1, round(SETTLED_TIMESTEP * highest))
    return tokens.masked_fill(follows_end(tokens, (EOS, PAD)), PAD)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("num_labels", [5, 50])  # noise of width K, and of width d
def test_classification_is_that_of_the_slow_loop(
    make_model: MakeModel, pixel_values: Tensor, num_labels: int, scale: float, compiled: bool
) -> None:
    model = make_model(num_labels=num_labels)
    if compiled:
        model.compile_denoising(backend="aot_eager", mode=None)
    with torch.no_grad():
        logits = model(pixel_values, num_inference_steps=6, guidance_scale=scale).logits
    torch.testing.assert_close(logits, classify_slowly(model, pixel_values, 6, scale), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_captions_are_those_of_the_slow_loop(
    make_captioner: MakeModel, pixel_values: Tensor, scale: float, compiled: bool
) -> None:
    model = make_captioner()
    if compiled:
        model.compile_denoising(backend="aot_eager", mode=None)
    captions = model.generate(pixel_values, num_inference_steps=5, guidance_scale=scale)
    assert captions.tolist() == caption_slowly(model, pixel_values, 5, scale).tolist()
    assert len({tuple(row) for row in captions.tolist()}) > 1  # the images matter


# ---- Compiled steps


class CountingBackend:
    """Counts graphs, and runs them as CUDA graphs do: each run of a graph overwrites what it returned before."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        self.graphs += 1
        memory: list[Tensor] = []

        def run(*inputs: Tensor) -> list[Tensor]:
            results = [result.clone() for result in module(*inputs)]
            if not memory:
                memory.extend(results)
            for kept, result in zip(memory, results, strict=True):
                kept.copy_(result)
            return memory

        return run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"confidence_threshold": 0.3},
        {"stability_threshold": 1},
        {"do_sample": True, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_trajectory": True},
    ],
)
@pytest.mark.parametrize("corruption", ["gaussian", "mask", "uniform"])
def test_compiled_captions(make_captioner: MakeModel, pixel_values: Tensor, corruption: str, settings: dict) -> None:
    """The same captions, from one graph for all steps and all later calls of a batch size."""
    model, backend = make_captioner(corruption=corruption), CountingBackend()
    expected = model.generate(pixel_values, num_inference_steps=6, **settings)
    model.compile_denoising(backend=backend, mode=None)
    for seed in (0, 0):
        made = model.generate(pixel_values, num_inference_steps=6, seed=seed, **settings)
        assert backend.graphs == 1
        if isinstance(expected, Tensor):
            assert torch.equal(made, expected)
        else:
            assert torch.equal(made.sequences, expected.sequences)
            assert torch.equal(made.trajectory.tokens, expected.trajectory.tokens)
            torch.testing.assert_close(made.log_probs, expected.log_probs, atol=1e-5, rtol=1e-5)
    model.generate(pixel_values[:2], num_inference_steps=6, **settings)
    assert backend.graphs == 2


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0}, {"output_hidden_states": True}])
def test_compiled_logits_outlive_the_next_call(make_model: MakeModel, pixel_values: Tensor, settings: dict) -> None:
    """On a GPU, the logits of a batch once turned into those of the next batch."""
    model, backend = make_model(), CountingBackend()
    with torch.no_grad():
        expected = [model(pixels, num_inference_steps=3, **settings) for pixels in (pixel_values, -pixel_values)]
        model.compile_denoising(backend=backend, mode=None)
        made = [model(pixels, num_inference_steps=3, **settings) for pixels in (pixel_values, -pixel_values)]
    assert backend.graphs == 1 and not torch.allclose(expected[0].logits, expected[1].logits, atol=1e-3)
    for one, other in zip(expected, made):
        for name, values in one.items():
            torch.testing.assert_close(other[name], values, atol=1e-5, rtol=1e-5)


def test_compiled_steps_with_and_without_guidance(make_captioner: MakeModel, pixel_values: Tensor) -> None:
    """A graph with guidance reads keys and values of the null condition, which are missing in the next call."""
    model, backend = make_captioner(), CountingBackend()
    scales = (2.0, 1.0, 3.0, 1.0)
    expected = [model.generate(pixel_values, guidance_scale=scale) for scale in scales]
    model.compile_denoising(backend=backend, mode=None)
    for scale, captions in zip(scales, expected):
        assert torch.equal(model.generate(pixel_values, guidance_scale=scale), captions)
    assert backend.graphs == 2


def test_processed_logits_are_not_compiled(make_captioner: MakeModel, pixel_values: Tensor) -> None:
    model, backend = make_captioner(), CountingBackend()
    expected = model.generate(pixel_values, bad_words_ids=[[5]])
    model.compile_denoising(backend=backend, mode=None)
    assert torch.equal(model.generate(pixel_values, bad_words_ids=[[5]]), expected) and backend.graphs == 0


# ---- The work of a step


def run_classifier(model: nn.Module, pixel_values: Tensor, steps: int, **settings: float) -> None:
    with torch.no_grad():
        model(pixel_values, num_inference_steps=steps, **settings)


@pytest.mark.parametrize(("settings", "most"), [({}, 95), ({"guidance_scale": 2.0}, 115)])
def test_operations_of_a_classification_step(
    make_model: MakeModel, pixel_values: Tensor, settings: dict, most: int
) -> None:
    """Two layers. Guidance adds few operations: both conditions are one pass. Nothing waits for the device."""
    work = count_work_of_a_step(partial(run_classifier, make_model(), pixel_values, **settings))
    assert work["host_reads"] == 0
    assert 60 < work["kernels"] <= most


@pytest.mark.parametrize(("corruption", "most"), [("gaussian", 185), ("mask", 175)])
def test_operations_of_a_captioning_step(
    make_captioner: MakeModel, pixel_values: Tensor, corruption: str, most: int
) -> None:
    """As on a GPU: on a CPU a step asks which places are settled, where nothing reads the scores of all places."""
    model, call = make_captioner(corruption=corruption), {"return_dict_in_generate": True}
    work = count_work_of_a_step(lambda steps: model.generate(pixel_values, num_inference_steps=steps, **call))
    assert work["host_reads"] == 0
    assert 100 < work["kernels"] <= most


def test_a_whole_classification_reads_one_number(make_model: MakeModel, pixel_values: Tensor) -> None:
    """It asks at the end whether the scores are finite."""
    model = make_model()
    assert count_work(partial(run_classifier, model, pixel_values, 10, guidance_scale=2.0))["host_reads"] == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["classifier", "wide classifier", "captioner", "mask captioner"])
def test_nothing_waits_for_a_gpu(make_model: MakeModel, make_captioner: MakeModel, name: str, training: bool) -> None:
    """On tensors that have a GPU's name and no values, whatever asks for a value fails: a number, a mask's places."""
    if "captioner" in name:
        model = make_captioner(corruption="mask" if "mask" in name else "gaussian")
        labels = torch.full((4, 8), 5)
    else:
        model, labels = make_model(num_labels=50 if "wide" in name else 5), torch.ones(4, dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        to_gpu = partial(tree_map, lambda value: mode.from_tensor(value).to("cuda"))
        model = model.to("cuda").train(training)
        pixel_values, labels = to_gpu((torch.randn(4, 3, 16, 16), labels))
        if training:
            assert model(pixel_values, labels).loss.device.type == "cuda"
            return
        prefix = model.model.get_prefix(pixel_values)
        with torch.no_grad():
            steps = list(loop_on(model, prefix))
        assert len(steps) == 3 and steps[-1].prediction.tokens.device.type == "cuda"


def loop_on(model: nn.Module, prefix: Tensor) -> Iterator[DenoisingStep]:
    """A guided loop with the model's sampler."""
    config, device = model.config, prefix.device
    is_mask, places = config.corruption == "mask", config.max_position_embeddings
    sampler = RenoiseSampler(config.num_timesteps)
    if places > 1:
        sampler = ConfidenceSampler(config.num_timesteps, (EOS, PAD))
    if is_mask:
        sampler = UnmaskingSampler(torch.linspace(1, 0, 21, device=device), config.num_categories, (EOS, PAD))
    width = None if is_mask else config.noise_width
    numbers = RandomNumbers([torch.Generator()], len(prefix), 1, places, width, device)
    network = ConditionedDenoiser(model.model.denoiser, model.get_output_embeddings(), prefix)
    return denoise(network, sampler, numbers, KnownTokens.none(len(prefix), places, device), [2.0] * 3)


def test_timesteps_of_an_image_add_no_operations_to_a_training_step(
    make_model: MakeModel, pixel_values: Tensor
) -> None:
    def count(repeats: int) -> int:
        model = make_model(timesteps_per_image=repeats).train()

        def step() -> None:
            model.zero_grad()
            model(pixel_values, torch.zeros(4, dtype=torch.long)).loss.backward()

        return count_work(step)["kernels"]

    one = count(1)
    assert one > 500 and all(count(repeats) <= one + 10 for repeats in (4, 8))


def test_counting_sees_a_host_read() -> None:
    values = torch.ones(3)
    assert count_work(lambda: values.sum().item())["host_reads"] == 1
    assert count_work(lambda: values + values) == {"kernels": 1, "host_reads": 0, "copies": 0}


# ---- What is kept between calls


@torch.no_grad()
def test_the_noise_factor_is_kept_as_long_as_the_weights_are_the_same(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *args: calls.append(1) or original(*args))
    embedding = make_model(num_labels=50).model.denoiser.token_embedding
    noise = torch.randn(3, embedding.embedding_dim)
    first = embedding(noise=noise)
    assert torch.equal(embedding(noise=noise), first) and len(calls) == 1
    # Changes that PyTorch does not count are seen too
    weight = embedding.weight.clone()
    embedding.weight.data.copy_(2 * weight)
    torch.testing.assert_close(embedding(noise=noise), 2 * first, atol=1e-4, rtol=1e-4)
    embedding.weight.data[7, 3] += 0.5
    embedding(noise=noise)
    embedding.weight.data.copy_(weight)
    torch.testing.assert_close(embedding(noise=noise), first)
    assert len(calls) == 4


def test_the_noise_factor_of_training_has_a_gradient(make_model: MakeModel) -> None:
    embedding = make_model(num_labels=50).model.denoiser.token_embedding
    noise = torch.randn(3, embedding.embedding_dim)
    with torch.no_grad():
        embedding(noise=noise)
    embedding(noise=noise).sum().backward()
    assert embedding.weight.grad.abs().sum() > 0


# ---- Adaptive steps


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"stability_threshold": 1}, {"confidence_threshold": 0.4}])
def test_adaptive_classification(make_model: MakeModel, pixel_values: Tensor, settings: dict) -> None:
    """A row that ends early has the logits of its last step, in any batch, and its trajectory repeats them."""
    model = make_model()
    call = {"num_inference_steps": 12, "guidance_scale": 2.0, "output_trajectory": True}
    whole = model(pixel_values, **call).trajectory
    adaptive = model(pixel_values, **call, **settings)
    ends = []
    for row, trajectory in enumerate(adaptive.trajectory):
        end = next(
            step
            for step, (probs, label) in enumerate(zip(whole[row], whole[row].argmax(-1)))
            if step == 11
            or ("stability_threshold" in settings and step > 0 and label == whole[row, step - 1].argmax())
            or probs.max() >= settings.get("confidence_threshold", 2)
        )
        ends.append(end)
        last = min(end, len(trajectory) - 1)
        torch.testing.assert_close(trajectory[: last + 1], whole[row, : last + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(adaptive.logits[row].softmax(-1), whole[row, end], atol=1e-5, rtol=1e-5)
        alone = model(pixel_values[row : row + 1], **call, **settings)
        torch.testing.assert_close(alone.logits[0], adaptive.logits[row], atol=1e-5, rtol=1e-5)
        assert alone.trajectory.shape[1] == end + 1
    assert len(adaptive.trajectory[0]) == max(ends) + 1 and min(ends) < 11


@pytest.mark.parametrize("corruption", ["gaussian", "mask"])
def test_adaptive_captions_do_not_depend_on_their_batch(
    make_captioner: MakeModel, pixel_values: Tensor, corruption: str
) -> None:
    model = make_captioner(corruption=corruption)
    call = {"num_inference_steps": 12, "confidence_threshold": 0.25}
    outputs = model.generate(pixel_values, return_dict_in_generate=True, **call)
    assert torch.equal(model.generate(pixel_values, **call), outputs.sequences)  # without logits of settled places
    assert len(set(outputs.num_steps.tolist())) > 1 and outputs.num_steps.max() <= model.config.max_position_embeddings
    for row in range(len(pixel_values)):
        alone = model.generate(pixel_values[row : row + 1], return_dict_in_generate=True, **call)
        assert torch.equal(alone.sequences[0], outputs.sequences[row])
        assert alone.num_steps.item() == outputs.num_steps[row]


# ---- The benchmark


def test_medians_take_turns() -> None:
    order: list[str] = []
    jobs = {name: partial(order.append, name) for name in "ab"}
    assert medians(jobs, 3, torch.device("cpu")).keys() == {"a", "b"}
    assert order == ["a", "b"] * 4


def test_table_of_a_benchmark() -> None:
    rows = [{"job": "one", "batch_size": size, "milliseconds": 10.0 * size, "throughput": 1.0} for size in (1, 8)] + [
        {"job": "two", "batch_size": 8, "milliseconds": 20.0, "throughput": 4.0}
    ]
    lines = format_benchmark(rows).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["one", "10.0", "1.00", "80.0", "1.00"]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["two", "-", "-", "20.0", "4.00"]


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (["step", "--output", "x", "--batch-sizes", "3"], "step does not use --batch-sizes, --output"),
        (["train", "--compile"], "train does not use --compile"),
        (["growth", "--dtype", "bfloat16", "--repeats", "3"], "growth does not use --dtype, --repeats"),
    ],
)
def test_arguments_without_effect_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], unused: str
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "scripts")
    import benchmark

    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit):
        benchmark.parse_arguments()
    assert unused in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "classify", "--compile", "--repeats", "3"])
    assert benchmark.parse_arguments().compile
