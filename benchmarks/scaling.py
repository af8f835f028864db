"""How the cost of every command grows with samples, steps, mined samples, parameters and classes.

    python benchmarks/scaling.py [--only samples,steps,...] [--quick] [--repeats 1] [--results FILE]

One quantity is varied at a time, each size in a process of its own, whose start-up does not count. Prints CPU seconds
and memory at the peak of every command as it is measured, and at the end tables in Markdown: the least seconds and the
most megabytes of the repeats at each size, of both the exponent between the two largest sizes, the one that fits the
three largest best in seconds, and the size at which 24 GB would be full if memory went on growing so; "-" where nothing
grew that could be told from noise. "bare gradients" are as many forward and backward passes as there are steps, by
torch alone. With `--results` what was measured is kept in the file, and what is in there is not measured again.
"""

import argparse
import ctypes
import gc
import json
import math
import os
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
OWN_BASE = {"parameters": BASE | {"samples": 500, "steps": 16}}
"""Where others than BASE hold while one quantity is varied: large nets see fewer samples, and less often."""
SIZES = {
    "samples": (2000, 8000, 32_000),
    "steps": (64, 256, 1024),
    "mined": (200, 400, 800, 1600),
    "parameters": (80_000, 320_000, 1_280_000, 5_120_000, 20_480_000),
    "classes": (10, 40, 160),
}
INPUTS = 16
ROOM = 24e9
SHORTEST = 0.1
"""CPU seconds below which an exponent says nothing."""
Cost = tuple[float, float]
"""CPU seconds, and bytes of memory at the peak."""


class Clouds:
    """Points around a centre for each class, told apart by a network with two hidden layers of one width."""

    def __init__(self, samples: str = "2000", parameters: str = "20000", classes: str = "10"):
        self._samples, self._classes = int(samples), int(classes)
        others = INPUTS + self._classes + 2
        self._width = max(2, round(math.sqrt(int(parameters) + others**2 / 4) - others / 2))

    def model(self) -> nn.Module:
        """Of about so many parameters."""
        ends = nn.Linear(INPUTS, self._width), nn.Linear(self._width, self._classes)
        return nn.Sequential(ends[0], nn.Tanh(), nn.Linear(self._width, self._width), nn.Tanh(), ends[1])

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
        return model[:4](batch[0])

    def label(self, sample: int) -> str:
        """The class by name."""
        return self.classes[sample % self._classes]

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return [f"class {number}" for number in range(self._classes)]


def measured(call: Callable[[], object]) -> Cost:
    """CPU seconds of a call, and bytes of memory at its peak beyond what there was before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what commands before gave back would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = _memory(), time.process_time()
    call()
    return time.process_time() - begin, max(0.0, _memory() - before)


def _memory() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def commands(sizes: dict[str, int], folder: Path) -> dict[str, list[object]]:
    """Every command's words at these sizes, by its name, in an order in which they can be run."""
    task = f"{__file__}:Clouds:samples={sizes['samples']},parameters={sizes['parameters']},classes={sizes['classes']}"
    run, branch = folder / "run.h5", folder / "branch.h5"
    top, of_task = ["--top", sizes["mined"]], ["--task", task]
    steps = sizes["steps"]
    return {
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


def run_all(sizes: dict[str, int], out: Path) -> None:
    """Write a line with its cost for every command at these sizes as it is measured."""
    from opsig_cli.main import app

    task = Clouds(*(str(sizes[name]) for name in ("samples", "parameters", "classes")))
    model, batch = task.model(), list(task.dataset().tensors)

    def gradients() -> None:
        for _ in range(sizes["steps"]):
            model.zero_grad()
            task.losses(model, batch).mean().backward()

    with tempfile.TemporaryDirectory() as folder, out.open("w", buffering=1) as lines:
        print(json.dumps(["bare gradients", measured(gradients)]), file=lines)
        for name, words in commands(sizes, Path(folder)).items():
            sys.argv = ["opsig", *map(str, words), *(["-q"] if words[0] != "verify" else [])]
            print(json.dumps([name, measured(lambda: app(standalone_mode=False))]), file=lines)


def apart(quantity: str, size: int) -> dict[str, Cost]:
    """The cost of every command at this size by its name, measured in a process of its own and printed."""
    sizes, found = OWN_BASE.get(quantity, BASE) | {quantity: size}, {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "costs"
        words = [sys.executable, __file__, "--one", json.dumps(sizes), "--out", str(out)]
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        over = False
        while not over:
            over = child.poll() is not None
            for line in out.read_text().splitlines()[len(found) :] if out.exists() else ():
                name, cost = json.loads(line)
                found[name] = cost
                print(f"{quantity} {size:,}: {name}: {cost[0]:.2f} s, {cost[1] / 1e6:.0f} MB", flush=True)
            time.sleep(0.0 if over else 0.5)
        if child.returncode:
            raise SystemExit(child.returncode)
    return found


def of_repeats(found: list[dict[str, Cost]]) -> dict[str, Cost]:
    """The least seconds and the most memory of every command."""
    return {name: (min(costs[name][0] for costs in found), max(costs[name][1] for costs in found)) for name in found[0]}


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


def table(quantity: str, sizes: tuple[int, ...], costs: list[dict[str, Cost]]) -> str:
    """All of one quantity in Markdown."""
    at = ", ".join(f"{size:,}" for size in sizes)
    lines = [f"| {quantity}: {at} | CPU seconds | last | fit | MB | last | 24 GB at |", "| --- " * 7 + "|"]
    for name in costs[0]:
        seconds, memory = ([cost[name][part] for cost in costs] for part in (0, 1))
        full = full_at(sizes, memory)
        cells = (
            f"`{name}`",
            ", ".join(f"{one:.2f}" for one in seconds),
            exponent(sizes, seconds),
            fitted(sizes, seconds),
            ", ".join(f"{one / 1e6:.0f}" for one in memory),
            "-" if full == "-" else exponent(sizes, memory),
            full,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SIZES))
    parser.add_argument("--quick", action="store_true", help="two sizes of each")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--results", type=Path, help="keep what was measured here, and begin with what is in it")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return run_all(options.one, options.out)
    kept = options.results.read_text().splitlines() if options.results and options.results.exists() else []
    known: dict[tuple[str, int], list[dict[str, Cost]]] = {}
    for quantity, size, costs in map(json.loads, kept):
        known.setdefault((quantity, size), []).append(costs)
    tables = []
    for quantity in options.only.split(","):
        sizes = SIZES[quantity][: 2 if options.quick else None]
        for size in sizes:
            found = known.setdefault((quantity, size), [])
            while len(found) < options.repeats:
                found.append(apart(quantity, size))
                if options.results:
                    with options.results.open("a") as file:
                        print(json.dumps([quantity, size, found[-1]]), file=file)
        tables.append(table(quantity, sizes, [of_repeats(known[quantity, size]) for size in sizes]))
    print("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
