"""Gradient descent, heavy ball and Adam on the model's one vector, as torch.optim takes their steps, bit for bit.

torch.optim loads torch's compiler with the first optimizer that is made, which costs each command a second.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Descent:
    """theta <- theta - lr m with m <- momentum m + g, m = g at the first step; g has weight_decay theta added to it.

    `state`: what is remembered of a vector, by name, as torch.optim keeps it; `spared`: where nothing decays.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([2.0])
    >>> Descent(weight, lr=0.25).step()
    >>> weight.item()
    0.5
    """

    def __init__(
        self, vector: torch.nn.Parameter, lr: float, momentum: float = 0.0, weight_decay: float = 0.0,
        spared: Sequence[slice] = (),
    ):  # fmt: skip
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {vector: {}}
        self._vector, self._lr, self._momentum, self._decay = vector, lr, momentum, weight_decay
        self._spared = spared

    @torch.no_grad()
    def step(self) -> None:
        """Take one step by the vector's gradient."""
        gradient, slots = _decayed(self._vector, self._decay, self._spared), self.state[self._vector]
        if self._momentum:
            if "momentum_buffer" in slots:
                slots["momentum_buffer"].mul_(self._momentum).add_(gradient)
            else:
                slots["momentum_buffer"] = gradient.clone()
            gradient = slots["momentum_buffer"]
        self._vector.add_(gradient, alpha=-self._lr)


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1), g with weight_decay theta added to it; `count` steps have been taken.

    `state` as above: `exp_avg` is the paper's m, `exp_avg_sq` its v.
    """

    def __init__(
        self, vector: torch.nn.Parameter, lr: float, betas: tuple[float, float], epsilon: float,
        weight_decay: float = 0.0, spared: Sequence[slice] = (),
    ):  # fmt: skip
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {vector: {}}
        self.count, self._spared = 0, spared
        self._vector, self._lr, self._betas, self._epsilon, self._decay = vector, lr, betas, epsilon, weight_decay

    @torch.no_grad()
    def step(self) -> None:
        """Take one step by the vector's gradient."""
        gradient, slots = _decayed(self._vector, self._decay, self._spared), self.state[self._vector]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in slots:
                slots[name] = torch.zeros_like(self._vector)
        (beta1, beta2), first, second = self._betas, slots["exp_avg"], slots["exp_avg_sq"]
        self.count += 1
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (second.sqrt() / (1 - beta2**self.count) ** 0.5).add_(self._epsilon)
        self._vector.addcdiv_(first, size, value=-self._lr / (1 - beta1**self.count))


def _decayed(vector: torch.nn.Parameter, decay: float, spared: Sequence[slice]) -> torch.Tensor:
    assert vector.grad is not None
    if not decay:
        return vector.grad
    gradient = vector.grad.add(vector, alpha=decay)
    for part in spared:
        gradient[part] = 0
    return gradient
