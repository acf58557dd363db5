"""What loss scaling costs a step with a sparse gradient, on TensorFlow.

An embedding of 1,000,000 x 64, SGD, 128 rows a step; plain SGD, stock Keras's wrapper, and ours.

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


def training(optimizer, rows, steps):
    """Return a function that takes `steps` steps."""
    keras.utils.set_random_seed(0)
    embedding = keras.layers.Embedding(rows, 64)
    embedding.build()
    optimizer.build(embedding.trainable_variables)
    ids = tf.constant(np.random.default_rng(0).integers(0, rows, size=(steps, 128)), "int32")

    @tf.function
    def step(ids):
        with tf.GradientTape() as tape:
            # Not through the layer, which reads the whole table and so makes the update copy it.
            rows = tf.gather(embedding.embeddings.value, ids)
            loss = optimizer.scale_loss(tf.reduce_mean(tf.square(rows - 1.0)))
        grads = tape.gradient(loss, embedding.trainable_variables)
        optimizer.apply(grads, embedding.trainable_variables)

    def train():
        for one in ids:
            step(one)

    return train


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    sgd = keras.optimizers.SGD
    optimizers = {
        "plain": sgd(0.1),
        "stock LossScaleOptimizer": keras.optimizers.LossScaleOptimizer(sgd(0.1)),
        "kerasmp LossScaleOptimizer": mp.LossScaleOptimizer(sgd(0.1)),
    }
    compared = {
        name: training(optimizer, arguments.rows, arguments.steps)
        for name, optimizer in optimizers.items()
    }
    times = interleaved.measure(compared, arguments.rounds)
    interleaved.report(f"embedding of {arguments.rows:,} x 64", times)


if __name__ == "__main__":
    main()
