"""The steps of gd, momentum and Adam against torch.optim, and what a command loads to take them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from opsig_torch.updates import Adam, Descent


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda v, d: Descent(v, 0.1, 0.0, d), lambda v, d: torch.optim.SGD([v], 0.1, weight_decay=d)),
        (lambda v, d: Descent(v, 0.1, 0.9, d), lambda v, d: torch.optim.SGD([v], 0.1, 0.9, weight_decay=d)),
        (
            lambda v, d: Adam(v, 0.1, (0.9, 0.99), 1e-8, d),
            lambda v, d: torch.optim.Adam([v], 0.1, (0.9, 0.99), 1e-8, d),
        ),
    ],
    ids=["gd", "momentum", "adam"],
)
def test_every_step_is_that_of_torch_bit_for_bit(ours, theirs, decay):
    start, curvature = torch.randn(257, generator=torch.Generator().manual_seed(1)), torch.linspace(0.1, 30, 257)
    found = []
    for make in (ours, theirs):
        vector = torch.nn.Parameter(start.clone())
        optimizer = make(vector, decay)
        for _ in range(20):
            vector.grad = curvature * vector.detach().sin()
            optimizer.step()
        slots = {name: slot for name, slot in optimizer.state[vector].items() if name != "step" and slot is not None}
        found.append((vector.detach().numpy(), {name: slot.numpy() for name, slot in slots.items()}))
    (mine, my_slots), (torchs, torch_slots) = found
    np.testing.assert_array_equal(mine, torchs)
    assert my_slots.keys() == torch_slots.keys()
    for name, slot in my_slots.items():
        np.testing.assert_array_equal(slot, torch_slots[name])


def test_commands_never_load_the_compiler_of_torch_or_algebra(tmp_path):
    code = """
import sys
from opsig_cli import main
for line in ("train --task fashion-mnist:samples=60 --steps 24 --optimizer {} --track --replace -o run.h5",
             "cluster run.h5", "sharpness run.h5 -k 1 --steps 20"):
    for optimizer in ("gd", "adam") if "{}" in line else ("",):
        sys.argv = ["opsig", *line.format(optimizer).split()]
        try:
            main.app()
        except SystemExit as end:
            assert not end.code, end.code
print(sorted(name for name in sys.modules if name in ("torch._dynamo", "torch._inductor", "sympy")), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("[]"), done.stderr
