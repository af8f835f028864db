"""What curvature costs: products to a residual of 1e-3, and every sample's curvature and gradient norm in passes.

    python benchmarks/curvature.py [--steps 200] [--only solver|passes] [--models mlp,cnn,resnet20,vit,gpt]

The solver's part trains an MLP on Fashion-MNIST by gradient descent with a checkpoint every ten steps, and solves at
each of them. `peers.py` compares it with other programs.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from opsig_torch import TorchBackend
from opsig_torch.hessian import Hessian
from opsig_zoo import FashionMnist, Text
from torch.nn.attention import SDPBackend, sdpa_kernel

from opsig_cli import tasks
from opsig_cli.settings import Settings
from opsig_cli.studies import training
from opsig_cli.tasks import Task
from opsig_cli.trajectory.file import open_trajectory
from opsig_cli.trajectory.states import read_state

TOLERANCE = 1e-3


def checkpoints(path: Path, steps: int, samples: int = 5000, model: str = "mlp", seed: int = 0):
    """A session on the task and its states every ten steps of gradient descent, the first left out."""
    task = f"fashion-mnist:samples={samples}"
    settings = Settings.of({"task": task, "model": model, "learning_rate": 0.1, "steps": steps, "checkpoint_every": 10})
    loaded, spec = tasks.load(tasks.parse_spec(task, model))
    session = TorchBackend().open(loaded)
    recorder = training.new_recorder(str(path), settings, session, loaded, spec, True, 10)
    with recorder:
        for _ in training.run(
            recorder, session, settings, session.initial(seed), training.StopRequest(), lambda **_: None
        ):
            pass
    with open_trajectory(path) as run:
        return session, [read_state(run, step) for step in run.steps("checkpoints")[1:].tolist()]


def seconds(*calls: Callable[[], object]) -> np.ndarray:
    """Least CPU seconds of each call, taken in turns: what a busy machine adds differs from turn to turn."""
    rows = []
    for _ in range(7):
        row = []
        for call in calls:
            begin = time.process_time()
            call()
            row.append(time.process_time() - begin)
        rows.append(row)
    return np.min(rows[1:], axis=0)


def passes(name: str, task: Task, batch_size: int | None = None, statistics: str | None = None) -> None:
    """Costs of one product, of all curvatures and of all gradient norms in passes over the same data, and errors.

    Curvature is held against the same in float64 and against a loop of products for single samples; its mean against
    v'Hv.
    """
    session = TorchBackend().open(task, "cpu", batch_size, statistics)
    state = session.initial(0)
    vector = np.random.default_rng(0).standard_normal(len(state.params)).astype(np.float32)
    vector /= np.linalg.norm(vector)
    size = session.inference_batch()
    few = range(8)

    def forward() -> None:
        with torch.inference_mode():
            for _, batch in session.batches.in_pieces(size):
                task.losses(session.flat.model, batch)

    def both() -> None:
        for _, batch in session.batches:
            torch.autograd.grad(task.losses(session.flat.model, batch).sum(), session.flat.parameters)

    def loop() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            for sample in few:
                loss = task.losses(session.flat.model, session.batches.take([sample])).sum()
                slope = torch.autograd.grad(loss, session.flat.parameters, create_graph=True)
                inner = sum((g * p).sum() for g, p in zip(slope, pieces, strict=True))
                torch.autograd.grad(inner, session.flat.parameters, materialize_grads=True)

    with session.at(state):
        hessian = Hessian(session)
        flat = torch.from_numpy(vector)
        pieces = [flat[t.offset : t.offset + t.size].view(t.shape) for t in session.layout if t.kind == "parameter"]
        product, curvature, norms, one, two, single = seconds(
            lambda: hessian(flat),
            lambda: session.curvature_along(state, vector),
            lambda: session.gradient_norms(state),
            forward,
            both,
            loop,
        )
        mean = float(hessian(flat).double() @ flat.double())
    values = session.curvature_along(state, vector)[2]
    exact_session = TorchBackend().open(task, "cpu", batch_size, statistics, double=True)
    exact_session.initial(0)
    exact = exact_session.curvature_along(state, vector)[2]
    errors = np.abs(values - exact) / np.abs(exact).max()  # a ReLU at rounding can make one sample's large
    print(
        f"{name} ({len(state.params):,} parameters, {session.samples} samples): product {product / two:.2f} "
        f"forward+backward; curvature {curvature / one:.2f} forwards, a loop of products "
        f"{single / len(few) * session.samples / curvature:.0f} times as much, error "
        f"{np.quantile(errors, 0.99):.0e} of the largest for 99 in 100, {errors.max():.0e} for all, mean off by "
        f"{abs(values.mean() - mean) / abs(mean):.0e}; gradient norms {norms / two:.2f} forward+backward",
        flush=True,
    )


def solver(steps: int) -> None:
    """Products to a residual of TOLERANCE, from cold and along a run."""
    with tempfile.TemporaryDirectory() as folder:
        session, states = checkpoints(Path(folder) / "run.h5", steps)
    for count in (1, 5):
        cold, warm, previous = [], [], None
        for state in states:
            cold.append(session.top_eigenpairs(state, count, TOLERANCE).products)
            previous = session.top_eigenpairs(state, count, TOLERANCE, previous)
            warm.append(previous.products)
        print(f"k = {count}: cold {np.mean(cold):.1f} (at most {max(cold)}), along the run {np.mean(warm[1:]):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--models", default="mlp,cnn,resnet20,vit,gpt")
    parser.add_argument("--only", choices=("solver", "passes"))
    options = parser.parse_args()
    if options.only != "passes":
        solver(options.steps)
    if options.only != "solver":
        models = options.models.split(",")
        if "mlp" in models:
            passes("mlp", FashionMnist())
        if "cnn" in models:
            passes("cnn", FashionMnist(model="cnn", samples=500))
        if "resnet20" in models:
            passes("resnet20", FashionMnist(model="resnet20", samples=200), 100, "running")
        if "vit" in models:
            passes("vit", FashionMnist(model="vit", samples=300))
        if "gpt" in models:
            with tempfile.TemporaryDirectory() as folder:
                text = Path(folder) / "text.txt"
                text.write_text(" ".join(str(number**3) for number in range(5000)))
                passes("gpt", Text(str(text), samples=8000))


if __name__ == "__main__":
    main()
