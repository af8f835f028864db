"""What tests/test_group.py starts in several processes: every call of a session, shared and alone, to the bit."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from opsig_torch import session as session_module
from opsig_torch.session import TorchSession

from opsig_cli.analysis.grouping import group_by_similarity
from opsig_cli.analysis.significance import gaussian_null
from opsig_cli.analysis.stability import resampled
from opsig_cli.backends import Training, load_backend
from opsig_cli.tasks import load, parse_spec

HERE = Path(__file__).parent
TASKS = {f"{HERE / 'tasks' / 'tiny.py'}:Tiny": 7, f"{HERE / 'token_task.py'}:Digits:items=11": 3}
"""Tasks, and how many items of each are a batch: the last one is smaller. Digits have several samples an item."""


def same(name: str, shared, alone) -> None:
    """Say what differs."""
    for left, right in zip(shared, alone, strict=True):
        if left is None and right is None:
            continue
        if isinstance(left, dict):
            left, right = list(left.values()), list(right.values())
        if not np.array_equal(np.asarray(left), np.asarray(right), equal_nan=True):
            print(f"{name} differs by {np.abs(np.asarray(left) - np.asarray(right)).max()}")


def compare(backend, name: str, chunk: int) -> None:
    task, _ = load(parse_spec(name))
    shared, alone = backend.open(task, "cpu", chunk), TorchSession(task, "cpu", chunk)
    start, again = shared.initial(3), alone.initial(3)
    same("initial", [start.params], [again.params])
    training = Training("momentum", 0.3, 6, wants_losses=lambda step: True, wants_state=lambda step: True)
    weights = np.linspace(0, 2, shared.samples)
    for how in (training, replace(training, weights=weights), training):  # the last without the weights before it
        pairs = list(zip(shared.train(how, start), alone.train(how, start), strict=True))
        for a, b in pairs:
            same(
                "train",
                [a.train_loss, a.grad_norm, a.losses, a.predictions],
                [b.train_loss, b.grad_norm, b.losses, b.predictions],
            )
            same("train", [a.state.params], [b.state.params])
    state, earlier = pairs[-1][0].state, pairs[2][0].state
    samples, sets = np.arange(0, shared.samples, 2), [np.arange(0, 5), np.arange(5, 12)]
    direction = np.random.default_rng(0).standard_normal(len(state.params)).astype(np.float32)
    for name, arguments in {
        "gradient_norms": (state,),
        "gradient_cosines": (state, samples),
        "mean_cosines": (state, np.arange(shared.samples), sets),
        "gradient_sketch": (state, samples, 64, 0),
        "features": (state, samples),
        "mean_feature_cosines": (state, np.arange(shared.samples), sets),
        "curvature_along": (state, direction),
        "slopes_along": (state, np.stack([direction, direction[::-1]])),
        "sample_sharpness": (state, samples[:5], 1e-3),
        "hessian_vectors": (state, direction[None]),
        "spectral_density": (state,),
    }.items():
        same(name, getattr(shared, name)(*arguments), getattr(alone, name)(*arguments))
    same("gradient", [shared.gradient(state)], [alone.gradient(state)])
    same("weighted gradient", [shared.gradient(state, weights)], [alone.gradient(state, weights)])
    for (a, b), (c, d) in zip(
        shared.losses([state, earlier, start]), alone.losses([state, earlier, start]), strict=True
    ):
        same("losses", [a, b], [c, d])
    one, two = shared.top_eigenpairs(state, 2, 1e-3), alone.top_eigenpairs(state, 2, 1e-3)
    same("eigenpairs", [one.values, one.vectors, one.residuals], [two.values, two.vectors, two.residuals])
    one, two = shared.top_eigenpairs(earlier, 2, 1e-3, one), alone.top_eigenpairs(earlier, 2, 1e-3, two)
    same("warm eigenpairs", [one.values, one.vectors], [two.values, two.vectors])
    states = [state, earlier, start]
    for name, arguments in {
        "gradient_cosines": (samples,), "mean_cosines": (samples, sets), "features": (samples,),
        "mean_feature_cosines": (samples, sets),
    }.items():  # fmt: skip
        for room in (1 << 20, 1 << 60):  # with room for everybody's results and without
            every = shared.each([(name, (at, *arguments)) for at in states], room)
            for one, at in zip(every, states, strict=True):
                same(f"{name} at several states", [one], [getattr(alone, name)(at, *arguments)])
    silent = np.where(np.arange(shared.samples) % 5 == 1, 0.0, 1.0)
    repeated = replace(training, steps=state.step + 3, replayed=True, wants_state=lambda step: False)
    for name, asked in {
        "replays": [repeated, replace(repeated, weights=silent), replace(repeated, weights=silent[::-1].copy())],
        "replays of minibatches": [replace(repeated, weights=silent, batch_size=4, tracked=np.arange(3, 9))] * 4,
    }.items():
        for one, how in zip(shared.replays((each, state) for each in asked), asked, strict=True):
            two = list(alone.train(how, state))
            same(name, [a.losses for a in one], [b.losses for b in two])
            same(name, [a.train_loss for a in one], [b.train_loss for b in two])
    similarity = alone.gradient_cosines(state, samples)
    found = group_by_similarity(similarity, 2)
    for name, null in {"gaussian": gaussian_null, "again": resampled}.items():
        about = (similarity, None, None) if name == "gaussian" else (similarity, found, 2)
        one, two = null(*about, rounds=5, in_rounds=shared.in_rounds), null(*about, rounds=5)
        same(f"null {name}", vars(one).values(), vars(two).values())
    broken = replace(state, params=state.params[:-1])
    try:
        shared.gradient_norms(broken)
        print("a wrong state is taken")
    except Exception as error:
        print(f"refused: {type(error).__name__}: {error}", file=sys.stderr)
    same("after an error", [shared.gradient_norms(state)], [alone.gradient_norms(state)])


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = load_backend("torch")
    session_module.give_back_at_once = lambda: print("freed memory is given back, where nobody gave a bound")
    with backend.meeting(rank, size) as serve:
        if rank:
            serve()
            return
        for name, chunk in TASKS.items():
            compare(backend, name, chunk)


def at_once() -> None:
    """End as `opsig_cli.main` does: torch's threads abort now and then as Python ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    at_once()
