"""How often `opsig cluster` establishes a pair where no two samples share a feature, through the command line.

    python benchmarks/noise.py [--runs 100] [--first 0] [--only "gaussian 2 edge,series"] [--by slope]
        [--json FILE | --from FILES]

A row for each kind of data: runs, those with an established pair at the level stated, 5% (and at 1%: p at most .01, or
R below a half at three checkpoints or more), those with a likely one, and verdicts of all pairs. `below`: full-batch
gradient descent that stops before the edge of stability; `edge`: beyond it.
"""

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from planted import opsig
from shards import Row, by_kind, cost, keep, kept, parser_of, wanted

from opsig_cli import Recorder
from opsig_cli.analysis.verdicts import REPLAYS, SILENCES

TASKS = Path(__file__).with_name("null_tasks.py")
BELOW = ("--learning-rate", "0.05", "--steps", "150", "--checkpoint-every", "10")
EDGE = ("--learning-rate", "0.7", "--steps", "200", "--checkpoint-every", "10")
SGD = ("--optimizer", "sgd", "--batch-size", "50", "--learning-rate", "0.1", "--steps", "200", "--checkpoint-every",
       "10")  # fmt: skip
KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
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


def pairs_of(path: Path, kind: str, seed: int, by: str = "both") -> list[dict]:
    """The pairs of one run of a kind."""
    task, training = KINDS[kind]
    if not task:
        white_series(path, seed)
        return [r for r in opsig("cluster", str(path), "-q") if r["kind"] == "pair"]
    options = f"{task.rstrip(':')}{',' if '=' in task else ':'}seed={seed}"
    own = ("--task", f"{TASKS}:{options}")
    with contextlib.suppress(RuntimeError):  # a loss that is not finite: the steps before it are kept
        opsig("train", *own, *training, "--seed", str(seed), "--track", "-q", "--replace", "-o", str(path))
    return [r for r in opsig("cluster", str(path), *own, "--by", by, "-q") if r["kind"] == "pair"]


def told(path: Path, kind: str, seed: int, by: str) -> Row:
    """What the pairs of one run come to."""
    pairs = pairs_of(path, kind, seed, by)
    keys = ("sizes", "opposition", "alike", "p_value", "swing_ratio", "silenced", "curvature_ratio", "reason",
            "verdict")  # fmt: skip
    return {
        "kind": kind, "seed": seed, "verdicts": Counter(pair["verdict"] for pair in pairs),
        "silenced": sum(bool(pair["silenced"]) for pair in pairs),
        "positive": [{k: pair[k] for k in keys} for pair in pairs if pair["verdict"] in ("established", "likely")],
    }  # fmt: skip


def strict(pair: dict) -> bool:
    """Whether an established pair would be at the level of 1%."""
    return pair["p_value"] <= 0.01 or sum(one["swing_ratio"] < SILENCES for one in pair["silenced"]) >= REPLAYS


def line(kind: str, rows: list[Row]) -> str:
    """The row of the table for a kind."""
    established = [[pair for pair in row["positive"] if pair["verdict"] == "established"] for row in rows]
    likely = sum(any(pair["verdict"] == "likely" for pair in row["positive"]) for row in rows)
    held, strictly = sum(map(bool, established)), sum(any(map(strict, pairs)) for pairs in established)
    verdicts = sum((Counter(row["verdicts"]) for row in rows), Counter())
    return (
        f"{kind:22} {len(rows)} runs: established in {held} (1%: {strictly}), likely in {likely}; pairs "
        f"{dict(verdicts)}, silenced {sum(row['silenced'] for row in rows)}; {cost(rows)}"
    )


def main() -> None:
    parser = parser_of(__doc__, KINDS, 100)
    parser.add_argument("--by", default="both")
    options = parser.parse_args()
    rows = kept(options.files or ())
    with tempfile.TemporaryDirectory() as folder:
        for kind, seed in wanted(options) if not options.files else ():
            begin = time.process_time()
            rows.append(keep(options, told(Path(folder) / "run.h5", kind, seed, options.by), begin))
    for kind, own in by_kind(rows, KINDS):
        for row in own:
            for pair in row["positive"]:
                if pair["verdict"] == "established":
                    print(
                        f"  {kind} {row['seed']}: {pair['sizes']} cosine {pair['opposition']:.2f} "
                        f"alike {pair['alike']:.2f} p {pair['p_value']} R {pair['swing_ratio']} {pair['reason']}"
                    )
        print(line(kind, own), flush=True)


if __name__ == "__main__":
    main()
