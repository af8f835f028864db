"""The Python door: `mine`, `cluster`, `sharpness` and `branch` with the options of the commands, under the same names.

The commands call exactly these functions, so that a notebook and a shell never differ. `run` is a path, or a trajectory
that `open_trajectory` gave. Each returns `Records`: a list of dictionaries with `.frame()`, `.figure()`, `.notes`, and
`.damage`, which names rows of the file that are damaged: the records are those of the run without them.
All raise OpsigError, whose text says what is wrong, where, and what to do.
"""

from opsig_cli.studies.door.eigenvalues import sharpness
from opsig_cli.studies.door.futures import branch
from opsig_cli.studies.door.groups import cluster
from opsig_cli.studies.door.movers import mine

__all__ = ["branch", "cluster", "mine", "sharpness"]
