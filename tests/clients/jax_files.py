"""Checkpoints that JAX's libraries write, with their current releases: of a tree whose leaves are Mlp's tensors."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clients.case import TASKS, Client, Made, losses_of
from clients.tasks import Mlp

RATE, STEPS = 0.05, (0, 10, 20)
ADAM = ("--optimizer", "adam", "--learning-rate", RATE)
MOMENTUM = ("--optimizer", "momentum", "--momentum", 0.9, "--learning-rate", RATE)


def nested(model: Any) -> Any:
    """A model's parameters as flax nests them."""
    import jax.numpy as jnp

    tree: dict[str, dict[str, Any]] = {}
    for name, value in model.named_parameters():
        layer, _, leaf = name.partition(".")
        tree.setdefault(layer, {})[leaf] = jnp.array(value.detach().numpy())
    return tree


def trained(right: Made, make: Any, save: Callable[[int, Any, Any], object], task: Any = None) -> Made:
    """Twenty steps of optax, of which every tenth is saved. `right` learns losses, and thresholds of optax's own."""
    import jax
    import jax.numpy as jnp
    import optax

    warnings.simplefilter("ignore")
    task = Mlp() if task is None else task
    x, y = jnp.array(task.x.numpy()), jnp.array(task.y.numpy())
    model = task.model()
    weights, optimizer = nested(model), make(optax)
    state = optimizer.init(weights)

    @jax.jit
    def step_of(weights: Any, state: Any) -> Any:
        def loss(weights: Any) -> Any:
            hidden = jax.nn.relu(x @ weights["first"]["weight"].T + weights["first"]["bias"])
            logits = hidden @ weights["second"]["weight"].T + weights["second"]["bias"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    for step in range(max(STEPS) + 1):
        if step in STEPS:
            save(step, weights, state)
            flat = {f"{layer}.{leaf}": torch.from_numpy(np.array(value, np.float32))
                    for layer, leaves in weights.items() for leaf, value in leaves.items()}  # fmt: skip
            model.load_state_dict(flat)
            right.losses[step] = losses_of(task, model)
            if ADAM[1] in right.options:
                right.thresholds[step] = (2 + 2 * 0.9) / ((1 - 0.9) * right.rates.get(step, RATE))
            elif MOMENTUM[1] in right.options:
                right.thresholds[step] = (2 + 2 * 0.9) / RATE
        weights, state = step_of(weights, state)
    return right


def adam(optax: Any) -> Any:
    return optax.adam(RATE)


def chained(optax: Any) -> Any:
    rate = optax.constant_schedule(RATE)
    return optax.chain(optax.clip_by_global_norm(1e3), optax.sgd(rate, momentum=0.9))


def flax_state(step: int, weights: Any, state: Any) -> Any:
    """flax's TrainState, as its users save it."""
    from flax.training.train_state import TrainState

    return TrainState(step, lambda *_: None, weights, None, state)  # pyright: ignore[reportArgumentType]


def flax_train_state(folder: Path) -> Made:
    from flax.serialization import to_bytes

    def save(step: int, weights: Any, state: Any) -> None:
        (folder / f"state_{step}.msgpack").write_bytes(to_bytes(flax_state(step, weights, state)))

    return trained(Made(f"{TASKS}:Mlp", [folder], ADAM), adam, save)


def flax_params(folder: Path) -> Made:
    from flax.serialization import to_bytes

    def save(step: int, weights: Any, _: Any) -> None:
        (folder / f"checkpoint_{step}").write_bytes(to_bytes({"params": weights}))

    return trained(Made(f"{TASKS}:Mlp", [folder]), adam, save)


def flax_bfloat16(folder: Path) -> Made:
    import jax
    import jax.numpy as jnp
    from flax.serialization import to_bytes

    right = Made(f"{TASKS}:Mlp", [folder])

    def save(step: int, weights: Any, _: Any) -> None:
        short = jax.tree.map(lambda each: each.astype(jnp.bfloat16), weights)
        (folder / f"step{step}.msgpack").write_bytes(to_bytes(short))
        for leaves, shortened in zip(weights.values(), short.values(), strict=True):
            leaves |= {key: each.astype(jnp.float32) for key, each in shortened.items()}

    return trained(right, adam, save)


def flax_injected(folder: Path) -> Made:
    """A learning rate inside the state, as inject_hyperparams keeps it."""
    from flax.serialization import to_bytes

    def save(step: int, weights: Any, state: Any) -> None:
        (folder / f"state_{step}.msgpack").write_bytes(to_bytes(flax_state(step, weights, state)))

    right = Made(f"{TASKS}:Mlp", [folder], ("--optimizer", "adam"), says=["optax's state does not say whose it is"])
    right.rates = {step: float(np.float32(RATE)) for step in STEPS}
    return trained(right, lambda optax: optax.inject_hyperparams(optax.adam)(learning_rate=RATE), save)


def orbax_tree(folder: Path, **options: Any) -> Made:
    """A folder each step, by PyTreeCheckpointer's handler."""
    import orbax.checkpoint as ocp

    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options))

    def save(step: int, weights: Any, state: Any) -> None:
        checkpointer.save(folder / f"step_{step}", flax_state(step, weights, state))

    return trained(Made(f"{TASKS}:Mlp", [folder], ADAM), adam, save)


def orbax_standard(folder: Path) -> Made:
    import orbax.checkpoint as ocp

    checkpointer = ocp.StandardCheckpointer()

    def save(step: int, weights: Any, state: Any) -> None:
        checkpointer.save(folder / f"step_{step}", {"model": weights, "optimizer": state})
        checkpointer.wait_until_finished()

    return trained(Made(f"{TASKS}:Mlp", [folder], MOMENTUM), chained, save)


def orbax_manager(folder: Path) -> Made:
    """Steps as folders, with a tree and a JSON item each, and one that was not finished."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder / "run", item_names=("state", "data")) as manager:

        def save(step: int, weights: Any, state: Any) -> None:
            items = ocp.args.Composite(
                state=ocp.args.StandardSave({"params": weights, "opt_state": state}),
                data=ocp.args.JsonSave({"epoch": step // 10}),
            )
            manager.save(step, args=items)
            manager.wait_until_finished()

        right = trained(Made(f"{TASKS}:Mlp", [folder / "run"], ADAM), adam, save)
    os.rename(folder / "run" / "20", folder / "run" / "20.orbax-checkpoint-tmp-5")
    del right.losses[20], right.thresholds[20]
    return right


def equinox_leaves(folder: Path) -> Made:
    """A model and Adam's state as leaves, behind a line of options."""
    import equinox

    def save(step: int, weights: Any, state: Any) -> None:
        with open(folder / f"step{step}.eqx", "wb") as file:
            file.write(b'{"width": 12}\n')
            leaves = [[weights[layer]["weight"], weights[layer]["bias"]] for layer in ("first", "second")]
            mirrored = [[[tree[layer]["weight"], tree[layer]["bias"]] for layer in ("first", "second")]
                        for tree in (state[0].mu, state[0].nu)]  # fmt: skip
            equinox.tree_serialise_leaves(file, (leaves, (state[0].count, *mirrored), 0.1))

    return trained(Made(f"{TASKS}:Mlp", [folder], ADAM), adam, save)


def npz_leaves(folder: Path) -> Made:
    """Leaves in their order, and names by slashes."""

    def save(step: int, weights: Any, _: Any) -> None:
        flat = {f"params/{layer}/{leaf}": value for layer, leaves in weights.items() for leaf, value in leaves.items()}
        np.savez(folder / f"params_{step}.npz", **flat)  # pyright: ignore[reportArgumentType]

    return trained(Made(f"{TASKS}:Mlp", [folder]), adam, save)


def pickled(folder: Path) -> Made:
    def save(step: int, weights: Any, state: Any) -> None:
        with open(folder / f"step{step}.pkl", "wb") as file:
            pickle.dump({"step": step, "params": weights, "opt_state": state}, file)

    return trained(Made(f"{TASKS}:Mlp", [folder]), adam, save)


FLAX, ORBAX = ("jax", "optax", "flax"), ("jax", "optax", "flax", "orbax", "tensorstore")
CLIENTS = [
    Client("flax, TrainState", "flax", flax_train_state, FLAX),
    Client("flax, params alone", "flax", flax_params, FLAX),
    Client("flax, bfloat16", "flax", flax_bfloat16, FLAX),
    Client("flax, inject_hyperparams", "flax", flax_injected, FLAX),
    Client("orbax, PyTreeCheckpointHandler", "orbax.checkpoint", orbax_tree, ORBAX),
    Client("orbax, zarr", "orbax.checkpoint", lambda folder: orbax_tree(folder, use_ocdbt=False), ORBAX),
    Client("orbax, zarr3", "orbax.checkpoint",
           lambda folder: orbax_tree(folder, use_ocdbt=False, use_zarr3=True), ORBAX),
    Client("orbax, zarr3 in OCDBT", "orbax.checkpoint", lambda folder: orbax_tree(folder, use_zarr3=True), ORBAX),
    Client("orbax, StandardCheckpointer", "orbax.checkpoint", orbax_standard, ORBAX),
    Client("orbax, CheckpointManager", "orbax.checkpoint", orbax_manager, ORBAX),
    Client("equinox, model and optimizer", "equinox", equinox_leaves, ("jax", "optax", "equinox")),
    Client("npz from JAX, names by slashes", "jax", npz_leaves, ("jax", "optax")),
    Client("pickle of JAX arrays", "jax", pickled, ("jax", "optax")),
]  # fmt: skip
