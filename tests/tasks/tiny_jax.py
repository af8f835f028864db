"""The tasks of tiny.py in JAX, with the same data and the same names and shapes of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jax.nn import log_softmax, relu


def cross_entropy(logits, y):
    return -jnp.take_along_axis(log_softmax(logits), y[:, None], 1)[:, 0]


def linear(layer, x):
    return x @ layer["weight"].T + layer["bias"]


class Plain:
    """Sixty points in three classes through three linear layers."""

    classes = ("red", "green", "blue")
    layers = (("0", 5, 16), ("1", 16, 16), ("3", 16, 3))

    def __init__(self, samples: int = 60):
        same = tiny.Tiny(samples)
        self.x, self.y = same.x.numpy(), same.y.numpy()

    def data(self):
        return self.x, self.y

    def init(self, key):
        keys = jax.random.split(key, len(self.layers))
        return {
            name: {"weight": jax.random.normal(key, (out, inner)) / inner**0.5, "bias": jnp.zeros(out)}
            for key, (name, inner, out) in zip(keys, self.layers, strict=True)
        }

    def hidden(self, params, x):
        return relu(linear(params["1"], linear(params["0"], x)))

    def outputs(self, params, x):
        return linear(params["3"], self.hidden(params, x))

    def losses(self, params, batch):
        return cross_entropy(self.outputs(params, batch[0]), batch[1])

    def predictions(self, params, batch):
        return self.outputs(params, batch[0]).argmax(1)

    def label(self, i):
        return self.classes[int(self.y[i])]


class Tiny(Plain):
    """With features, which are found by no backend but torch's."""

    def features(self, params, batch):
        return self.hidden(params, batch[0])


class Reduced(Tiny):
    """Forgets that losses are a sample's own."""

    def losses(self, params, batch):
        return super().losses(params, batch).mean()


class Mixed(Tiny):
    """Centres each batch."""

    def losses(self, params, batch):
        return super().losses(params, (batch[0] - batch[0].mean(0), batch[1]))


class Branching(Tiny):
    """Decides by a value."""

    def losses(self, params, batch):
        losses = super().losses(params, batch)
        if losses.mean() > 1:
            return losses * 2
        return losses


class Failing(Tiny):
    """Has a mistake."""

    def losses(self, params, batch):
        return cross_entropy(self.outputs(params, batch[0].T), batch[1])


class Linen(Plain):
    """flax.linen, as its guides write it."""

    def __init__(self, samples: int = 60):
        from flax import linen

        super().__init__(samples)
        self.model = linen.Sequential([linen.Dense(16), linen.tanh, linen.Dense(3)])

    def init(self, key):
        return self.model.init(key, self.x[:1])["params"]

    def outputs(self, params, x):
        return self.model.apply({"params": params}, x)


class Nnx(Plain):
    """flax.nnx: the module is the pytree."""

    def init(self, key):
        from flax import nnx

        class Net(nnx.Module):
            def __init__(self, rngs):
                self.first = nnx.Linear(5, 16, rngs=rngs)
                self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
                self.last = nnx.Linear(16, 3, rngs=rngs)

            def __call__(self, x):
                return self.last(self.drop(nnx.tanh(self.first(x))))

        return Net(nnx.Rngs(key))

    def outputs(self, params, x):
        return params(x)


class Normed(Plain):
    """Batch norm, whose statistics are no parameters."""

    def init(self, key):
        from flax import nnx

        return nnx.BatchNorm(5, rngs=nnx.Rngs(key))


class Equinox(Plain):
    """equinox: a module of one sample, mapped over the batch; its activation is a leaf that is no array."""

    def init(self, key):
        import equinox

        return equinox.nn.MLP(5, 3, 16, 1, activation=jnp.tanh, key=key)

    def outputs(self, params, x):
        return jax.vmap(params)(x)


class Half(Tiny):
    """Parameters in half precision."""

    def init(self, key):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), super().init(key))


class Uneven(Tiny):
    """Arrays of several lengths."""

    def data(self):
        return {"x": self.x, "y": self.y[:-1]}


class Long(Tiny):
    """Float64 in numpy, integers in 64 bits."""

    def data(self):
        return self.x.astype(np.float64), self.y.astype(np.int64)
