"""What loss scaling costs a step with a sparse gradient, on TensorFlow.

An embedding of 1,000,000 x 64, SGD, 128 rows a step; plain SGD, stock Keras's wrapper, and ours; in
`fit`, and in a bare loop.

    KERAS_BACKEND=tensorflow python benchmarks/sparse.py
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import interleaved
import keras
import numpy as np
import tensorflow as tf

import kerasmp as mp

BATCH = 128


class Rows(keras.layers.Embedding):
    """An embedding that reads its rows alone.

    Keras's reads the whole table, which makes the update copy it: 25 ms, beside which nothing else
    is seen.
    """

    def call(self, ids):
        """Return the rows of `ids`."""
        return tf.gather(self.embeddings.value, ids)


def fitting(optimizer, rows, steps):
    """Return a function that takes `steps` steps in `fit`."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((1,), dtype="int32"), Rows(rows, 64), keras.layers.Flatten()]
    model = keras.Sequential(layers)
    model.compile(optimizer, "mse", jit_compile=False)
    x = np.random.default_rng(0).integers(0, rows, size=(BATCH * steps, 1))
    y = np.ones((len(x), 64), "float32")
    return lambda: model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)


def looping(optimizer, rows, steps):
    """Return a function that takes `steps` steps in a bare loop, the least that a step can be."""
    keras.utils.set_random_seed(0)
    embedding = Rows(rows, 64)
    embedding.build()
    optimizer.build(embedding.trainable_variables)
    ids = tf.constant(np.random.default_rng(0).integers(0, rows, size=(steps, BATCH)), "int32")

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


def optimizers():
    """Return what is compared: a name, and an optimizer."""
    sgd = keras.optimizers.SGD
    return {
        "plain": sgd(0.1),
        "stock LossScaleOptimizer": keras.optimizers.LossScaleOptimizer(sgd(0.1)),
        "kerasmp LossScaleOptimizer": mp.LossScaleOptimizer(sgd(0.1)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    for training in (fitting, looping):
        compared = {
            name: training(optimizer, arguments.rows, arguments.steps)
            for name, optimizer in optimizers().items()
        }
        times = interleaved.measure(compared, arguments.rounds)
        interleaved.report(f"embedding of {arguments.rows:,} x 64, {training.__name__}", times)


if __name__ == "__main__":
    main()
