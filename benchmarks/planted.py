"""How well `opsig cluster` recovers planted pairs: scenarios x seeds, through the command line.

    python benchmarks/planted.py [--seeds 5] [--only easy,shared] [--by both,loss] [--keep FOLDER]

Every scenario trains an MLP on 2,000 planted Fashion-MNIST images by full-batch gradient descent (minibatch SGD where
it says so), mines and clusters with the defaults, and compares with the truth. `--keep` trains only what the folder
does not hold yet. A line per scenario: the adjusted Rand index of the planted sides (mean, and worst seed), over all
planted samples and over the mined ones; precision and recall of the pairs; and how many other samples were grouped.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from opsig_cli.main import run

GD = ("--learning-rate", "0.1", "--steps", "600")
SCENARIOS = {
    "easy": ("", GD),
    "same classes": ("same_classes=true", GD),
    "distractors": ("distractors=4", GD),
    "six pairs": ("pairs=6,patch=3", GD),
    "two pairs": ("pairs=2", GD),
    "one pair": ("pairs=1", GD),
    "unequal sizes": ("unequal=true", GD),
    "jittered": ("pairs=3,jitter=1", GD),
    "label noise": ("label_noise=0.05", GD),
    "native classes": ("native=true", GD),
    "shared patch": ("shared=true", GD),
    "minibatch SGD": ("", ("--optimizer", "sgd", "--batch-size", "100", "--learning-rate", "0.05", "--steps", "600")),
}


def opsig(*arguments: str) -> list[dict]:
    """The records that a command prints. Raises RuntimeError with its words where it fails."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["opsig", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run()
    except SystemExit as exit:
        if exit.code:
            raise RuntimeError(err.getvalue()) from None
    finally:
        sys.argv = before
    return [json.loads(line) for line in out.getvalue().splitlines()]


def trained(folder: Path, name: str, seed: int) -> Path:
    """The run of a scenario, made where it is not there."""
    task, training = SCENARIOS[name]
    path = folder / f"{name.replace(' ', '-')}-{seed}.h5"
    if not path.exists():
        options = ",".join(filter(None, [task, f"seed={seed}"]))
        part = path.with_suffix(".part")
        opsig("train", "--task", f"planted:{options}", *training, "--seed", str(seed), "--track", "--replace", "-q",
              "-o", str(part))  # fmt: skip
        part.rename(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default=",".join(SCENARIOS))
    parser.add_argument("--by", default="both,loss")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        for name in options.only.split(","):
            runs = [trained(folder, name, seed) for seed in range(options.seeds)]
            for by in options.by.split(","):
                rows = [opsig("cluster", str(path), "--by", by, "--truth", "-q")[-1] for path in runs]
                print(f"{name:15} {by:8} {summary(rows)}", flush=True)


def summary(rows: list[dict]) -> str:
    """One line of the agreements of all seeds."""
    values = {key: np.array([np.nan if row[key] is None else row[key] for row in rows], float) for key in rows[0]
              if key not in ("kind", "trajectory")}  # fmt: skip
    rand, mined = values["adjusted_rand_index"], values["adjusted_rand_index_mined"]
    judged = values["pair_precision"][np.isfinite(values["pair_precision"])]
    precision, recall = judged.mean() if len(judged) else np.nan, values["pair_recall"].mean()
    found = values["planted_mined"].sum() / values["planted"].sum()
    return (
        f"ARI {rand.mean():.3f} ({rand.min():.3f}), of the mined {mined.mean():.3f} ({mined.min():.3f}); "
        f"pairs: precision {precision:.3f}, recall {recall:.3f}; planted mined {found:.2f}, "
        f"others grouped {values['other_grouped'].mean():.0f}"
    )


if __name__ == "__main__":
    main()
