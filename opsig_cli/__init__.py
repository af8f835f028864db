"""opsig finds the opposing groups of samples that make a network's training loss oscillate and spike.

The public Python API: `open_trajectory` reads a run, `Recorder` writes one from a training loop of one's own, and
`Task` is what a training problem must offer.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsig_cli.tasks import Task
    from opsig_cli.trajectory.file import open_trajectory
    from opsig_cli.trajectory.recorder import Recorder

__all__ = ["Recorder", "Task", "open_trajectory"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `opsig --help` needs none of them."""
    from importlib import import_module

    home = {"Recorder": "trajectory.recorder", "Task": "tasks", "open_trajectory": "trajectory.file"}.get(name)
    if home is None:
        raise AttributeError(f"module 'opsig_cli' has no attribute '{name}'")
    return getattr(import_module(f"opsig_cli.{home}"), name)
