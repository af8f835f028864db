"""Tables of the samples that move most, and of those whose loss is not finite: what `mine` prints, and others too."""

from __future__ import annotations

import math
from typing import Any

from opsig_cli.figures.canvas import cut
from opsig_cli.trajectory.texts import NUMBERS, context

LARGE = 1e4
"""Losses from which on a table shows digits and an exponent."""
TEXT = 40
"""Characters of a text sample that fit into a table."""


def mover_rows(found: Any) -> list[dict[str, Any]]:
    """Records of `mine`, shortened to what a person reads in a row."""
    return [_mover_row(r) for r in found if r.get("kind") != "not_finite"]


def _mover_row(r: dict[str, Any]) -> dict[str, Any]:
    what = {"name": cut(r["name"], TEXT, end=True)} if "name" in r else {}
    text, label = r.get("text"), r["label"]
    if (label is not None and (text is None or context(text, label) is None)) or (text is None and not what):
        what |= {"label": _short(label)}
    if text is not None and not (label is not None and text.startswith(NUMBERS)):
        what |= {"text": cut(" ".join(text.split()), TEXT, end=True)}
    if r.get("seen") == "sighting":
        share = r["share"]
        return {
            "rank": r["rank"], "sample": r["sample"], **what, "step": r["step"], "loss": r["loss_after"],
            "expected": r["loss_before"], "excess": r["change"],
            "share": None if share is None or math.isnan(share) else f"{share:.1%}".replace("-0.0%", "0.0%"),
            "seen_before": r["previous_step"], "loss_then": r["loss_last"],
        }  # fmt: skip
    guesses = [r["prediction_before"], r["prediction_after"]]
    predicted = {} if guesses == [None, None] else {"predicted": " -> ".join(str(_short(guess)) for guess in guesses)}
    return {
        "rank": r["rank"],
        "sample": r["sample"],
        **what,
        **predicted,
        "step": r["step"],
        "loss": f"{_loss(r['loss_before'])} -> {_loss(r['loss_after'])}",
        "score": r["score"],
        "of movement": "-" if r["movement"] is None else f"{r['movement']:.1%}",
    }


def _loss(value: float) -> str:
    """A loss to two places, or a very large one to three digits."""
    return f"{value:.2f}" if abs(value) < LARGE else f"{value:.3g}"


def _short(name: Any) -> Any:
    from opsig_cli.studies.numbers import short

    return short(name, 20) if isinstance(name, str) else name


def not_finite_tables(found: Any) -> list[Any]:
    """The table that comes first where samples are not finite while the others are."""
    from opsig_cli.records import Table

    rows = [{name: r[name] for name in ("sample", "label", "step")} for r in found.of("not_finite")]
    return [Table("samples whose loss is not finite, from this step on", rows)] if rows else []
