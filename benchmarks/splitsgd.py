"""SplitSGD's step against torch's foreach Adam on ten million parameters, in turns.

python benchmarks/splitsgd.py
"""

import time

import numpy as np
import torch
from opsig_torch.splitsgd import SplitSGD


def seconds(optimizer: torch.optim.Optimizer) -> float:
    begin = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - begin


def main() -> None:
    kinds = {
        "ten layers": [(1000, 1000)] * 10,
        "one flat vector": [(10_000_000,)],
        "ResNet-110's number of tensors": [(192, 160)] * 330,
    }
    print(f"{torch.get_num_threads()} threads")
    for name, shapes in kinds.items():
        pairs = []
        for make in (lambda p: SplitSGD(p), lambda p: torch.optim.Adam(p, foreach=True)):
            parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            pairs.append(make(parameters))
        times = np.array([[seconds(optimizer) for optimizer in pairs] for _ in range(15)][3:])
        ours, adam = np.median(times, axis=0) * 1e3
        print(f"{name}: SplitSGD {ours:.1f} ms, Adam {adam:.1f} ms: {ours / adam:.2f}x")


if __name__ == "__main__":
    main()
