"""What tracking costs: `train --track` against `train`, and `track` against a bare inference loop over the same data.

    python benchmarks/track_overhead.py [--steps 100] [--task fashion-mnist] [--repeats 3]

All runs are made in turns in one process; the least CPU times and their ratios are printed. The loop runs twice: as
torch multiplies by itself, and as opsig has it multiply (`opsig_torch.arithmetic`).
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from opsig_torch import TorchBackend
from opsig_torch.arithmetic import calculating

from opsig_cli import tasks
from opsig_cli.settings import Settings
from opsig_cli.studies import tracking, training
from opsig_cli.trajectory.file import open_trajectory
from opsig_cli.trajectory.states import read_state


def train(path: Path, task: str, steps: int, track: bool) -> float:
    """CPU seconds of a training run, its file included and the start of the process not."""
    settings = Settings.of({"task": task, "learning_rate": 0.05, "steps": steps, "track_every": 1 if track else None})
    loaded, spec = tasks.load(tasks.parse_spec(task))
    session = TorchBackend().open(loaded)
    start = session.initial(0)
    begin = time.process_time()
    recorder = training.new_recorder(str(path), settings, session, loaded, spec, True, 10)
    with recorder:
        for _ in training.run(recorder, session, settings, start, training.StopRequest(), lambda **_: None):
            pass
    return time.process_time() - begin


def bare_loop(path: Path, task: str) -> float:
    """CPU seconds of losses of every sample at every checkpoint, by a loop as one would write it by hand."""
    loaded, _ = tasks.load(tasks.parse_spec(task))
    model, data = loaded.model(), loaded.dataset()
    with open_trajectory(path) as run:
        states = [read_state(run, int(step)) for step in run.steps("checkpoints")]
    begin = time.process_time()
    with torch.inference_mode():
        for state in states:
            torch.nn.utils.vector_to_parameters(torch.from_numpy(state.params), model.parameters())
            rows = [loaded.losses(model, data[i : i + 500]).numpy() for i in range(0, len(data), 500)]
            np.concatenate(rows)
    return time.process_time() - begin


def track(path: Path, task: str) -> float:
    """CPU seconds of the same, by opsig, into the file."""
    with open_trajectory(path, "r+") as run:
        session, _ = tracking.open_session(run, task, None, "torch", lambda _: None)
        begin = time.process_time()
        for _ in tracking.fill_losses(run, session, tracking.missing_losses(run)):
            pass
        return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="fashion-mnist")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, list[float]] = {
        "train": [],
        "train --track": [],
        "bare loop": [],
        "bare loop, alike": [],
        "track": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        for _ in range(options.repeats):
            times["train --track"].append(train(path, options.task, options.steps, True))
            times["train"].append(train(path, options.task, options.steps, False))
            times["bare loop"].append(bare_loop(path, options.task))
            with calculating("cpu", print):
                times["bare loop, alike"].append(bare_loop(path, options.task))
            times["track"].append(track(path, options.task))
    least = {name: min(found) for name, found in times.items()}
    for name, seconds in least.items():
        print(f"{name}: {seconds:.2f} s")
    print(f"training with --track: {least['train --track'] / least['train']:.3f}x")
    for name in ("bare loop", "bare loop, alike"):
        print(f"track against the {name}: {least['track'] / least[name]:.3f}x")


if __name__ == "__main__":
    main()
