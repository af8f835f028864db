"""Tables that loggers leave, a line for each loss of a sample: CSV, TSV, JSON lines and parquet, gzipped or not.

N losses, S samples. Columns are named by a person or known by the names that loggers give them. A log is read once,
line by line; what stays in memory is 32 bytes a loss.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.torch_files import MAX_EXPANSION, SPARE_BYTES, first_words

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
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
NEEDED = ("step", "sample", "loss")
LONGEST = 16 << 20
"""Bytes of a line, as of the lists of a batch."""
LOOKED_AT = 100
"""Lines of a file of JSON from which its columns are known."""

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Log:
    """Lines of a log: `step` (N,) and `place` (N,) int64, `loss` (N,) float64, `prediction` (N,) int64, -1 for none.

    `place` counts samples (S,) in the order of `samples`, their indices, increasing, or, where they have `names` (S,)
    in the log, 0, 1, ... in the order in which these first appear. `labels` (S,) and `classes`, the names behind
    predictions, where the log has them.
    """

    step: np.ndarray
    place: np.ndarray
    loss: np.ndarray
    prediction: np.ndarray
    samples: np.ndarray
    names: np.ndarray | None = None
    labels: np.ndarray | None = None
    classes: list[str] | None = None


def is_table(path: str) -> bool:
    """Whether a file is one that `read` reads, by its name."""
    return path.lower().removesuffix(".gz").endswith(ENDINGS)


def read(path: str, named: Mapping[str, str], warn: Warn) -> Log:
    """A log of losses; `named`: columns by what they hold, where a person says them.

    Raises OpsigError, naming the line, where it is not of this form.
    """
    columns, lines = _lines(path, named, warn)
    step, place, loss, prediction = array("q"), array("q"), array("d"), array("q")
    known: dict[Any, int] = {}
    labels: dict[int, str] = {}
    classes: dict[str, int] = {}
    empty = 0
    for number, values in lines:
        for record in _spread(path, number, dict(zip(columns, values, strict=True))):
            if _is_empty(record["sample"]) and _is_empty(record["loss"]):
                empty += 1  # of an evaluation, say, in the same log
                continue
            step.append(whole_of(path, number, "step", record["step"]))
            if _is_empty(record["sample"]):
                raise OpsigError(f"{path} line {number} has a loss and no {columns['sample']}")
            name = _name_of(record["sample"])
            at = known.setdefault(name, len(known))
            place.append(at)
            loss.append(_float(path, number, "loss", record["loss"]))
            prediction.append(_prediction(record.get("prediction"), classes))
            if at not in labels and not _is_empty(record.get("label")):
                labels[at] = str(_name_of(record["label"]))
    if empty and len(step):
        warn(f"{path}: {empty:,} lines without a sample and a loss are left out")
    if not len(step):
        raise OpsigError(f"{path} has a header and no lines")
    return _with_samples(
        np.array(step), np.array(place), np.array(loss), np.array(prediction), list(known), labels, list(classes)
    )


def _with_samples(
    step: np.ndarray, place: np.ndarray, loss: np.ndarray, prediction: np.ndarray, known: list[Any],
    labels: Mapping[int, str], classes: list[str],
) -> Log:  # fmt: skip
    """The lines with what their samples are called: numbers where all are, else names."""
    label = [labels.get(at, "") for at in range(len(known))]
    names, samples = np.array([str(name) for name in known]), np.arange(len(known))
    if all(isinstance(name, int) for name in known):
        samples, back = np.unique(np.array(known, np.int64), return_inverse=True)
        names, place = None, back[place]
        label = [label[at] for at in np.argsort(back)]
    if classes and all(text.isdecimal() for text in classes):
        number = np.array([int(text[:9]) for text in classes])
        prediction, classes = np.where(prediction < 0, -1, number[prediction]), []
    found = np.array(label, dtype=str) if labels else None
    return Log(step, place, loss, prediction, samples, names, found, classes or None)


# -- lines of each format


Lines = Iterator[tuple[int, Sequence[Any]]]


def _lines(path: str, named: Mapping[str, str], warn: Warn) -> tuple[dict[str, str], Lines]:
    """The columns that were found, by what they hold, and the lines by number with their values in that order."""
    plain = path.lower().removesuffix(".gz")
    if plain.endswith(".parquet"):
        return _lines_of_parquet(path, named, warn)
    text = opened(path)
    if plain.endswith((".jsonl", ".ndjson")):
        return _lines_of_json(path, text, named, warn)
    return _lines_of_csv(path, text, named, warn, plain.endswith(".tsv"))


def opened(path: str) -> Iterator[str]:
    """The lines of a text file, unpacked as far as a log may unpack. Raises OpsigError where it unpacks to more."""
    most = MAX_EXPANSION * os.path.getsize(path) + SPARE_BYTES
    zipped = path.lower().endswith(".gz")
    with open(path, "rb") as raw, gzip.open(raw) if zipped else raw as data:
        whole = _said_size(path) if zipped else 0
        if whole > most:
            raise OpsigError(f"{path} would unpack to {whole:,} bytes, more than {MAX_EXPANSION} times its size")
        whole = 0
        try:
            while line := data.readline(LONGEST):
                whole += len(line)
                if len(line) == LONGEST:
                    raise OpsigError(f"{path} would be read as a line of more than {LONGEST >> 20} MiB. Is it a table?")
                if whole > most:
                    raise OpsigError(f"{path} would unpack to more than {MAX_EXPANSION} times its size")
                yield line.decode("utf-8-sig" if whole == len(line) else "utf-8")
        except (EOFError, gzip.BadGzipFile, UnicodeDecodeError, ValueError) as error:
            raise OpsigError(f"{path} is not readable as text ({first_words(error)})") from error


def _said_size(path: str) -> int:
    """How many bytes a gzipped file says that its last part unpacks to; it need not be true."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) < 4:
            return 0
        file.seek(-4, os.SEEK_END)
        return int.from_bytes(file.read(4), "little")


def _lines_of_csv(
    path: str, text: Iterator[str], named: Mapping[str, str], warn: Warn, tabs: bool
) -> tuple[dict[str, str], Lines]:
    first = next(text, "")
    comma = "\t" if tabs or ("," not in first and "\t" in first) else ";" if "," not in first and ";" in first else ","
    reader = csv.reader(itertools.chain([first], text), delimiter=comma)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise OpsigError(f"{path} is not readable as CSV ({first_words(error)})") from error
    columns = choose(path, header, named, warn)
    places = [header.index(name) for name in columns.values()]

    def lines() -> Lines:
        try:
            for values in reader:
                if not values:
                    continue
                if len(values) != len(header):
                    raise OpsigError(f"{path} line {reader.line_num} has {len(values)} values, not {len(header)}")
                yield reader.line_num, [values[place].strip() for place in places]
        except csv.Error as error:
            raise OpsigError(f"{path} is not readable as CSV ({first_words(error)})") from error

    return columns, lines()


def _lines_of_json(
    path: str, text: Iterator[str], named: Mapping[str, str], warn: Warn
) -> tuple[dict[str, str], Lines]:  # fmt: skip
    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise OpsigError(f"{path} line {number} is not a JSON object")
            yield number, value

    every = objects()
    first = list(itertools.islice(every, LOOKED_AT))
    columns = choose(path, list(dict.fromkeys(name for _, value in first for name in value)), named, warn)
    lines = (
        (number, [value.get(name) for name in columns.values()]) for number, value in itertools.chain(first, every)
    )
    return columns, lines


def _lines_of_parquet(path: str, named: Mapping[str, str], warn: Warn) -> tuple[dict[str, str], Lines]:
    if path.lower().endswith(".gz"):
        raise OpsigError(f"{path}: parquet is compressed inside. Unpack it: gunzip {path}")
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise OpsigError(f"{path}: parquet is read by pyarrow. Install it: pip install 'opsig[parquet]'") from None
    file = parquet.ParquetFile(path)
    about = file.metadata
    stored = max(about.num_rows * 24, sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups)))
    if stored > MAX_EXPANSION * os.path.getsize(path) + SPARE_BYTES:
        raise OpsigError(f"{path} would unpack to {stored:,} bytes, more than {MAX_EXPANSION} times its size")
    columns = choose(path, file.schema_arrow.names, named, warn)

    def lines() -> Lines:
        number = 0
        for batch in file.iter_batches(1 << 16, columns=list(dict.fromkeys(columns.values()))):
            values = {name: batch.column(name).to_pylist() for name in set(columns.values())}
            for row in zip(*(values[name] for name in columns.values()), strict=True):
                number += 1
                yield number, row

    return columns, lines()


def choose(path: str, header: Sequence[str], named: Mapping[str, str], warn: Warn) -> dict[str, str]:
    """Which of these columns holds what: those that a person named, else the likeliest by name, which is said.

    Raises OpsigError where one that is needed is not there.

    >>> choose("log.csv", ["_step", "idx", "loss/train"], {}, lambda text: None)
    {'step': '_step', 'sample': 'idx', 'loss': 'loss/train'}
    """
    folded = {name.casefold(): name for name in reversed(header)}
    found = {}
    for what, names in COLUMNS.items():
        if what in named:
            if named[what] not in header:
                raise OpsigError(f"{path} has no column {named[what]}. It has: {_listed(header)}")
            found[what] = named[what]
        elif there := [folded[name] for name in names if name in folded]:
            found[what] = there[0]
        elif what in NEEDED:
            raise OpsigError(
                f"{path} has no column {what}. It has: {_listed(header)}. --{what}-column NAME says which it is"
            )
    told = [f"{what} from {name}" for what, name in found.items() if name != what]
    if told:
        warn(f"{path}: {', '.join(told)}")
    return found


def _listed(header: Sequence[str]) -> str:
    shown = ", ".join(repr(name)[1:-1][:40] for name in header[:12])
    return f"{shown} and {len(header) - 12} more" if len(header) > 12 else shown or "none"


# -- values


def _spread(path: str, number: int, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A line as it is, or, where it holds lists of samples and of their losses, a record for each."""
    if not isinstance(record["sample"], list):
        yield record
        return
    lists = {name: value for name, value in record.items() if isinstance(value, list)}
    if len({len(value) for value in lists.values()}) > 1 or not isinstance(record["loss"], list):
        raise OpsigError(f"{path} line {number}: samples and losses must be lists of one length")
    for values in zip(*lists.values(), strict=True):
        yield record | dict(zip(lists, values, strict=True))


def _is_empty(value: Any) -> bool:
    return value is None or value == ""


def number_of(value: Any) -> int | None:
    """A whole number from 0 on, also as 12.0 or 1e3; None for anything else.

    >>> number_of("12.0"), number_of("1e3"), number_of(7), number_of("007"), number_of("-1")
    (12, 1000, 7, None, None)
    """
    if isinstance(value, str):
        if value.isascii() and value.isdecimal():
            return int(value) if len(value) < 19 and (value[0] != "0" or value == "0") else None
        if not value[:1].isdecimal() or not (set(value) & set(".eE")):
            return None
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if value == int(value) and 0 <= value < 1 << 62 else None


def _name_of(value: Any) -> Any:
    """What a sample is called: a number where it is one, else text."""
    number = number_of(value)
    return str(value) if number is None else number


def whole_of(path: str, number: int, name: str, value: Any) -> int:
    found = number_of(value.lstrip("0") or "0" if isinstance(value, str) and value.isdecimal() else value)
    if found is None:
        raise OpsigError(f"{path} line {number}: {name} is '{value!s:.40}', which is not a whole number from 0 on")
    return found


def _float(path: str, number: int, name: str, value: Any) -> float:
    try:
        return math.nan if _is_empty(value) else float(value)
    except (ValueError, TypeError, OverflowError):
        raise OpsigError(f"{path} line {number}: {name} is '{value!s:.40}', which is not a number") from None


def _prediction(value: Any, classes: dict[str, int]) -> int:
    if _is_empty(value) or str(value) == "-1":
        return -1
    return classes.setdefault(str(_name_of(value)), len(classes))
