"""opsig's eigenpairs against its peers: same model, data, chunks and checkpoints, in one process.

    pip install -c constraints.txt -e '.[peers]'
    python benchmarks/peers.py [--steps 200] [--samples 5000] [--every 4]

Trains an MLP on Fashion-MNIST by gradient descent with a checkpoint every ten steps. Every solver is asked for the k
most positive eigenpairs at a residual of 1e-3 at every `--every`-th checkpoint; opsig solves at all of them, as it does
along a run. The residual that is printed is the true one, |Hv - av| / |a|, the worst of all pairs, by opsig's product.
Costs are in gradients: seconds over those of one forward and backward pass over the data, all taken in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curvature import checkpoints, seconds
from opsig_torch.hessian import Hessian
from scipy.sparse.linalg import LinearOperator, eigsh, lobpcg
from torch.nn.functional import cross_entropy

TOLERANCE = 1e-3
Pairs = tuple[np.ndarray, np.ndarray]  # values (K,), vectors (K, P)
Solver = Callable[[int], tuple[Pairs, int]]  # of the number of eigenpairs: the pairs and the products spent


class Peers:
    """The peers' operators and solvers on a session's model and chunks, at the parameters that are loaded."""

    def __init__(self, session: Any):
        from curvlinops import HessianLinearOperator
        from hessian_eigenthings.operators import HessianOperator
        from pyhessian import hessian

        self.session = session
        self.model = session.flat.model
        self.data = [tuple(batch) for _, batch in session.batches]
        self.parameters = session.flat.parameters
        mean = torch.nn.CrossEntropyLoss()
        self.curvlinops = HessianLinearOperator(self.model, mean, self.parameters, self.data, check_deterministic=False)
        self.eigenthings = HessianOperator(self.model, self.data, lambda m, b: cross_entropy(m(b[0]), b[1]))
        self.pyhessian = hessian(self.model, mean, dataloader=self.data, cuda=False)

    def products(self) -> dict[str, Callable[[torch.Tensor], Any]]:
        """One product with a (P,) vector, by name."""
        shapes = [p.shape for p in self.parameters]

        def split(v: torch.Tensor) -> list[torch.Tensor]:
            return [part.view(s) for part, s in zip(v.split([s.numel() for s in shapes]), shapes, strict=True)]

        return {
            "PyHessian": lambda v: self.pyhessian.dataloader_hv_product(split(v)),
            "curvlinops": lambda v: self.curvlinops @ v,
            "hessian-eigenthings": lambda v: self.eigenthings.matvec(v),
        }

    def solvers(self) -> dict[str, Solver]:
        """Solvers by name, each as its documentation would have a person call it."""
        return {
            "PyHessian, its default tolerance": lambda k: self._power(k, 100, 1e-3),
            "PyHessian, tolerance 1e-6": lambda k: self._power(k, 1000, 1e-6),
            "curvlinops + scipy eigsh": self._eigsh,
            "hessian-eigenthings, Lanczos": self._lanczos,
            "curvlinops + scipy lobpcg": self._lobpcg,
        }

    def _power(self, count: int, most: int, tolerance: float) -> tuple[Pairs, int]:
        spent = 0
        plain = self.pyhessian.dataloader_hv_product

        def counted(v: Any) -> Any:
            nonlocal spent
            spent += 1
            return plain(v)

        self.pyhessian.dataloader_hv_product = counted
        try:
            values, vectors = self.pyhessian.eigenvalues(maxIter=most, tol=tolerance, top_n=count)
        finally:
            self.pyhessian.dataloader_hv_product = plain
            self.model.zero_grad()
        flat = [torch.cat([part.reshape(-1) for part in vector]).detach().numpy() for vector in vectors]
        return (np.array(values), np.stack(flat)), spent

    def _operator(self) -> tuple[LinearOperator, list[int]]:
        spent = [0]

        def product(v: np.ndarray) -> np.ndarray:
            columns = torch.from_numpy(np.asarray(v, np.float32).reshape(len(v), -1))
            spent[0] += columns.shape[1]
            return (self.curvlinops @ columns).detach().numpy().reshape(v.shape)

        size = self.curvlinops.shape[0]
        return LinearOperator((size, size), matvec=product, matmat=product, dtype=np.float32), spent  # type: ignore

    def _eigsh(self, count: int) -> tuple[Pairs, int]:
        operator, spent = self._operator()
        values, vectors = eigsh(operator, k=count, which="LA", tol=TOLERANCE)
        return (values, vectors.T), spent[0]

    def _lobpcg(self, count: int) -> tuple[Pairs, int]:
        operator, spent = self._operator()
        start = np.random.default_rng(0).standard_normal((operator.shape[0], count)).astype(np.float32)
        largest = float(eigsh(operator, k=1, which="LA", tol=0.1, return_eigenvectors=False)[0])
        spent[0] = 0  # its tolerance is absolute: what is needed to say 1e-3 is not counted
        values, vectors = lobpcg(operator, start, tol=TOLERANCE * largest, maxiter=200, largest=True)[:2]
        return (values, vectors.T), spent[0]

    def _lanczos(self, count: int) -> tuple[Pairs, int]:
        from hessian_eigenthings.algorithms import lanczos

        for steps in range(2 * count + 6, 200, 2):  # it takes a number of steps: the smallest that suffices counts
            found = lanczos(self.eigenthings, k=count, max_iter=steps, tol=TOLERANCE, which="LA", seed=0)
            if found.converged.all():
                break
        began = time.perf_counter()
        lanczos(self.eigenthings, k=count, max_iter=steps, tol=TOLERANCE, which="LA", seed=0)
        self.took = time.perf_counter() - began
        return (found.eigenvalues.numpy(), found.eigenvectors.numpy()), steps


def residual(session: Any, pairs: Pairs) -> float:
    """The worst |Hv - av| / |a|."""
    hessian = Hessian(session)
    worst = 0.0
    for value, vector in zip(*pairs, strict=True):
        image = hessian(torch.from_numpy(np.array(vector, np.float32))).numpy().astype(np.float64)
        worst = max(worst, float(np.linalg.norm(image - value * vector) / abs(value)))
    return worst


def compare(session: Any, states: list[Any], every: int, count: int, gradient: float) -> None:
    """Print products, cost in gradients and residual of every solver at every `every`-th state."""
    rows: dict[str, list[tuple[int, float, float]]] = {}
    previous = None
    for number, state in enumerate(states):
        measured = number % every == 0 and number > 0
        for name in ("opsig, along the run", "opsig, cold"):
            if name == "opsig, cold" and not measured:
                continue
            began = time.perf_counter()
            found = session.top_eigenpairs(state, count, TOLERANCE, previous if "along" in name else None)
            took = time.perf_counter() - began
            if "along" in name:
                previous = found
            if measured:
                with session.at(state):
                    true = residual(session, (found.values, found.vectors))
                rows.setdefault(name, []).append((found.products, took / gradient, true))
        if not measured:
            continue
        with session.at(state):
            peers = Peers(session)
            for name, solve in peers.solvers().items():
                began = time.perf_counter()
                pairs, spent = solve(count)
                took = time.perf_counter() - began
                took = peers.took if "Lanczos" in name else took
                rows.setdefault(name, []).append((spent, took / gradient, residual(session, pairs)))
    print(f"\nk = {count}: {len(rows['opsig, cold'])} checkpoints")
    print(f"{'':36}{'products':>10}{'gradients':>11}{'worst residual':>16}")
    for name, row in rows.items():
        products, gradients, true = (np.array(column) for column in zip(*row, strict=True))
        print(f"{name:36}{products.mean():10.1f}{gradients.mean():11.1f}{true.max():16.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--every", type=int, default=4)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the peers
    with tempfile.TemporaryDirectory() as folder:
        session, states = checkpoints(Path(folder) / "run.h5", options.steps, options.samples)
        with session.at(states[-1]):
            peers = Peers(session)
            vector = torch.randn(session.flat.vector.shape)
            hessian = Hessian(session)

            def gradient() -> None:
                for _, batch in session.batches:
                    torch.autograd.grad(session.task.losses(session.flat.model, batch).sum(), session.flat.parameters)

            products = peers.products()
            one, own, *theirs = seconds(
                gradient, lambda: hessian(vector), *(lambda f=f: f(vector) for f in products.values())
            )
            session.flat.model.zero_grad()
        costs = dict(zip(products, theirs, strict=True))
        print(f"one product, in gradients: opsig {own / one:.2f}", end="")
        print("".join(f", {name} {cost / one:.2f}" for name, cost in costs.items()), flush=True)
        for count in (1, 5):
            compare(session, states, options.every, count, one)


if __name__ == "__main__":
    main()
