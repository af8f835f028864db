"""A run's groups and pairs, computed once: kept in its file, and read back where nothing that made them has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opsig_cli.analysis.gram import Gram
from opsig_cli.studies import kept, sighted
from opsig_cli.studies.clustering import around, finding, silencing
from opsig_cli.studies.clustering.clusters import Clusters
from opsig_cli.studies.clustering.finding import Found
from opsig_cli.studies.filled import filled
from opsig_cli.studies.trained import backend_of
from opsig_cli.trajectory.file import Trajectory

GROUP = "clusters"
READ_BACK = "note: the groups are those found before, kept in the file (opsig cluster --replace finds them anew)"


@dataclass(frozen=True)
class Kept:
    """What was found, and what was said on the way that a person should know whenever it is shown."""

    found: Found
    said: list[str]


@dataclass
class Keeper:
    """Finds groups once for a command: `find` reads them back or computes them, `keep` writes what was computed.

    `replace`: always compute. `any_of`: options of `find` that those who read back do not mind.
    """

    replace: bool = False
    any_of: Collection[str] = ()
    origin: kept.Origin | None = None
    computed: Kept | None = None

    def find(
        self, run: Trajectory, by: str | None, top: int | None, task: str | None, device: str | None,
        backend: str | None, warn: Callable[[str], None], progress: Any,
        tell: Callable[[str], None] = lambda words: None, **options: Any,
    ) -> Found:  # fmt: skip
        """What `finding.find` returns for these options; `tell` takes a line where it was read back."""
        self.computed = None
        backend = backend_of(run, backend)
        if sighted.chosen(run):  # takes seconds: four checkpoints, and nothing is silenced
            return around.find(run, by, top, task, device, backend, warn, progress, **options)
        self.origin = kept.origin_of(run, _stated(by, top, device, backend, options), task, backend)
        back = None if self.replace else kept.read_back(run, GROUP, Kept, self.origin, self.any_of)
        if back is not None and (found := _whole(run, back.found)) is not None:
            for words in back.said:
                warn(words)
            tell(READ_BACK)
            return found
        said: list[str] = []

        def say(words: str) -> None:
            if not words.startswith("device:"):
                said.append(words)
            warn(words)

        found = finding.find(run, by, top, task, device, backend, say, progress, **options)
        self.computed = Kept(found, said)
        return found

    def keep(self, path: str) -> None:
        """Write what was computed into the file, which must not be open; see `kept.keep`."""
        if self.computed is not None:
            found = self.computed.found
            kept.keep(path, GROUP, self.origin, replace(self.computed, found=replace(found, clusters=_lean(found))))


def _stated(
    by: str | None, top: int | None, device: str | None, backend: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The options by which a result is known, with their defaults."""
    given = {"samples": None, "window": (None, None), "join": None, "sketch": None, "test": "replay", "budget": None}
    given |= {"allow_changed_data": False} | options
    if given["samples"] is not None:
        given["samples"] = hashlib.sha256(np.asarray(given["samples"]).tobytes()).hexdigest()
    if given["budget"] is None:
        given["budget"] = silencing.BUDGET
    return {"by": by, "top": top, "device": device, "backend": backend} | given


def _lean(found: Found) -> Clusters:
    """Without what the file holds, losses, and with similarities of the samples in groups alone: others' are unread."""
    clusters = found.clusters
    inside = np.flatnonzero(clusters.grouping.group_M >= 0)
    whole = clusters.similarity_MM
    if isinstance(whole, Gram):  # what reads it back means over groups, or draws
        similarity = Gram(whole.rows_MD[inside].astype(np.float16), whole.scale)
    else:
        similarity = np.ascontiguousarray(whole[np.ix_(inside, inside)])
    return replace(clusters, similarity_MM=similarity, losses_TM=np.empty((0, 0), np.float32))


def _whole(run: Trajectory, found: Found) -> Found | None:
    """What was kept, with the run's losses again; None where it does not fit the run.

    Raises DamagedRows where rows that it was made from are not what was written any more.
    """
    clusters, steps = found.clusters, run.steps("losses")
    count, window = len(clusters.position), clusters.window
    inside = np.flatnonzero(clusters.grouping.group_M >= 0)
    places = np.concatenate([clusters.position, clusters.joined.position, found.movers.position])
    groups = np.concatenate([clusters.grouping.group_M, clusters.joined.group, clusters.grouping.partner_G])
    fits = (
        len(clusters.grouping.group_M) == len(clusters.grouping.alignment_M) == count
        and clusters.similarity_MM.shape == (len(inside), len(inside))
        and len(clusters.groups) == len(clusters.grouping.partner_G)
        and len(clusters.pairs) == len(clusters.grouping.pairs())
        and all(kind.dtype.kind == "i" for kind in (places, groups))
        and min(places, default=0) >= 0
        and max(places, default=0) < len(run.samples)
        and min(groups, default=0) >= -1
        and max(groups, default=-1) < len(clusters.groups)
        and 0 <= window.first < window.stop <= len(steps)
        and np.array_equal(window.steps_T, steps[window.first : window.stop])
        and 0 < window.rise_row < len(window.steps_T)
    )
    if not fits:
        return None
    run.check("losses", steps.tolist())
    tests = clusters.tests
    run.check("checkpoints", {*tests.found_on, *tests.held_out, *tests.replayed})
    lean = clusters.similarity_MM
    if isinstance(lean, Gram):
        rows_MD = np.zeros((count, lean.rows_MD.shape[1]), lean.rows_MD.dtype)
        rows_MD[inside] = lean.rows_MD
        similarity_MM = Gram(rows_MD, lean.scale)
    else:
        similarity_MM = np.zeros((count, count), lean.dtype)
        similarity_MM[np.ix_(inside, inside)] = lean
    losses_TM = filled(run, found.movers.known).series("losses/loss", clusters.position, window.first, window.stop)
    return replace(found, clusters=replace(clusters, similarity_MM=similarity_MM, losses_TM=losses_TM))
