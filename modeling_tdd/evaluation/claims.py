# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What the paper's tables and figures compare, with the paper's numbers, and the trainings that each of them needs."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """A method to train: `overrides` change the recipe of a [`Setting`], and `recipe` takes its place on ImageNet."""

    label: str
    method: str
    recipe: str  # in scripts/recipes
    overrides: tuple[str, ...] = ()
    paper_top1: float | None = None  # on ImageNet, in percent


@dataclass(frozen=True)
class Setting:
    """Data, network and budget that all variants share, and their title. `minutes` is the time of a training on one
    core, or an estimate of that on one GPU."""

    title: str
    recipe: str  # in scripts/recipes
    num_seeds: int
    minutes: float
    variants: tuple[str, ...]
    uses_variant_recipes: bool = False
    budget: str = "cpu"
    mdd: tuple[str, ...] = ()  # what MDD's own tuning changed


VARIANTS = {
    # A wide initialisation is for narrow networks, and would be too wide for a linear head on many features
    "mdd": Variant("MDD (linear head)", "mdd", "table1/mdd_vit_b16.yaml", ("model.initializer_range=0.02",), 82.3),
    "tdd": Variant("TDD", "tdd", "table1/tdd_vit_b16.yaml", ("evaluation.guidance_scale=[1.0, 1.5]",), 82.82),
    "no_coefficient": Variant(
        "TDD without coefficient",
        "tdd",
        "table1/tdd_vit_b16_no_coefficient.yaml",
        ("model.loss_weighting=none",),
        82.96,
    ),
    "regression": Variant(
        "TDD with regression loss",
        "tdd",
        "table2/regression_loss.yaml",
        ("model.prediction_type=epsilon", "model.loss_weighting=none", "model.label_smoothing=0.0"),
        0.13,
    ),
    "no_guidance": Variant(
        "TDD without guidance", "tdd", "table2/no_guidance.yaml", ("model.condition_dropout=0.0",), 82.36
    ),
    # Not in the paper. With so small a label nothing can be read off y_t: the network is a plain classifier of TDD's
    # size. What TDD has over it is what the diffusion of the label contributes.
    "no_signal": Variant(
        "TDD's network, label hidden",
        "tdd",
        "table1/tdd_vit_b16_no_coefficient.yaml",
        ("model.loss_weighting=none", "model.one_hot_scale=0.001"),
    ),
    # Not in the paper: the same network, loss and loop, with random tokens in place of noise
    "uniform": Variant("random labels in place of noise (D3PM)", "uniform", "table1/tdd_vit_b16.yaml"),
}
ALL, PAPERS, SHORT = tuple(VARIANTS), tuple(VARIANTS)[:5], ("mdd", "tdd", "no_signal")


@dataclass(frozen=True)
class CaptionSetting:
    """Captioners to compare: the recipe that trains them, the splits to caption, and a CLIP by folder or id. `minutes`
    is the time of one training. `others` are checkpoints that need no training. The drafts of Figs. 9 and 10 are those
    of the last one, or of the last method."""

    recipe: str  # in scripts/recipes
    splits: tuple[str, ...]
    clip: str | None  # `None`: no CLIP knows such pictures
    minutes: float
    num_seeds: int = 3
    methods: tuple[str, ...] = ("mdd", "tdd")
    mdd: tuple[str, ...] = ()  # what MDD's own tuning changed
    others: dict[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Method and seed of each training."""
        return [(method, seed) for seed in range(self.num_seeds) for method in self.methods]


SETTINGS: dict[str, dict[str, Setting]] = {
    "cifar10": {
        "frozen": Setting(
            "CIFAR-10, frozen encoder", "cifar10/frozen.yaml", 5, 1.3, ALL, mdd=("training.learning_rate=2.0e-3",)
        ),
        "scratch": Setting(
            "a tenth of CIFAR-10, from scratch", "cifar10/scratch.yaml", 3, 3.0, ("mdd", "tdd", "no_coefficient")
        ),
        "scratch_all": Setting(
            "CIFAR-10, from scratch", "cifar10/scratch_all.yaml", 3, 20.0, ("mdd", "tdd", "no_coefficient")
        ),
        "frozen_10": Setting(
            "a tenth of CIFAR-10, frozen encoder",
            "cifar10/frozen_10.yaml",
            5,
            0.7,
            SHORT,
            mdd=("training.learning_rate=2.0e-3",),
        ),
        "frozen_1": Setting(
            "a hundredth of CIFAR-10, frozen encoder",
            "cifar10/frozen_1.yaml",
            5,
            0.5,
            SHORT,
            mdd=("training.learning_rate=2.0e-3",),
        ),
        # For the claim that TDD is better than MDD with a larger encoder
        "frozen_larger": Setting(
            "CIFAR-10, larger frozen encoder",
            "cifar10/frozen_larger.yaml",
            5,
            1.3,
            ("mdd",),
            mdd=("training.learning_rate=2.0e-3",),
        ),
        "full": Setting("CIFAR-10, ResNet-18 from scratch", "cifar10/full.yaml", 3, 2.5, PAPERS, budget="gpu"),
    },
    "fashion_mnist": {
        "scratch": Setting(
            "a tenth of Fashion-MNIST, from scratch",
            "fashion_mnist/scratch.yaml",
            3,
            2.5,
            ("mdd", "tdd", "no_coefficient"),
        ),
        "scratch_long": Setting(
            "a tenth of Fashion-MNIST, from scratch, 60 epochs",
            "fashion_mnist/scratch_long.yaml",
            3,
            7.0,
            ("mdd", "tdd"),
        ),
    },
    "imagenet": {
        # 500 epochs at some 800 images a second
        "vit_b16": Setting(
            "ImageNet, ViT-B/16", "imagenet_vit_b16.yaml", 1, 13_000, PAPERS, uses_variant_recipes=True, budget="gpu"
        )
    },
}
# The variants that a table or figure compares. Table 2 also samples `tdd` from the softmax.
CLASSIFIER_ELEMENTS = {
    "table1": ("mdd", "tdd", "no_coefficient", "no_signal", "uniform"),
    "table2": ("regression", "no_guidance", "tdd", "no_coefficient"),
    "fig3": ("mdd", "tdd", "no_coefficient", "no_signal"),
    "fig4": ("regression", "tdd"),
    "fig5": ("tdd", "no_coefficient", "no_signal"),
    "fig6": ("tdd", "no_coefficient"),
    # Beyond the paper
    "calibration": ("mdd", "tdd", "no_coefficient", "no_signal"),
    "robustness": ("mdd", "tdd", "no_coefficient", "no_signal"),
}
CAPTION_ELEMENTS = ("table3", "fig7", "fig9", "fig10")
PAPER_SOFTMAX = 82.35  # Table 2, sampling with softmax, top-1 in percent
PAPER_CLIP_SCORES: dict[str, float] = {"true": 0.30, "shuffled": 0.16, "mdd": 0.18, "tdd": 0.25}  # Table 3
CAPTION_SETTINGS = {
    # No training set has a picture of these splits: neither that of the captioners nor that of the CLIP.
    "emoji": CaptionSetting(
        "emoji_full.yaml",
        ("validation", "test_combo"),
        "outputs/emoji_clip",
        20,
        mdd=("training.base_learning_rate=1.6e-2",),
        others={"shipped": "checkpoints/emoji-captions"},
    ),
    "stamps": CaptionSetting("stamps.yaml", ("validation", "test"), None, 1, methods=("ar", "mdd", "tdd")),
    "coco": CaptionSetting("coco_vit_b16.yaml", ("val2017",), "openai/clip-vit-base-patch32", 1_500, num_seeds=1),
}
