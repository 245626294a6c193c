"""Show how a caption is denoised: print it at each step (Fig. 9) and plot each token's likeliest candidates (Fig. 10).

    python scripts/show_denoising.py image.png --model outputs/emoji/tdd-seed0 --gif denoising.gif

The plot and the animation need matplotlib: pip install -e ".[demo]"
"""

import argparse
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_tdd  # noqa: F401 - registers TDD with the Auto classes
from modeling_tdd.evaluation.trajectories import denoising_frames, plot_token_trajectories, save_animation
from modeling_tdd.images_tdd import open_image


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="an image file")
    parser.add_argument("--model", required=True, help="a captioner's folder or model id")
    parser.add_argument("--text", default="", help="the given beginning of the caption")
    parser.add_argument("--infill", help="instead of --text: a caption with gaps, such as 'man [MASK]: dark skin'")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the model's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--sampler", help="renoise or confidence; default: the model's")
    parser.add_argument("--output", type=Path, help="the heatmap's file; default: <image>-denoising.png here")
    parser.add_argument("--gif", type=Path, metavar="FILE", help="also save the steps as an animation")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model = AutoModelForImageTextToText.from_pretrained(args.model)
    processor = AutoProcessor.from_pretrained(args.model)
    texts = {"text": args.text} if args.infill is None else {"infill": args.infill}
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "sampler": args.sampler}
    outputs = model.generate(
        **processor(images=args.image, **texts, return_tensors="pt"),
        **{name: value for name, value in given.items() if value is not None},
        seed=args.seed,
        return_dict_in_generate=True,
        output_trajectory=True,
    )

    def decode(tokens: Tensor, skip_special_tokens: bool = False) -> str:
        return processor.decode(tokens, skip_special_tokens=skip_special_tokens).strip()

    frames = denoising_frames(outputs, model.config, partial(decode, skip_special_tokens=True))
    for frame in frames:
        print(f"t = {frame.timestep:4d}  {frame.caption}")
    # The caption's tokens and its end, without the padding after them
    num_places = min(len(frames[-1].tokens) + 1, outputs.sequences.shape[1])
    output = args.output or Path(f"{args.image.stem}-denoising.png")
    plot_token_trajectories(outputs, decode, range(num_places)).savefig(output, dpi=150)
    print(f"saved {output}")
    if args.gif is not None:
        save_animation(frames, open_image(args.image), args.gif)
        print(f"saved {args.gif}")


if __name__ == "__main__":
    main()
