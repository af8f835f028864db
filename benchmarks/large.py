"""GPT-2 small, of 124 million parameters and random weights: what commands take of memory within a bound.

    python benchmarks/large.py FOLDER [--sequences 200] [--only small,cluster,gradient_norm,sharpness]

Needs transformers. The text is letters drawn at random, in sequences of 16, each token a sample; the run has five
checkpoints of 0.5 GB, and stays in the folder for another look. `small` is a GPT-2 of 5 million parameters: every
command within the least that its plan asks for, and within all there is, which must give the same. A line for each:
what the plan says, the bound, and the peak of the process; an hour of CPU in all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 16
CONFIG = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024,
    "n_embd": 768, "n_layer": 12, "n_head": 12, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
SMALL, FEW = CONFIG | {"n_embd": 96, "n_layer": 2, "n_head": 4}, 32
"""A model with the same vocabulary, and sequences for it."""
COMMANDS = {
    "gradient_norm": ("6GiB", ["sharpness", "--metrics", "gradient_norm", "--random", "20", "--steps", "4"]),
    "cluster": ("8GiB", ["cluster", "--top", "40", "--by", "gradient", "--test", "none", "--replace"]),
    "sharpness": (
        "12GiB",
        ["sharpness", "-k", "1", "--steps", "4", "--at", "iterate", "--tolerance", "0.01", "--replace"],
    ),
}
COMPARED = ("eigenvalue", "gradient_norm", "cohesion", "opposition", "alignment", "size", "group", "sample")
AGREES = 2e-2
"""Relative difference of two results: eigenvalues are found to a residual of 1e-2 each."""


def opsig(folder: Path, *arguments: str) -> tuple[list[dict[str, Any]], float, float, float]:
    """Records, peak GiB, and seconds of CPU and of wall time. Raises SystemExit where the command fails."""
    begin = time.perf_counter()
    done = subprocess.run(
        ["/usr/bin/time", "-f", "%M %U %S", sys.executable, "-m", "opsig_cli", *arguments, "-q", "--format", "json"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    peak, user, system = map(float, done.stderr.split()[-3:])
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return records, peak / 2**20, user + system, time.perf_counter() - begin


def hugging_face(folder: Path, name: str, config: dict[str, Any], sequences: int) -> str:
    """The task of a model with this configuration on random letters, which are written to the folder."""
    model = folder / name
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(config))
    letters = np.random.default_rng(0).integers(97, 123, sequences * LENGTH + 1, np.uint8)
    (model / "text.txt").write_bytes(letters.tobytes())
    return f"hf-causal:model={model},text={model / 'text.txt'},length={LENGTH}"


def train(folder: Path, name: str, config: dict[str, Any], sequences: int) -> str:
    """The run file of a model, trained for four steps where it is not there yet."""
    if not (folder / f"{name}.h5").exists():
        task = hugging_face(folder, name, config, sequences)
        how = ["--track", "--checkpoint-every", "1", "--steps", "4", "--learning-rate", "0.05"]
        _, peak, cpu, _ = opsig(folder, "train", "--task", task, *how, "-o", f"{name}.h5")
        print(f"{name:6} train         peak {peak:5.2f} GiB, {cpu:6.0f} s of CPU", flush=True)
    return f"{name}.h5"


def measured(folder: Path, run: str, name: str, memory: str) -> list[dict[str, Any]]:
    """The records of a command within so much memory; says what it took."""
    command, *options = COMMANDS[name][1]
    (plan,), *_ = opsig(folder, command, run, *options, "--memory", memory, "--plan")
    records, peak, cpu, wall = opsig(folder, command, run, *options, "--memory", memory)
    least, most = (plan[each] / 2**30 for each in ("memory_least", "memory_most"))
    print(
        f"{Path(run).stem:6} {name:13} peak {peak:5.2f} GiB within {memory}, planned {least:.2f} to {most:.2f}, "
        f"{plan['passes']:.0f} passes, {cpu:6.0f} s of CPU, {wall:6.0f} s", flush=True,
    )  # fmt: skip
    return records


def numbers(records: list[dict[str, Any]]) -> np.ndarray:
    return np.array([float(r[name]) for r in records for name in COMPARED if isinstance(r.get(name), (int, float))])


def compared(folder: Path, run: str, name: str) -> bool:
    """Whether a command finds the same within the least memory as within all there is."""
    command, *options = COMMANDS[name][1]
    (plan,), *_ = opsig(folder, command, run, *options, "--plan")
    few = measured(folder, run, name, f"{plan['memory_least'] / 2**20 + 32:.0f}MiB")
    (folder / run).unlink()
    (folder / f"{run}.kept").rename(folder / run)
    many = measured(folder, run, name, "12GiB")
    one, two = numbers(few), numbers(many)
    same = one.shape == two.shape and bool(np.allclose(one, two, rtol=AGREES, atol=1e-6))
    off = np.abs(one - two).max() / np.abs(two).max() if one.shape == two.shape else float("nan")
    print(
        f"       {name:13} {len(two)} numbers, off by {off:.0e}: {'the same' if same else 'NOT the same'}", flush=True
    )
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--only", default="small,gradient_norm,cluster,sharpness")
    arguments = parser.parse_args()
    folder, asked = arguments.folder.resolve(), arguments.only.split(",")
    folder.mkdir(parents=True, exist_ok=True)
    good = True
    if "small" in asked:
        run = train(folder, "small", SMALL, FEW)
        for name in COMMANDS:
            (folder / f"{run}.kept").write_bytes((folder / run).read_bytes())
            good &= compared(folder, run, name)
    if any(name in asked for name in COMMANDS):
        run = train(folder, "gpt2", CONFIG, arguments.sequences)
        for name, (memory, _) in COMMANDS.items():
            if name in asked:
                measured(folder, run, name, memory)
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
