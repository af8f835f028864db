"""The steps of gd, momentum and Adam against torch.optim, and what a command loads to take them."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from opsig_torch import arithmetic
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
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("[]"), done.stderr


def test_deterministic_algorithms_are_as_torchs_own_function_sets_them():
    code = """
import torch
def seen():
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
from opsig_torch import arithmetic
for device in ("cpu", "cuda"):
    torch.use_deterministic_algorithms(device != "cpu", warn_only=device != "cpu")
    arithmetic.prepare(device)
    ours = seen()
    torch.use_deterministic_algorithms(device == "cpu", warn_only=device == "cpu")
    assert ours == seen(), (device, ours, seen())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_float32_products_keep_their_bits_whoever_multiplies():
    arithmetic.prepare("cpu")
    generator = torch.Generator().manual_seed(3)
    shapes = (((500, 784), (784, 200)), ((37, 1100), (1100, 41)), ((1, 300), (300, 70)), ((6, 90, 50), (50, 8)))
    for left, right in shapes:
        a, b = (torch.randn(*shape, generator=generator) for shape in (left, right))
        for x in (a, a.transpose(-1, -2).contiguous().transpose(-1, -2)):
            off = ((x @ b).double() - x.double() @ b.double()).abs() / (x.double().abs() @ b.double().abs())
            assert off.max() < 1e-6  # bfloat16 is off by 1e-3


WIDE = {"avx512_f": True, "amx_tile": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("able", "exact", "set_to"),
    [
        (WIDE, True, "medium"),
        (WIDE, False, "highest"),
        (WIDE | {"amx_bf16": True}, True, "highest"),  # which shapes it rounds there is not known
        ({"architecture": "aarch64"}, True, "highest"),
    ],
)
def test_products_go_to_the_faster_library_only_where_it_is_exact(monkeypatch, able, exact, set_to):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    monkeypatch.setattr(arithmetic, "multiplies_exactly", lambda: exact)
    try:
        arithmetic.prepare("cpu")
        assert torch.get_float32_matmul_precision() == set_to
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_in_bfloat16_are_not_taken_for_exact(monkeypatch):
    assert arithmetic.multiplies_exactly()
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: a.bfloat16().float().mm(b.bfloat16().float()))
    assert not arithmetic.multiplies_exactly()
