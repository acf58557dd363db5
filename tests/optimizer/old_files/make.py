"""Makes the files beside it, which later versions must load; run at commit 15f1cdd on TensorFlow.

KERAS_BACKEND=tensorflow python make.py
"""

from pathlib import Path

import keras
import numpy as np

import kerasmp as mp

HERE = Path(__file__).parent
X = np.random.default_rng(0).normal(size=(8, 4, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")
BAD = np.full_like(X, np.inf)


def network(layers):
    inputs = keras.Input((4, 3))
    x = layers.MultiHeadAttention(2, 2)(inputs, inputs)
    x = layers.LSTM(3)(x)
    x = layers.Dense(4, activation="gelu", activity_regularizer="l2")(x)
    x = layers.BatchNormalization()(x)
    return inputs, layers.Dense(2, dtype="float32")(x)


def ours(inner, **arguments):
    """Return a kerasmp model of kerasmp layers."""
    keras.utils.set_random_seed(0)
    with mp.policy_scope("mixed_float16"):
        model = mp.Model(*network(mp.layers))
    model.compile(mp.LossScaleOptimizer(inner, **arguments), "mse")
    return model


def converted():
    """Return a converted stock model."""
    keras.utils.set_random_seed(0)
    model = keras.Model(*network(keras.layers))
    model.compile(keras.optimizers.Adam(0.01, clipnorm=1.0), "mse")
    mp.convert(model, "mixed_float16", safe_layers=True)
    return model


MODELS = {
    "adam": lambda: ours(
        keras.optimizers.Adam(0.01),
        loss_scale=mp.DynamicLossScale(initial_scale=64.0, growth_interval=3),
    ),
    "company": lambda: ours(
        keras.optimizers.SGD(0.01, momentum=0.9, use_ema=True, gradient_accumulation_steps=2),
        loss_scale=mp.LogMaxLossScale(),
        skips_advance_schedules=True,
    ),
    "converted": converted,
}


def main():
    import tensorflow as tf

    for name, make in MODELS.items():
        model = make()
        for x in (X, BAD, X, X, X, BAD):
            model.train_on_batch(x, Y)
        model.save(HERE / f"{name}.keras")
        values = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
        np.savez(HERE / f"{name}.npz", *values, predictions=model.predict(X, verbose=0))
        if name == "adam":
            model.save_weights(HERE / "adam.weights.h5")
            tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(HERE / "checkpoint")


if __name__ == "__main__":
    main()
