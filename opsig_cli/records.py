"""Records in and out: JSON lines, CSV, and tables for people."""

from __future__ import annotations

import csv
import json
import math
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from opsig_cli.errors import OpsigError, UsageError

Record = Mapping[str, Any]
FORMATS = ("table", "json", "csv")


@dataclass(frozen=True)
class Table:
    """What a person sees instead of records: a title, and one row a record, under the records' own names."""

    title: str
    rows: Sequence[Record]


def write(
    records: Sequence[Record], format: str | None, tables: Sequence[Table] | None = None, out: TextIO | None = None
) -> None:
    """Write records to stdout as JSON lines, CSV or tables; None means tables on a terminal and JSON lines elsewhere.

    NaN and infinity become null. `tables` replaces the plain table of all records.
    """
    out = sys.stdout if out is None else out
    assert out is not None
    match format or ("table" if out.isatty() else "json"):
        case "json":
            for record in records:
                out.write(json.dumps({key: plain(value) for key, value in record.items()}, allow_nan=False) + "\n")
        case "csv":
            columns = list(dict.fromkeys(key for record in records for key in record))
            writer = csv.DictWriter(out, columns, lineterminator="\n")
            writer.writeheader()
            for record in records:
                writer.writerow({key: _cell(plain(value)) for key, value in record.items()})
        case "table":
            for table in tables if tables is not None else [Table("", records)]:
                _print_table(table, out)
        case other:
            raise UsageError(f"no format is called '{other}'. Known: {', '.join(FORMATS)}")
    out.flush()


def read(stream: TextIO) -> list[dict[str, Any]]:
    """All records of a stream of JSON lines, read to its end.

    Raises OpsigError where there are none, or naming the line that is not a JSON object.
    """
    records = []
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise OpsigError(
                f"stdin line {number} is not a JSON object. Pipe records in: opsig mine run.h5 | opsig cluster -"
            )
        records.append(record)
    if not records:
        raise OpsigError("stdin holds no records. Pipe some in: opsig mine run.h5 | opsig cluster -")
    return records


def plain(value: Any) -> Any:
    """A value as JSON has it: numpy becomes Python, NaN and infinity None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


def printable(text: str) -> str:
    """Text without characters that steer a terminal; each becomes a replacement mark."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _print_table(table: Table, out: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=table.title or None, title_justify="left")
    columns = list(dict.fromkeys(key for record in table.rows for key in record))
    for column in columns:
        numeric = any(isinstance(plain(record.get(column)), int | float) for record in table.rows)
        drawn.add_column(column.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for record in table.rows:
        drawn.add_row(*(Text(_human(plain(record.get(column)))) for column in columns))
    Console(file=out).print(drawn)


def _human(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_human(item) for item in value)
    return printable(str(value))
