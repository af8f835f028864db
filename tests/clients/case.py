"""What a client left, and what is right of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

TASKS = Path(__file__).parent / "tasks.py"


@dataclass
class Made:
    """`losses`: of every sample at each step, by plain PyTorch on the model that was saved; `thresholds`: by step, NaN
    where there must be none; `refused`: words of the one line in place of a run; `says`: words on stderr; `scalars`:
    values by name and step."""

    task: str
    paths: Sequence[Any]
    options: Sequence[Any] = ()
    losses: dict[int, np.ndarray] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)
    thresholds: dict[int, float] = field(default_factory=dict)
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    says: Sequence[str] = ()
    refused: Sequence[str] = ()

    def keep(self, step: int, task: Any, model: Any, optimizer: Any = None) -> None:
        """Note what is right at a step, from the live model and its optimizer."""
        self.losses[step] = losses_of(task, model)
        if optimizer is not None:
            group = optimizer.param_groups[0]
            self.rates[step] = float(group["lr"])
            self.thresholds[step] = threshold_of(optimizer)


@dataclass(frozen=True)
class Client:
    """A row of the table: a name, who wrote the files (a library, or by hand as it writes them), what makes them."""

    name: str
    writer: str
    make: Callable[[Path], Made]
    needs: Sequence[str] = ()


def losses_of(task: Any, model: Any) -> np.ndarray:
    """Losses of all samples by plain PyTorch, in float32 and evaluation mode, (S,)."""
    plain = task.model()
    plain.load_state_dict(model.state_dict())
    plain.eval()
    with torch.no_grad():
        return task.losses(plain.float(), (task.x, task.y)).numpy().copy()


def threshold_of(optimizer: Any) -> float:
    """The sharpness at which torch's optimizers lose stability; NaN for any other."""
    group = optimizer.param_groups[0]
    match type(optimizer).__name__:
        case "SGD":
            return (2 + 2 * group["momentum"]) / group["lr"] if group["lr"] else math.inf
        case "Adam" | "AdamW":
            beta = group["betas"][0]
            return (2 + 2 * beta) / ((1 - beta) * group["lr"]) if group["lr"] else math.inf
    return math.nan


def step_of(task: Any, model: Any, optimizer: Any, rows: slice = slice(None)) -> float:
    """One step on some rows; returns the loss before it."""
    optimizer.zero_grad()
    loss = task.losses(model, (task.x[rows], task.y[rows])).mean()
    loss.backward()
    optimizer.step()
    return float(loss)
