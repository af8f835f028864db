"""What a task says of its samples, as a run's file keeps it: labels, classes, and what a person sees of each.

S samples. Figures and the report need neither the task nor its data then. A task without `render` is shown by its raw
samples: pictures where they are shaped like some, text as it is, a few numbers in words, more as a small plot.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from opsig_cli import tasks
from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.file import open_trajectory
from opsig_cli.trajectory.texts import NUMBERS

IN_WORDS = 4
"""Numbers of an input, and of its target, up to which a person reads them."""
IN_PLOT = 256
"""Numbers of an input up to which each is kept; of more, the least and the largest of every stretch."""
BYTES = 64 << 20
"""Pictures of all samples are kept in the file up to this total; larger ones stay with the task."""
SIDE = 64
"""Pixels of a picture's longer side, at most."""
CHANNELS = (1, 3, 4)
SEEN = 256
"""Samples by which the range of raw pictures is told."""
GROUND = 255
"""The grey around pictures of several shapes."""
PICTURES = ("samples/thumbnail", "samples/vector", "samples/text")
"""Where a file has what a person sees; it has one of them."""
MADE_BY = "pictures_sha256"
"""The root attribute with the digest of the code of the task that the pictures are of, where that is a later one."""


def description(task: tasks.Task, ids: Iterable[int], targets: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What the samples of these ids are, by the datasets that say it; `targets`: which of them have a loss."""
    ids = [int(i) for i in ids]
    label, classes = getattr(task, "label", None), getattr(task, "classes", None)
    found = {} if label is None else {"samples/label": np.array([str(label(i)) for i in ids], dtype=str)}
    if classes is not None:
        found["class_name"] = np.array(classes, dtype=str)
    for name in ("truth", "feature"):
        planted = getattr(task, name, None)
        if planted is not None:
            found[f"samples/{name}"] = np.asarray(planted())[ids]
    if targets is not None and not targets.all():
        found["samples/target"] = targets.astype(np.uint8)
    return found | pictures(task, ids)


def pictures(task: tasks.Task, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """What a person sees of each of these samples: one of PICTURES, or nothing."""
    render = getattr(task, "render", None)
    if not ids:
        return {}
    if render is not None:
        first = render(ids[0])
        if isinstance(first, str):
            return {"samples/text": np.array([str(render(i)) for i in ids])}
        return _thumbnails(first, (render(i) for i in ids), len(ids))
    if tasks.positions_of(task) > 1:  # a sample is a position of an item, of which the item shows nothing
        return {}
    items = _items(task)
    return {} if items is None else _raw(items, ids)


def renew(path: str | os.PathLike, task: str | None, note: Callable[[str], None]) -> None:
    """Take what a person's own task says now of a run's samples into its file, where it lacks that or the task's code
    is another than the pictures are of: a `render` that was added later.

    Labels and classes that the file has stay. Nothing is done without a `task` of one's own, or for another dataset,
    which is for the study to refuse.
    """
    spec = tasks.parse_spec(task) if task is not None else None
    if spec is None or not tasks.is_own(spec) or not os.path.isfile(path):
        return
    with open_trajectory(path) as run:
        attributes, ids, held = run.attributes, run.samples, set(run.names())
    made_by = attributes.get(MADE_BY, attributes.get("task_sha256"))
    if made_by is not None and made_by == tasks.digest_of(spec):
        return
    loaded, found = tasks.load(spec)
    if found.digest in (None, made_by):
        return
    items = _items(loaded)
    if items is None or len(items) * tasks.positions_of(loaded) <= int(ids.max(initial=-1)):
        return
    new = {name: values for name, values in description(loaded, ids).items() if name in PICTURES or name not in held}
    try:
        with open_trajectory(path, "r+") as run:
            if drawn := set(new) & set(PICTURES):
                for name in set(PICTURES) & held:
                    run.remove(name)
            for name, values in new.items():
                run.write(name, values)
            run.set_attributes(**{MADE_BY: found.digest})
    except OpsigError as error:
        note(f"note: pictures stay as they are: {error}")
        return
    if drawn:
        note(f"note: pictures of {len(ids):,} samples are those of {spec.name} now")


class _Rows:
    """Arrays with a row for every sample, one or in a tuple or a dictionary, as a dataset of items."""

    def __init__(self, data: Any):
        parts = (
            data if isinstance(data, Mapping) else dict(enumerate(data if isinstance(data, tuple | list) else [data]))
        )
        self._parts = {name: np.asarray(part) for name, part in parts.items() if hasattr(part, "shape")}

    def __len__(self) -> int:
        return min(map(len, self._parts.values()), default=0)

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        return tuple(part[i] for part in self._parts.values())


def _items(task: tasks.Task) -> Any:
    """What a person can look at of a task: its dataset, or the rows of its arrays; None where it has neither."""
    for name, make in (("dataset", lambda data: data), ("data", _Rows)):
        if callable(given := getattr(task, name, None)):
            return make(given())
    return None


def _raw(data: Any, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Samples by what the dataset gives, told by the first: text, a picture, or numbers."""
    first = _input(data[ids[0]])
    if isinstance(first, str):
        return {"samples/text": np.array([str(_input(data[i])) for i in ids])}
    if _is_image(first):
        return _thumbnails(first, (_input(data[i]) for i in ids), len(ids))
    values = _array(first)
    if values is None or values.ndim > 3:
        return {}
    kept = values.size if values.ndim < 2 else min(values.size, SIDE * SIDE * CHANNELS[-1])
    if len(ids) * min(kept, IN_PLOT if values.ndim < 2 else kept) > BYTES:
        return {}
    if values.ndim >= 2:
        return _array_pictures(data, ids, values.shape)
    if values.size <= IN_WORDS or (values.dtype.kind in "iu" and values.dtype.itemsize > 1):
        return {"samples/text": np.array([_in_words(data[i]) for i in ids])}
    rows = [_array(_input(data[i])) for i in ids]
    if any(row is None or row.shape != values.shape for row in rows):
        return {}
    return {"samples/vector": np.stack([thinned(row.astype(np.float32)) for row in rows if row is not None])}


def thinned(values: np.ndarray) -> np.ndarray:
    """A vector as it is kept: of a long one the least and the largest number of every stretch, in turn.

    >>> thinned(np.arange(1024.0)).shape, thinned(np.arange(5.0)).tolist()
    ((256,), [0.0, 1.0, 2.0, 3.0, 4.0])
    """
    if len(values) <= IN_PLOT:
        return values
    starts = np.linspace(0, len(values), IN_PLOT // 2 + 1).astype(int)[:-1]
    ends = [ufunc.reduceat(values, starts) for ufunc in (np.minimum, np.maximum)]
    return np.stack(ends, axis=1).ravel()


def _input(item: Any) -> Any:
    """The part of a dataset's item that a person can look at: the first text, picture or array of numbers."""
    if isinstance(item, Mapping):
        parts = list(item.values())
    else:
        parts = list(item) if isinstance(item, tuple | list) else [item]
    return next((p for p in parts if isinstance(p, str) or _is_image(p) or _array(p) is not None), None)


def _is_image(part: Any) -> bool:
    return hasattr(part, "convert") and isinstance(getattr(part, "size", None), tuple)


def _array(part: Any) -> np.ndarray | None:
    """Numbers as an array; None for what is none, and for a lone integer, which says nothing (an index, a class)."""
    if hasattr(part, "detach"):
        part = part.detach().cpu()
        part = part.float() if part.is_floating_point() else part  # numpy has no bfloat16
    if not hasattr(part, "shape") and not isinstance(part, float | list):
        return None
    try:
        values = np.asarray(part)
    except (TypeError, ValueError, RuntimeError):
        return None
    if values.dtype.kind not in "fiub" or not values.size or (values.ndim == 0 and values.dtype.kind != "f"):
        return None
    return values


def _in_words(item: Any) -> str:
    """The numbers of an input, and a target of few real ones.

    >>> print(_in_words((np.array([0.5, -1.0]), np.float32(2.0))))
    x = +0.5, -1
    y = +2
    >>> _in_words((np.array([12, 7, 99]), 1))
    'x = 12, 7, 99'
    """
    x = _array(_input(item))
    if x is None:
        return ""
    said = [NUMBERS + _numbers(x)]
    y = _array(item[1]) if isinstance(item, tuple | list) and len(item) == 2 else None
    if y is not None and y.dtype.kind == "f" and y.size <= IN_WORDS:
        said.append(f"y = {_numbers(y)}")
    return "\n".join(said)


def _numbers(values: np.ndarray) -> str:
    form = "{:+.3g}" if values.dtype.kind == "f" else "{}"
    return ", ".join(form.format(value) for value in values.ravel()[:IN_PLOT].tolist())


def _array_pictures(data: Any, ids: Sequence[int], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Arrays (H, W), (C, H, W) or (H, W, C) as pictures, over one range for each channel; nothing where some are of
    another kind."""
    from PIL import Image

    def read(i: int) -> np.ndarray:
        values = _array(_input(data[i]))
        if values is None or values.ndim != len(shape):
            raise ValueError
        return _channels_last(values)

    try:
        low, high = _range([read(i) for i in ids[:: -(-len(ids) // SEEN)]])

        def image(i: int) -> Any:
            values = np.nan_to_num(read(i).astype(np.float64))
            pixels = np.round(255 * np.clip((values - low) / (high - low), 0, 1)).astype(np.uint8)
            return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

        return _thumbnails(image(ids[0]), map(image, ids), len(ids))
    except ValueError:
        return {}


def _channels_last(values: np.ndarray) -> np.ndarray:
    """An array as a picture (H, W, C) of 1, 3 or 4 channels; of other numbers of channels their mean."""
    if values.ndim == 2:
        return values[:, :, None]
    if values.shape[0] in CHANNELS:
        return np.moveaxis(values, 0, -1)
    return values if values.shape[2] in CHANNELS else values.mean(0)[:, :, None]


def _range(some: Sequence[np.ndarray]) -> tuple[Any, Any]:
    """What is black and what is white in pictures (H, W, C): of bytes 0 and 255, of others 0 and 1 or 255 where they
    lie between, else by channel from the 0.5th to the 99.5th in a hundred."""
    values = np.concatenate([each.reshape(-1, each.shape[2]) for each in some]).astype(np.float64)
    values = values[np.isfinite(values).all(1)]
    if some[0].dtype == np.uint8 or not len(values):
        return 0.0, 255.0
    if values.min() >= 0 and values.max() <= 255:
        return 0.0, 1.0 if values.max() <= 1 else 255.0
    low, high = np.percentile(values, (0.5, 99.5), axis=0)
    return low, np.where(high > low, high, low + 1)


def _thumbnails(first: Any, every: Any, count: int) -> dict[str, np.ndarray]:
    """Pictures as small ones of one shape; those of several shapes stand in the middle of a square."""
    shape = _thumbnail(first).shape
    if count * math.prod(shape) > BYTES:
        return {}
    small = [_thumbnail(picture) for picture in every]
    if any(each.shape != shape for each in small):
        channels = 3 if any(each.shape[2] != 1 for each in small) else 1
        if count * SIDE * SIDE * channels > BYTES:
            return {}
        small = [_squared(each, channels) for each in small]
    return {"samples/thumbnail": np.stack(small)}


def _squared(pixels: np.ndarray, channels: int) -> np.ndarray:
    square = np.full((SIDE, SIDE, channels), GROUND, np.uint8)
    height, width = pixels.shape[:2]
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    colours = pixels[:, :, :3] if pixels.shape[2] >= 3 else np.repeat(pixels[:, :, :1], channels, axis=2)
    square[top : top + height, left : left + width] = colours
    return square


def _thumbnail(picture: Any) -> np.ndarray:
    """A PIL image as pixels (h, w, C) uint8, reduced to SIDE; palettes and rare modes as colours."""
    if not _is_image(picture):
        raise OpsigError(f"the task's render() gives {type(picture).__name__}. It gives a PIL image, or text")
    if picture.mode not in ("L", "RGB", "RGBA"):
        picture = picture.convert("L" if picture.mode in ("1", "I", "F", "LA", "I;16") else "RGB")
    if max(picture.size) > SIDE:
        picture = picture.copy()
        picture.thumbnail((SIDE, SIDE))
    pixels = np.asarray(picture)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
