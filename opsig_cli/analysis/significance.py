"""How far a group or a pair can be trusted: what the same search finds where there is nothing.

M samples, G groups, T steps. A null is what the strongest group and pair reach by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from opsig_cli.analysis.cutting import cut_tree
from opsig_cli.analysis.evidence import COLUMNS
from opsig_cli.analysis.gram import Similarity
from opsig_cli.analysis.group_means import between_groups
from opsig_cli.analysis.grouping import LOOKS, SMALLEST, correlation
from opsig_cli.analysis.likeness import ALIKE, alike_groups, typical_likeness
from opsig_cli.analysis.pairing import OPPOSES, OPPOSES_ALIKE, match, pairs_of
from opsig_cli.analysis.rounds import Rounds, one_after_the_other

MOST_IN_NULL = 300
"""Samples of one round of a null."""
MOST_FITTED = 800
"""Samples that a null is fitted to."""
ROUNDING = 1e-6
"""Relative difference up to which two strengths are the same."""
HIGHEST = 0.999
"""Opposition from which on strength does not grow: an inverse hyperbolic tangent has no end."""
ROUNDS = 99
"""Rounds of a null: the smallest p-value is 1 / (ROUNDS + 1)."""
KEPT = 0.999
"""Part of the variance of looks that a null has, in the directions in which they vary most."""
BLOCK = 32
"""Reflections that LAPACK multiplies out at a time, given the room: one by one takes twice as long."""

Draw = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]
"""A round of a null: what to cut, to pair by, to test on and to see likeness by, (M, M) each; None: all are alike."""


@dataclass(frozen=True)
class Null:
    """Strength of each round's strongest group and of its strongest pair, (rounds,) each."""

    group: np.ndarray
    pair: np.ndarray


NOTHING = Null(np.empty(0), np.empty(0))


def group_strength(cohesion: float, size: int) -> float:
    """Cohesion in units in which groups of any size compare: times the root of the number of its sample pairs."""
    return cohesion * float(np.sqrt(size * (size - 1) / 2))


def pair_strength(opposition: float, size_a: int, size_b: int) -> float:
    """Opposition of two groups in units in which groups of any size and tightness compare: Fisher's transform of the
    cosine across, times the root of the number of samples of a side (geometric mean).

    As each sample is in many of the n x m cosines, a side counts by its samples and not by its cosines. Without the
    transform two halves of all samples that oppose by 0.5 were stronger than fifteen against fifteen at 0.97.

    >>> pair_strength(-0.97, 15, 15) > pair_strength(-0.5, 150, 150) > 0 > pair_strength(0.1, 9, 9)
    True
    """
    return float(np.arctanh(np.clip(-opposition, -HIGHEST, HIGHEST)) * (size_a * size_b) ** 0.25)


def p_value(value: float, null: np.ndarray) -> float:
    """Share of the null, the value itself included, that is at least as large to rounding; 1 for a value that is not
    known.

    >>> p_value(3.0, np.array([1.0, 2.0, 4.0])), p_value(float("nan"), np.array([1.0]))
    (0.5, 1.0)
    """
    if not np.isfinite(value):
        return 1.0
    return float((1 + (null >= value - ROUNDING * abs(value)).sum()) / (1 + len(null)))


def gaussian_null(
    similarity_MM: Similarity, likeness_MM: Similarity | None, labels_M: np.ndarray | None, rounds: int = ROUNDS,
    smallest: int = SMALLEST, seed: int = 0, total: int | None = None, in_rounds: Rounds = one_after_the_other,
) -> Null:  # fmt: skip
    """The null of samples that share no feature: looks from one Gaussian, under the labels that there are.

    Kept: the covariance of the looks (the spectrum of their Gram matrix), the labels and how many have each, how far
    gradients align given both labels and looks, as a line for every two labels, and the covariance of what remains of
    them. What is not:
    that some samples look alike among themselves, and that looks and labels go together (the one-Gaussian null of
    SigClust, Liu et al. 2008, JASA 103). Each round goes through the whole search, and its strongest group and pair at
    any cut are kept, so that a p-value held against them accounts for the search and for the number of pairs. A round
    has at most MOST_IN_NULL samples; strengths are scaled to all, or to a `total` of which these are some. Where labels
    are none or of nearly one sample each, as in a regression, the sign of a sample's error stands for it; without a
    likeness gradients are their own looks.
    """
    total = total or len(similarity_MM)
    some = fitted(len(similarity_MM), seed)
    similarity = np.nan_to_num(similarity_MM[np.ix_(some, some)]).astype(np.float64)
    likeness = similarity if likeness_MM is None else likeness_MM[np.ix_(some, some)].astype(np.float64)
    spectrum = np.maximum(np.linalg.eigvalsh(likeness)[::-1], 0)
    spread = np.sqrt(spectrum[: np.searchsorted(np.cumsum(spectrum), KEPT * spectrum.sum()) + 1])
    codes = _codes(similarity, likeness, None if labels_M is None else labels_M[some])
    offset, slope = _aligned_by(similarity, likeness, codes)
    count = min(MOST_IN_NULL, len(similarity_MM))
    within = np.ix_(*[codes[:count]] * 2)
    rest = np.linalg.eigvalsh(similarity[:count, :count] - offset[within] - slope[within] * likeness[:count, :count])

    labelled = labels_M is not None and shared(labels_M)
    below = OPPOSES_ALIKE if labelled else OPPOSES
    model = (spread, codes, offset, slope, rest, likeness_MM is None, count, below, smallest, seed)
    return _of_all(Null(*in_rounds(gaussian_rounds, model, rounds)), total / count)


def gaussian_rounds(
    spread: np.ndarray, codes: np.ndarray, offset: np.ndarray, slope: np.ndarray, rest: np.ndarray, looks_alone: bool,
    count: int, below: float, smallest: int, seed: int, rounds: range,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Strongest group and pair of some rounds of `gaussian_null`, from what is fitted there."""
    spread, offset, slope, rest = (part.astype(np.float32) for part in (spread, offset, slope, rest))

    def drawn(generator: np.random.Generator) -> Draw:
        rows = generator.standard_normal((count, len(spread)), np.float32) * spread
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        looks = rows @ rows.T
        if looks_alone:
            return looks, looks, looks, None
        code = codes[generator.integers(0, len(codes), count)]
        turn = rotation(count, generator)
        aligned = offset[code][:, code] + slope[code][:, code] * looks + (turn * rest) @ turn.T
        np.clip(aligned, -1, 1, out=aligned)
        np.fill_diagonal(aligned, 1)
        aligned, looks = aligned.astype(np.float64), looks.astype(np.float64)
        return (1 - LOOKS) * aligned + LOOKS * looks, aligned, aligned, looks

    return _null(drawn, rounds, smallest, seed, below)


def rotation(count: int, generator: np.random.Generator) -> np.ndarray:
    """A random orthogonal matrix (count, count) float32 from the uniform distribution, up to the signs of its columns.

    The decomposition QR of a matrix of normal numbers reflects one vector after the other onto an axis, and each is
    again of normal numbers, whatever was reflected before: the reflections are drawn, and not calculated (Stewart 1980,
    SIAM Journal on Numerical Analysis 17).
    """
    from scipy.linalg import get_lapack_funcs

    (multiplied,) = get_lapack_funcs(("orgqr",), dtype=np.float32)
    vectors = np.triu(generator.standard_normal((count, count), np.float32))  # one a row, shorter and shorter
    first = np.diagonal(vectors).copy()
    image = -np.copysign(np.sqrt(np.einsum("ij,ij->i", vectors, vectors)), first)
    vectors /= (first - image)[:, None]  # LAPACK takes the first number of each to be 1
    return multiplied(vectors.T, (image - first) / image, lwork=BLOCK * count, overwrite_a=True)[0]


def fitted(count: int, seed: int = 0) -> np.ndarray:
    """Which of so many samples a null is fitted to, at most MOST_FITTED, in random order."""
    return np.random.default_rng(seed).choice(count, min(MOST_FITTED, count), replace=False)


def shared(labels: np.ndarray) -> bool:
    """Whether labels say which samples go together: not where nearly every sample has one of its own, as in a
    regression."""
    return len(np.unique(labels)) <= len(labels) / 2


def _codes(similarity: np.ndarray, likeness: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """A number for every sample's label, (M,), or for the sign of its error where labels say nothing."""
    if labels is not None and shared(labels):
        return np.unique(labels, return_inverse=True)[1]
    _, vectors = np.linalg.eigh(similarity * likeness)  # S is about s s' K for errors of sign s: times K, s s' K^2
    return (vectors[:, -1] > 0).astype(np.int64)


def _aligned_by(similarity: np.ndarray, likeness: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every two labels the line S = offset + slope K through their samples, (L, L) each."""
    count = int(codes.max()) + 1
    block = np.add.outer(codes * count, codes)
    off = ~np.eye(len(codes), dtype=bool)
    s, k, place = similarity[off], likeness[off], block[off]
    n = np.maximum(np.bincount(place, minlength=count**2), 1)
    s_mean, k_mean = (np.bincount(place, x, count**2) / n for x in (s, k))
    k_var = np.bincount(place, k * k, count**2) / n - k_mean**2
    slope = (np.bincount(place, s * k, count**2) / n - s_mean * k_mean) / np.maximum(k_var, 1e-9)
    offset = s_mean - slope * k_mean
    return offset.reshape(count, count), slope.reshape(count, count)


def phase_null(losses_TM: np.ndarray, rounds: int = ROUNDS, smallest: int = SMALLEST, seed: int = 0) -> Null:
    """The null of series that share their spectra alone: each round shuffles the phases of every sample's changes.

    As in `cluster --by loss`, groups of the first half are tested on the second. A round takes at most MOST_IN_NULL
    samples; strengths are scaled to all of them, as a group holds a fixed part of samples that all alternate. Where
    every series alternates at period two this null finds groups as strong as those of the data: losses alone cannot
    tell then.
    """
    count = min(MOST_IN_NULL, losses_TM.shape[1])
    steps = len(losses_TM) - 1
    # what a shuffle keeps: found once for all rounds
    sizes_FM, means_M = np.empty((steps // 2 + 1, losses_TM.shape[1]), np.float32), np.empty(losses_TM.shape[1])
    for some in np.array_split(np.arange(losses_TM.shape[1]), losses_TM.shape[1] // COLUMNS + 1):
        changes = np.diff(losses_TM[:, some].astype(np.float64), axis=0)
        sizes_FM[:, some], means_M[some] = np.abs(np.fft.rfft(changes, axis=0)), changes.mean(0)

    def surrogates(generator: np.random.Generator) -> Draw:
        chosen = generator.choice(losses_TM.shape[1], count, replace=False)
        spectrum = sizes_FM[:, chosen] * _phases((len(sizes_FM), count), steps, generator)
        spectrum[0] = means_M[chosen] * steps
        series = np.fft.irfft(spectrum, steps, axis=0)
        first, second = (np.nan_to_num(correlation(part)) for part in (series[: steps // 2], series[steps // 2 :]))
        return first, first, second, None

    found = Null(*_null(surrogates, range(rounds), smallest, seed))
    return _of_all(found, losses_TM.shape[1] / count)


def _of_all(null: Null, scale: float) -> Null:
    """The null of `scale` times as many samples, of which a group holds the same part."""
    return Null(null.group * scale, null.pair * np.sqrt(scale))


def _null(
    draw: Callable[[np.random.Generator], Draw], rounds: range, smallest: int, seed: int, below: float = OPPOSES
) -> tuple[np.ndarray, np.ndarray]:
    """Strongest groups, and strongest pairs that look alike and have a similarity across of `below`, of the rounds of
    these numbers."""
    groups, pairs = np.zeros(len(rounds)), np.zeros(len(rounds))
    for number, its_seed in enumerate(rounds):
        cut, similarity, tested, looks = draw(np.random.default_rng([seed, its_seed]))
        typical = 0.0 if looks is None else typical_likeness(looks)
        before, promising = None, []
        for chosen in cut_tree(cut, smallest):
            if (before is not None and np.array_equal(chosen, before)) or chosen.max(initial=-1) < 0:
                continue
            before = chosen
            group, opposed = _at_a_cut(chosen, similarity, tested, looks, typical, below)
            groups[number] = max(groups[number], group)
            promising.append(opposed)
        for opposed in sorted(promising, key=lambda opposed: -opposed.most):
            if opposed.most <= pairs[number]:
                break
            pairs[number] = max(pairs[number], opposed.strongest())
    return groups, pairs


@dataclass(frozen=True)
class _Opposed:
    """Groups of a cut that may be pairs, `allowed_GG`, with their mean similarity and their strength as a pair."""

    between_GG: np.ndarray
    allowed_GG: np.ndarray
    strength_GG: np.ndarray

    @property
    def most(self) -> float:
        """Strength that no pair exceeds, whoever is matched with whom."""
        return float(self.strength_GG[self.allowed_GG].max(initial=0.0))

    def strongest(self) -> float:
        """Strength of the strongest pair; 0 for none."""
        return max(
            [0.0, *(float(self.strength_GG[a, b]) for a, b in pairs_of(match(self.between_GG, self.allowed_GG, 1)))]
        )


def _at_a_cut(
    group_M: np.ndarray, similarity: np.ndarray, tested: np.ndarray, looks: np.ndarray | None, typical: float,
    below: float,
) -> tuple[float, _Opposed]:  # fmt: skip
    """Strength of the strongest of these groups, 0 for none, and those that oppose and look alike."""
    inside = group_M >= 0
    between_GG = between_groups(similarity, group_M)
    tested_GG = between_GG if tested is similarity else between_groups(tested, group_M)
    sizes = np.bincount(group_M[inside])
    own = np.bincount(group_M[inside], np.diagonal(tested)[inside])  # without a sample's similarity with itself
    cohesion = (np.diagonal(tested_GG) * sizes**2 - own) / np.maximum(sizes * (sizes - 1), 1)
    group = float((cohesion * np.sqrt(sizes * (sizes - 1) / 2)).max())
    allowed_GG = between_GG <= below
    if looks is not None:
        allowed_GG &= alike_groups(between_groups(looks, group_M), sizes, typical) >= ALIKE
    np.fill_diagonal(allowed_GG, False)
    strength_GG = np.arctanh(np.clip(-tested_GG, -HIGHEST, HIGHEST)) * np.outer(sizes, sizes) ** 0.25
    return max(group, 0.0), _Opposed(between_GG, allowed_GG, strength_GG)


def _phases(shape: tuple[int, ...], steps: int, generator: np.random.Generator) -> np.ndarray:
    """Random turns of the frequencies of real series of so many steps, complex64: F of them along the first axis."""
    turns = (2 * np.pi) * generator.random(shape, np.float32)
    phases = np.empty(shape, np.complex64)
    np.cos(turns, out=phases.real)
    np.sin(turns, out=phases.imag)
    phases[0] = 1
    if steps % 2 == 0:  # the highest frequency stays real
        phases[-1] = np.where(turns[-1] < np.pi, -1, 1)
    return phases


def series_p_value(changes_a: np.ndarray, changes_b: np.ndarray, rounds: int = ROUNDS, seed: int = 0) -> float:
    """Share of phase-shuffled a, (T,), itself included, that correlate with b at least as negatively as a does (Theiler
    et al. 1992).

    Two series that do nothing but alternate at period two are at +1 or -1 whatever their phase: the answer is then a
    half, not small. It is 1 where a change is not known. Products of series are those of their spectra (Parseval), so
    that no surrogate is made.

    >>> swing = np.resize([1.0, -1.0], 64)
    >>> series_p_value(swing, -swing) > 0.3
    True
    """
    a, b = changes_a - changes_a.mean(), changes_b - changes_b.mean()
    observed = float(a @ b)
    if not np.isfinite(observed):
        return 1.0
    steps = len(a)
    cross_F = np.fft.rfft(a) * np.fft.rfft(b).conj() * (2 / steps)
    cross_F[0] /= 2
    if steps % 2 == 0:
        cross_F[-1] /= 2
    generator = np.random.default_rng(seed)
    products = [float((cross_F @ _phases(cross_F.shape, steps, generator)).real) for _ in range(rounds)]
    return float((1 + (np.array(products) <= observed + ROUNDING * abs(observed)).sum()) / (1 + rounds))
