"""SplitSGD (the paper's Algorithm 1, appendix F), usable without opsig.

Entries of the momentum that are large take a step of fixed length by their sign; the rest take a plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

QUANTILE = 0.1


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
        self._signed: list[torch.Tensor] = []  # +1 and -1 where the last step went by the sign
        defaults = {
            "lr": lr, "sign_lr": sign_lr, "momentum": momentum, "dampening": dampening, "radius": radius, "steps": 0,
        }  # fmt: skip
        super().__init__(params, defaults)

    @property
    def signed_fraction(self) -> float:
        """Share of all entries that took the sign step in the last step; NaN before the first. Waits for the device."""
        if not self._signed:
            return float("nan")
        return sum(int(sign.count_nonzero()) for sign in self._signed) / sum(sign.numel() for sign in self._signed)

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
        self._signed = []
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
        if beta or tau:
            buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
            torch._foreach_mul_(buffers, beta)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(buffers, gradients, alpha=1 - tau)  # pyright: ignore[reportPrivateImportUsage]
            correction = 1 - tau ** group["steps"]
        else:
            buffers, correction = gradients, 1.0
        # the comparison is made on m, with the bound scaled instead of m_hat
        bound = group["radius"] * correction
        for parameter, buffer in zip(parameters, buffers, strict=True):
            large = torch.nn.functional.hardshrink(buffer, bound)  # m where |m| > bound, else 0
            parameter.add_(buffer - large, alpha=-group["lr"] / correction)
            parameter.add_(large.sign_(), alpha=-group["sign_lr"])
            self._signed.append(large)

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


class SignSGD(SplitSGD):
    """Every entry takes a step of length `lr` by the sign of its gradient: SplitSGD of radius 0 without momentum."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3):
        super().__init__(params, lr=0.0, sign_lr=lr, momentum=0.0, dampening=0.0, radius=0.0)
