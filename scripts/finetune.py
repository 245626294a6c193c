"""Fine-tune a classifier or a captioner with Transformers' `Trainer`, on any image folder or data set of the Hub.

    python scripts/finetune.py --task classification --model outputs/digits/tdd-seed0 \
        --dataset my_images --output_dir outputs/my_images --num_train_epochs 10 --eval_strategy epoch
    python scripts/finetune.py --task captioning --model outputs/imagenet_vl_enriched/tdd-seed0 \
        --dataset coco --data_dir data/coco --train_split train2017 --eval_split val2017 --output_dir outputs/coco
    python scripts/finetune.py --task classification --encoder facebook/dinov2-base \
        --dataset cifar10 --image_column img --eval_split test --output_dir outputs/cifar10 --lora_rank 8

`--model` is a TDD checkpoint: a captioner keeps its tokenizer; a classifier with another number of labels gets a new
head. `--encoder` is any pretrained vision model: denoiser and head are new, and a captioner's tokenizer is trained on
the captions. All fields of `TrainingArguments` are options too (`--learning_rate`, `--bf16`, `--push_to_hub`, ...).
They have their usual defaults, and none needs a particular value. A repeated command resumes from the last complete
checkpoint.

What is evaluated, saved and pushed are the averaged weights (`--ema_decay`, `--ema_warmup`). With `--lora_rank` the
adapter goes to `OUTPUT_DIR/adapter`, and the model with the adapter merged in, which loads without peft, to
`OUTPUT_DIR`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import AutoImageProcessor, BaseImageProcessor, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from modeling_tdd import TDDConfig, TDDForCaptioning, TDDForImageClassification, TDDPreTrainedModel, TDDProcessor
from modeling_tdd.evaluation.captions import seen_bigrams
from modeling_tdd.training.caption_data import CaptionCollator, load_caption_data
from modeling_tdd.training.data import EvalCollator, TrainCollator, build_train_transform, load_classification_data
from modeling_tdd.training.ema import EMACallback
from modeling_tdd.training.finetuning import (
    CaptionMetrics,
    EpochCallback,
    TrainerDataset,
    classification_metrics,
    last_complete_checkpoint,
)
from modeling_tdd.training.lora import LORA_TARGETS, add_lora, merge_lora
from modeling_tdd.training.recipe import AugmentationRecipe, CaptionDataRecipe, DataRecipe
from modeling_tdd.training.tokenization import train_tokenizer


logger = logging.get_logger(__name__)


@dataclass
class ModelArguments:
    """What to start from, and what of it to train."""

    task: str = field(metadata={"help": "The task.", "choices": ["classification", "captioning"]})
    model: str | None = field(default=None, metadata={"help": "A TDD checkpoint: a folder or an id of the Hub."})
    encoder: str | None = field(default=None, metadata={"help": "Instead of --model: a pretrained vision model."})
    config_overrides: str = field(
        default="{}", metadata={"help": "Fields of TDDConfig as JSON, such as '{\"timesteps_per_image\": 8}'."}
    )
    tokenizer_kind: str = field(
        default="bpe", metadata={"help": "With --encoder: the tokens of the captioner.", "choices": ["word", "bpe"]}
    )
    ema_decay: float = field(default=0.9999, metadata={"help": "Decay of the averaged weights; 0: no average."})
    ema_warmup: bool = field(
        default=True, metadata={"help": "Whether the decay grows with the steps, so that short runs are followed."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 trains all weights."})
    lora_target: str = field(default="all", metadata={"help": "What gets adapters.", "choices": list(LORA_TARGETS)})

    def __post_init__(self):
        if (self.model is None) == (self.encoder is None):
            raise ValueError(f"Give one of --model and --encoder, got {self.model} and {self.encoder}.")
        self.config_overrides = json.loads(self.config_overrides)


@dataclass
class DataArguments:
    """Which images to learn from."""

    dataset: str = field(
        metadata={"help": "What datasets.load_dataset reads: a folder or an id; or 'digits', 'coco'."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the data, such as COCO's."})
    train_split: str = "train"
    eval_split: str = "validation"
    eval_share: float = field(
        default=0.0, metadata={"help": "Instead of --eval_split: hold out this share of the training split."}
    )
    image_column: str = "image"
    label_column: str = "label"
    caption_column: str = "caption"
    augmentation: str | None = field(
        default=None, metadata={"help": "Fields of AugmentationRecipe as JSON, such as '{\"hflip\": 0.5}'."}
    )

    def __post_init__(self):
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"--eval_share must be in [0, 1), got {self.eval_share}.")
        if self.augmentation is not None:
            self.augmentation = AugmentationRecipe(**json.loads(self.augmentation))

    def train_transform(self, image_processor: BaseImageProcessor) -> Callable[..., Tensor] | None:
        """The augmentation. `None` if there is none: the image processor then makes the training images too."""
        return None if self.augmentation is None else build_train_transform(self.augmentation, image_processor)


@dataclass
class Task:
    """What differs between the two tasks: arguments of `Trainer`, and the names of newly initialised modules."""

    model: TDDPreTrainedModel
    processor: BaseImageProcessor | TDDProcessor
    train_dataset: TrainerDataset
    eval_dataset: TrainerDataset
    compute_metrics: Any
    new_modules: list[str]


def split_rows(arguments: DataArguments, train: Dataset, held_out: Dataset) -> tuple[Dataset, Dataset]:
    """Training and evaluation rows: two splits, or one that is split here. The split is the same in each run."""
    if arguments.eval_share == 0:
        return train, held_out
    parts = train.train_test_split(test_size=arguments.eval_share, seed=0)
    return parts["train"], parts["test"]


def make_classification(model_args: ModelArguments, data_args: DataArguments, seed: int) -> Task:
    train, held_out, names = load_classification_data(
        DataRecipe(
            path=data_args.dataset,
            data_dir=data_args.data_dir,
            train_split=data_args.train_split,
            eval_split=data_args.train_split if data_args.eval_share else data_args.eval_split,
            image_column=data_args.image_column,
            label_column=data_args.label_column,
        )
    )
    train, held_out = split_rows(data_args, train, held_out)
    fields = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        **model_args.config_overrides,
    }
    new_modules = ["connector", "denoiser", "classifier"]
    if model_args.encoder is not None:
        model = TDDForImageClassification.from_encoder_pretrained(model_args.encoder, **fields)
    else:
        num_labels = TDDConfig.from_pretrained(model_args.model).num_labels
        new_modules = [] if num_labels == len(names) else ["token_embedding", "classifier"]
        if new_modules:
            logger.warning(
                f"{model_args.model} has {num_labels} labels, but the data have {len(names)}: the label embedding and "
                "the classifier are initialised anew."
            )
        model = TDDForImageClassification.from_pretrained(
            model_args.model, ignore_mismatched_sizes=bool(new_modules), **fields
        )
    image_processor = AutoImageProcessor.from_pretrained(model_args.model or model_args.encoder)
    transform, eval_collate = data_args.train_transform(image_processor), EvalCollator(image_processor)
    return Task(
        model,
        image_processor,
        TrainerDataset(train, eval_collate if transform is None else TrainCollator(transform), seed),
        TrainerDataset(held_out, eval_collate),
        classification_metrics,
        new_modules,
    )


def make_captioning(model_args: ModelArguments, data_args: DataArguments, seed: int) -> Task:
    eval_split = data_args.train_split if data_args.eval_share else data_args.eval_split
    data = load_caption_data(
        CaptionDataRecipe(
            path=data_args.dataset,
            data_dir=data_args.data_dir,
            train_split=data_args.train_split,
            eval_splits=[eval_split],
            image_column=data_args.image_column,
            caption_column=data_args.caption_column,
        )
    )
    train, held_out = split_rows(data_args, data[data_args.train_split], data[eval_split])
    captions = [caption for captions in train["captions"] for caption in captions]
    if model_args.model is not None:
        processor = TDDProcessor.from_pretrained(model_args.model)
        model = TDDForCaptioning.from_pretrained(model_args.model, **model_args.config_overrides)
        new_modules = []
    else:
        tokenizer = train_tokenizer(captions, model_args.tokenizer_kind)
        fields = {
            "max_position_embeddings": 32,
            "pooling": None,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **model_args.config_overrides,
        }
        tokenizer.model_max_length = fields["max_position_embeddings"]
        processor = TDDProcessor(AutoImageProcessor.from_pretrained(model_args.encoder), tokenizer)
        model = TDDForCaptioning.from_encoder_pretrained(model_args.encoder, **fields)
        new_modules = ["connector", "denoiser", "lm_head"]
    transform = data_args.train_transform(processor.image_processor)
    return Task(
        model,
        processor,
        TrainerDataset(train, CaptionCollator(processor, transform), seed),
        TrainerDataset(held_out, CaptionCollator(processor)),
        CaptionMetrics(model, processor, held_out["captions"], seen_bigrams(captions)),
        new_modules,
    )


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), description=__doc__)
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    if training_args.label_smoothing_factor > 0:
        raise ValueError(
            "Set label smoothing in --config_overrides: that of Trainer would replace the diffusion loss."
        )
    set_seed(training_args.seed)
    make_task = make_classification if model_args.task == "classification" else make_captioning
    task = make_task(model_args, data_args, training_args.seed)
    model = task.model
    if model_args.lora_rank > 0:
        model = add_lora(model, model_args.lora_rank, model_args.lora_target, task.new_modules)
    callbacks = [EpochCallback()]
    if model_args.ema_decay > 0:
        callbacks.append(EMACallback(model_args.ema_decay, model_args.ema_warmup))
    trainer = Trainer(
        model,
        training_args,
        train_dataset=task.train_dataset,
        eval_dataset=task.eval_dataset,
        processing_class=task.processor,
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=getattr(task.compute_metrics, "generate", None),
        callbacks=callbacks,
    )
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is None:
        checkpoint = last_complete_checkpoint(training_args.output_dir, with_ema=model_args.ema_decay > 0)
        if checkpoint is not None:
            logger.warning(f"Resuming from {checkpoint}. To start anew, choose another --output_dir.")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.log_metrics("train", result.metrics)
    if model_args.lora_rank > 0:
        merge_lora(trainer)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_model()


if __name__ == "__main__":
    main()
