"""What curvature costs: products to a residual of 1e-3 against scipy's solvers, and passes over the data.

    python benchmarks/curvature.py [--steps 200]

Trains an MLP on Fashion-MNIST by gradient descent with a checkpoint every ten steps, and solves at each of them.
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
from opsig_zoo import FashionMnist
from scipy.sparse.linalg import LinearOperator, eigsh, lobpcg

from opsig_cli import tasks, trainer
from opsig_cli.recorder import read_state
from opsig_cli.settings import Settings
from opsig_cli.trajectory import open_trajectory

TOLERANCE = 1e-3


def checkpoints(path: Path, steps: int, samples: int = 5000):
    """A session on the task and its states every ten steps of gradient descent, the first left out."""
    task = f"fashion-mnist:samples={samples}"
    settings = Settings.of({"task": task, "learning_rate": 0.1, "steps": steps, "checkpoint_every": 10})
    loaded, spec = tasks.load(tasks.parse_spec(task))
    session = TorchBackend().open(loaded)
    recorder = trainer.new_recorder(str(path), settings, session, loaded, spec, True, 10)
    with recorder:
        for _ in trainer.run(recorder, session, settings, session.initial(0), trainer.StopRequest(), lambda **_: None):
            pass
    with open_trajectory(path) as run:
        return session, [read_state(run, step) for step in run.steps("checkpoints")[1:].tolist()]


def scipy_products(session, state, count: int, solver: str) -> int:
    """Products that a scipy solver spends from a random start until it has its tolerance."""
    with session.at(state):
        hessian = Hessian(session)
        size = len(state.params)

        def product(v: np.ndarray) -> np.ndarray:
            columns = [hessian(torch.from_numpy(c.astype(np.float32))).numpy() for c in np.atleast_2d(v.T)]
            return np.stack(columns, -1).reshape(v.shape).astype(np.float64)

        operator = LinearOperator((size, size), matvec=product, matmat=product, dtype=np.float64)  # type: ignore
        start = np.random.default_rng(state.step).standard_normal((size, count))
        if solver == "eigsh":
            eigsh(operator, k=count, which="LA", tol=TOLERANCE, v0=start[:, 0])
        else:
            lobpcg(operator, start, tol=TOLERANCE * 20, maxiter=40, largest=True)
        return hessian.products


def seconds(*calls: Callable[[], object]) -> np.ndarray:
    """Median seconds of each call, taken in turns."""
    rows = []
    for _ in range(7):
        row = []
        for call in calls:
            begin = time.perf_counter()
            call()
            row.append(time.perf_counter() - begin)
        rows.append(row)
    return np.median(rows[1:], axis=0)


def passes(model: str, samples: int) -> None:
    """Costs of one product, of all curvatures and of all gradient norms in passes over the same data."""
    task = FashionMnist(model=model, samples=samples)
    session = TorchBackend().open(task)
    state = session.initial(0)
    vector = np.random.default_rng(0).standard_normal(len(state.params)).astype(np.float32)
    vector /= np.linalg.norm(vector)
    size = session.inference_batch()

    def forward() -> None:
        with torch.inference_mode():
            for _, batch in session.batches.in_pieces(size):
                task.losses(session.flat.model, batch)

    def both() -> None:
        for _, batch in session.batches:
            torch.autograd.grad(task.losses(session.flat.model, batch).sum(), session.flat.parameters)

    with session.at(state):
        hessian = Hessian(session)
        flat = torch.from_numpy(vector)
        product, curvature, norms, one, two = seconds(
            lambda: hessian(flat),
            lambda: session.curvature_along(state, vector),
            lambda: session.gradient_norms(state),
            forward,
            both,
        )
    print(
        f"{model}: product {product / two:.2f} forward+backward, curvature of all {samples} samples "
        f"{curvature / one:.2f} forward, gradient norms {norms / two:.2f} forward+backward"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    with tempfile.TemporaryDirectory() as folder:
        session, states = checkpoints(Path(folder) / "run.h5", parser.parse_args().steps)
        for count in (1, 5):
            cold, warm, previous = [], [], None
            for state in states:
                cold.append(session.top_eigenpairs(state, count, TOLERANCE).products)
                previous = session.top_eigenpairs(state, count, TOLERANCE, previous)
                warm.append(previous.products)
            line = f"k = {count}: cold {np.mean(cold):.1f} (at most {max(cold)}), along the run {np.mean(warm[1:]):.1f}"
            for solver in ("eigsh", "lobpcg"):
                spent = [scipy_products(session, state, count, solver) for state in states[::4]]
                line += f", {solver} {np.mean(spent):.1f}"
            print(line)
    passes("mlp", 5000)
    passes("cnn", 500)


if __name__ == "__main__":
    main()
