"""Models for lint, and its findings in them."""

import keras
import numpy as np

import kerasmp as mp

layers = keras.layers
X = np.ones((8, 8), "float32")


def made(*parts, shape=(8,), policy="mixed_float16", module=keras, **arguments):
    """Return a Sequential of these parts, followed by a float32 layer unless `bare`."""
    bare = arguments.pop("bare", False)
    with mp.policy_scope(policy):
        made_now = [part() for part in parts]
    tail = [] if bare else [layers.Dense(8, dtype="float32", name="tail")]
    return module.Sequential([keras.Input(shape, **arguments), *made_now, *tail])


def found(model, rule, x=None):
    return [each for each in mp.lint(model, x) if each.rule == rule]


def only(model, rule, x=None):
    [each] = found(model, rule, x)
    return each


def dense(units=8, **settings):
    return lambda: layers.Dense(units, **settings)


def compiled(model, loss, optimizer=None):
    model.compile(optimizer or mp.LossScaleOptimizer("sgd"), loss)
    return model


class Own(keras.Model):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.dense = layers.Dense(8)

    def call(self, inputs):
        return self.dense(inputs)


class Holds(layers.Layer):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.dense = layers.Dense(8, dtype=self.dtype_policy)

    def call(self, inputs):
        return self.dense(inputs)
