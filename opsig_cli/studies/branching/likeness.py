"""How like the unchanged replay is to the run: bit for bit, or by how much not."""

from __future__ import annotations

import numpy as np

from opsig_cli.studies.branching.fork import Fork


class Likeness:
    """Takes the steps of the unchanged replay and holds them against what the run recorded.

    Losses of samples are compared where the run has them, else the logged training loss.
    """

    def __init__(self, fork: Fork):
        self._run = fork.run
        self._fork = fork
        self._rows = {int(step): place for place, step in enumerate(fork.run.steps("losses").tolist())}
        self._logged = {}
        if fork.run.has("scalars/train_loss"):
            steps = fork.run.steps("scalars")
            logged = fork.run.rows("scalars/train_loss", 0, len(steps)).tolist()
            self._logged = dict(zip(steps.tolist(), logged, strict=True))
        self._order = np.argsort(fork.run.samples)
        self._steps: list[int] = []
        self._largest = 0.0
        self._from: int | None = None

    def add(self, step: int, train_loss: float, losses_S: np.ndarray | None) -> None:
        """Compare one step."""
        differences = []
        if losses_S is not None and step in self._rows:
            recorded = self._run.rows("losses/loss", self._rows[step], self._rows[step] + 1)[0][self._order]
            known = np.isfinite(recorded)
            differences += [float(np.abs(recorded - losses_S)[known].max())] if known.any() else []
        elif step in self._logged:
            differences.append(abs(self._logged[step] - train_loss))
        for difference in differences:
            self._steps.append(step)
            if difference and self._from is None:
                self._from = step
            self._largest = max(self._largest, difference)

    @property
    def difference(self) -> float | None:
        """The largest difference of a loss, in nats; None where the run recorded nothing to compare."""
        return self._largest if self._steps else None

    def words(self) -> str:
        """What was found, in a sentence."""
        if not self._steps:
            return "the run recorded nothing after the fork: whether the unchanged replay is like it is not known"
        span = f"from step {self._steps[0]} to {self._steps[-1]}"
        if not self._largest:
            return f"the unchanged replay equals the run bit for bit, {span}"
        text = f"the unchanged replay is not the run: losses differ by up to {self._largest:.2g} nats {span}, first at "
        text += f"step {self._from}"
        if self._run.has("checkpoints/source/path") and self._fork.settings.batch_size is not None:
            text += ". The order of its batches is not known: branches draw their own"
        return text
