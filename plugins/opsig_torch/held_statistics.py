"""Batch norm by the statistics of the chunk at hand, held constant while differentiating.

The layers are in evaluation mode, so that samples are kept apart; before each is entered, its running statistics are
replaced by the mean and variance of what enters it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from opsig_torch.opened import Opened

Statistics = tuple[torch.Tensor, torch.Tensor]


class Frozen:
    """The batch norm layers where statistics are the chunk's; none elsewhere."""

    def __init__(self, opened: Opened):
        self.layers = opened.batch_norms() if opened.couples_samples else []
        self._opened = opened
        self._noted: dict[nn.Module, list[Statistics]] | None = None
        self._held: dict[nn.Module, Iterator[Statistics]] | None = None

    @contextmanager
    def held(self, samples: np.ndarray) -> Iterator[None]:
        """Inside, layers go by the statistics of this chunk of samples whatever enters them, in the same order."""
        if not self.layers:
            yield
            return
        self._noted = {layer: [] for layer in self.layers}
        try:
            with torch.no_grad():
                self._opened.losses_of(samples)
            self.rewind()
            yield
        finally:
            self._noted = self._held = None

    def rewind(self) -> None:
        """Begin again with the held statistics: another pass through the model follows."""
        if self._noted is not None:
            self._held = {layer: iter(statistics) for layer, statistics in self._noted.items()}

    def enter(self, layer: nn.Module, inputs: tuple) -> None:
        """Give a layer the statistics to go by."""
        if self._held is None:
            entering = inputs[0].detach()
            if entering.device.type == "cpu":  # three times as fast; the variance is the biased one
                mean, variance = torch.batch_norm_update_stats(entering.contiguous(), None, None, 0.0)
            else:
                variance, mean = torch.var_mean(entering, (0, *range(2, entering.ndim)), correction=0)
            if self._noted is not None:
                self._noted[layer].append((mean, variance))
        else:
            mean, variance = next(self._held[layer])
        layer._buffers["running_mean"], layer._buffers["running_var"] = mean, variance


@contextmanager
def frozen_statistics(opened: Opened) -> Iterator[Frozen]:
    """Differentiate inside with each chunk's statistics held constant; batches must be whole chunks."""
    frozen = Frozen(opened)
    before = [(layer, layer._buffers["running_mean"], layer._buffers["running_var"]) for layer in frozen.layers]
    handles = [layer.eval().register_forward_pre_hook(frozen.enter) for layer in frozen.layers]
    try:
        yield frozen
    finally:
        for handle in handles:
            handle.remove()
        for layer, mean, variance in before:
            layer.train()
            layer._buffers["running_mean"], layer._buffers["running_var"] = mean, variance
