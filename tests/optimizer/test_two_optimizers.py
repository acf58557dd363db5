"""Two wrapped optimizers in one step: one skips, the other equals a plain one bit for bit."""

import functools

import keras
import numpy as np
import pytest
from helpers.marks import few
from helpers.stepping import BACKEND, assert_same_bits, numpy
from keras import ops

import kerasmp as mp

X = np.random.default_rng(0).normal(size=(5, 4, 3)).astype("float32")
SCALES = (2.0**10, 2.0**4)


def loss_of(layer, x):
    return ops.mean(ops.square(layer(x)))


class Pair(keras.Model):
    """Two layers, each with its own loss and optimizer, in a user-defined train step."""

    def __init__(self):
        super().__init__()
        self.parts = [keras.layers.Dense(2), keras.layers.Dense(2)]
        for part in self.parts:
            part.build((None, 3))

    def call(self, x):
        return [part(its) for part, its in zip(self.parts, x, strict=True)]

    def compile(self, *optimizers):
        super().compile()
        self.pair = optimizers
        for optimizer, part in zip(optimizers, self.parts, strict=True):
            optimizer.build(part.trainable_variables)

    def train_step(self, data):
        grads = _gradients(self, data[0])
        for optimizer, part, its in zip(self.pair, self.parts, grads, strict=True):
            optimizer.apply(its, part.trainable_variables)
        return {}


def _scaled(model, batches):
    parts = zip(model.pair, model.parts, batches, strict=True)
    return [optimizer.scale_loss(loss_of(part, x)) for optimizer, part, x in parts]


def _gradients(model, batches):
    if BACKEND == "torch":
        model.zero_grad()
        sum(_scaled(model, batches)).backward()
        return [[v.value.grad for v in part.trainable_variables] for part in model.parts]
    import tensorflow as tf

    with tf.GradientTape(persistent=True) as tape:
        losses = _scaled(model, batches)
    parts = zip(losses, model.parts, strict=True)
    return [tape.gradient(loss, part.trainable_variables) for loss, part in parts]


def jitted(model):
    """Return one step of both on JAX: stateless, compiled, with two `stateless_apply`."""
    import jax

    def one(optimizer, part, values, state, x):
        def scaled(values):
            pairs = [*zip(part.trainable_variables, values, strict=True)]
            pairs += zip(optimizer.variables, state, strict=True)
            with keras.StatelessScope(state_mapping=pairs):
                return optimizer.scale_loss(loss_of(part, x))

        return optimizer.stateless_apply(state, jax.grad(scaled)(values), values)

    @jax.jit
    def both(values, batches):
        return [
            one(o, part, *its, x)
            for o, part, its, x in zip(model.pair, model.parts, values, batches, strict=True)
        ]

    def step(batches):
        owners = [
            (part.trainable_variables, o.variables)
            for o, part in zip(model.pair, model.parts, strict=True)
        ]
        values = [tuple([v.value for v in group] for group in owner) for owner in owners]
        for owner, new in zip(owners, both(values, batches), strict=True):
            for variables, theirs in zip(owner, new, strict=True):
                for variable, value in zip(variables, theirs, strict=True):
                    variable.assign(value)

    return step


def trained(optimizers, batches_of):
    keras.utils.set_random_seed(0)
    model = Pair()
    model.compile(*optimizers)
    step = jitted(model) if BACKEND == "jax" else model.train_on_batch
    for x in X:
        step([ops.convert_to_tensor(batch) for batch in batches_of(x)])
    return model


@functools.cache
def plain_pair(rate):
    return trained([keras.optimizers.Adam(rate) for _ in SCALES], lambda x: [x, x])


@pytest.mark.parametrize("bad", few([0, 1], [1]))
def test_one_skips_and_the_other_is_updated_like_a_plain_one(bad):
    wrapped = [
        mp.LossScaleOptimizer(keras.optimizers.Adam(0.1), loss_scale=s, fused=False) for s in SCALES
    ]
    model = trained(wrapped, lambda x: [x * np.inf if part == bad else x for part in range(2)])
    plain, start = plain_pair(0.1), plain_pair(0.0)
    for part, optimizer in enumerate(model.pair):
        counts = optimizer.applied_steps, optimizer.skipped_steps
        assert counts == ((0, len(X)) if part == bad else (len(X), 0))
    good = 1 - bad
    assert_same_bits(numpy(model.parts[bad].variables), numpy(start.parts[bad].variables))
    assert_same_bits(numpy(model.parts[good].variables), numpy(plain.parts[good].variables))
    inner = model.pair[good].inner_optimizer
    assert_same_bits(numpy(inner.variables), numpy(plain.pair[good].variables))


def test_each_scale_follows_its_own_gradients():
    schedule = mp.DynamicLossScale(2.0**10, growth_interval=2)
    wrapped = [
        mp.LossScaleOptimizer(keras.optimizers.SGD(0.01), loss_scale=schedule) for _ in SCALES
    ]
    # A finite loss whose gradient is beyond float32, for one of them in every second step.
    calls = iter(range(len(X)))
    model = trained(wrapped, lambda x: [x, x * (4e18 if next(calls) % 2 else 1.0)])
    assert [o.loss_scale for o in model.pair] == [2.0**12, 2.0**8]
    assert [o.skipped_steps for o in model.pair] == [0, 2]
