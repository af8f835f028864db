"""What a run holds, in one number: the same as long as nothing is recorded, measured anew or left out."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import numpy as np

from opsig_cli.trajectory.reading import Reading
from opsig_cli.trajectory.schema import ROW_GROUPS, field_of


def content_of(run: Reading, without: Collection[str] = ()) -> str | None:
    """SHA-256, in hexadecimal, of the checksums of everything that a run presents and of its attributes.

    Groups named by `without` do not count. No row itself is read. None for a file with data that have no checksum.
    """
    digest = hashlib.sha256(repr(sorted(run.attributes.items())).encode())
    for group in ROW_GROUPS:
        if group in without or not run.has(f"{group}/step"):
            continue
        steps = run.steps(group)
        if not run.has(f"{group}/checksum"):
            return None
        checksums = run._gather(f"{group}/checksum", run._rows(group).order())
        for part in (group.encode(), steps.tobytes(), np.ascontiguousarray(checksums).tobytes()):
            digest.update(part)
    for name in run.names():
        if name.split("/")[0] in without or field_of(name).dims[0] == "step":
            continue
        checksum = run._file[name].attrs.get("checksum")
        if checksum is None:
            return None
        digest.update(f"{name} {int(checksum)}".encode())
    return digest.hexdigest()
