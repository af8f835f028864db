"""Samples as the page shows them: picture or text, label, and what the network took them for. M samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.report.images import LARGEST, SMALL, thumbnail
from opsig_cli.studies.clustering.clusters import Clusters
from opsig_cli.studies.drawing import predictions_at
from opsig_cli.studies.pictures import Pictures
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.texts import context


@dataclass(frozen=True)
class Shown:
    """One sample. `picture` is a data URI, `small` one for a row of a table; `text` a context and its target; `before`
    and `after` predicted classes."""

    sample: int
    label: str | None
    before: str | None
    after: str | None
    picture: str | None
    text: tuple[str, str] | None
    small: str | None = None

    @property
    def name(self) -> str:
        """Of the sample, for those who do not see the picture."""
        return f"sample {self.sample}" + (f", {self.label}" if self.label is not None else "")

    def wrong(self, predicted: str) -> bool:
        """Whether a predicted class is not the label."""
        return self.label is not None and predicted != self.label


class Samples:
    """Shows samples of a run around a step: predictions are those of the row before it and of the step itself."""

    def __init__(self, run: Trajectory, previous_step: int, step: int):
        self._run = run
        self.shown_at: dict[int, int] = {}  # of every sample that was shown, its column in the file
        self._made: dict[int, tuple[str, str]] = {}
        self._pictures = Pictures(run)
        self._ids = run.samples
        self.before, self.after = (predictions_at(run, at) for at in (previous_step, step))

    def show(self, positions: Sequence[int]) -> list[Shown]:
        """The samples in these columns of the file."""
        return [
            self.shown(p, self._pictures.name(self.before, p), self._pictures.name(self.after, p)) for p in positions
        ]

    def shown(self, position: int, before: Any, after: Any) -> Shown:
        """The sample in this column, with predictions of another step."""
        tile = self._pictures.tile(position, before, after)
        picture, small = self._thumbnails(position, tile.picture)
        text = _split(tile.picture, tile.label) if isinstance(tile.picture, str) else None
        sample = int(self._ids[position])
        self.shown_at[sample] = position
        return Shown(sample, tile.label, tile.before, tile.after, picture, text, small)

    def around(self, previous_step: int, step: int) -> Samples:
        """The same samples with the predictions of another change."""
        other = Samples(self._run, previous_step, step)
        other.shown_at, other._made = self.shown_at, self._made
        return other

    def _thumbnails(self, position: int, picture: np.ndarray | str | None) -> tuple[str | None, str | None]:
        """A sample's picture as data URIs, larger and small; None for both of what is none."""
        if not isinstance(picture, np.ndarray):
            return None, None
        if position not in self._made:
            large = thumbnail(picture, LARGEST)
            self._made[position] = large, large if max(picture.shape[:2]) <= SMALL else thumbnail(picture, SMALL)
        return self._made[position]


def strongest(clusters: Clusters, group: int, count: int) -> list[int]:
    """Columns in the file of a group's most aligned members, the most aligned first."""
    members = clusters.grouping.members(group)
    order = np.argsort(-clusters.grouping.alignment_M[members], kind="stable")[:count]
    return clusters.position[members[order]].tolist()


def _split(text: str, label: str | None) -> tuple[str, str]:
    """Context and target of a text sample, as far as it says which is which."""
    before = context(text, label) if label is not None else None
    return (text, "") if before is None else (before, text[len(before) :])
