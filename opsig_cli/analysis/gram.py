"""The similarity of many samples, known by rows whose products it is. M samples of D numbers, G groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_FORMED = 14_000
"""M: samples whose similarities are formed two by two, which takes 20 bytes a pair, 3.9 GB, at the most. More go by
their rows, of which only products with groups, and blocks of some samples, are made."""


def formed(count: int) -> bool:
    """Whether the similarity of every two of so many samples is formed."""
    return count <= MOST_FORMED


@dataclass(frozen=True)
class Gram:
    """scale R R' of rows R (M, D) float32, which is never formed as a whole: M x D numbers stand for M x M.

    It is asked as the array would be: `gram[a:b]` are rows of it, `gram[np.ix_(rows, columns)]` is a block.

    >>> gram = Gram(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], np.float32))
    >>> gram[:1].tolist(), gram[np.ix_([1, 2], [0, 2])].tolist(), gram.diagonal().tolist()
    ([[1.0, -1.0, 0.0]], [[-1.0, 0.0], [0.0, 1.0]], [1.0, 1.0, 1.0])
    """

    rows_MD: np.ndarray
    scale: float = 1.0

    def __len__(self) -> int:
        return len(self.rows_MD)

    def __getitem__(self, asked: Any) -> np.ndarray:
        rows, columns = (np.ravel(part) for part in asked) if isinstance(asked, tuple) else (asked, slice(None))
        return self._scaled(self._rows(rows) @ self._rows(columns).T)

    @property
    def shape(self) -> tuple[int, int]:
        """That of the array it stands for."""
        return len(self), len(self)

    def diagonal(self) -> np.ndarray:
        """Every sample's similarity with itself, (M,)."""
        return self.scale * np.einsum("md,md->m", self.rows_MD, self.rows_MD)

    def totals(self, members: list[np.ndarray]) -> np.ndarray:
        """The sum of the rows of each of these groups, (G, D) float64."""
        found = np.zeros((len(members), self.rows_MD.shape[1]))
        for total, inside in zip(found, members, strict=True):
            total += self._rows(inside).sum(0, dtype=np.float64)
        return found

    def sums(self, rows: slice, totals_GD: np.ndarray) -> np.ndarray:
        """Sums of these rows' similarity over groups with these totals, (m, G) float64."""
        return self._scaled(self._rows(rows) @ totals_GD.T.astype(np.float32)).astype(np.float64)

    def mean_square(self) -> float:
        """Mean square similarity of two different samples, from the smaller of the two matrices of products."""
        count, size = self.rows_MD.shape
        total, step = 0.0, 1024
        if size < count:
            inner = np.zeros((size, size))
            for first in range(0, count, step):
                part = self._rows(slice(first, first + step))
                inner += part.T @ part
            total = float((inner**2).sum())
        else:
            for first in range(0, count, step):
                total += float((self[first : first + step].astype(np.float64) ** 2).sum()) / self.scale**2
        own = np.einsum("md,md->m", self.rows_MD, self.rows_MD, dtype=np.float64)
        return self.scale**2 * max(total - float((own**2).sum()), 0.0) / max(1, count * (count - 1))

    def _rows(self, asked: Any) -> np.ndarray:
        return np.asarray(self.rows_MD[asked], np.float32)

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        return values if self.scale == 1 else values * np.float32(self.scale)


Similarity = np.ndarray | Gram
"""(M, M) in [-1, 1], as an array or by rows."""


def block(similarity_MM: Similarity, members: np.ndarray) -> np.ndarray:
    """The similarity of every two of these samples, (m, m)."""
    if isinstance(similarity_MM, Gram):
        return similarity_MM[np.ix_(members, members)]
    return similarity_MM[members][:, members]  # whole rows first take a third of the time of single numbers
