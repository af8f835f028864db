"""SplitSGD (the paper's Algorithm 1, appendix F), usable without opsig.

Entries of the momentum that are large take a step of fixed length by their sign; the rest take a plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

QUANTILE = 0.1
BLOCK = 1 << 17
"""Entries a thread takes at a time."""


class SplitSGD(torch.optim.Optimizer):
    """SGD with momentum whose large entries are replaced by their sign.

    m <- beta m + (1 - tau) g; m_hat = m / (1 - tau^t); theta <- theta - lr m_hat where |m_hat| <= r, and
    theta <- theta - sign_lr sign(m_hat) elsewhere.

    `lr` is the paper's eta_1, `sign_lr` eta_2, `momentum` beta, `dampening` tau, and `radius` r; without one, r is the
    0.1-quantile of the nonzero sizes in the first gradient, over all parameter groups together, and is kept in each
    group. `signed_fraction` says what share of the entries took the sign step last. Raises ValueError for values out of
    range, RuntimeError for sparse gradients.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = SplitSGD([weight], lr=0.1, sign_lr=0.01, momentum=0, dampening=0, radius=0.5)
    >>> weight.grad = torch.tensor([0.2, 5.0])
    >>> optimizer.step()
    >>> [round(value, 6) for value in weight.tolist()], optimizer.signed_fraction
    ([0.98, 0.99], 0.5)
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.1, sign_lr: float = 1e-3, momentum: float = 0.9,
        dampening: float = 0.9, radius: float | None = None,
    ):  # fmt: skip
        if lr < 0 or sign_lr < 0:
            raise ValueError(f"learning rates must not be negative: lr={lr}, sign_lr={sign_lr}")
        if not (0 <= momentum < 1 and 0 <= dampening < 1):
            raise ValueError(f"momentum and dampening must be in [0, 1): {momentum}, {dampening}")
        if radius is not None and not radius >= 0:
            raise ValueError(f"radius must not be negative: {radius}")
        self._signed: list[torch.Tensor] = []  # how many entries of each block went by the sign in the last step
        self._entries = 0
        defaults = {
            "lr": lr, "sign_lr": sign_lr, "momentum": momentum, "dampening": dampening, "radius": radius, "steps": 0,
        }  # fmt: skip
        super().__init__(params, defaults)

    @property
    def signed_fraction(self) -> float:
        """Share of all entries that took the sign step in the last step; NaN before the first. Waits for the device."""
        return sum(float(count) for count in self._signed) / self._entries if self._entries else float("nan")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step; returns the closure's loss, where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(group["radius"] is None for group in self.param_groups):
            radius = self._first_radius()
            for group in self.param_groups:
                group["radius"] = radius if group["radius"] is None else group["radius"]
        self._signed, self._entries = [], 0
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        gradients: list[torch.Tensor] = [p.grad for p in parameters]
        if any(g.is_sparse for g in gradients):
            raise RuntimeError("SplitSGD does not take sparse gradients")
        group["steps"] += 1
        beta, tau = group["momentum"], group["dampening"]
        remembers = bool(beta or tau)
        correction = 1 - tau ** group["steps"] if remembers else 1.0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            momentum = gradient
            if remembers:
                momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            for theta, m, g in _blocks(parameter, momentum, gradient):
                if remembers:
                    m.mul_(beta).add_(g, alpha=1 - tau)
                # the comparison is made on m, with the bound scaled instead of m_hat
                large = torch.nn.functional.hardshrink(m, group["radius"] * correction)  # m where |m| > bound, else 0
                theta.add_(m - large, alpha=-group["lr"] / correction)
                signs = large.sign_()
                theta.add_(signs, alpha=-group["sign_lr"])
                self._signed.append(_count(signs))
            self._entries += parameter.numel()

    def _first_radius(self) -> float:
        """The quantile of the nonzero sizes of all gradients; 0 where all are zero."""
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return 0.0
        sizes = torch.cat([g.to(gradients[0].device) for g in gradients]).abs()
        sizes = sizes[sizes > 0]
        if sizes.numel() == 0:
            return 0.0
        rank = max(1, round(QUANTILE * sizes.numel()))
        return float(torch.kthvalue(sizes, rank).values)  # torch.quantile has a limit on the size


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of tensors of one shape, block by block on the CPU, where a block stays in the cache from one operation to
    the next: a flat vector of ten million entries takes half the time. The whole where they cannot be viewed so."""
    if tensors[0].device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    yield from zip(*(tensor.view(-1).split(BLOCK * torch.get_num_threads()) for tensor in tensors), strict=True)


def _count(signs: torch.Tensor) -> torch.Tensor:
    """How many entries of +1, -1 and 0 are not 0. A block's inner product with itself is exact, and five times faster
    than counting on the CPU."""
    exact = signs.dim() == 1 and signs.numel() < 1 << 24 and signs.dtype in (torch.float32, torch.float64)
    return signs.dot(signs) if exact else signs.count_nonzero()


class SignSGD(SplitSGD):
    """Every entry takes a step of length `lr` by the sign of its gradient: SplitSGD of radius 0 without momentum."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3):
        super().__init__(params, lr=0.0, sign_lr=lr, momentum=0.0, dampening=0.0, radius=0.0)
