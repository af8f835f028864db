"""At which step each checkpoint was taken, from what it holds, its optimizer's count, or its name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from opsig_cli.errors import OpsigError, UsageError

STEP_KEYS = (
    "global_step", "step", "iteration", "iter", "iter_num", "iterations", "it", "num_updates", "train_step",
    "current_step", "global_steps",
)  # fmt: skip
EPOCH_KEYS = ("epoch", "current_epoch")
FROM = ("content", "optimizer", "name")
REMEDY = "Give --steps 0,10,20 or --steps-from name|content|optimizer"
PLACES = "the places in the list"
NUMBER = re.compile(r"\d+(?:\.\d+)?")
STEP_WORD = re.compile(r"(?:step|iter|iteration|(?<![a-z])it)s?[-_=.]?$", re.IGNORECASE)
EPOCH_WORD = re.compile(r"(?:epoch|(?<![a-z])ep?)[-_=.]?$", re.IGNORECASE)


def given_steps(text: str, count: int, what: str = "checkpoints") -> list[int]:
    """Steps written `0,10,20`. Raises UsageError where one is not a step or their number is not `count`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 19 for part in parts):
        raise UsageError(f"--steps '{text}' is not a list of steps. Write them as in 0,10,20")
    if len(parts) != count:
        raise UsageError(f"--steps names {len(parts)} steps, and there are {count} {what}")
    return [int(part) for part in parts]


def steps_of(
    paths: Sequence[str], numbers: Sequence[dict[str, int]], counts: Sequence[int | None], how: str | None = None
) -> tuple[list[int], str]:
    """The step of every checkpoint, and where it is from.

    `numbers` are what each holds by key, `counts` the steps that its optimizer has counted; `how` is one of FROM, or
    None for the first that tells all of them apart: a step in the content, the optimizer's count, the name, an epoch.
    Raises OpsigError where two have the same step, or one has none.
    """
    if how not in (None, *FROM):
        raise UsageError(f"--steps-from is one of {', '.join(FROM)}, not '{how}'")
    by_key = [(f"'{key}' in the content", [n.get(key) for n in numbers]) for key in (*STEP_KEYS, *EPOCH_KEYS)]
    of_steps, of_epochs = by_key[: len(STEP_KEYS)], by_key[len(STEP_KEYS) :]
    counted = [("the optimizer's count", list(counts))]
    match how:
        case "content":
            found = [*of_steps, *of_epochs]
        case "optimizer":
            found = counted
        case "name":
            found = [steps_in_names(paths)]
        case _:
            found = [*of_steps, *counted, _of_names_if_clear(paths), *of_epochs]
    for source, steps in found:
        if all(step is not None and step >= 0 for step in steps) and len(set(steps)) == len(steps):
            if source == "the names" and len(steps) > 1 and any(_apart(steps, told) for _, told in of_epochs):
                source = "the names, in which they are epochs"
            return [step for step in steps if step is not None], source
    raise OpsigError(_why(paths, found))


def _apart(steps: list[int | None], epochs: list[int | None]) -> bool:
    """Whether numbers are those of epochs, counted from 0 or from 1."""
    gaps = {step - epoch if step is not None and epoch is not None else None
            for step, epoch in zip(steps, epochs, strict=True)}  # fmt: skip
    return gaps in ({0}, {1}, {-1})


def _why(paths: Sequence[str], found: list[tuple[str, list[int | None]]]) -> str:
    """What is wrong with the source that knows most steps."""
    source, steps = max(found, key=lambda pair: sum(step is not None for step in pair[1]))
    if not any(step is not None for step in steps) and len(found) > len(STEP_KEYS + EPOCH_KEYS):
        steps_in_names(paths)  # says what is unclear about the names
    places: dict[int, str] = {}
    for path, step in zip(paths, steps, strict=True):
        if step is None:
            continue
        if step in places:
            return f"{places[step]} and {path} are both at step {step} by {source}. Leave one out, or g{REMEDY[1:]}"
        places[step] = path
    unknown = next(path for path, step in zip(paths, steps, strict=True) if step is None or step < 0)
    return f"{unknown} does not say at which step it was taken, in its content or its name. {REMEDY}"


def _of_names_if_clear(paths: Sequence[str]) -> tuple[str, list[int | None]]:
    try:
        return steps_in_names(paths)
    except OpsigError:
        return "the names", [None for _ in paths]


def steps_in_names(paths: Sequence[str]) -> tuple[str, list[int | None]]:
    """The number in each name that differs from file to file; the one behind "step" or "iter" where several do.

    Before it, what it is called: behind "epoch" it is one. Raises OpsigError where the names are not alike, or it is
    not clear which number is meant.

    >>> steps_in_names(["v2/ckpt_9.pt", "v2/ckpt_10.pt"])
    ('the names', [9, 10])
    >>> steps_in_names(["epoch=0-step=40.ckpt", "epoch=1-step=80.ckpt"])
    ('the names', [40, 80])
    >>> steps_in_names(["net_epoch3.pt"])
    ('the epochs in the names', [3])
    """
    names = [_stem(path) for path in paths]
    if len({os.path.basename(name) for name in names}) == len(names):  # else folders tell them apart: step_10/model.pt
        names = [os.path.basename(name) for name in names]
    shapes = [NUMBER.sub("#", name) for name in names]
    numbers = [NUMBER.findall(name) for name in names]
    usual = max(dict.fromkeys(shapes), key=lambda shape: ("#" in shape, shapes.count(shape)))
    if "#" not in usual:
        raise OpsigError(
            f"{paths[0]} does not say at which step it was taken, in its content or its name. Give --steps 0,10,20"
        )
    if odd := [path for path, shape in zip(paths, shapes, strict=True) if shape != usual]:
        raise OpsigError(f"{odd[0]} has no number where the others have it. Give --steps 0,10,20, or leave it out")
    before = NUMBER.split(names[0])
    whole = [i for i in range(len(numbers[0])) if all("." not in row[i] and len(row[i]) < 19 for row in numbers)]
    varying = [i for i in whole if len({row[i] for row in numbers}) > 1] if len(paths) > 1 else whole
    named = [i for i in varying if STEP_WORD.search(before[i])]
    chosen = named if named else varying
    if len(paths) == 1 and not named:
        chosen = varying[-1:]
    if len(chosen) != 1:
        raise OpsigError(f"it is not clear which number in names such as {names[0]} is the step. Give --steps 0,10,20")
    what = "the epochs in the names" if EPOCH_WORD.search(before[chosen[0]]) else "the names"
    if before[chosen[0]].endswith("[") and all(name.endswith("]") for name in names):
        what = PLACES
    return what, [int(row[chosen[0]]) for row in numbers]


def _stem(path: str) -> str:
    root, suffix = os.path.splitext(path.rstrip("/"))
    return path if suffix[1:].isdecimal() else root
