"""How often `opsig cluster` establishes a pair where no two samples share a feature, through the command line.

    python benchmarks/noise.py [--runs 100] [--first 0] [--only "gaussian 2,series"]

A row for each kind of data: runs, those with an established pair at the level stated, 5% (and at 1%: p at most .01, and
R below a half at both checkpoints), those with a likely one, and verdicts of all pairs. `below`: full-batch gradient
descent that stops before the edge of stability; `edge`: beyond it.
"""

import argparse
import contextlib
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from planted import opsig

from opsig_cli import Recorder

TASKS = Path(__file__).with_name("null_tasks.py")
BELOW = ("--learning-rate", "0.05", "--steps", "150", "--checkpoint-every", "10")
EDGE = ("--learning-rate", "0.7", "--steps", "200", "--checkpoint-every", "10")
SGD = ("--optimizer", "sgd", "--batch-size", "50", "--learning-rate", "0.1", "--steps", "200", "--checkpoint-every",
       "10")  # fmt: skip
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    f"gaussian {classes} {where}": (f"Gaussian:classes={classes}", training)
    for classes in (2, 3, 10)
    for where, training in (("below", BELOW), ("edge", EDGE))
} | {
    "gaussian 3 sgd": ("Gaussian:classes=3", SGD),
    "gaussian cnn 3 below": ("GaussianImages:classes=3", BELOW),
    "gaussian cnn 3 edge": ("GaussianImages:classes=3", EDGE),
    "clusters 3 below": ("Clusters:classes=3", BELOW),
    "clusters 3 edge": ("Clusters:classes=3,gap=3", EDGE),
    "clusters 10 below": ("Clusters:classes=10", BELOW),
    "regression below": ("NoiseRegression:", BELOW),
    "regression edge": ("NoiseRegression:", ("--learning-rate", "0.25", *EDGE[2:])),
    "series": ("", ()),
}


def white_series(path: Path, seed: int) -> None:
    """Losses without any structure."""
    losses = 1 + 0.1 * np.random.default_rng(seed).standard_normal((80, 60))
    with Recorder(path, samples=60, replace=True) as recorder:
        for step, row in enumerate(losses):
            recorder.record(step, losses=row.astype(np.float32))


def pairs_of(path: Path, kind: str, seed: int) -> list[dict]:
    """The pairs of one run of a kind."""
    task, training = KINDS[kind]
    if not task:
        white_series(path, seed)
        return [r for r in opsig("cluster", str(path), "-q") if r["kind"] == "pair"]
    options = f"{task.rstrip(':')}{',' if '=' in task else ':'}seed={seed}"
    own = ("--task", f"{TASKS}:{options}")
    with contextlib.suppress(RuntimeError):  # a loss that is not finite: the steps before it are kept
        opsig("train", *own, *training, "--seed", str(seed), "--track", "-q", "--replace", "-o", str(path))
    return [r for r in opsig("cluster", str(path), *own, "-q") if r["kind"] == "pair"]


def strict(pair: dict) -> bool:
    """Whether an established pair would be at the level of 1%."""
    return pair["p_value"] <= 0.01 or len(pair["silenced"]) > 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        for kind in options.only.split(","):
            held, held_strictly, likely, begin = 0, 0, 0, time.process_time()
            verdicts: Counter[str] = Counter()
            tested = 0
            for seed in range(options.first, options.first + options.runs):
                pairs = pairs_of(path, kind, seed)
                established = [pair for pair in pairs if pair["verdict"] == "established"]
                held += bool(established)
                held_strictly += any(map(strict, established))
                likely += any(pair["verdict"] == "likely" for pair in pairs)
                tested += sum(bool(pair["silenced"]) for pair in pairs)
                verdicts.update(pair["verdict"] for pair in pairs)
                for pair in established:
                    print(f"  {kind} {seed}: {pair['sizes']} cosine {pair['opposition']:.2f} alike {pair['alike']:.2f} "
                          f"p {pair['p_value']} R {pair['swing_ratio']} {pair['reason']}", flush=True)  # fmt: skip
            print(
                f"{kind:22} {options.runs} runs: established in {held} (1%: {held_strictly}), likely in {likely}; "
                f"pairs {dict(verdicts)}, silenced {tested}; {time.process_time() - begin:.0f} s of CPU", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
