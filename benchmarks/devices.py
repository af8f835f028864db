"""The same commands on a GPU and on the CPU: whether they find the same, and the ratio of their times.

    python benchmarks/devices.py [--device cuda] [--samples 1000] [--models mlp,cnn,resnet20,vit]

Every model is trained once on the CPU with a checkpoint now and then; each command then measures copies of that run
file on either device, in this process, after a first call that loads the device's libraries. A number is the largest
difference over the largest value of the CPU. Training is compared over its first steps alone: near the edge of
stability rounding grows from step to step.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from planted import opsig

from opsig_cli import open_trajectory

STEPS = 12
COMMANDS = {
    "track": ("track",),
    "gradient_norm": ("sharpness", "--metrics", "gradient_norm", "--steps", str(STEPS)),
    "curvature": ("sharpness", "--metrics", "curvature", "--steps", str(STEPS)),
    "sample_sharpness": ("sharpness", "--metrics", "sample_sharpness", "--random", "8", "--steps", str(STEPS)),
    "sharpness": ("sharpness", "-k", "3", "--steps", str(STEPS), "--at", "iterate"),
    "cluster": ("cluster", "--top", "200", "--test", "none"),
}
VALUES = ("gradient_norm", "curvature", "sample_sharpness", "eigenvalue", "alignment", "cohesion", "opposition")


def numbers(records: list[dict]) -> np.ndarray:
    """Every measured number of the records, in order."""
    return np.array([r[name] for r in records for name in VALUES if isinstance(r.get(name), float)])


def difference(found: np.ndarray, truth: np.ndarray) -> str:
    if found.shape != truth.shape:
        return f"{len(found)} numbers for {len(truth)}"
    return f"{np.abs(found - truth).max() / np.abs(truth).max():.0e}" if len(truth) else "nothing measured"


def losses(path: Path) -> np.ndarray:
    with open_trajectory(path) as run:
        return np.concatenate([np.array(block[1]) for block in run.blocks("losses/loss")])


def compare(model: str, samples: int, device: str, folder: Path) -> None:
    task = f"fashion-mnist:model={model},samples={samples}"
    train = ("train", "--task", task, "--learning-rate", "0.05", "--steps", str(STEPS), "--checkpoint-every", "4",
             "--replace", "-q", "--track")  # fmt: skip
    paths = {where: folder / f"{where}.h5" for where in ("cpu", device)}
    took = {}
    for where, path in paths.items():
        begin = time.perf_counter()
        opsig(*train, "--device", where, "-o", str(path))
        took[where] = time.perf_counter() - begin
    say(model, "train", difference(losses(paths[device]), losses(paths["cpu"])), took[device] / took["cpu"])
    opsig(*train, "--device", "cpu", "-o", str(folder / "tracked.h5"))
    opsig(*train[:-1], "--device", "cpu", "-o", str(folder / "bare.h5"))
    for name, command in COMMANDS.items():
        results, took = {}, {}
        for where, path in paths.items():
            for _ in range(2):
                shutil.copyfile(folder / ("bare.h5" if name == "track" else "tracked.h5"), path)
                begin = time.perf_counter()
                records = opsig(command[0], str(path), *command[1:], "--device", where, "-q")
                took[where] = time.perf_counter() - begin
            results[where] = losses(path) if name == "track" else numbers(records)
        say(model, name, difference(results[device], results["cpu"]), took[device] / took["cpu"])


def say(model: str, what: str, difference: str, ratio: float) -> None:
    print(f"{model:10} {what:18} difference {difference:>8}   time {ratio:.2f} of the CPU's", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--models", default="mlp,cnn,resnet20,vit")
    options = parser.parse_args()
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            compare(model, options.samples, options.device, Path(folder))


if __name__ == "__main__":
    main()
