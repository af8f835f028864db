"""Opposing signals planted in Fashion-MNIST, with known truth. S images."""

from __future__ import annotations

import numpy as np

from opsig_zoo.images import FASHION_CLASSES, ImageTask, fashion_mnist, first, shrunk


class Planted(ImageTask):
    """Fashion-MNIST with `pairs` bright patches, each on two sides of `side` images with two different labels.

    A patch is a square of `patch` pixels with a random texture of its own, `strength` times white, at a place of its
    own. Images of both sides are drawn from all classes, so that the patch is all they share; with `native` they come
    from the class they are labelled with. `jitter`: the patch is shifted by up to so many pixels. `shared`: the
    first two pairs carry the same patch. `same_classes`: all pairs set the same two classes against each other.
    `unequal`: sizes differ, up to threefold. `distractors`: so many further patches whose images all have one label.
    `label_noise`: this share of all the other images gets a random label. `seed` decides all of it.
    """

    def __init__(
        self, pairs: int = 4, side: int = 30, samples: int = 2000, size: int = 14, patch: int = 4,
        strength: float = 20.0, jitter: int = 0, shared: bool = False, native: bool = False,
        same_classes: bool = False, unequal: bool = False, distractors: int = 0, label_noise: float = 0.0,
        seed: int = 0, root: str = "", model: str = "mlp:width=64", loss: str = "cross-entropy",
        label_smoothing: float = 0.0,
    ):  # fmt: skip
        if pairs < 1 or side < 2:
            raise ValueError("pairs must be at least 1 and side at least 2")
        if shared and pairs < 2:
            raise ValueError("shared needs two pairs")
        if not 0 <= label_noise < 1:
            raise ValueError("label_noise must be at least 0 and below 1")
        images, labels = fashion_mnist(root, "train")
        generator = np.random.default_rng([seed, 2311_04163])
        order = generator.permutation(len(images))
        images, labels = first(samples, images[order], labels[order].astype(np.int64))
        pixels = shrunk(images, size)
        features = pairs - shared
        corners = self._corners(size, patch, jitter, features + distractors, generator)
        textures = generator.uniform(0.5, 1.0, (features + distractors, patch, patch))
        textures *= strength / np.sqrt(np.square(textures).mean((1, 2), keepdims=True))  # all equally strong
        sizes = [side] * (2 * pairs)
        if unequal:
            sizes = [int(size) for size in np.geomspace(side / 1.75, side * 1.75, 2 * pairs).round()]
            generator.shuffle(sizes)
        planted = sum(sizes) + distractors * side
        if planted > len(pixels):
            raise ValueError(f"{planted} planted images are more than the {len(pixels)} there are")
        truth, planted_feature = (np.full(len(pixels), -1) for _ in range(2))
        free = np.ones(len(pixels), bool)
        classes = self._classes(pairs, same_classes, generator)

        def plant(count: int, feature: int, label: int) -> np.ndarray:
            candidates = np.flatnonzero(free & (labels == label) if native else free)
            if len(candidates) < count:
                raise ValueError(f"class {FASHION_CLASSES[label]} has too few images left. Use a smaller side")
            chosen = generator.choice(candidates, count, replace=False)
            free[chosen] = False
            labels[chosen] = label
            for i, (down, right) in zip(
                chosen, corners[feature] + generator.integers(-jitter, jitter + 1, (count, 2)), strict=True
            ):
                pixels[i, down : down + patch, right : right + patch, 0] = textures[feature]
            return chosen

        for pair in range(pairs):
            feature = max(0, pair - 1) if shared else pair
            for half in (0, 1):
                chosen = plant(sizes[2 * pair + half], feature, classes[pair][half])
                truth[chosen], planted_feature[chosen] = 2 * pair + half, feature
        for distractor in range(distractors):
            plant(side, features + distractor, int(generator.integers(10)))
        noisy = np.flatnonzero(free)[generator.random(int(free.sum())) < label_noise]
        labels[noisy] = generator.integers(0, 10, len(noisy))
        self._truth, self._feature = truth, planted_feature
        super().__init__(pixels, labels, FASHION_CLASSES, model, loss, label_smoothing)

    def truth(self) -> np.ndarray:
        """Planted side of every image, (S,): 2 * pair + side, or -1."""
        return self._truth

    def feature(self) -> np.ndarray:
        """Patch in every image of a side, (S,), or -1."""
        return self._feature

    @staticmethod
    def _corners(
        size: int, patch: int, jitter: int, count: int, generator: np.random.Generator
    ) -> np.ndarray:  # (count, 2)
        pitch = patch + 2 * jitter
        along = size // pitch
        if count > along * along:
            raise ValueError(f"{count} patches of {patch} pixels do not fit beside each other in {size} x {size}")
        cells = generator.permutation(along * along)[:count]
        gap = (size - along * pitch) // max(1, along - 1) if along > 1 else 0
        return np.stack([cells // along, cells % along], 1) * (pitch + gap) + jitter

    @staticmethod
    def _classes(pairs: int, same: bool, generator: np.random.Generator) -> list[tuple[int, int]]:
        if same:
            pair = generator.permutation(10)[:2]
            return [(int(pair[0]), int(pair[1]))] * pairs
        deck = np.concatenate([generator.permutation(10) for _ in range(-(-2 * pairs // 10))])
        chosen = deck[: 2 * pairs].reshape(pairs, 2)
        return [(int(a), int(b)) if a != b else (int(a), int((b + 1) % 10)) for a, b in chosen]
