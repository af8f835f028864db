"""A traced computation is the one that was traced, whatever is taken together in it."""

import pytest
import torch
from opsig_torch.tracing import traced


@pytest.mark.parametrize(
    "formula",
    [
        lambda x, y: x * y + x * y,
        lambda x, y: (x + x) + (x + x),
        lambda x, y: x * y - x * y + y,
        lambda x, y: y - (x + x),
        lambda x, y: y - x * y,
        lambda x, y: (x + x) - y,
        lambda x, y: x * y - x,
        lambda x, y: x[0] * y + x[:, :1],
    ],
)
def test_sums_of_products_and_of_doubles_are_what_they_were(formula):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    function = traced(lambda x, y: [formula(x, y)], [x + 1, y + 1])
    assert torch.allclose(function(x, y)[0], formula(x, y), rtol=1e-12)
