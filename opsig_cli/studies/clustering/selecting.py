"""Some of the pairs alone: those of a verdict, or those that are named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from opsig_cli.analysis.verdicts import VERDICTS
from opsig_cli.errors import OpsigError, UsageError

Records = Iterable[dict[str, Any]]


class Selection:
    """Chooses among the records of `cluster`; without verdicts and numbers it chooses all.

    Raises UsageError for a verdict that there is not.
    """

    def __init__(self, verdicts: Sequence[str] = (), numbers: Sequence[int] = ()):
        for verdict in verdicts:
            if verdict not in VERDICTS:
                raise UsageError(f"--verdict is one of {', '.join(VERDICTS)}, not '{verdict}'")
        self._verdicts = verdicts
        self._numbers = numbers

    def __bool__(self) -> bool:
        """Whether it leaves anything out."""
        return bool(self._verdicts or self._numbers)

    @property
    def words(self) -> str:
        """What the chosen pairs are.

        >>> Selection(["established", "likely"]).words, Selection(numbers=[2]).words
        ('established or likely', 'chosen')
        """
        return " or ".join(self._verdicts) or "chosen"

    def pairs(self, records: Records) -> list[dict[str, Any]]:
        """The pairs that are chosen. Raises OpsigError, listing what there is, for a number that no pair has."""
        pairs = [record for record in records if record["kind"] == "pair"]
        known = [pair["pair"] for pair in pairs]
        for number in self._numbers:
            if number not in known:
                raise OpsigError(f"there is no pair {number}. Pairs: {', '.join(map(str, sorted(known))) or 'none'}")
        return [
            pair
            for pair in pairs
            if (not self._verdicts or pair["verdict"] in self._verdicts)
            and (not self._numbers or pair["pair"] in self._numbers)
        ]

    def of(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The chosen pairs with their groups and members, and records of other kinds."""
        if not self:
            return list(records)
        pairs = self.pairs(records)
        numbers, groups = {pair["pair"] for pair in pairs}, {group for pair in pairs for group in pair["groups"]}
        kept = {"pair": ("pair", numbers), "member": ("pair", numbers), "group": ("group", groups)}

        def chosen(record: dict[str, Any]) -> bool:
            key, among = kept.get(record["kind"], ("kind", {record["kind"]}))
            return record[key] in among

        return [record for record in records if chosen(record)]
