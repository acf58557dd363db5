"""A custom training loop in TensorFlow: scale the loss, compute gradients, apply them.

Backend: tensorflow
"""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

import kerasmp as mp

keras.utils.set_random_seed(0)
with mp.policy_scope("mixed_float16"):
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(32, activation="tanh"), mp.layers.DenseHead(1)]
    )
optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(1e-2))
optimizer.build(model.trainable_variables)
loss_fn = keras.losses.MeanSquaredError()


@tf.function
def train_step(x, y):
    with tf.GradientTape() as tape:
        loss = loss_fn(y, model(x, training=True))
        scaled_loss = optimizer.scale_loss(loss)
    gradients = tape.gradient(scaled_loss, model.trainable_variables)
    # Pass the gradients of the scaled loss. `apply` checks and unscales them, or skips the step.
    optimizer.apply(gradients, model.trainable_variables)
    return loss


x = np.random.default_rng(0).normal(size=(512, 8)).astype("float32")
y = x[:, :1] * x[:, 1:2]
batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(64)
first = last = None
for _ in range(30):
    losses = [float(train_step(*batch)) for batch in batches]
    last = sum(losses) / len(losses)
    first = first or last
print(f"loss {first:.3f} -> {last:.3f}, scale {optimizer.loss_scale:g}")

# A batch that overflows changes only the scale and the counters.
before = model.get_weights()
train_step(tf.fill((64, 8), np.float32("inf")), y[:64])
assert optimizer.skipped_steps == 1
assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
assert last < first / 2
