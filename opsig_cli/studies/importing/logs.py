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
import re
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
MISSING = {"na", "n/a", "#n/a", "<na>", "nan", "null", "none"}
"""What stands in a cell without a number, as pandas knows them, in any case of letters."""
WIDE = re.compile(r"(.*?)(\d+)")
"""The header of a sample's own column: what all have in common, and the sample."""
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
    relabelled: dict[int, int] = {}  # the line that says another label than the first, by sample
    classes: dict[str, int] = {}
    empty = 0
    for number, values in lines:
        for record in _spread(path, number, dict(zip(columns, values, strict=True))):
            if _is_empty(record["sample"]) and _is_missing(record["loss"]):
                empty += 1  # of an evaluation, say, in the same log
                continue
            if record["step"] == columns["step"]:
                raise OpsigError(
                    f"{path} line {number} is the header again, as where a run went on and its log was appended to. "
                    "Take it out, with the lines before it of steps that come again"
                )
            step.append(whole_of(path, number, "step", record["step"]))
            if _is_empty(record["sample"]):
                raise OpsigError(f"{path} line {number} has a loss and no {columns['sample']}")
            name = _name_of(record["sample"])
            at = known.setdefault(name, len(known))
            place.append(at)
            loss.append(_float(path, number, "loss", record["loss"]))
            prediction.append(_prediction(record.get("prediction"), classes))
            if not _is_empty(record.get("label")):
                label = str(_name_of(record["label"]))
                if labels.setdefault(at, label) != label:
                    relabelled.setdefault(at, number)
    if empty and len(step):
        warn(f"{path}: {empty:,} lines without a sample and a loss are left out")
    if relabelled:
        many = f"{len(relabelled):,} samples have" if len(relabelled) > 1 else "one sample has"
        line = min(relabelled.values())
        warn(f"{path}: {many} more than one {columns['label']}, as on line {line}; the first of each is taken")
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
    if zipped and not _is_gzipped(path):
        raise OpsigError(f"{path} is not gzipped, whatever its name says. Rename it")
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
        except UnicodeDecodeError as error:
            raise OpsigError(f"{path} is not text in UTF-8 ({first_words(error)}). Save it as UTF-8") from error
        except (EOFError, gzip.BadGzipFile, ValueError) as error:
            raise OpsigError(f"{path} is not readable as text ({first_words(error)})") from error


def _is_gzipped(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) in (b"\x1f\x8b", b"")


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
    skipped, begun, comma = _beginning(path, text)
    comma = "\t" if tabs else comma
    last = begun[-1:]
    reader = csv.reader(itertools.chain(begun, _kept(text, last)), delimiter=comma)
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise OpsigError(f"{path} is not readable as CSV ({first_words(error)})") from error
    wide = wide_columns(header) if not named else None
    if wide is not None:
        step, places = wide
        columns = {"step": header[step], "sample": "number in its header", "loss": header[places[0]]}
        ids = [WIDE.fullmatch(header[place])[2] for place in places]  # pyright: ignore[reportOptionalSubscript]
        warn(f"{path}: a column for each of {len(ids):,} samples, {header[places[0]]} to {header[places[-1]]}")
    else:
        columns = choose(path, header, named, warn)
        step, places, ids = 0, [header.index(name) for name in columns.values()], []
    decimal = comma != ","  # then a comma is the point of a number

    def lines() -> Lines:
        try:
            for values in reader:
                if not values:
                    continue
                number = reader.line_num + skipped
                if len(values) < len(header) and not last[0].endswith("\n"):
                    warn(f"{path}: the last line, {number}, is cut off in its middle, and left out")
                    return
                if len(values) != len(header):
                    raise OpsigError(f"{path} line {number} has {len(values)} values, not {len(header)}")
                found: list[Any] = [values[place].strip() for place in places]
                if decimal:
                    found = [pointed(value) for value in found]
                yield number, [values[step].strip(), ids, found] if wide is not None else found
        except csv.Error as error:
            raise OpsigError(f"{path} is not readable as CSV ({first_words(error)})") from error

    return columns, lines()


def _beginning(path: str, text: Iterator[str]) -> tuple[int, list[str], str]:
    """How many lines come before the header, the header, with the first line of numbers where it was read to find out,
    and what separates columns.

    Spreadsheets put "sep=;" above it, and numpy.savetxt writes it as a comment.
    """
    skipped, first = 0, next(text, "")
    separator = re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE)
    if separator:
        skipped, first = 1, next(text, "")
    comment = ""
    while first.startswith("#"):
        comment, first = first, next(text, "")
        skipped += 1
    if not first.strip() and not comment.strip("# \n"):
        raise OpsigError(f"{path} is empty" if not first else f"{path} begins with an empty line, not with a header")
    if "\r" in first.rstrip("\r\n"):
        raise OpsigError(
            f"{path} has lines that end in a carriage return alone. Write them anew: tr '\\r' '\\n' < FILE"
        )
    comma = separator[1] if separator else separator_of(first)
    if _numbers_alone(first, comma):
        if not comment:
            raise OpsigError(
                f"{path} has no header: its first line is {first.strip()[:60]}. Put the columns' names above it, as in "
                "step,sample,loss"
            )
        return skipped - 1, [comment.lstrip("# "), first], comma
    return skipped, [first], comma


def separator_of(header: str) -> str:
    """What separates the columns of a header: a comma, else a tab, a semicolon or a bar."""
    return next((sign for sign in ",\t;|" if sign in header), ",")


def _numbers_alone(line: str, comma: str) -> bool:
    """Whether a line holds numbers, and so no names of columns; one line of a wide table has a step's name at least."""
    cells = [cell.strip().strip('"') for cell in line.split(comma)]
    return all(cell and _is_number(pointed(cell)) for cell in cells)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _kept(text: Iterator[str], last: list[str]) -> Iterator[str]:
    """The lines, of which `last` holds the one that was read last."""
    for line in text:
        last[0] = line
        yield line


def pointed(value: str) -> str:
    """A number with a decimal comma with a point instead."""
    return value.replace(",", ".") if value.count(",") == 1 and "." not in value else value


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
            if value is None and not line.endswith("\n"):
                warn(f"{path}: the last line, {number}, is cut off in its middle, and left out")
                return
            if not isinstance(value, dict):
                raise OpsigError(f"{path} line {number} is not a JSON object")
            yield number, _by_sample(value)

    every = objects()
    first = list(itertools.islice(every, LOOKED_AT))
    columns = choose(path, list(dict.fromkeys(name for _, value in first for name in value)), named, warn)
    lines = (
        (number, [value.get(name) for name in columns.values()]) for number, value in itertools.chain(first, every)
    )
    return columns, lines


def _by_sample(value: dict[str, Any]) -> dict[str, Any]:
    """A line whose losses are an object by sample as one with two lists."""
    for name, inner in value.items():
        if isinstance(inner, dict) and folded(name) in COLUMNS["loss"]:
            return value | {"sample": list(inner), name: list(inner.values())}
    return value


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


def _is_missing(value: Any) -> bool:
    """Whether there is no number, as tables write it."""
    return _is_empty(value) or (isinstance(value, str) and value.casefold() in MISSING)


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
        return math.nan if _is_missing(value) else float(value)
    except (ValueError, TypeError, OverflowError):
        raise OpsigError(f"{path} line {number}: {name} is '{value!s:.40}', which is not a number") from None


def _prediction(value: Any, classes: dict[str, int]) -> int:
    if _is_missing(value) or str(value) == "-1":
        return -1
    return classes.setdefault(str(_name_of(value)), len(classes))
