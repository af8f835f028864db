"""The same MLP, CNN and GPT in torch and in JAX, in float32 as commands measure: the same numbers, at the same cost."""

import numpy as np
import pytest
from tasks import twins

from opsig_cli.backends import Training, load_backend

AGREES = 1e-5
SAMPLES = 24


@pytest.mark.parametrize("kind", twins.KINDS)
def test_both_backends_measure_the_same_and_spend_as_many_products(kind):
    pytest.importorskip("jax", reason="needs jax")
    pytest.importorskip("optax", reason="needs optax")
    one = load_backend("torch").open(twins.InTorch(kind, SAMPLES), "cpu")
    other = load_backend("jax").open(twins.InJax(kind, SAMPLES), "cpu")
    other.arrange([tensor.name for tensor in one.layout])
    assert other.layout == one.layout
    training = Training("gd", 0.1, 3, wants_state=lambda step: step == 3)
    (state,) = [each.state for each in one.train(training, one.initial(0)) if each.state is not None]
    direction = np.random.default_rng(0).standard_normal(len(state.params)).astype(np.float32)
    direction /= np.linalg.norm(direction)
    found = [
        {
            "losses": session.losses([state])[0][0],
            "gradient": session.gradient(state),
            "norms": session.gradient_norms(state),
            "cosines": session.gradient_cosines(state, np.arange(0, SAMPLES, 2)),
            "slopes": session.curvature_along(state, direction)[1],
            "curvature": session.curvature_along(state, direction)[2],
            "product": session.hessian_vectors(state, direction[None]),
        }
        for session in (one, other)
    ]
    for name, expected in found[0].items():
        np.testing.assert_allclose(found[1][name], expected, rtol=0, atol=AGREES * np.abs(expected).max(), err_msg=name)
    pairs = [session.top_eigenpairs(state, 1, 1e-3) for session in (one, other)]
    assert pairs[0].values[0] == pytest.approx(pairs[1].values[0], rel=AGREES)
    assert abs(pairs[0].products - pairs[1].products) <= 2, "from another random part of the start"


def test_a_loop_that_jax_cannot_differentiate_is_one_line(opsig, tmp_path):
    pytest.importorskip("jax", reason="needs jax")
    pytest.importorskip("optax", reason="needs optax")
    (tmp_path / "looping.py").write_text(
        "import jax, jax.numpy as jnp\n"
        "class Looping:\n"
        "    def data(self): return jnp.ones((4, 2)),\n"
        "    def init(self, key): return {'w': jnp.ones(2)}\n"
        "    def losses(self, params, batch):\n"
        "        h = batch[0] @ params['w']\n"
        "        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, h))[1]\n"
    )
    task = f"{tmp_path / 'looping.py'}:Looping"
    outcome = opsig("train", "--backend", "jax", "--task", task, "--steps", 2, "-o", tmp_path / "run.h5")
    outcome.fails(1, "JAX cannot compute this of the task", "while_loop")
