"""How the cost of every command grows with samples, steps, mined samples, parameters and classes.

    python benchmarks/scaling.py [--only samples,steps,...] [--quick]

One quantity is varied at a time, each size in a process of its own, whose start-up does not count. Prints CPU seconds
and peak memory at each size, of both the exponent between the two largest sizes, the one that fits the three largest
best in seconds, and the size at which 24 GB would be full if memory went on growing so; "-" where nothing grew that
could be told from noise.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

BASE = {"samples": 2000, "steps": 64, "mined": 200, "parameters": 20_000, "classes": 10}
SIZES = {
    "samples": (2000, 8000, 32_000),
    "steps": (64, 256, 1024),
    "mined": (200, 400, 800, 1600),
    "parameters": (20_000, 80_000, 320_000, 1_280_000),
    "classes": (10, 40, 160),
}
INPUTS = 16
ROOM = 24e9
SHORTEST = 0.1
"""CPU seconds below which an exponent says nothing."""


class Clouds:
    """Points around a centre for each class, told apart by a network with one hidden layer."""

    def __init__(self, samples: str = "2000", parameters: str = "20000", classes: str = "10"):
        self._samples, self._classes = int(samples), int(classes)
        self._width = max(2, int(parameters) // (INPUTS + self._classes + 1))

    def model(self) -> nn.Module:
        """Of about so many parameters."""
        return nn.Sequential(nn.Linear(INPUTS, self._width), nn.Tanh(), nn.Linear(self._width, self._classes))

    def dataset(self) -> TensorDataset:
        """The same points for every run."""
        generator = torch.Generator().manual_seed(0)
        label = torch.arange(self._samples) % self._classes
        centres = 2 * torch.randn(self._classes, INPUTS, generator=generator)
        return TensorDataset(centres[label] + torch.randn(self._samples, INPUTS, generator=generator), label)

    def losses(self, model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of each sample."""
        return cross_entropy(model(batch[0]), batch[1], reduction="none")

    def predictions(self, model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        """The class with the largest logit."""
        return model(batch[0]).argmax(1)

    def features(self, model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        """What enters the last layer."""
        assert isinstance(model, nn.Sequential)
        return model[:2](batch[0])

    def label(self, sample: int) -> str:
        """The class by name."""
        return self.classes[sample % self._classes]

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return [f"class {number}" for number in range(self._classes)]


def measured(call: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of a call, and bytes of memory at its peak beyond what there was before."""
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = _memory(), time.process_time()
    call()
    return time.process_time() - begin, max(0.0, _memory() - before)


def _memory() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def one(sizes: dict[str, int], folder: Path) -> dict[str, tuple[float, float]]:
    """Costs of every command at these sizes, by its name."""
    from opsig_cli.main import app

    task = f"{__file__}:Clouds:samples={sizes['samples']},parameters={sizes['parameters']},classes={sizes['classes']}"
    run, branch = folder / "run.h5", folder / "branch.h5"
    top, of_task = ["--top", sizes["mined"]], ["--task", task]
    steps = sizes["steps"]
    commands = {
        "train --track": ["train", *of_task, "--steps", steps, "--learning-rate", 0.1, "--track", "-o", run],
        "mine": ["mine", run, *top],
        "cluster --by loss": ["cluster", run, "--by", "loss", *top],
        "cluster": ["cluster", run, "--no-join", *top, *of_task],
        "cluster, read back": ["cluster", run, "--no-join", *top, *of_task],
        "report": ["report", run, "--by", "loss", *top, "-o", folder / "page.html"],
        "sharpness": ["sharpness", run, "--steps", f"0:{steps}:{max(1, steps // 4)}", *of_task],
        "sharpness --metrics": ["sharpness", run, "--metrics", "curvature", "--steps", steps, *of_task],
        "branch": ["branch", run, "--from", 0, "--steps", steps, "--drop", "17", "--draws", 1, *of_task, "-o", branch],
        "verify": ["verify", run],
    }
    found = {}
    for name, words in commands.items():
        sys.argv = ["opsig", *map(str, words), *(["-q"] if words[0] not in ("verify",) else [])]
        found[name] = measured(lambda: app(standalone_mode=False))
    return found


def exponent(sizes: tuple[int, ...], costs: list[float]) -> str:
    """Between the two largest sizes."""
    if costs[-1] < SHORTEST or min(costs[-2:]) <= 0:
        return "-"
    return f"{math.log(costs[-1] / costs[-2]) / math.log(sizes[-1] / sizes[-2]):.2f}"


def fitted(sizes: tuple[int, ...], costs: list[float]) -> str:
    """That fits the three largest sizes best."""
    if costs[-1] < SHORTEST or min(costs[-3:]) <= 0 or len(sizes) < 3:
        return "-"
    return f"{np.polyfit(np.log(sizes[-3:]), np.log(costs[-3:]), 1)[0]:.2f}"


def full_at(sizes: tuple[int, ...], memory: list[float]) -> str:
    """The size at which memory is full if it goes on growing as between the last two sizes, at least linearly."""
    grown = memory[-1] - memory[-2]
    if grown < 20e6:
        return "-"
    power = max(1.0, math.log(memory[-1] / max(memory[-2], 1e6)) / math.log(sizes[-1] / sizes[-2]))
    return f"{sizes[-1] * (ROOM / memory[-1]) ** (1 / power):,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(SIZES))
    parser.add_argument("--quick", action="store_true", help="two sizes of each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder, open(options.one + ".out", "w") as out:
            json.dump(one(json.loads(Path(options.one).read_text()), Path(folder)), out)
        return
    for quantity in options.only.split(","):
        sizes = SIZES[quantity][: 2 if options.quick else None]
        costs = [_apart(BASE | {quantity: size}) for size in sizes]
        print(f"\n{quantity}: {', '.join(f'{size:,}' for size in sizes)}")
        print(f"{'command':22}{'CPU seconds':34}{'last':>6}{'fit':>6}   {'MB':30}{'last':>6}{'24 GB at':>16}")
        for name in costs[0]:
            seconds, memory = ([cost[name][part] for cost in costs] for part in (0, 1))
            print(
                f"{name:22}{' '.join(f'{one:7.2f}' for one in seconds):34}{exponent(sizes, seconds):>6}"
                f"{fitted(sizes, seconds):>6}   {' '.join(f'{one / 1e6:6.0f}' for one in memory):30}"
                f"{exponent(sizes, memory) if full_at(sizes, memory) != '-' else '-':>6}{full_at(sizes, memory):>16}",
                flush=True,
            )


def _apart(sizes: dict[str, int]) -> dict[str, tuple[float, float]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sizes.json"
        path.write_text(json.dumps(sizes))
        subprocess.run([sys.executable, __file__, "--one", str(path)], check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(f"{path}.out").read_text())


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
