"""opsig finds the opposing groups of samples that make a network's training loss oscillate and spike.

The public Python API. `open_trajectory` reads a run, as arrays, pandas frames or xarray datasets; `mine`, `cluster`,
`sharpness` and `branch` are the commands of these names as functions, and return the records that the commands print;
`Recorder` writes a run from a training loop of one's own, with `State` for checkpoints whose layout is a list of
`Tensor`; `Task` is what a training problem must offer; `OpsigError` is what all of them raise.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsig_cli.backends import State, Tensor
    from opsig_cli.errors import OpsigError
    from opsig_cli.studies.door import branch, cluster, mine, sharpness
    from opsig_cli.studies.results import Records
    from opsig_cli.tasks import Task
    from opsig_cli.trajectory.file import Trajectory, open_trajectory
    from opsig_cli.trajectory.recorder import Recorder

_HOMES = {
    "OpsigError": "errors",
    "Recorder": "trajectory.recorder",
    "Records": "studies.results",
    "State": "backends",
    "Task": "tasks",
    "Tensor": "backends",
    "Trajectory": "trajectory.file",
    "branch": "studies.door",
    "cluster": "studies.door",
    "mine": "studies.door",
    "open_trajectory": "trajectory.file",
    "sharpness": "studies.door",
}

__all__ = [
    "OpsigError",
    "Recorder",
    "Records",
    "State",
    "Task",
    "Tensor",
    "Trajectory",
    "branch",
    "cluster",
    "mine",
    "open_trajectory",
    "sharpness",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `opsig --help` needs none of them."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'opsig_cli' has no attribute '{name}'")
    found = getattr(import_module(f"opsig_cli.{_HOMES[name]}"), name)
    if _HOMES[name] == "studies.door":
        found = globals()[name] = _spoken(found)
    return found


def _spoken(study: Any) -> Any:
    """A study that a command calls, too, whose errors speak of arguments instead of options."""
    from functools import wraps

    from opsig_cli.errors import OpsigError, in_python

    @wraps(study)
    def called(*arguments: Any, **options: Any) -> Any:
        try:
            return study(*arguments, **options)
        except OpsigError as error:
            error.args = (in_python(str(error)),)
            raise

    return called
