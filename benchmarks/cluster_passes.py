"""What `opsig cluster --by gradient` asks of the model, call by call, in forward and backward passes over all samples.

    python benchmarks/cluster_passes.py [--models mlp,cnn,vit] [--samples 3000] [--steps 60]

Trains each model on Fashion-MNIST for a few steps with as many checkpoints as `cluster` looks at, and adds up CPU
seconds of every call of the session. Replays, which are training and have a budget of their own, are left out.
"""

import argparse
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from opsig_torch import TorchBackend

from opsig_cli import cluster, tasks
from opsig_cli.settings import Settings
from opsig_cli.studies import tracking, training

CALLS = (
    "gradient_norms", "gradient_cosines", "mean_cosines", "features", "mean_feature_cosines", "losses",
)  # fmt: skip


def run(model: str, samples: int, steps: int, path: Path):
    task = f"fashion-mnist:samples={samples}"
    settings = Settings.of({"task": task, "model": model, "learning_rate": 0.1, "steps": steps, "track_every": 1,
                            "checkpoint_every": 3})  # fmt: skip
    loaded, spec = tasks.load(tasks.parse_spec(f"{task},model={model}"))
    session: Any = TorchBackend().open(loaded)
    recorder = training.new_recorder(str(path), settings, session, loaded, spec, True, 3)
    with recorder:
        for _ in training.run(
            recorder, session, settings, session.initial(0), training.StopRequest(), lambda **_: None
        ):
            pass


def counted(session, spent: defaultdict[str, float], calls: Counter[str]) -> None:
    """Add up the CPU seconds of every call of this session."""

    def timed(name: str):
        inner = getattr(session, name)

        def call(*args, **kwargs):
            begin = time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[name] += time.process_time() - begin
                calls[name] += 1

        return call

    for name in CALLS:
        setattr(session, name, timed(name))


def one_pass(session) -> float:
    """CPU seconds of a forward and backward pass over all samples, the least of three."""
    taken = []
    for _ in range(3):
        begin = time.process_time()
        for _, batch in session.batches.in_pieces(session.inference_batch()):
            torch.autograd.grad(session.task.losses(session.flat.model, batch).sum(), session.flat.parameters)
        taken.append(time.process_time() - begin)
    return min(taken)


def measure(model: str, samples: int, steps: int) -> None:
    spent: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    opened = tracking.open_session
    held = []

    def opening(*args, **kwargs):
        session, task = opened(*args, **kwargs)
        counted(session, spent, calls)
        held.append(session)
        return session, task

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        run(model, samples, steps, path)
        tracking.open_session = opening
        try:
            begin = time.process_time()
            records = list(cluster(str(path), by="gradient", test="none"))
            whole = time.process_time() - begin
        finally:
            tracking.open_session = opened
    one = one_pass(held[0])
    print(
        f"{model}: {samples} samples, {sum(r['kind'] == 'group' for r in records)} groups, "
        f"{sum(r['kind'] == 'member' for r in records)} members; {whole / one:.1f} passes in all, "
        f"{sum(spent.values()) / one:.1f} of them in the model: "
        + ", ".join(f"{name} {spent[name] / one:.1f} ({calls[name]} calls)" for name in CALLS if calls[name]),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mlp,cnn,vit")
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    for model in options.models.split(","):
        measure(model, options.samples, options.steps)


if __name__ == "__main__":
    main()
