"""A fixed loss scale: what it solves, and what happens if it is too high.

The example fits a linear model. Its loss has a small weight, as auxiliary losses often do, so the
gradients are small. Without scaling, they become 0 in float16 and the model learns nothing. A scale
of 2**15 preserves them. With 2**60, every step overflows and is skipped, and the monitor warns.

Backend: any
"""

import warnings

import keras
import numpy as np

import kerasmp as mp

rng = np.random.default_rng(0)
x = rng.normal(size=(512, 8)).astype("float32")
y = x @ rng.normal(size=(8, 1)).astype("float32")


def train(loss_scale):
    keras.utils.set_random_seed(0)
    with mp.policy_scope("mixed_float16"):
        model = mp.Sequential(
            [keras.Input((8,)), mp.layers.DenseHead(1, kernel_initializer="zeros")]
        )
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(1e6), loss_scale=loss_scale)
    model.compile(optimizer, loss="mse", loss_weights=1e-7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", mp.errors.LossScaleWarning)
        model.fit(x, y, batch_size=64, epochs=20, verbose=0, callbacks=[mp.OverflowMonitor()])
    unexplained = float(np.var(model.predict(x, verbose=0) - y) / np.var(y))
    print(
        f"scale {optimizer.loss_scale:>13g}: {unexplained:6.1%} of the variance unexplained, "
        f"{optimizer.skipped_steps} of 160 steps skipped"
    )
    scale_warnings = [w for w in caught if issubclass(w.category, mp.errors.LossScaleWarning)]
    for warning in scale_warnings:
        print("  ", warning.message)
    return unexplained, optimizer.skipped_steps, scale_warnings


unscaled, _, _ = train(None)
scaled, _, _ = train(2.0**15)
_, skipped, scale_warnings = train(2.0**60)
assert unscaled > 0.5
assert scaled < 0.01
assert skipped == 160
assert scale_warnings
