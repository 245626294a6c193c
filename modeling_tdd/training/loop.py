# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The training loop: Accelerate moves and synchronises, AdamW steps, timm keeps the moving average of the weights."""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from datasets import Dataset
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from .data import Batch, Example
from .recipe import TrainingRecipe


def fast_mixed_precision() -> str:
    """`"bf16"` where the hardware multiplies matrices faster in it, `"no"` elsewhere.

    Of CPUs those are the ones with AMX (19 times as fast as float32); on one without, bf16 was over 100 times slower.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "no"


def make_accelerator(recipe: TrainingRecipe) -> Accelerator:
    """An Accelerator that reaches the recipe's batch size by gradient accumulation, whatever the number of processes.

    Raises:
        `ValueError`: if the batch size is not a whole number of accumulated device batches.
    """
    if recipe.cpu_threads is not None:
        torch.set_num_threads(recipe.cpu_threads)
    precision = fast_mixed_precision() if recipe.mixed_precision == "auto" else recipe.mixed_precision
    # Without `cpu=True` Accelerate runs processes that have no GPU as so many separate trainings.
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())
    device_batch_size = recipe.device_batch_size or recipe.batch_size // accelerator.num_processes
    steps, remainder = divmod(recipe.batch_size, max(1, device_batch_size) * accelerator.num_processes)
    if remainder or steps == 0:
        raise ValueError(
            f"`training.batch_size` must be a multiple of `device_batch_size` x processes, got {recipe.batch_size} "
            f"and {device_batch_size} x {accelerator.num_processes}."
        )
    accelerator.gradient_accumulation_steps = steps
    accelerator.print(
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, precision {precision}: batch size "
        f"{recipe.batch_size} = {device_batch_size} x {accelerator.num_processes} x {steps} accumulation step(s)"
    )
    return accelerator


def make_loader(
    accelerator: Accelerator,
    recipe: TrainingRecipe,
    dataset: Dataset,
    collate: Callable[[list[Example]], Batch],
    shuffle: bool,
    seed: int = 0,
) -> DataLoader:
    """Batches of one device's share, sharded over the processes by Accelerate. Training drops a last short batch."""
    device_batch_size = recipe.batch_size // (accelerator.gradient_accumulation_steps * accelerator.num_processes)
    if shuffle and len(dataset) < recipe.batch_size:
        raise ValueError(f"`training.batch_size` is {recipe.batch_size}, but there are only {len(dataset)} images.")
    loader = DataLoader(
        dataset,
        batch_size=device_batch_size,
        shuffle=shuffle,
        drop_last=shuffle,
        collate_fn=collate,
        num_workers=recipe.num_workers,
        persistent_workers=recipe.num_workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )
    return accelerator.prepare(loader)


def train(
    accelerator: Accelerator,
    recipe: TrainingRecipe,
    model: PreTrainedModel,
    loader: DataLoader,
    evaluate: Callable[[PreTrainedModel], float],
    description: str = "training",
) -> PreTrainedModel:
    r"""
    Trains a model in place.

    Args:
        accelerator (`Accelerator`): From [`make_accelerator`].
        recipe ([`TrainingRecipe`]): The optimisation.
        model (`PreTrainedModel`): Returns a `loss` in training mode.
        loader (`DataLoader`): From [`make_loader`].
        evaluate (`Callable`): From a model to its score, shown as training goes.
        description (`str`, *optional*): Of the progress bar.

    Returns:
        `PreTrainedModel`: the moving average of the model, in eval mode: what to evaluate and to publish.
    """
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(model, recipe.weight_decay),
        lr=recipe.learning_rate,
        betas=(0.9, recipe.adam_beta2),
        fused=True,
    )
    steps_per_epoch = math.ceil(len(loader) / accelerator.gradient_accumulation_steps)
    total_steps = steps_per_epoch * recipe.epochs
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(recipe.warmup_epochs * steps_per_epoch), total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    # With its warm-up the average follows a short run too: its horizon grows with the steps taken.
    ema = ModelEmaV3(accelerator.unwrap_model(model), decay=recipe.ema_decay, use_warmup=True)

    bar = tqdm(total=total_steps, desc=description, disable=not accelerator.is_local_main_process)
    score, step = None, 0
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
                step += 1
                ema.update(accelerator.unwrap_model(model), step=step)
                bar.update()
        if epoch % recipe.eval_every == 0 or epoch == recipe.epochs:
            score = evaluate(ema.module)
        bar.set_postfix(epoch=epoch, loss=f"{loss.item():.3f}", **({} if score is None else {"eval": f"{score:.2%}"}))
    bar.close()
    accelerator.free_memory()
    return ema.module
