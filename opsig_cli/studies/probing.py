"""Synthetic inputs through every checkpoint (the paper's Fig. 5), and iterates along the top eigenvector (Fig. 6b)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opsig_cli.backends import Session
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.settings import Settings
from opsig_cli.studies.curvature import scale_of, select_steps
from opsig_cli.studies.mining import positions_of
from opsig_cli.studies.trained import settings_at, settings_of
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import read_state

COLOURS = {"sky": "#87ceeb", "white": "#ffffff", "black": "#000000", "red": "#ff0000", "green": "#00ff00"}
SWINGS = 0.05
"""Change of a class's probability from step to step that counts as a swing."""
MAX_SIDE = 4096


def make_input(text: str, shape: tuple[int, int, int]) -> np.ndarray:
    """The picture that `color:NAME`, `color:#rrggbb`, or an image or .npy file stands for, (H, W, C), white at 1.

    Raises OpsigError or UsageError for what cannot be read or does not fit.
    """
    height, width, channels = shape
    if text.startswith("color:"):
        name = text.removeprefix("color:")
        code = COLOURS.get(name, name).removeprefix("#")
        try:
            rgb = np.frombuffer(bytes.fromhex(code), np.uint8)
        except ValueError:
            rgb = np.empty(0)
        if len(rgb) != 3:
            raise UsageError(f"--input {text}: no such colour. Known: {', '.join(COLOURS)}, or color:#rrggbb")
        block = np.broadcast_to(rgb / 255, (height, width, 3))
        return _channels(block, channels)
    path = Path(text)
    if not path.is_file():
        raise OpsigError(f"--input {text} is neither a file nor color:NAME nor sample:N")
    try:
        pixels = (
            np.load(path, mmap_mode="r", allow_pickle=False) if path.suffix == ".npy" else _picture(path, height, width)
        )
    except (OSError, ValueError) as error:
        raise OpsigError(f"--input {text} cannot be read: {' '.join(str(error).split())}") from error
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    pixels = pixels / 255 if pixels.dtype == np.uint8 else pixels.astype(float)
    if pixels.shape[:2] != (height, width) or pixels.shape[2] not in (1, 3):
        raise OpsigError(f"--input {text} has shape {pixels.shape}; the task's pictures are {shape}")
    return _channels(pixels, channels)


def _picture(path: Path, height: int, width: int) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        if max(image.size) > MAX_SIDE:
            raise ValueError(f"it has more than {MAX_SIDE} pixels a side")
        return np.asarray(image.convert("RGB").resize((width, height)))


def _channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Grey by the usual weights, or grey repeated."""
    if pixels.shape[2] == channels:
        return pixels.astype(np.float32)
    if channels == 1:
        return (pixels @ np.array([0.299, 0.587, 0.114]))[:, :, None].astype(np.float32)
    return np.repeat(pixels, channels, axis=2).astype(np.float32)


def gather(task: Any, run: Trajectory, names: Sequence[str]) -> np.ndarray:
    """All inputs by name, (N, H, W, C). Raises OpsigError where the task does not take pictures."""
    shape = getattr(task, "picture_shape", None)
    if shape is None or not hasattr(task, "inputs") or not hasattr(task, "logits"):
        raise OpsigError("this task cannot be probed: it needs picture_shape, inputs(pixels) and logits(model, batch)")
    pictures = []
    for name in names:
        if name.startswith("sample:"):
            number = name.removeprefix("sample:")
            if not number.isdigit():
                raise UsageError(f"--input {name}: write sample:N with the index of a sample")
            sample = int(run.samples[positions_of(run, [int(number)])[0]])
            pictures.append(task.pixels[sample])
        else:
            pictures.append(make_input(name, shape))
    return np.stack(pictures)


def probe(
    run: Trajectory, session: Session, steps: Sequence[int], names: Sequence[str], pictures: np.ndarray,
    classes: Sequence[str] | None, advance: Callable[..., None],
) -> list[dict[str, Any]]:  # fmt: skip
    """What the network makes of each input at each checkpoint, one record an input and step.

    `oscillating`: the probability of some class changed by more than SWINGS, up and down again, over the last two
    steps; None without checkpoints at both. `time` is the step times the learning rate.
    """
    settings = settings_of(run)
    found = []
    history: list[np.ndarray] = []
    for place, step in enumerate(steps):
        logits, norms, mean_norm = session.outputs(read_state(run, step), pictures)  # pyright: ignore
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = shifted / shifted.sum(1, keepdims=True)
        history = [*history[-2:], probabilities]
        known = place >= 2 and step - steps[place - 2] == 2
        swinging = swings(np.stack(history)) if known else [None] * len(names)
        for number, name in enumerate(names):
            best = int(probabilities[number].argmax())
            found.append({
                "trajectory": run.path,
                "step": step,
                "time": None if settings is None else step * settings.learning_rate,
                "input": name,
                "predicted": best if classes is None else classes[best],
                "probability": float(probabilities[number, best]),
                "feature_norm": None if norms is None else float(norms[number]),
                "mean_feature_norm": mean_norm,
                "oscillating": None if swinging[number] is None else bool(swinging[number]),
                "logits": logits[number],
                "probabilities": probabilities[number],
            })  # fmt: skip
        advance(note=f"step {step}")
    return found


def swings(probabilities_3NC: np.ndarray) -> np.ndarray:
    """Whether a class's probability goes up and down by more than SWINGS over three steps, for each input, (N,)."""
    first, second = np.diff(probabilities_3NC, axis=0)
    return ((first * second < 0) & (np.minimum(abs(first), abs(second)) > SWINGS)).any(1)


def crossing(run: Trajectory) -> tuple[int, np.ndarray]:
    """The first step whose sharpness exceeds the threshold, and the top eigenvector there, (P,).

    Raises OpsigError where the run has no eigenvectors, or stays below.
    """
    run.require("sharpness/eigenvector")
    steps = run.steps("sharpness")
    values = run.rows("sharpness/eigenvalue", 0, len(steps))[:, 0]
    thresholds = run.rows("sharpness/threshold", 0, len(steps))
    above = np.flatnonzero(values > thresholds)
    if not len(above):
        raise OpsigError(f"{run.path} stays below its threshold at every checkpoint that has a sharpness")
    step = int(steps[above[0]])
    return step, run.row("sharpness/eigenvector", step)


def project(
    run: Trajectory, runs: Sequence[Trajectory], steps: str | None, advance: Callable[..., None]
) -> list[dict[str, Any]]:
    """Iterates of runs along the first one's top eigenvector u at its first crossing, <theta_t - theta*, u>, and for
    each run the share of its steps that reverse (the paper's Fig. 6b).

    theta* is the first run's state there. For Adam also its effective step along u: |<D m, u>|, which falls near the
    valley's floor, and the paper's |<D, u>|, with D = eta / (sqrt(v) + epsilon) and moments corrected for bias.
    """
    start, direction = crossing(run)
    origin = run.row("checkpoints/params", start).astype(np.float64)
    found, summaries = [], []
    for other in runs:
        if other.shape("checkpoints/params")[1] != len(origin):
            raise OpsigError(f"{other.path} has another number of parameters than {run.path}")
        settings = settings_of(other)
        chosen = select_steps(other, steps)
        rows = [_iterate(other, settings, step, origin, direction) for step in chosen]
        found += [{"kind": "iterate", "trajectory": other.path, "crossing_step": start, **row} for row in rows]
        projections = np.array([row["projection"] for row in rows])
        share, counted = reversals(np.array(chosen), projections, start)
        summaries.append({
            "kind": "summary", "trajectory": other.path, "crossing_step": start,
            "optimizer": None if settings is None else settings.optimizer, "reversals": share, "counted": counted,
        })  # fmt: skip
        advance(note=other.path)
    return found + summaries


def _iterate(
    run: Trajectory, settings: Settings | None, step: int, origin: np.ndarray, direction: np.ndarray
) -> dict[str, Any]:
    state = read_state(run, step)
    settings = None if settings is None else settings_at(run, settings, step)
    record: dict[str, Any] = {"step": step, "projection": float((state.params - origin) @ direction)}
    if settings is not None and scale_of(settings, state) is not None:
        second = state.optimizer["exp_avg_sq"].astype(np.float64) / (1 - settings.beta2**step)
        first = state.optimizer["exp_avg"].astype(np.float64) / (1 - settings.beta1**step)
        sizes = settings.learning_rate / (np.sqrt(second) + settings.epsilon)
        record["effective_step"] = abs(float((sizes * first) @ direction))
        record["step_size_along"] = abs(float(sizes @ direction))
    return record


def reversals(steps: np.ndarray, projections: np.ndarray, start: int) -> tuple[float | None, int]:
    """Share of steps from `start` on that go the other way than the step before, and how many were counted.

    Only successive steps count: None where no three checkpoints are one step apart.

    >>> reversals(np.arange(5), np.array([0.0, 1.0, 0.0, 1.0, 2.0]), 0)
    (0.6666666666666666, 3)
    """
    near = (np.diff(steps) == 1) & (steps[:-1] >= start)
    counts = near[1:] & near[:-1]
    moves = np.diff(projections)
    turned = moves[1:] * moves[:-1] < 0
    total = int(counts.sum())
    return (float(turned[counts].mean()) if total else None), total
