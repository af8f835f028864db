"""Records in and out: JSON lines, CSV, and tables for people."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from opsig_cli.errors import OpsigError, UsageError

Record = Mapping[str, Any]
FORMATS = ("table", "json", "csv")
NUMBER = re.compile(r"-|[-+]?\d[\d.]*(e[-+]?\d+)?%?")
ALIGNED = re.compile(rf"((<=|<|>) )?({NUMBER.pattern})")
"""What stands at the right of a column and is never broken: a number, or a bound of one."""
FORMULA = tuple("=+-@\t\n")
"""What a cell begins with that spreadsheets take for a formula, or skip before one."""
GAP = 2
"""Blanks between the columns of a table."""
PROSE = 100
"""Characters of a line that the eye follows; longer text is broken on the widest terminal."""
LONG = 24
"""Characters from which on a word, such as a path, may be broken in a table."""


class Lines(tuple[str, ...]):
    """A cell of several lines, under one another."""


@dataclass(frozen=True)
class Table:
    """What a person sees instead of records: a title, and one row a record, under the records' own names.

    `narrower`: rows of less for terminals on which those before would be broken, the widest first; the last are broken
    where even they do not fit.
    """

    title: str
    rows: Sequence[Record]
    narrower: Sequence[Sequence[Record]] = ()


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
            writer.writerow({column: _cell(column) for column in columns})
            for record in records:
                writer.writerow({key: _cell(plain(value)) for key, value in record.items()})
        case "table":
            for table in tables if tables is not None else [_plain_table(records)]:
                _print_table(table, out)
        case other:
            raise UsageError(f"no format is called '{other}'. Known: {', '.join(FORMATS)}")
    out.flush()


def check_format(name: str | None) -> None:
    """Raise UsageError for a format that is not one of FORMATS."""
    if name is not None and name not in FORMATS:
        raise UsageError(f"no format is called '{name}'. Known: {', '.join(FORMATS)}")


def json_lines(lines: Iterable[str]) -> Iterator[tuple[int, str, Any]]:
    """The lines that are not blank, each with its number from 1 on, and the value in it: None where it is no JSON."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield number, line, value


def read(stream: TextIO) -> list[dict[str, Any]]:
    """All records of a stream of JSON lines, read to its end.

    Raises OpsigError where there are none, or naming the line that is not a JSON object, or whose sample is none.
    """
    records = []
    for number, _, record in json_lines(stream):
        if not isinstance(record, dict):
            raise OpsigError(
                f"stdin line {number} is not a JSON object. Pipe records in: opsig mine run.h5 | opsig cluster -"
            )
        sample = record.get("sample")
        if sample is not None and (not isinstance(sample, int) or isinstance(sample, bool)):
            raise OpsigError(f"stdin line {number}: sample is {sample!r:.40}, and must be its index in the dataset")
        records.append(record)
    if not records:
        raise OpsigError("stdin holds no records. Pipe some in: opsig mine run.h5 --top 400 | opsig cluster -")
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


def _plain_table(records: Sequence[Record]) -> Table:
    """All records as they are; the one trajectory that they speak of becomes the title."""
    paths = {record.get("trajectory") for record in records}
    if len(paths) != 1 or None in paths:
        return Table("", records)
    return Table(
        str(paths.pop()),
        [{key: value for key, value in r.items() if key not in ("trajectory", "kind")} for r in records],
    )


def _cell(value: Any) -> Any:
    """A value of a CSV file: text without characters that steer a terminal, and none that a spreadsheet would run."""
    if isinstance(value, list | dict):
        return json.dumps(value)
    if not isinstance(value, str):
        return value
    text = "".join(c if c in "\n\t" else printable(c) for c in value)
    return f"'{text}" if text[:1] in FORMULA and not NUMBER.fullmatch(text) else text


def _print_table(table: Table, out: TextIO) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=out)
    if table.title:
        title = printable(table.title) + ("" if table.rows else ": none")
        console.print(Text(title, style="italic"), soft_wrap=True)
    if not table.rows:
        return
    for rows in (table.rows, *table.narrower):
        cells = _cells(rows, out)
        columns = {name: (printable(name.replace("_", " ")), cells[name]) for name in cells}
        if sum(_longest(name, texts) + GAP for name, texts in columns.values()) - GAP <= console.width:
            break
    widths = _widths(columns, console.width)
    drawn = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, width in widths.items():
        header = Text(printable(name.replace("_", " ")))
        drawn.add_column(header, justify="right" if _numeric(cells[name]) else "left", overflow="fold", width=width)
    for row in zip(*(cells[name] for name in widths), strict=True):
        drawn.add_row(*map(Text, row))
    console.print(drawn)
    if left_out := [
        name.replace("_", " ") for name in _left_out(table.rows, rows) + [n for n in cells if n not in widths]
    ]:
        console.print(Text(f"too narrow for: {', '.join(left_out)} (--format json has them)", style="italic"))
    console.print()


def _left_out(rows: Sequence[Record], narrower: Sequence[Record]) -> list[str]:
    """Columns that narrower rows go without, those aside that stand as a line of another."""
    lines = {line for row in narrower for value in row.values() if isinstance(value, Lines) for line in value}
    gone = dict.fromkeys(name for row in rows for name in row if not any(name in other for other in narrower))
    return [name for name in gone if not all(row.get(name) in lines for row in rows)]


def _cells(rows: Sequence[Record], out: TextIO) -> dict[str, list[str]]:
    """What stands in every column, by its name."""
    names = dict.fromkeys(key for record in rows for key in record)
    return {name: [_shown(_human(record.get(name)), out) for record in rows] for name in names}


def _longest(header: str, cells: Sequence[str]) -> int:
    """The width of a column in which nothing is broken."""
    from rich.cells import cell_len

    return max(cell_len(line) for text in (header, *cells) for line in text.split("\n"))


def _shown(text: str, out: TextIO) -> str:
    """Text as a stream without UTF-8 shows it: what it does not have by its code, so that columns stay in line."""
    encoding = getattr(out, "encoding", None) or "utf-8"
    if encoding.lower().startswith("utf"):
        return text
    return text.replace("\u2026", "...").encode(encoding, "backslashreplace").decode(encoding)


def _widths(columns: Mapping[str, tuple[str, Sequence[str]]], available: int) -> dict[str, int]:
    """The width of each column, given its header and cells, so that no word and no number is broken.

    Columns that do not fit even with a word a line are left out, the last first; words count up to LONG characters.
    """
    from rich.cells import cell_len

    least, most = {}, {}
    for name, (header, cells) in columns.items():
        whole = _numeric(cells)
        words = [word for text in (header, *([] if whole else cells)) for word in text.split()]
        least[name] = max([min(cell_len(word), LONG) for word in words] + [cell_len(cell) for cell in cells if whole])
        most[name] = max(least[name], min(_longest(header, cells), PROSE))
    kept = list(columns)
    while len(kept) > 1 and sum(least[name] + GAP for name in kept) - GAP > available:
        kept.pop()
    widths = {name: min(least[name], available) for name in kept}
    slack = available - sum(width + GAP for width in widths.values()) + GAP
    wanting = sorted(kept, key=lambda name: most[name] - widths[name])
    for place, name in enumerate(wanting):  # the least in want first, so that few columns wrap
        more = max(0, min(most[name] - widths[name], slack // (len(wanting) - place)))
        widths[name] += more
        slack -= more
    return widths


def _numeric(cells: Sequence[str]) -> bool:
    return all(ALIGNED.fullmatch(cell) for cell in cells)


def _human(value: Any) -> str:
    if isinstance(value, Lines):
        return "\n".join(printable(line) for line in value)
    value = plain(value)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_human(item) for item in value)
    return printable(str(value))
