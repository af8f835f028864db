"""What measuring a large run costs, multiplied out from sizes and from passes over the data; nothing is measured.

A pass is a forward and a backward pass over all samples: 6 floating-point operations for a parameter and a token or
position; a forward pass is a third of it. GPU hours are at 40% of the stated speed.
"""

from __future__ import annotations

from dataclasses import dataclass

SPEED = 0.4 * 60e12
"""Float32 operations a second of one GPU (without TF32), at 40%."""
EIGEN_PASSES = 13 * 2.5
"""Products of a solve for one eigenpair, each two and a half passes."""


@dataclass(frozen=True)
class Case:
    name: str
    samples: int
    steps: int
    checkpoints: int
    parameters: float
    pass_operations: float
    """Of one sample, forward and backward."""
    movers: int = 2000


CASES = (
    Case("ImageNet, ResNet-50", 1_280_000, 1000, 1000, 25.6e6, 3 * 8.2e9),
    Case("7B, 20,000 x 2,048 tokens", 20_000, 20, 20, 7e9, 6 * 7e9 * 2048, 400),
)


def main() -> None:
    for case in CASES:
        hours = case.samples * case.pass_operations / SPEED / 3600
        vector = 4 * case.parameters
        print(f"{case.name}")
        print(f"  losses            {4 * case.samples * case.steps / 1e9:10.1f} GB")
        print(f"  checkpoints       {vector * case.checkpoints / 1e9:10.1f} GB in float32, half in bfloat16")
        print(f"  a pass            {hours:10.1f} GPU hours")
        print(f"  track             {case.checkpoints * hours / 3:10.1f} GPU hours, {case.checkpoints} forward passes")
        print(f"  sharpness -k 1    {20 * EIGEN_PASSES * hours:10.1f} GPU hours, 20 checkpoints")
        share = 10 * case.movers / case.samples + 10 * 2 / 1
        print(f"  cluster           {share * hours:10.1f} GPU hours, 10 checkpoints, {case.movers} movers")
        print(f"  losses need       {3 * vector / 1e9:10.1f} GB of memory for vectors")
        print(f"  one product needs {8 * vector / 1e9:10.1f} GB, a small basis {5 * vector / 1e9:.1f} GB more")


if __name__ == "__main__":
    main()
