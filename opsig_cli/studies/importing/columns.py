"""What the columns of a logger's table hold: by what a person says of them, or by the names that loggers give them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from opsig_cli.errors import OpsigError

COLUMNS = {
    "step": ("step", "steps", "global_step", "trainer/global_step", "train/global_step", "_step", "iteration", "iter"),
    "sample": (
        "sample", "samples", "sample_id", "sample_ids", "sample_idx", "sample_index", "idx", "index", "indices", "guid",
        "uid", "id", "ids", "example_id", "example_idx", "data_index", "instance_id",
    ),
    "loss": (
        "loss", "losses", "train_loss", "loss/train", "train/loss", "sample_loss", "per_sample_loss", "training_loss",
        "nll",
    ),
    "prediction": ("prediction", "predictions", "predicted", "pred"),
    "label": ("label", "labels", "target", "gold"),
}  # fmt: skip
"""What a column may be called, in any case of letters, the likeliest first."""
WIDE = re.compile(r"(.*?)(\d+)")
"""The header of a sample's own column: what all have in common, and the sample."""
NEEDED = ("step", "sample", "loss")

Warn = Callable[[str], None]


def choose(path: str, header: Sequence[str], named: Mapping[str, str], warn: Warn) -> dict[str, str]:
    """Which of these columns holds what: those that a person named, else the likeliest by name, which is said.

    Raises OpsigError where one that is needed is not there.

    >>> choose("log.csv", ["_step", "idx", "loss/train"], {}, lambda text: None)
    {'step': '_step', 'sample': 'idx', 'loss': 'loss/train'}
    """
    known = {folded(name): name for name in reversed(header)}
    found = {}
    for what, names in COLUMNS.items():
        if what in named:
            if named[what] not in header:
                raise OpsigError(f"{path} has no column {named[what]}. It has: {listed(header)}")
            found[what] = named[what]
        elif there := [known[name] for name in names if name in known]:
            found[what] = there[0]
        elif what in NEEDED:
            raise OpsigError(
                f"{path} has no column {what}. It has: {listed(header)}. --{what}-column NAME says which it is"
                + (", and a log of the run's own loss goes to --scalars" if what == "sample" else "")
            )
    if twice := [name for name in found.values() if list(header).count(name) > 1]:
        raise OpsigError(f"{path} has two columns {twice[0]}. Rename one of them")
    told = [f"{what} from {name}" for what, name in found.items() if name != what]
    if told:
        warn(f"{path}: {', '.join(told)}")
    return found


def folded(name: str) -> str:
    """A column's name in small letters, without its unit.

    >>> folded("Sample ID"), folded("Loss [nats]")
    ('sample_id', 'loss')
    """
    return re.sub(r"\s*(\[[^\]]*\]|\([^)]*\))$", "", name).strip().casefold().replace(" ", "_").replace("-", "_")


def listed(header: Sequence[str]) -> str:
    shown = ", ".join(repr(name)[1:-1][:40] for name in header[:12])
    return f"{shown} and {len(header) - 12} more" if len(header) > 12 else shown or "none"


def wide_columns(header: Sequence[str]) -> tuple[int, list[int]] | None:
    """The places of the step and of the samples' columns in a header with one for each sample; None for others.

    >>> wide_columns(["step", "loss_0", "loss_1", "loss_7"])
    (0, [1, 2, 3])
    """
    names = [folded(name) for name in header]
    if set(names) & {*COLUMNS["sample"], *COLUMNS["loss"]}:
        return None
    steps = [names.index(name) for name in COLUMNS["step"] if name in names]
    found: dict[str, list[int]] = {}
    for place, name in enumerate(header):
        if match := WIDE.fullmatch(name):
            found.setdefault(match[1], []).append(place)
    known = [p for p in found if folded(p.rstrip("_-/. []#:")) in ("", *COLUMNS["sample"], *COLUMNS["loss"])]
    if not steps or len(known) != 1 or len(found[known[0]]) < 2:
        return None
    return steps[0], found[known[0]]
