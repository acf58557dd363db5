"""Defines the cost of loss scaling in a step with a sparse gradient, on TensorFlow.

A 1,000,000 x 64 embedding with SGD and 128 rows per step: plain SGD, the wrapper of stock Keras,
and kerasmp's, in `fit` and in a bare loop.
"""

import keras
import numpy as np
import tensorflow as tf
from update import OPTIMIZERS

ROWS = 1_000_000
STEPS = 40
BATCH = 128


class Rows(keras.layers.Embedding):
    """An embedding that reads only its rows.

    Keras's Embedding reads the whole table, so the update copies it, which takes 25 ms and hides
    everything else.
    """

    def call(self, ids):
        """Return the rows of `ids`."""
        return tf.gather(self.embeddings.value, ids)


def fitting(optimizer):
    """Return a function that runs a round of steps in `fit`."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((1,), dtype="int32"), Rows(ROWS, 64), keras.layers.Flatten()]
    model = keras.Sequential(layers)
    model.compile(optimizer, "mse", jit_compile=False)
    x = np.random.default_rng(0).integers(0, ROWS, size=(BATCH * STEPS, 1))
    y = np.ones((len(x), 64), "float32")
    return lambda: model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)


def looping(optimizer):
    """Return a function that runs a round of steps in a bare loop, the smallest possible step."""
    keras.utils.set_random_seed(0)
    embedding = Rows(ROWS, 64)
    embedding.build()
    optimizer.build(embedding.trainable_variables)
    ids = tf.constant(np.random.default_rng(0).integers(0, ROWS, size=(STEPS, BATCH)), "int32")

    @tf.function
    def step(ids):
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(tf.reduce_mean(tf.square(embedding(ids) - 1.0)))
        grads = tape.gradient(loss, embedding.trainable_variables)
        optimizer.apply(grads, embedding.trainable_variables)

    def train():
        for one in ids:
            step(one)

    return train


NAMES = {"fit": fitting, "bare loop": looping}


def variants(name, _):
    """Return the functions to compare, by name, and no counts."""
    training = NAMES[name]
    return {
        label: training(wrap(keras.optimizers.SGD(0.1))) for label, wrap in OPTIMIZERS.items()
    }, {}
