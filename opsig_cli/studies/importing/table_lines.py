"""Lines of tables by their number, whatever the format: CSV, TSV, JSON lines and parquet, gzipped or not.

A table is read once, line by line, and unpacked no further than MAX_EXPANSION allows.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.records import json_lines
from opsig_cli.studies.importing.columns import COLUMNS, WIDE, Warn, choose, folded, wide_columns
from opsig_cli.studies.importing.torch_files import MAX_EXPANSION, SPARE_BYTES, first_words

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
LONGEST = 16 << 20
"""Bytes of a line, as of the lists of a batch."""
LOOKED_AT = 100
"""Lines of a file of JSON from which its columns are known."""

Lines = Iterator[tuple[int, Sequence[Any]]]


def is_table(path: str) -> bool:
    """Whether a file is one whose lines are read here, by its name."""
    return path.lower().removesuffix(".gz").endswith(ENDINGS)


def lines_of(path: str, named: Mapping[str, str], warn: Warn) -> tuple[dict[str, str], Lines]:
    """The columns that were found, by what they hold, and the lines by number with their values in that order."""
    plain = path.lower().removesuffix(".gz")
    if plain.endswith(".parquet"):
        return _parquet_lines(path, named, warn)
    text = opened(path)
    if plain.endswith((".jsonl", ".ndjson")):
        return _json_lines(path, text, named, warn)
    return _csv_lines(path, text, named, warn, plain.endswith(".tsv"))


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


def _csv_lines(
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


def _json_lines(
    path: str, text: Iterator[str], named: Mapping[str, str], warn: Warn
) -> tuple[dict[str, str], Lines]:  # fmt: skip
    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line, value in json_lines(text):
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


def _parquet_lines(path: str, named: Mapping[str, str], warn: Warn) -> tuple[dict[str, str], Lines]:
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
