"""Runs of a benchmark over many processes: which seeds this one takes, a JSON line a run, a table from all lines.

    seq 0 99 | xargs -P 16 -I SEED env OMP_NUM_THREADS=1 python benchmarks/noise.py --first SEED --runs 1 --json rows
    python benchmarks/noise.py --from rows

Rows may go to one file from all processes, as each is one write, or to a file each: `--from` takes any number.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def parser_of(words: str | None, kinds: Iterable[str], runs: int) -> argparse.ArgumentParser:
    """What every benchmark of many runs takes: kinds, seeds, and where its rows go to or come from."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(kinds), help="kinds, with commas between them")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--runs", "--seeds", type=int, default=runs, help="how many seeds of each kind")
    parser.add_argument("--json", type=Path, help="append a line for each run to this file")
    parser.add_argument(
        "--from", dest="files", type=Path, nargs="+", help="run nothing: the table of these files' rows"
    )
    return parser


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Every kind with every seed that is asked for."""
    for kind in options.only.split(","):
        for seed in range(options.first, options.first + options.runs):
            yield kind, seed


def keep(options: argparse.Namespace, row: Row, begin: float) -> Row:
    """The row with the processor time since `begin`, appended to the file of rows where there is one."""
    row = row | {"seconds": round(time.process_time() - begin, 1)}
    if options.json is not None:
        with options.json.open("ab", buffering=0) as file:  # one write: rows of several processes do not mix
            file.write(json.dumps(row).encode() + b"\n")
    return row


def kept(files: Iterable[Path]) -> list[Row]:
    """The rows of these files in the order of their seeds, those of the same run once, the last."""
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    return sorted({(row["kind"], row.get("by"), row["seed"]): row for row in rows}.values(), key=lambda r: r["seed"])


def by_kind(rows: Iterable[Row], kinds: Iterable[str]) -> Iterator[tuple[str, list[Row]]]:
    """The rows of every kind that has some."""
    rows = list(rows)
    for kind in kinds:
        if own := [row for row in rows if row["kind"] == kind]:
            yield kind, own


def cost(rows: list[Row]) -> str:
    """Processor time of a run, in words."""
    return f"{sum(row['seconds'] for row in rows) / len(rows):.1f} s of CPU a run"
