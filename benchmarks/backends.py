"""The torch and the JAX backend on the same tasks and the same parameters: agreement, products, and time.

    OMP_NUM_THREADS=1 python benchmarks/backends.py [--samples 500] [--steps 60] [--only agreement|products|time]

Tasks are `tests/tasks/twins.py`: an MLP, a CNN and a small GPT, each for both. torch trains it by gradient descent,
and both then measure its checkpoints, the parameters carried by name. Time is CPU seconds, medians of calls in turns in
one process on one thread, JAX's first call, which compiles, apart. Needs jax.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

from opsig_cli.backends import Eigenpairs, State, Training, load_backend

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tasks import twins

RATES = {"mlp": 0.1, "cnn": 0.1, "gpt": 0.2}
COUNT, TOLERANCE, EVERY = 3, 1e-4, 10
VECTORS, CHOSEN, TURNS = 8, 64, 7


def opened(kind: str, samples: int) -> tuple[Any, Any]:
    """The same task in both, with torch's order of parameters."""
    one = load_backend("torch").open(twins.InTorch(kind, samples), "cpu")
    other = load_backend("jax").open(twins.InJax(kind, samples), "cpu")
    names = [tensor.name for tensor in one.layout]
    assert {t.name: t.shape for t in one.layout} == {t.name: t.shape for t in other.layout}
    other.arrange(names)
    return one, other


def checkpoints(session: Any, kind: str, steps: int) -> list[State]:
    """States every few steps of gradient descent, the first left out."""
    training = Training("gd", RATES[kind], steps, wants_state=lambda step: step % EVERY == 0)
    states = [each.state for each in session.train(training, session.initial(0)) if each.state is not None]
    return states[1:]


def apart(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest value."""
    expected = np.asarray(expected, np.float64)
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


def agreement(kind: str, one: Any, other: Any, states: list[State]) -> dict[str, float]:
    """The largest difference of each quantity over checkpoints."""
    generator = np.random.default_rng(0)
    chosen = np.sort(generator.choice(one.samples, min(CHOSEN, one.samples), replace=False))
    worst: dict[str, float] = {}
    for state in states:
        direction = generator.standard_normal(len(state.params)).astype(np.float32)
        direction /= np.linalg.norm(direction)

        def measured(session: Any, state: State = state, direction: np.ndarray = direction) -> dict[str, Any]:
            along = session.curvature_along(state, direction)
            return {
                "losses": session.losses([state])[0][0],
                "gradient": session.gradient(state),
                "gradient norms": session.gradient_norms(state),
                "cosines": session.gradient_cosines(state, chosen),
                "curvature of samples": along[2],
                "Hessian-vector product": session.hessian_vectors(state, direction[None]),
                "top 3 eigenvalues": session.top_eigenpairs(state, COUNT, TOLERANCE).values,
            }

        expected, found = measured(one), measured(other)
        for name, value in expected.items():
            worst[name] = max(worst.get(name, 0.0), apart(found[name], value))
    return worst


def products(session: Any, states: list[State], count: int, tolerance: float) -> list[int]:
    """Products along a run: from nothing at the first checkpoint, then from the one before."""
    previous: Eigenpairs | None = None
    spent = []
    for state in states:
        previous = session.top_eigenpairs(state, count, tolerance, previous)
        spent.append(previous.products)
    return spent


def clocked(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def seconds(*calls: Callable[[], object]) -> tuple[np.ndarray, np.ndarray]:
    """CPU seconds of each call: medians of turns, and what the first took more."""
    first = np.array([clocked(call) for call in calls])
    rows = [[clocked(call) for call in calls] for _ in range(TURNS)]
    median = np.median(rows, axis=0)
    return median, first - median


def timed(one: Any, other: Any, state: State) -> list[tuple[str, float, float, float]]:
    """Of each quantity: milliseconds in torch, in JAX, and what the first call in JAX took more."""
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((VECTORS, len(state.params))).astype(np.float32)
    chosen = np.arange(min(CHOSEN, one.samples))
    works: dict[str, tuple[int, Callable[[Any], object]]] = {
        "losses of all samples": (1, lambda session: session.losses([state])),
        "curvature of all samples": (1, lambda session: session.curvature_along(state, vectors[0])),
        "Hessian-vector product": (VECTORS, lambda session: session.hessian_vectors(state, vectors)),
        "gradient norms of all": (1, lambda session: session.gradient_norms(state)),
        f"cosines of {len(chosen)}": (1, lambda session: session.gradient_cosines(state, chosen)),
    }
    rows = []
    for name, (times, work) in works.items():
        median, more = seconds(lambda work=work: work(one), lambda work=work: work(other))
        rows.append((name, *(1000 * median / times).tolist(), 1000 * float(more[1])))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", choices=("agreement", "products", "time"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = [options.only] if options.only else ["agreement", "products", "time"]
    made = {}
    for kind in twins.KINDS:
        one, other = opened(kind, options.samples)
        made[kind] = one, other, checkpoints(one, kind, options.steps)
    sizes = ", ".join(f"{kind} {len(states[0].params):,}" for kind, (_, _, states) in made.items())
    print(f"{options.samples} samples, parameters: {sizes}; checkpoints every {EVERY} of {options.steps} steps\n")
    if "agreement" in parts:
        found = {kind: agreement(kind, *each) for kind, each in made.items()}
        print(f"| largest relative difference | {' | '.join(made)} |\n|---{'|---' * len(made)}|")
        for name in next(iter(found.values())):
            print(f"| {name} | {' | '.join(f'{each[name]:.0e}' for each in found.values())} |", flush=True)
        print()
    if "products" in parts:
        print(f"| products to convergence | {' | '.join(made)} |\n|---{'|---' * len(made)}|")
        for count, tolerance in ((1, 1e-2), (1, 1e-3), (COUNT, 1e-3)):
            for number, name in enumerate(("torch", "JAX")):
                spent = [products(each[number], each[2], count, tolerance) for each in made.values()]
                listed = " | ".join(f"{sum(each)} ({', '.join(map(str, each))})" for each in spent)
                print(f"| {name}, k = {count}, {tolerance:g} | {listed} |", flush=True)
        print()
    if "time" in parts:
        print("| CPU time | torch, ms | JAX, ms | JAX / torch | compiling, ms |\n|---|---|---|---|---|")
        for kind, (one, other, states) in made.items():
            for name, torch_ms, jax_ms, more in timed(one, other, states[-1]):
                row = f"{torch_ms:.1f} | {jax_ms:.1f} | {jax_ms / torch_ms:.2f} | {more:,.0f}"
                print(f"| {kind}, {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
