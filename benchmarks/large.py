"""GPT-2 small, of 124 million parameters and random weights: what commands take of memory within a bound.

    python benchmarks/large.py FOLDER [--sequences 32]

Needs transformers. The text is bytes drawn at random, in sequences of 16, each byte a sample; the run has five
checkpoints of 0.5 GB, and stays in the folder for another look.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from scale import measured

LENGTH = 16
CONFIG = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024,
    "n_embd": 768, "n_layer": 12, "n_head": 12, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
COMMANDS = {
    "cluster": ["--top", 40, "--by", "gradient", "--test", "none", "--memory", "8GiB"],
    "sharpness": ["--metrics", "gradient_norm", "--random", 20, "--steps", 4, "--memory", "6GiB"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sequences", type=int, default=32)
    arguments = parser.parse_args()
    folder, run = arguments.folder, arguments.folder / "gpt2.h5"
    if not run.exists():
        (folder / "config.json").write_text(json.dumps(CONFIG))
        letters = np.random.default_rng(0).integers(97, 123, arguments.sequences * LENGTH + 1, np.uint8)
        (folder / "text.txt").write_bytes(letters.tobytes())
        task = f"hf-causal:model={folder},text={folder / 'text.txt'},length={LENGTH}"
        how = ["--track", "--checkpoint-every", 1, "--steps", 4, "--learning-rate", 0.05, "-q"]
        measured("train", "--task", task, *how, "-o", run)
    for name, options in COMMANDS.items():
        cpu, _, peak, _ = measured(name, run, *options, "-q")
        print(f"{name:10} {peak:5.2f} GiB {cpu:8.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
