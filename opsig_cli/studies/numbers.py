"""How a number is written for a person: one way each, in tables and sentences, and from there in figures and pages.

Plain text keeps to ASCII, "-" and "+-"; `opsig_cli.figures.canvas.typeset` makes true signs of them where a font is
drawn. A share of a change is always of all samples' movement at the step: the sizes of their loss changes, summed.
"""

from __future__ import annotations

import math

from opsig_cli.analysis.significance import ROUNDS
from opsig_cli.trajectory.file import Trajectory

PLURAL = {"nat": "nats", "bit": "bits"}


def percent(part: float | None) -> str:
    """A part of a whole; what is there is never 0%.

    >>> percent(0.534), percent(0.0021), percent(-0.2), percent(0.0), percent(None)
    ('53%', '< 0.5%', '-20%', '0%', '-')
    """
    if part is None or not math.isfinite(part):
        return "-"
    if 0 < abs(part) < 0.005:
        return "< 0.5%" if part > 0 else "> -0.5%"
    return f"{part:.0%}"


def p_value(value: float | None) -> str:
    """A p-value; the least that the rounds of the null can give is said to be that or less.

    >>> p_value(0.25), p_value(1.0), p_value(1 / (ROUNDS + 1)).startswith("<= ")
    ('0.25', '1', True)
    """
    if value is None or not math.isfinite(value):
        return "-"
    return f"{'<= ' if value <= 1 / (ROUNDS + 1) + 1e-9 else ''}{value:.2g}"


def plus_minus(value: float, error: float | None) -> str:
    """A number with its standard error, where it has one.

    >>> plus_minus(-0.617, 0.0213), plus_minus(0.5, float("nan"))
    ('-0.62 +- 0.02', '0.50')
    """
    return f"{value:.2f}" + (f" +- {error:.2f}" if error is not None and math.isfinite(error) else "")


def short(name: str, most: int = 32) -> str:
    """A label that is longer than this cut, so that it fits into tables and sentences.

    >>> short("a label that is rather long", 12), short("Coat")
    ('a label t...', 'Coat')
    """
    return name if len(name) <= most else name[: most - 3].rstrip() + "..."


def loss_unit(run: Trajectory) -> str:
    """The unit of the run's losses, in the plural, as its task states it; "" where that is not known.

    Of a file that does not say: nats for classes, whose losses are log-likelihoods.
    """
    stated = str(run.attributes.get("loss_unit") or "")
    if not stated and (run.has("class_name") or run.has("losses/prediction")):
        stated = "nat"
    return PLURAL.get(stated, stated)


def with_unit(text: str, unit: str) -> str:
    """A number that is written already, with its unit where it has one.

    >>> with_unit("+3.9", "nats"), with_unit("+3.9", "")
    ('+3.9 nats', '+3.9')
    """
    return f"{text} {unit}" if unit else text


def in_unit(name: str, unit: str) -> str:
    """The name of an axis or a column with its unit in brackets, where it has one.

    >>> in_unit("loss", "nats"), in_unit("loss", "")
    ('loss (nats)', 'loss')
    """
    return f"{name} ({unit})" if unit else name
