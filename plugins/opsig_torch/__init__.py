"""opsig's default backend: PyTorch on the CPU or one CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from opsig_cli.tasks import Task, require_methods


class TorchBackend:
    """The backend named `torch`."""

    def open(
        self,
        task: Task,
        device: str | None = None,
        batch_size: int | None = None,
        statistics: str | None = None,
        double: bool = False,
    ):
        """Open a task on "cpu" or "cuda" (None: the best there is); see `opsig_torch.session.TorchSession`.

        Raises OpsigError where the device is absent, UsageError where `statistics` is unknown.
        """
        from opsig_torch import group
        from opsig_torch.session import TorchSession

        require_methods(task, "torch", "model", "dataset", "losses")
        if (others := group.current()) is None:
            return TorchSession(task, device, batch_size, statistics, double)
        from opsig_torch import serving

        return serving.opened(others, task, (device, batch_size, statistics, double))

    @contextmanager
    def meeting(self, rank: int, size: int) -> Iterator[Callable[[], None]]:
        """Work with the other processes that were started with this one; yields what those but the first do: to serve.

        Raises OpsigError where they do not come, or where one of them ends.
        """
        from opsig_torch import group, serving

        with group.meeting(rank, size) as together:
            yield partial(serving.serve, together)
