"""SplitSGD against the optimizers that it becomes at the ends of its range."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from opsig_torch import splitsgd
from opsig_torch.splitsgd import SignSGD, SplitSGD


def run(make, steps=7, seed=0):
    """Parameters after some steps on fixed random gradients, in float64."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in ((3, 4), 5)]
    optimizer = make(parameters)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in parameters]), optimizer


def same(left, right, **tolerances):
    torch.testing.assert_close(run(left)[0], run(right)[0], **tolerances)


def test_an_infinite_radius_without_dampening_is_sgd_with_momentum():
    same(
        lambda p: SplitSGD(p, lr=0.1, momentum=0.9, dampening=0.0, radius=math.inf),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    )


def test_an_infinite_radius_with_equal_dampening_is_adam_of_huge_epsilon():
    same(
        lambda p: SplitSGD(p, lr=0.1, momentum=0.9, dampening=0.9, radius=math.inf),
        lambda p: torch.optim.Adam(p, lr=0.1 * 1e9, betas=(0.9, 0.999), eps=1e9),
        rtol=1e-6,
        atol=1e-8,
    )


def test_it_is_not_torchs_dampened_sgd():
    ours = run(lambda p: SplitSGD(p, lr=0.1, momentum=0.9, dampening=0.9, radius=math.inf))[0]
    theirs = run(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.9))[0]
    assert not torch.allclose(ours, theirs, rtol=1e-3)


def test_radius_zero_makes_lr_irrelevant_and_is_adam_without_memory():
    same(
        lambda p: SplitSGD(p, lr=7.0, sign_lr=0.01, momentum=0.0, dampening=0.0, radius=0.0),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.0), eps=0.0),
    )
    same(
        lambda p: SplitSGD(p, lr=7.0, sign_lr=0.01, radius=0.0), lambda p: SplitSGD(p, lr=0.1, sign_lr=0.01, radius=0.0)
    )
    same(lambda p: SignSGD(p, lr=0.01), lambda p: SplitSGD(p, 7, 0.01, 0.0, 0.0, 0.0))


def test_an_infinite_radius_makes_sign_lr_irrelevant():
    same(lambda p: SplitSGD(p, sign_lr=9.0, radius=math.inf), lambda p: SplitSGD(p, sign_lr=0.0, radius=math.inf))


@pytest.mark.parametrize(("beta", "tau"), [(0.9, 0.9), (0.5, 0.99), (0.0, 0.3)])
def test_the_first_step_follows_the_gradient_itself(beta, tau):
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    weight.grad = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    SplitSGD([weight], lr=0.5, momentum=beta, dampening=tau, radius=math.inf).step()
    torch.testing.assert_close(weight.detach(), -0.5 * weight.grad)


def test_a_constant_gradient_moves_in_a_straight_line():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = SplitSGD([weight], lr=0.1, momentum=0.9, dampening=0.9, radius=math.inf)
    gradient = torch.tensor([0.3, -0.7], dtype=torch.float64)
    for _ in range(20):
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), 1 - 20 * 0.1 * gradient)


def test_the_default_radius_is_the_quantile_of_what_is_not_zero_over_all_groups():
    first = torch.nn.Parameter(torch.zeros(60))
    second = torch.nn.Parameter(torch.zeros(60))
    optimizer = SplitSGD([{"params": [first]}, {"params": [second], "lr": 0.3}])
    first.grad = torch.cat([torch.zeros(20), -torch.arange(1.0, 41)])
    second.grad = torch.arange(41.0, 101)
    optimizer.step()
    assert [group["radius"] for group in optimizer.param_groups] == [10.0, 10.0]
    assert optimizer.signed_fraction == pytest.approx(90 / 120)


def test_state_goes_round_exactly():
    whole, _ = run(lambda p: SplitSGD(p, lr=0.1, sign_lr=0.01), steps=10)
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in ((3, 4), 5)]
    optimizer = SplitSGD(parameters, lr=0.1, sign_lr=0.01)
    for step in range(10):
        if step == 4:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = SplitSGD(parameters, lr=99.0)
            optimizer.load_state_dict(state)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    assert torch.equal(torch.cat([p.detach().flatten() for p in parameters]), whole)


def test_closures_missing_gradients_and_bad_values():
    weight, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = SplitSGD([weight, unused], lr=0.1)
    assert math.isnan(optimizer.signed_fraction)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert torch.equal(unused.detach(), torch.ones(2))
    for bad in ({"lr": -1.0}, {"momentum": 1.0}, {"dampening": 1.5}, {"radius": -1.0}, {"sign_lr": -0.1}):
        with pytest.raises(ValueError, match="must"):
            SplitSGD([weight], **bad)
    weight.grad = torch.sparse_coo_tensor([[0]], [1.0], (2,), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        SplitSGD([weight], radius=1.0).step()


@pytest.mark.parametrize("shape", [(300_001,), (20, 30)])
def test_every_step_is_the_papers_algorithm(shape):
    generator = torch.Generator().manual_seed(4)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    if len(shape) == 2:
        weight.data = weight.data.T.contiguous().T  # not contiguous
    theta, m, r = weight.detach().double(), torch.zeros(shape, dtype=torch.float64), 0.05
    optimizer = SplitSGD([weight], lr=0.3, sign_lr=0.02, momentum=0.8, dampening=0.7, radius=r)
    for t in range(1, 5):
        weight.grad = 0.1 * torch.randn(shape, generator=generator)
        m = 0.8 * m + 0.3 * weight.grad.double()
        mean = m / (1 - 0.7**t)
        small = mean.abs() <= r
        theta = theta - 0.3 * mean * small - 0.02 * mean.sign() * ~small
        optimizer.step()
        torch.testing.assert_close(weight.detach().double(), theta, rtol=0, atol=1e-6)
        assert optimizer.signed_fraction == pytest.approx(1 - small.double().mean().item(), abs=1e-5)
        assert 0.1 < optimizer.signed_fraction < 0.9


def test_it_needs_nothing_of_opsig():
    code = (
        "import runpy, sys\n"
        f"made = runpy.run_path({splitsgd.__file__!r})\n"
        "import torch\n"
        "weight = torch.nn.Parameter(torch.ones(3)); weight.grad = torch.ones(3)\n"
        "made['SplitSGD']([weight]).step()\n"
        "assert not any(name.startswith('opsig') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
