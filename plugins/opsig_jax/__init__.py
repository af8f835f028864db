"""opsig's JAX backend: tasks written as `init(key) -> params` and `losses(params, batch) -> (B,)`, on one device."""

from __future__ import annotations

from importlib.util import find_spec

from opsig_cli.errors import OpsigError
from opsig_cli.tasks import Task, require_methods


class JaxBackend:
    """The backend named `jax`.

    A task of it has `data()`, a pytree of arrays with one row a sample; `init(key)`, a pytree of parameters, such as
    flax's and equinox's modules are; and `losses(params, batch)`, (B,), where a batch is rows of the data. Optional
    members are as of any task (`opsig_cli.tasks.Task`), with `params` in the place of `model`.
    """

    def open(
        self,
        task: Task,
        device: str | None = None,
        batch_size: int | None = None,
        statistics: str | None = None,
        double: bool = False,
    ):
        """Open a task on "cpu" or "cuda" (None: the best there is); see `opsig_jax.session.JaxSession`.

        Raises OpsigError where JAX or the device is absent, or the task is none of JAX's; UsageError where `statistics`
        is unknown.
        """
        require_methods(task, "jax", "init", "data", "losses")
        if absent := [name for name in ("jax", "optax") if find_spec(name) is None]:
            raise OpsigError(f"the jax backend needs {' and '.join(absent)}. Run: pip install 'opsig[jax]'")
        from opsig_jax.session import JaxSession

        return JaxSession(task, device, batch_size, statistics, double)
