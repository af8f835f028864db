"""opsig's default backend: PyTorch on the CPU or one CUDA device."""

from __future__ import annotations

from opsig_cli.tasks import Task


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
        from opsig_torch.session import TorchSession

        return TorchSession(task, device, batch_size, statistics, double)
