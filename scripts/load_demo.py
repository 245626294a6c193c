"""Load a running demo with many users at once, and check that each gets the caption of their own picture.

    python demo/app.py &
    python scripts/load_demo.py --output docs/results/demo/load.json

The demo must run on this machine, with its shipped model. Needs pip install -e ".[train,demo]".
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio
import numpy as np
import psutil
from datasets import load_dataset
from gradio_client import Client, handle_file
from transformers import pipeline

import modeling_tdd  # noqa: F401 - registers TDD with the pipelines


ROOT = Path(__file__).resolve().parents[1]
STEPS = 10


def choose_pictures(number: int, folder: Path) -> dict[Path, str]:
    """Files of pictures that have different captions, and these captions, from a pipeline of this process."""
    captioner, chosen = pipeline("image-captioning", model=str(ROOT / "checkpoints/emoji-captions")), {}
    data_file = str(ROOT / "scripts/data/emoji_mini/validation.parquet")
    for index, row in enumerate(load_dataset("parquet", data_files=data_file, split="train")):
        caption = captioner(row["image"], num_inference_steps=STEPS)[0]["generated_text"]
        if caption not in chosen.values():
            chosen[folder / f"{index}.png"] = caption
            row["image"].save(folder / f"{index}.png")
        if len(chosen) == number:
            break
    return chosen


def use_demo(client: Client, picture: Path, expected: str, seconds: float) -> list[tuple[float, bool]]:
    """What one user meets: the seconds of each request, and whether the answer was their picture's caption."""
    answers, end = [], time.monotonic() + seconds
    while time.monotonic() < end or not answers:
        start = time.monotonic()
        caption = client.predict(handle_file(picture), "", "", STEPS, 1.0, "", 0, api_name="/caption")[0]
        answers.append((time.monotonic() - start, caption == expected))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    listeners = [entry for entry in psutil.net_connections("tcp") if entry.status == psutil.CONN_LISTEN]
    pids = [entry.pid for entry in listeners if entry.laddr.port == args.port]
    if not pids:
        parser.error(f"nothing listens on port {args.port}: start demo/app.py, and give the port that it prints")
    server = psutil.Process(pids[0])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.users) as threads:
        pictures = choose_pictures(args.users, Path(folder))
        users = [(Client(f"http://127.0.0.1:{args.port}", verbose=False), *pair) for pair in pictures.items()]
        answers, memory, busy = [], [], []
        for seconds in (0, args.seconds):  # each user's first request, after which the server has all its buffers
            tasks = [threads.submit(use_demo, *user, seconds) for user in users]
            answers = [answer for task in tasks for answer in task.result()]
            memory.append(server.memory_info().rss >> 20)
            busy.append(sum(server.cpu_times()[:2]))
    latencies, is_right = zip(*answers)
    figures = {
        "command": shlex.join(["python", "scripts/load_demo.py", *sys.argv[1:]]),
        "users": len(users),
        "seconds": args.seconds,
        "requests": len(answers),
        "wrong_answers": len(answers) - sum(is_right),
        "median_latency_s": round(float(np.median(latencies)), 2),
        "p95_latency_s": round(float(np.percentile(latencies, 95)), 2),
        "server_cpu_s_per_request": round((busy[1] - busy[0]) / len(answers), 3),
        "rss_start_mib": memory[0],
        "rss_end_mib": memory[1],
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),  # more than the CPUs: other processes ran, too
        "gradio": gradio.__version__,
    }
    print(json.dumps(figures, indent=2))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["wrong_answers"]:
        sys.exit("Some user got the caption of another picture.")


if __name__ == "__main__":
    main()
