"""What `opsig branch` promises: unchanged branches are the run, planted pairs cause their swing, and it costs little.

    python benchmarks/branching.py [--only equal,planted,cost] [--seeds 5] [--keep FOLDER]

`equal`: 20 runs, optimizers x tasks x batches, whose unchanged branch is compared with the run bit for bit.
`planted`: each planted pair left out, from three checkpoints at the edge of stability; what part goes of its sides'
swing, of the other pairs', and, with random controls instead, of its own: for pairs that swing there at least as much
as samples do on average. `cost`: CPU time of a future over training's.
"""

import argparse
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from planted import opsig, trained

TASKS = {
    "digits": ("digits", "mlp"),
    "chebyshev": ("chebyshev", None),
    "convolutions": ("fashion-mnist:samples=200,size=14", "cnn"),
    "batch norm": ("fashion-mnist:samples=64,size=14", "resnet20"),
}
TRAININGS = (
    ("gd",), ("sgd", "--batch-size", "8"), ("momentum",), ("adam", "--batch-size", "8"),
    ("splitsgd", "--batch-size", "16"),
)  # fmt: skip
FORKS = (300, 420, 510)
LENGTH = 20
COST_STEPS = 60
COMPARED = (
    "losses/loss", "scalars/train_loss", "scalars/grad_norm", "checkpoints/params", "checkpoints/buffers",
    "checkpoints/optimizer/momentum_buffer", "checkpoints/optimizer/exp_avg", "checkpoints/optimizer/exp_avg_sq",
)  # fmt: skip


def equal(folder: Path) -> None:
    """Whether unchanged branches equal their runs: losses, logged scalars, checkpoints and optimizers' states."""
    same = 0
    for name, (task, model) in TASKS.items():
        for number, (optimizer, *more) in enumerate(TRAININGS):
            run, branch = folder / f"{name}-{number}.h5", folder / f"{name}-{number}-branch.h5"
            options = [*(("--model", model) if model else ()), "--optimizer", optimizer, *more]
            opsig("train", "--task", task, *options, "--learning-rate", "0.01", "--steps", "20", "--track", "-q",
                  "--replace", "--checkpoint-every", "1", "--device", "cpu", "-o", str(run))  # fmt: skip
            opsig("branch", str(run), "--from", "10", "--steps", "10", "--track-every", "1", "-q", "--replace",
                  "--device", "cpu", "-o", str(branch))  # fmt: skip
            differing = [path for path in COMPARED if not rows_equal(run, branch, path)]
            same += not differing
            if differing:
                print(f"{name}, {optimizer} {' '.join(more)}: differs in {', '.join(differing)}", flush=True)
    print(f"equal    {same} of {len(TASKS) * len(TRAININGS)} unchanged branches are the run bit for bit", flush=True)


def rows_equal(run: Path, branch: Path, path: str) -> bool:
    """Whether every row of the branch is the run's; NaN equals NaN."""
    with h5py.File(run) as one, h5py.File(branch) as other:
        if path not in other:
            return path not in one or "optimizer" in path
        steps = one[f"{path.split('/')[0]}/step"][()].tolist()
        own = other[f"{path.split('/')[0]}/step"][()].tolist()
        rows = one[path][[steps.index(step) for step in own]]
        return np.array_equal(rows, other[path][()], equal_nan=True)


def planted(folder: Path, seeds: int) -> None:
    """What goes of swings when a planted pair is left out."""
    gone, others, random = [], [], []
    for seed in range(seeds):
        run = trained(folder, "easy", seed)
        with h5py.File(run) as file:
            truth = file["samples/truth"][()]
            whole = file["losses/loss"][()].astype(float)
        pairs = [np.flatnonzero(truth // 2 == pair) for pair in range(truth.max() // 2 + 1)]
        for fork in FORKS:
            drops = [part for pair in pairs for part in ("--drop", ",".join(map(str, pair)))]
            records = opsig("branch", str(run), "--from", str(fork), "--steps", str(LENGTH), *drops, "--each", "-q",
                            "--replace", "-o", str(folder / "planted-branch.h5"))  # fmt: skip
            own = [r for r in records if r["control"] is None]
            stretch = whole[fork : fork + LENGTH + 1]
            unchanged = [swing(stretch, pair) for pair in pairs]
            swings = [value >= swing(stretch, np.arange(len(truth))) for value in unchanged]
            for number, record in enumerate(own):
                if not swings[number]:
                    continue
                left = 1 - record["swing_of_changed"] / record["unchanged_swing_of_changed"]
                gone.append(left)
                with h5py.File(record["trajectory"]) as file:
                    losses = file["losses/loss"][()].astype(float)
                others += [swing(losses, pair) / unchanged[n] - 1 for n, pair in enumerate(pairs)
                           if n != number and swings[n]]  # fmt: skip
                controls = [r for r in records if r["trajectory"] == record["trajectory"] and r["control"] is not None]
                random += [1 - r["swing_of_changed"] / r["unchanged_swing_of_changed"] for r in controls]
        print(f"planted  seed {seed}: {described(gone, others, random)}", flush=True)


def described(gone: list[float], others: list[float], random: list[float]) -> str:
    """Medians and the shares that reach what was asked, of all seeds so far."""
    return (
        f"{len(gone)} times a pair swings: of its swing {np.median(gone):.0%} goes (worst {min(gone):.0%}; "
        f"{np.mean(np.array(gone) >= 0.9):.0%} lose 90%); "
        f"other pairs' change by {np.median(np.abs(others)):.0%} "
        f"({np.mean(np.abs(others) <= 0.2):.0%} within 20%); controls remove {np.median(random):.0%} "
        f"({np.mean(np.array(random) <= 0.2):.0%} at most 20%)"
    )


def swing(losses_TS: np.ndarray, chosen: np.ndarray) -> float:
    """Half the mean size of second differences."""
    return float(np.abs(np.diff(losses_TS[:, chosen], 2, axis=0)).mean() / 2)


def cost(folder: Path) -> None:
    """CPU time of a future's step over that of a step of training, in one process; opening and ends are taken off."""
    run = str(folder / "cost.h5")
    task = ("--task", "fashion-mnist:samples=2000", "--checkpoint-every", "6", "--track", "--replace", "-q", "-o", run)
    ratios = []
    for _ in range(3):
        train = [seconds("train", *task, "--steps", str(steps)) for steps in (1, COST_STEPS + 1)]
        branch = [
            seconds("branch", run, "--from", "0", "--steps", str(steps), "--drop", "label:Coat", "--draws", "0",
                    "--replace", "-q", "-o", str(folder / "cost-branch.h5"))
            for steps in (1, COST_STEPS + 1)
        ]  # fmt: skip
        ratios.append((branch[1] - branch[0]) / 2 / (train[1] - train[0]))  # the branch and the unchanged future
    print(f"cost     a future of {COST_STEPS} steps takes {np.median(ratios):.2f} times training's "
          f"(three times: {', '.join(f'{ratio:.2f}' for ratio in ratios)})")  # fmt: skip


def seconds(*arguments: str) -> float:
    """CPU seconds of a command."""
    before = time.process_time()
    opsig(*arguments)
    return time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="equal,planted,cost")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        wanted = options.only.split(",")
        if "equal" in wanted:
            equal(folder)
        if "planted" in wanted:
            planted(folder, options.seeds)
        if "cost" in wanted:
            cost(folder)


if __name__ == "__main__":
    main()
