"""What the callbacks share: a recorder on one process, the fixed subset, and the bound on what measuring it costs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.recorder import Recorder

Losses = Callable[[Sequence[int]], tuple[Any, Any]]
"""Losses and, or None, predictions of the samples with these indices."""


@dataclass
class Options:
    """What a callback is asked to record.

    `path`: the file; `samples`: how many the dataset has. `batches`: the losses of every batch as sightings. `every`:
    so many steps apart, the losses of a fixed `subset` of the samples, drawn with `seed`, and with `checkpoints` the
    model and its optimizer; 0 is never. `most`: the part of the time of training that this may take; what would go
    beyond is left out, and how often is said at the end. `replace`: overwrite the file.
    """

    path: str | os.PathLike
    samples: int
    batches: bool = True
    every: int = 0
    subset: int = 256
    seed: int = 0
    checkpoints: bool = True
    most: float = 0.1
    labels: Sequence[str] | None = None
    classes: Sequence[str] | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        if not self.batches and not self.every:
            raise OpsigError("there is nothing to record. Give batches=True, every=N, or both")
        if self.every < 0 or self.subset < 1 or not self.most > 0:
            raise OpsigError("every must be 0 or more, subset at least 1, and most above 0")


class Recording:
    """A run as one process of a trainer sees it: its own share of every batch, and the subset."""

    def __init__(self, options: Options):
        self.options = options
        self.recorder: Recorder | None = None
        draw = np.random.default_rng(options.seed)
        self.chosen = np.sort(draw.choice(options.samples, min(options.subset, options.samples), replace=False))
        self.left_out = 0
        self._began, self._spent, self._longest = 0.0, 0.0, 0.0
        self._measured = -1
        self._logged: set[tuple[int, str]] = set()

    def begin(self, step: int) -> None:
        """Open the file: a new one at step 0, and one to go on with where training does."""
        asked = self.options
        resume = step > 0 and os.path.exists(asked.path)
        self.recorder = Recorder(
            asked.path, asked.samples, labels=asked.labels, classes=asked.classes, resume=resume,
            replace=asked.replace and not resume,
        )  # fmt: skip
        if resume:
            self.recorder.rewind(step)
        self._began, self._spent, self._longest, self._measured = time.monotonic(), 0.0, 0.0, -1

    def observe(self, step: int, index: Any, losses: Any) -> None:
        """The losses of a batch before the update that makes it step + 1."""
        assert self.recorder is not None
        self.recorder.observe(step, index, losses)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """What was logged of a step; of a number that is logged twice the first is kept."""
        assert self.recorder is not None
        new = {name: value for name, value in values.items() if (step, name) not in self._logged}
        if new:
            self.recorder.record(step, scalars=new)
            self._logged.update((step, name) for name in new)

    def due(self, step: int) -> bool:
        """Whether the subset is to be measured at a step and may still be, within the part of the time that it may
        take."""
        every = self.options.every
        if not every or step % every or step == self._measured:
            return False
        now = time.monotonic() - self._began
        if self._measured >= 0 and self._spent + self._longest > self.options.most * (now - self._spent):
            self.left_out += 1
            return False
        return True

    def measure(self, step: int, losses: Losses, model: Any, optimizer: Any) -> None:
        """Record the losses of the subset and, where asked for, a checkpoint."""
        assert self.recorder is not None
        began = time.monotonic()
        values, predictions = losses(self.chosen.tolist())
        self.recorder.record(step, losses=values, predictions=predictions, samples=self.chosen.tolist())
        if self.options.checkpoints:
            check_whole(model)
            self.recorder.record(step, model=model, optimizer=optimizer)
        self._measured = step
        took = time.monotonic() - began
        self._spent, self._longest = self._spent + took, max(self._longest, took)

    def end(self) -> None:
        """Close the file, and say what was left out."""
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None
        if self.left_out:
            print(
                f"opsig: {self.left_out} measurements of {self.options.subset} samples were left out, which would have "
                f"taken more than {self.options.most:.0%} of the time (most=)"
            )


def check_whole(model: Any) -> None:
    """Raise OpsigError for a model of which this process holds a part."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id"):
            raise OpsigError(
                f"{name} is sharded over processes, so that no checkpoint can be recorded. Give checkpoints=False, and "
                "import the trainer's own checkpoints: opsig import --append"
            )


@contextmanager
def at_rest(model: Any) -> Iterator[None]:
    """A model in evaluation mode, without gradients, and with the random numbers of training left as they are."""
    import torch

    training = [module for module in model.modules() if module.training]
    with torch.random.fork_rng(), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
