"""What a training loop hands over, checked and as arrays: each function raises OpsigError that names the argument.

S samples, N of them given. Arrays may be tensors of torch with gradients, on any device, in any float type.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError

LONGEST_NAME = 200
"""Bytes of a scalar's name."""


def as_step(step: Any) -> int:
    """A number of optimizer steps: whole and not negative."""
    value = step.item() if hasattr(step, "item") and getattr(step, "ndim", None) == 0 else step
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if not whole or abs(value) == float("inf") or value != int(value) or not 0 <= value < 1 << 62:
        raise OpsigError(f"step is {step!r:.60}, and must be a whole number from 0 on: optimizer steps taken so far")
    return int(value)


def as_ids(samples: Any) -> np.ndarray:
    """Dataset indices of a run's samples, (S,) int64, from their number or themselves."""
    if not isinstance(samples, bool):
        try:
            count = operator.index(samples)
        except TypeError:
            count = None
        if count is not None:
            if count < 1:
                raise OpsigError(f"samples is {count}, and must be the number of samples, at least 1, or their indices")
            return np.arange(count)
    return as_indices(samples)


def as_indices(samples: Any, once: bool = True) -> np.ndarray:
    """Dataset indices, (N,) int64, each `once`."""
    ids = _array("samples", samples)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size or ids.min() < 0 or ids.max() >= 1 << 62:
        raise OpsigError(f"samples must be dataset indices from 0 on, one a sample, not {_what(ids)}")
    if once and len(np.unique(ids)) < len(ids):
        raise OpsigError("samples names a sample twice")
    return ids.astype(np.int64)


def as_texts(name: str, values: Sequence[Any], count: int | None = None) -> np.ndarray:
    """Text, one a sample where `count` says how many."""
    if isinstance(values, str | bytes):
        raise OpsigError(f"{name} must be a list of text, not text")
    texts = [as_text(name, value) for value in values]
    if count is not None and len(texts) != count:
        raise OpsigError(f"{name} has {len(texts):,} entries, and there are {count:,} samples")
    if not texts:
        raise OpsigError(f"{name} is empty")
    return np.array(texts, dtype=str)


def as_text(name: str, value: Any) -> str:
    """Text that a file can hold."""
    text = str(value)
    if "\0" in text:
        raise OpsigError(f"{name}: {text!r:.60} holds a NUL character, and cannot be written")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OpsigError(f"{name}: {text!r:.60} is not valid Unicode, and cannot be written") from error
    return text


def as_losses(losses: Any, count: int) -> np.ndarray:
    """Losses of `count` samples, (N,) float32."""
    values = _array("losses", losses)
    if values.shape != (count,) or values.dtype.kind not in "fiu":
        raise OpsigError(f"losses must be {count:,} numbers, one a sample in the order of samples, not {_what(values)}")
    with np.errstate(over="ignore"):  # beyond float32 it is infinite
        return values.astype(np.float32)


def as_predictions(predictions: Any, count: int, classes: int | None) -> np.ndarray:
    """Predicted classes of `count` samples, (N,) int64, -1 for none; below `classes` where that is known."""
    values = _array("predictions", predictions)
    if values.shape != (count,) or values.dtype.kind not in "iu":
        raise OpsigError(f"predictions must be {count:,} integers, one a sample, not {_what(values)}")
    most = (1 << 31) - 1 if classes is None else classes
    wrong = (values < -1) | (values >= most) if values.dtype.kind == "i" else values >= most
    if wrong.any():
        known = "" if classes is None else f": classes has {classes}"
        raise OpsigError(f"predictions holds {values[wrong][0]}, which is no class's number{known}")
    return values.astype(np.int64)


def as_scalars(scalars: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by name. Any name is taken that is text."""
    if not isinstance(scalars, Mapping):
        raise OpsigError(f"scalars must be numbers by name, as in {{'train_loss': 0.5}}, not {type(scalars).__name__}")
    found = {}
    for name, value in scalars.items():
        if not isinstance(name, str) or not name or len(name.encode(errors="replace")) > LONGEST_NAME:
            raise OpsigError(f"scalars: a name must be text of 1 to {LONGEST_NAME} bytes, not {name!r:.60}")
        number = _array(f"scalars['{as_text('scalars', name)}']", value)
        if number.size != 1 or number.dtype.kind not in "fiub":
            raise OpsigError(f"scalars['{name}'] must be one number, not {_what(number)}")
        found[name] = float(number.reshape(-1)[0])
    return found


def as_attributes(attributes: Any) -> dict[str, Any]:
    """What a file says of its run: text or numbers by name; None is left out, and `_json` names take any JSON value."""
    if not isinstance(attributes, Mapping):
        raise OpsigError(f"attributes must be values by name, not {type(attributes).__name__}")
    found = {}
    for name, value in attributes.items():
        if not isinstance(name, str) or not name or "\0" in name:
            raise OpsigError(f"attributes: a name must be text, not {name!r:.60}")
        as_text("attributes", name)
        if name.endswith("_json"):
            try:
                json.dumps(value)
            except (TypeError, ValueError, RecursionError) as error:
                raise OpsigError(f"attributes['{name}'] is not a JSON value: {error!s:.100}") from error
        elif isinstance(value, str):
            as_text(f"attributes['{name}']", value)
        elif value is not None and _array(f"attributes['{name}']", value).dtype.kind not in "fiubS":
            raise OpsigError(
                f"attributes['{name}'] must be text or numbers, not {type(value).__name__}. A name that ends in _json "
                "takes any JSON value"
            )
        found[name] = value
    return found


def as_vector(name: str, values: Any, dtype: type) -> np.ndarray:
    """Numbers in one row, of this type."""
    row = _array(name, values)
    if row.ndim != 1 or row.dtype.kind not in "fiu":
        raise OpsigError(f"{name} must be numbers in one row, not {_what(row)}")
    return row.astype(dtype)


def _array(name: str, values: Any) -> np.ndarray:
    try:
        if hasattr(values, "detach"):  # a tensor of torch
            values = values.detach().cpu()
            if "bfloat16" in str(values.dtype) or "float8" in str(values.dtype):
                values = values.float()  # numpy lacks these
        if isinstance(values, np.ma.MaskedArray) and values.mask.any():
            if values.dtype.kind != "f":
                raise OpsigError(f"{name} has a mask, for which {values.dtype} has no number. Give values without one")
            values = values.filled(np.nan)  # what is masked is not known
        array = np.asarray(values)
        return array.astype(np.float32) if array.dtype.name in ("bfloat16", "float16") else array
    except (ValueError, TypeError, RuntimeError) as error:
        raise OpsigError(f"{name} is not an array of numbers: {' '.join(str(error).split())[:100]}") from error


def _what(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {array.shape}" if array.ndim else f"{array.item()!r:.60}"
