"""What `cluster` shows a person: records shortened to rows, and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from opsig_cli.records import Lines
from opsig_cli.studies.clustering.records import by_strength, established
from opsig_cli.studies.clustering.sentences import describe
from opsig_cli.studies.numbers import p_value, percent, plus_minus

DISPENSABLE = (("on vector",), ("alike",), ("p",), ("R",), ("cosine", "correlation"))
"""Columns that narrower and narrower tables of pairs go without, one after the other; sentences tell of most."""
SENTENCES = 5
"""Pairs that a table tells in words."""


def _pairs(written: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    return by_strength(record for record in written if record["kind"] == "pair")


def pair_table(written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of pairs, shortened to what a person reads in a row."""
    rows = []
    for pair in _pairs(written):
        sides = [
            f"G{group}: {describe(mix, size)}".replace("' '", "'\u2423'")  # a token of one blank
            for group, size, mix in zip(pair["groups"], pair["sizes"], pair["labels"], strict=True)
        ]
        ratio = pair["swing_ratio"]
        rows.append({
            "pair": pair["pair"],
            "verdict": pair["verdict"],
            "one side": sides[0],
            "against": sides[1],
            **({} if pair["after"] is None else {"after": repr(pair["after"]["text"])}),
            "correlation" if pair["by"] == "loss" else "cosine": f"{pair['opposition']:.2f}",
            **({} if pair["by"] == "loss" else {"alike": _two_digits(pair["alike"])}),
            **({} if pair["by"] == "loss" else {"R": None if ratio is None else _two_digits(ratio)}),
            "moves": percent(pair["movement"] if pair["apart_step"] is None else pair["apart_movement"]),
            "step": pair["rise_step"] if pair["apart_step"] is None else pair["apart_step"],
            "p": p_value(pair["p_value"]),
            **({} if pair["eigenvectors"] is None else {"on vector": _vector(pair)}),
        })  # fmt: skip
    return rows


def narrow_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of `pair_table` with the two sides under one another, and then with the least of numbers, for terminals of
    fewer columns."""
    stacked = [
        {("sides" if name == "one side" else name): Lines((value, row["against"])) if name == "one side" else value
         for name, value in row.items() if name != "against"}
        for row in rows
    ]  # fmt: skip
    without = accumulate(DISPENSABLE)
    return [[{name: row[name] for name in row if name not in left_out} for row in stacked] for left_out in without]


def _vector(pair: Mapping[str, Any]) -> str | None:
    """The eigenvector that a pair lies on, and its part of the eigenvalue."""
    return f"{pair['eigenvectors'][0]['rank']}: {percent(pair['sharpness_share'])}" if pair["eigenvectors"] else None


def _two_digits(value: float) -> str | None:
    return f"{value:.2f}" if np.isfinite(value) else None


def headline(written: Iterable[Mapping[str, Any]]) -> str:
    """How many pairs are established, and how many findings that is: one feature under several labels is one.

    >>> headline([{"kind": "pair", "verdict": "likely", "family": None, "pair": 1}])
    'no established pair among 1'
    """
    pairs = [record for record in written if record["kind"] == "pair"]
    held = established(pairs)
    if not held:
        return f"no established pair among {len(pairs)}" if pairs else "no opposing pair"
    findings = {pair["family"] or -pair["pair"] for pair in held}
    text = f"{len(held)} of {len(pairs)} opposing pairs established"
    return text + (f", {len(findings)} finding{'s' * (len(findings) > 1)}" if len(findings) < len(held) else "")


def sentence_table(written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sentences of the first established pairs; where there is none, of the first others."""
    pairs = _pairs(written)
    told = established(pairs) or pairs
    return [{"pair": pair["pair"], "sentence": pair["sentence"]} for pair in told[:SENTENCES]]


def alone_table(written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of groups that nothing opposes, shortened to what a person reads in a row."""
    return [
        {
            "group": f"G{group['group']}: {describe(group['labels'], group['size'])}".replace("' '", "'\u2423'"),
            "correlation" if group["by"] == "loss" else "cosine": plus_minus(
                group["cohesion"], group["cohesion_error"]
            ),
            "moves": percent(group["movement"]),
            "step": group["rise_step"],
            "p": p_value(group["p_value"]),
            "stable": f"{group['stability']:.2f}",
        }
        for group in written
        if group["kind"] == "group" and group["pair"] is None
    ]
