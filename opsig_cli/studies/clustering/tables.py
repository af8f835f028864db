"""What `cluster` shows a person: records shortened to rows, and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from opsig_cli.studies.clustering.agreement import SIGNIFICANT
from opsig_cli.studies.clustering.records import by_strength
from opsig_cli.studies.clustering.sentences import describe, plus_minus

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
        rows.append({
            "pair": pair["pair"],
            "one side": sides[0],
            "against": sides[1],
            **({} if pair["after"] is None else {"after": repr(pair["after"]["text"])}),
            "correlation" if pair["by"] == "loss" else "cosine": f"{pair['opposition']:.2f}",
            "losses": f"{pair['loss_correlation']:.2f}",
            **({} if pair["by"] == "loss" else {"alike": _two_digits(pair["shared"])}),
            "moves": f"{pair['movement']:.0%}",
            "p": f"{pair['p_value']:.3f}",
            "stable": f"{pair['stability']:.2f}",
        })  # fmt: skip
    return rows


def _two_digits(value: float) -> str | None:
    return f"{value:.2f}" if np.isfinite(value) else None


def sentence_table(written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sentences of the first significant pairs."""
    pairs = [pair for pair in _pairs(written) if pair["p_value"] < SIGNIFICANT]
    return [{"pair": pair["pair"], "sentence": pair["sentence"]} for pair in pairs[:SENTENCES]]


def alone_table(written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of groups that nothing opposes, shortened to what a person reads in a row."""
    return [
        {
            "group": f"G{group['group']}: {describe(group['labels'], group['size'])}".replace("' '", "'\u2423'"),
            "correlation" if group["by"] == "loss" else "cosine": plus_minus(
                group["cohesion"], group["cohesion_error"]
            ),
            "moves": f"{group['movement']:.0%}",
            "p": f"{group['p_value']:.3f}",
            "stable": f"{group['stability']:.2f}",
        }
        for group in written
        if group["kind"] == "group" and group["pair"] is None
    ]
