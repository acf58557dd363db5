"""A fixed scale: what it rescues, and what it costs when it is too high.

A line is fitted to tiny targets, and so the gradients are tiny. In float16 they become 0, and
nothing is learnt; a scale of 2**15 carries them through. With 2**40 every step overflows, is
skipped, and the monitor says so.

Backend: any
"""

import warnings

import keras
import numpy as np

import kerasmp as mp

rng = np.random.default_rng(0)
x = rng.normal(size=(512, 8)).astype("float32")
y = 1e-7 * x @ rng.normal(size=(8, 1)).astype("float32")


def train(loss_scale):
    keras.utils.set_random_seed(0)
    with mp.policy_scope("mixed_float16"):
        model = mp.Sequential(
            [keras.Input((8,)), mp.layers.DenseHead(1, kernel_initializer="zeros")]
        )
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.1), loss_scale=loss_scale)
    model.compile(optimizer, loss="mse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", mp.errors.LossScaleWarning)
        model.fit(x, y, batch_size=64, epochs=20, verbose=0, callbacks=[mp.OverflowMonitor()])
    # The kernel itself, since float16 predictions of this size would be rounded.
    unexplained = float(np.var(x @ model.get_weights()[0] - y) / np.var(y))
    print(
        f"scale {optimizer.loss_scale:>13g}: {unexplained:6.1%} of the variance unexplained, "
        f"{optimizer.skipped_steps} of 160 steps skipped"
    )
    said = [w for w in caught if issubclass(w.category, mp.errors.LossScaleWarning)]
    for warning in said:
        print("  ", warning.message)
    return unexplained, optimizer.skipped_steps, said


unscaled, _, _ = train(None)
scaled, _, _ = train(2.0**15)
_, skipped, said = train(2.0**40)
assert unscaled > 0.5
assert scaled < 0.01
assert skipped == 160
assert said
