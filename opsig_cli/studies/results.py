"""What a study hands back, and how it speaks while it works."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from opsig_cli.errors import UsageError
from opsig_cli.trajectory.file import Trajectory, open_trajectory

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from opsig_cli.studies.answers import Answer

KINDS = (
    "pair", "group", "member", "tests", "explain", "agreement", "sample", "neighbour", "not_finite", "eigenvector",
    "branch",
)  # fmt: skip
"""What records of studies can be of."""
Run = str | os.PathLike | Trajectory
"""A run's path, or one that is open."""
Note = Callable[[str], None]
"""Takes what a person should know while a study runs: the device, what is skipped."""
Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
"""Takes a label and a total; inside, the function it gives is called once for each part that is done."""


class Records(list[dict[str, Any]]):
    """The records of a study, a list of dictionaries in the order in which its command prints them.

    `notes`: what a person should know of them, in sentences. `damage`: rows of the file that were left out since they
    are damaged, in sentences. `title`: what they are of. `answer`: what they come to, with `.found`, a sentence, and
    `.next`, the command to go on with. `unit`: of the losses, "" where it is not known.

    >>> found = Records([{"kind": "pair", "pair": 1}, {"kind": "member", "sample": 4, "pair": 1}])
    >>> [record["sample"] for record in found.of("member")]
    [4]
    """

    def __init__(
        self, records: Iterable[dict[str, Any]] = (), *, notes: Sequence[str] = (), damage: Sequence[str] = (),
        title: str = "", draw: Callable[[], Figure] | None = None, answer: Answer | None = None, unit: str = "",
    ):  # fmt: skip
        super().__init__(records)
        self.notes = list(notes)
        self.damage = list(damage)
        self.title = title
        self.answer = answer
        self.unit = unit
        self._draw = draw

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Those records that are of a kind, such as the pairs, groups or members of `cluster`; none where there are
        none. Raises OpsigError for a kind that no record of ours is of."""
        if kind not in KINDS and all(record.get("kind") != kind for record in self):
            raise UsageError(f"no record is of the kind '{kind}'. Kinds: {', '.join(KINDS)}")
        return [record for record in self if record.get("kind") == kind]

    def frame(self, kind: str | None = None) -> pandas.DataFrame:
        """The records, or those of a kind, as a pandas frame, a row each. Needs pandas."""
        import pandas

        return pandas.DataFrame(list(self) if kind is None else self.of(kind))

    def figure(self) -> Figure:
        """The picture that the command saves with --figure, as a matplotlib Figure.

        Raises ValueError where these records have none.
        """
        if self._draw is None:
            raise ValueError("these records have no picture")
        return self._draw()


def planned(*plans: tuple[dict[str, Any], list[str]]) -> Records:
    """Records of what a command takes, one a run; see `planning`."""
    records, notes = [record for record, _ in plans], [words for _, said in plans for words in said]
    return Records(records, notes=notes, title=f"{records[0]['trajectory']}: plan of {records[0]['command']}")


def quietly(_: str) -> None:
    """A Note that says nothing."""


@contextmanager
def unseen(label: str, total: int) -> Iterator[Callable[..., None]]:
    """A Progress that shows nothing."""
    yield lambda count=1, note="": None


@contextmanager
def opened(run: Run, mode: str = "r", like: Trajectory | None = None) -> Iterator[Trajectory]:
    """The trajectory of this path, open for the time inside; one that is open already is given as it is.

    `like`: one whose damaged rows were left out, as they are then here.
    """
    if isinstance(run, Trajectory):
        yield run
    else:
        with open_trajectory(run, mode) as trajectory:
            if like is not None:
                trajectory.leave_out(like.left_out)
            yield trajectory
