"""Where a file is that somebody may move while it is written, and where else it may be kept."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

from opsig_cli.trajectory.disk import same_file, sync_folder
from opsig_cli.trajectory.redo_log import LOG_SUFFIX


def path_of(fd: int) -> str | None:
    """Where the open file is now, or None where it has no name any more, or the system does not say."""
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return None
    return path if same_file(fd, path) else None


def spare_names(path: str) -> Iterator[str]:
    """Names under which a copy of a file may be kept, best first."""
    base, suffix = os.path.splitext(os.path.basename(path))
    for folder in (os.path.dirname(os.path.abspath(path)), os.getcwd(), tempfile.gettempdir()):
        for number in range(1, 10):
            yield os.path.join(folder, f"{base}.kept{number if number > 1 else ''}{suffix}")


def move_log(log: int, before: str, after: str) -> None:
    """Let the log follow its file, unless it did already, or another lies there."""
    if same_file(log, before + LOG_SUFFIX) and not os.path.exists(after + LOG_SUFFIX):
        os.rename(before + LOG_SUFFIX, after + LOG_SUFFIX)
    sync_folder(after)
