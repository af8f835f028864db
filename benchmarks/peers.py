"""opsig against its peers: same model, data, chunks and checkpoints, in one process; prints a table in Markdown.

    pip install -c constraints.txt -e '.[peers]'
    python benchmarks/peers.py [--steps 200] [--samples 5000] [--every 4] [--only solvers|samples] [--best]
        [--model mlp] [--seed 0]

Trains an MLP (or `--model`) on Fashion-MNIST by gradient descent with a checkpoint every ten steps. Every solver is
asked for the k most positive eigenpairs at a residual of 1e-3 at every `--every`-th checkpoint; opsig, and the peer
that can start from the last checkpoint's vectors, solve at all of them, as along a run. `--best` leaves out peers that
were never the best of those that reach the residual. eigsh has its default subspace and one of 2k + 4
vectors, LOBPCG one vector more than asked for, the Lanczos of hessian-eigenthings the number of steps that just
suffices, PyHessian its default tolerance and 1e-6; nobody's options are swept. The residual that is printed is the
true one, |Hv - av| / |a|, the worst of all pairs, by opsig's product. Per sample: gradient norms by BackPACK and
Opacus, cosines by a vmapped gradient and a product. Costs are in gradients: CPU seconds over those of one forward and
backward pass over the data, whole calls, all taken in turns.
"""

from __future__ import annotations

import argparse
import copy
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
BEST = ("hessian-eigenthings, Lanczos", "curvlinops + scipy eigsh, small subspace")
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
            "curvlinops + scipy eigsh, its default subspace": lambda k: self._eigsh(k, None),
            "curvlinops + scipy eigsh, small subspace": lambda k: self._eigsh(k, 2 * k + 4),
            "hessian-eigenthings, Lanczos": self._lanczos,
            "curvlinops + scipy lobpcg": lambda k: self._lobpcg(k, None),
        }

    def warm(self, count: int, before: np.ndarray | None) -> tuple[Pairs, int]:
        """LOBPCG from the vectors (K, P) of the last checkpoint, as central-flow code runs it, and one more that is
        random: what overtakes must be seen."""
        return self._lobpcg(count, before)

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

    def _eigsh(self, count: int, subspace: int | None) -> tuple[Pairs, int]:
        operator, spent = self._operator()
        values, vectors = eigsh(operator, k=count, which="LA", tol=TOLERANCE, ncv=subspace)
        return (values, vectors.T), spent[0]

    def _lobpcg(self, count: int, before: np.ndarray | None) -> tuple[Pairs, int]:
        operator, spent = self._operator()
        start = np.random.default_rng(0).standard_normal((operator.shape[0], count + 1)).astype(np.float32)
        if before is None:
            largest = float(eigsh(operator, k=1, which="LA", tol=0.1, return_eigenvectors=False)[0])
            spent[0] = 0  # its tolerance is absolute: what is needed to say 1e-3 is not counted
        else:
            start[:, :count] = before.T * np.sqrt(operator.shape[0])
            image = operator @ before[0]
            largest, spent[0] = float(before[0] @ image), 0
        values, vectors = lobpcg(operator, start, tol=TOLERANCE * largest, maxiter=200, largest=True)[:2]
        best = np.argsort(-values)[:count]
        return (values[best], vectors.T[best]), spent[0]

    def _lanczos(self, count: int) -> tuple[Pairs, int]:
        from hessian_eigenthings.algorithms import lanczos

        for steps in range(2 * count + 6, 200, 2):  # it takes a number of steps: the smallest that suffices counts
            found = lanczos(self.eigenthings, k=count, max_iter=steps, tol=TOLERANCE, which="LA", seed=0)
            if found.converged.all():
                break
        began = time.process_time()
        lanczos(self.eigenthings, k=count, max_iter=steps, tol=TOLERANCE, which="LA", seed=0)
        self.took = time.process_time() - began
        return (found.eigenvalues.numpy(), found.eigenvectors.numpy()), steps


def residual(session: Any, pairs: Pairs) -> float:
    """The worst |Hv - av| / |a|."""
    hessian = Hessian(session)
    worst = 0.0
    for value, vector in zip(*pairs, strict=True):
        image = hessian(torch.from_numpy(np.array(vector, np.float32))).numpy().astype(np.float64)
        worst = max(worst, float(np.linalg.norm(image - value * vector) / abs(value)))
    return worst


def compare(session: Any, states: list[Any], every: int, count: int, gradient: float, best: bool) -> None:
    """Print products, cost in gradients and residual of every solver, or the BEST, at every `every`-th state."""
    rows: dict[str, list[tuple[int, float, float]]] = {}
    previous, theirs = None, None
    for number, state in enumerate(states):
        measured = number % every == 0 and number > 0
        for name in ("opsig, along the run", "opsig, cold"):
            if name == "opsig, cold" and not measured:
                continue
            began = time.process_time()
            found = session.top_eigenpairs(state, count, TOLERANCE, previous if "along" in name else None)
            took = time.process_time() - began
            if "along" in name:
                previous = found
            if measured:
                with session.at(state):
                    true = residual(session, (found.values, found.vectors))
                rows.setdefault(name, []).append((found.products, took / gradient, true))
        with session.at(state):
            peers = Peers(session)
            if not best:
                began = time.process_time()
                pairs, spent = peers.warm(count, theirs)
                took = time.process_time() - began
                theirs = pairs[1]
            if measured and not best:
                name = "curvlinops + scipy lobpcg, along the run"
                rows.setdefault(name, []).append((spent, took / gradient, residual(session, pairs)))
            for name, solve in peers.solvers().items() if measured else ():
                if best and name not in BEST:
                    continue
                began = time.process_time()
                pairs, spent = solve(count)
                took = time.process_time() - began
                took = peers.took if "Lanczos" in name else took
                rows.setdefault(name, []).append((spent, took / gradient, residual(session, pairs)))
    print(f"\n| k = {count}, {len(rows['opsig, cold'])} checkpoints | products | gradients | worst residual |")
    print("| --- | --- | --- | --- |")
    for name, row in rows.items():
        products, gradients, true = (np.array(column) for column in zip(*row, strict=True))
        print(f"| {name} | {products.mean():.1f} | {gradients.mean():.1f} | {true.max():.0e} |", flush=True)


def samples(session: Any, state: Any, gradient: float) -> None:
    """Print what per-sample gradient norms and cosines cost, in gradients, and how far they are from opsig's."""
    everybody = np.arange(session.samples)
    chosen = everybody[: min(1000, session.samples)]
    calls: dict[str, tuple[Callable[[], np.ndarray], str]] = {
        "opsig": (lambda: session.gradient_norms(state), "norms of all samples"),
        "BackPACK, BatchL2Grad": (lambda: _backpack(session), "norms of all samples"),
        "Opacus, ghost norms": (lambda: _opacus(session), "norms of all samples"),
        "opsig, exact": (lambda: session.gradient_cosines(state, chosen), f"cosines of {len(chosen)} samples"),
        "torch.func, vmapped gradients and a product": (
            lambda: _vmapped_cosines(session, chosen), f"cosines of {len(chosen)} samples",
        ),
    }  # fmt: skip
    print("\n| per sample | gradients | largest difference |\n| --- | --- | --- |")
    exact: dict[str, np.ndarray] = {}
    for name, (call, what) in calls.items():
        with session.at(state):
            call()
            taken = []
            for _ in range(3):
                began = time.process_time()
                found = call()
                taken.append(time.process_time() - began)
        exact.setdefault(what, found)
        share = len(chosen) / session.samples if "cosines" in what else 1.0
        off = np.abs(found - exact[what]).max() / np.abs(exact[what]).max()
        print(f"| {what}: {name} | {np.median(taken) / gradient / share:.2f} | {off:.0e} |", flush=True)


def _backpack(session: Any) -> np.ndarray:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model = extend(copy.deepcopy(session.flat.model))
    loss = extend(torch.nn.CrossEntropyLoss(reduction="sum"))
    rows = []
    for _, (inputs, labels) in session.batches:
        with backpack(BatchL2Grad()):
            loss(model(inputs), labels).backward()
        rows.append(torch.stack([p.batch_l2 for p in model.parameters()]).sum(0).sqrt())
        model.zero_grad()
    return torch.cat(rows).double().numpy()


def _opacus(session: Any) -> np.ndarray:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    plain = copy.deepcopy(session.flat.model).train()
    model = GradSampleModuleFastGradientClipping(
        plain, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum"
    )
    rows = []
    for _, (inputs, labels) in session.batches:
        cross_entropy(model(inputs), labels, reduction="sum").backward()
        rows.append(model.get_norm_sample())
        model.zero_grad()
    return torch.cat(rows).double().numpy()


def _vmapped_cosines(session: Any, chosen: np.ndarray) -> np.ndarray:
    from torch.func import functional_call, grad, vmap

    model = session.flat.model
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(at: Any, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return cross_entropy(functional_call(model, at, (image[None],)), label[None])

    images, labels = session.batches.take(chosen)
    found = vmap(grad(loss), (None, 0, 0))(parameters, images, labels)
    rows = torch.cat([part.flatten(1) for part in found.values()], 1)
    rows /= rows.norm(dim=1, keepdim=True)
    return (rows @ rows.T).double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("solvers", "samples"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the peers
    with tempfile.TemporaryDirectory() as folder:
        session, states = checkpoints(
            Path(folder) / "run.h5", options.steps, options.samples, options.model, options.seed
        )
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
        if options.only != "solvers":
            samples(session, states[-1], one)
        for count in (1, 5) if options.only != "samples" else ():
            compare(session, states, options.every, count, one, options.best)


if __name__ == "__main__":
    main()
