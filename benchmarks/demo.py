"""What a person waits for: CPU seconds of every command of `make demo`, as the Makefile has it.

    python benchmarks/demo.py [--repeats 3] [--seed 0] [FOLDER]

Medians, on one thread. A first round of few steps is not counted: Python compiles what it imports there. Beside other
work a second of CPU does less: the table gives every command in steps of the same net in a bare loop as well, which is
run in turns with the commands. The last lines are what `cluster` cannot do without, each by itself.
"""

import argparse
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from opsig_torch.arithmetic import calculating

from opsig_cli import cluster, tasks
from opsig_cli.studies.clustering.silencing import LENGTH

MAKEFILE = Path(__file__).parent.parent / "Makefile"
STEPS = 20
"""Steps of the bare loop."""
IMPORTED = {
    "torch": "torch", "scipy's trees": "scipy.cluster.hierarchy", "matplotlib": "matplotlib.backends.backend_agg",
}  # fmt: skip
"""Libraries that `cluster` loads, and what of them."""


def commands(folder: Path, *training: str) -> list[list[str]]:
    """The demo's commands, `training` added to the first."""
    lines = re.findall(r"^\t\$\(BIN\)/opsig (.+)$", MAKEFILE.read_text(), re.MULTILINE)
    found = [shlex.split(line.replace("$(DEMO)", str(folder))) for line in lines if "$(DEMO)" in line]
    return [[*command, *(training if command[0] == "train" else ())] for command in found]


def seconds(command: list[str], cache: Path, code: str = "from opsig_cli.main import run; run()") -> float:
    """CPU seconds of Python with some code, opsig's own by default, and what it started."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", code, *command], check=True, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bare_step() -> float:
    """CPU seconds of a full-batch step of the demo's net, as one would write it by hand, a batch of 500 at a time."""
    task, _ = tasks.load(tasks.parse_spec("fashion-mnist"))
    model, batches = task.model(), torch.utils.data.DataLoader(task.dataset(), batch_size=500)
    data, optimizer = list(batches), torch.optim.SGD(model.parameters(), lr=0.1)
    with calculating("cpu", print):
        for step in range(STEPS + 1):
            if step == 1:
                begin = time.process_time()
            optimizer.zero_grad()
            for batch in data:
                (task.losses(model, batch).sum() / 5000).backward()
            optimizer.step()
    return (time.process_time() - begin) / STEPS


def floor(run: Path, cache: Path, step: float) -> dict[str, float]:
    """CPU seconds of parts of `cluster`, by what they are: its replays' gradients, each a `step` of the bare loop, and
    libraries that are imported."""
    (tests,) = (record for record in cluster(str(run)) if record["kind"] == "tests")
    gradients = tests["replays"] * (LENGTH - 1) + len(
        tests["held_out"]
    )  # a checkpoint's first is shared, the last none
    parts = {f"{gradients} gradients of {tests['replays']} replays": gradients * step}
    for name, code in IMPORTED.items():
        parts[f"importing {name}"] = min(seconds([], cache, f"import numpy, {code}") for _ in range(3)) - min(
            seconds([], cache, "import numpy") for _ in range(3)
        )
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", default="0")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder, cache = given.folder or Path(made), Path(made) / "cache"
        folder.mkdir(exist_ok=True)
        for command in commands(folder, "--steps", "60"):
            seconds(command, cache)
        rounds, bare = [], []
        for _ in range(given.repeats):
            rounds.append([seconds(command, cache) for command in commands(folder, "--seed", given.seed)])
            bare.append(bare_step())
        step = float(np.median(bare))
        parts = floor(folder / "run.h5", cache, step)
    names = [command[0] for command in commands(folder)]
    table = dict(zip(names, np.median(rounds, 0), strict=True))
    table |= {"cluster + report": table["cluster"] + table["report"], "all": sum(table.values())}
    for name, spent in table.items():
        print(f"{name:20}{spent:8.1f} s{spent / step:10,.0f} bare steps")
    print(f"a bare step takes {1000 * step:.1f} ms")
    for name, spent in parts.items():
        print(f"of cluster, {name}: {spent:.1f} s")


if __name__ == "__main__":
    main()
