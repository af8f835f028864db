"""Which samples a person means: `pair:1`, `group:3`, `label:Coat`, indices, or `-`, the records on stdin."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.studies import mining
from opsig_cli.trajectory.file import Trajectory

SHOWN = 12
"""Names that an error lists."""

Records = Sequence[Mapping[str, Any]]


class Names:
    """Turns names into columns of a run's file, increasing, (M,).

    Groups and pairs are those of `records` where these have members, else of what `find_groups`, the records of
    `cluster`, returns: it is called once, and only if it is needed. Members that joined a group without having been
    mined are not counted, as they are not in the `sizes` of a pair.
    """

    def __init__(self, run: Trajectory, records: Records | None, find_groups: Callable[[], Records]):
        self._run = run
        self._records = records
        self._find = find_groups
        self._members: list[Mapping[str, Any]] | None = None

    def positions(self, name: str) -> np.ndarray:
        """The samples of this name. Raises OpsigError, listing what there is, where nothing is called so."""
        kind, colon, value = name.partition(":")
        if name == "-":
            return self._of_records()
        if kind == "label" and colon:
            return self._of_label(value)
        if kind in ("pair", "group") and colon:
            return self._of_number(kind, value)
        if re.fullmatch(r"\d+(,\d+)*", name):
            return np.unique(mining.positions_of(self._run, [int(part) for part in name.split(",")]))
        raise UsageError(
            f"'{name}' names no samples. Write pair:N, group:N, label:TEXT, indices as 17,18, or - for what stdin names"
        )

    def groups(self) -> dict[int, np.ndarray]:
        """The samples of every group, by its number."""
        numbers = sorted({record["group"] for record in self._all_members()})
        return {number: self._where("group", number) for number in numbers}

    def _of_records(self) -> np.ndarray:
        if self._records is None:
            raise UsageError(
                "- means the samples of the records on stdin. Give them: opsig mine RUN | opsig branch - ..."
            )
        samples = [record["sample"] for record in self._records if isinstance(record.get("sample"), int)]
        if not samples:
            raise OpsigError("the records on stdin name no samples. Pipe those of mine, or members of cluster")
        return np.unique(mining.positions_of(self._run, samples))

    def _of_label(self, label: str) -> np.ndarray:
        self._run.require("samples/label")
        labels = self._run.read("samples/label")
        found = np.flatnonzero(labels == label)
        if not len(found):
            known = sorted(set(labels.tolist()))
            near = known if len(known) <= SHOWN else difflib.get_close_matches(label, known, SHOWN) or known
            raise OpsigError(f"{self._run.path} has no sample with the label '{label}'. {_listed('Labels', near)}")
        return found

    def _of_number(self, kind: str, value: str) -> np.ndarray:
        if not value.isdigit():
            raise UsageError(
                f"'{kind}:{value}' is not a {kind}. Write {kind}:N with its number, as opsig cluster prints it"
            )
        found = self._where(kind, int(value))
        if not len(found):
            known = sorted({record[kind] for record in self._all_members() if record.get(kind) is not None})
            where = "the records on stdin have" if self._records_have_members() else "the clustering of the run has"
            raise OpsigError(f"{where} no {kind} {value}. {_listed(f'{kind.capitalize()}s', known)}")
        return found

    def _where(self, kind: str, number: int) -> np.ndarray:
        samples = [record["sample"] for record in self._all_members() if record.get(kind) == number]
        return np.unique(mining.positions_of(self._run, samples)) if samples else np.empty(0, np.int64)

    def _all_members(self) -> list[Mapping[str, Any]]:
        if self._members is None:
            found = self._records if self._records is not None and self._records_have_members() else self._find()
            self._members = [r for r in found if _is_member(r) and r.get("mined", True)]
        return self._members

    def _records_have_members(self) -> bool:
        return any(_is_member(record) for record in self._records or [])


def _is_member(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("sample"), int) and isinstance(record.get("group"), int)


def _listed(what: str, names: Sequence[Any]) -> str:
    """Names for an error, the first few of many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what}: {', '.join(map(str, names[:SHOWN])) or 'none'}{more}"
