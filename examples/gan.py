"""A GAN: two models with two wrapped optimizers, each with its own loss scale.

A generator learns to produce points on a ring, against a discriminator, both in float16. Their
gradients differ in size, so with a shared scale, an overflow in one would skip steps of the other.

Backend: tensorflow
"""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf

import kerasmp as mp

keras.utils.set_random_seed(0)


def network(inputs, outputs):
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(64, activation="relu"),
            mp.layers.DenseHead(outputs),
        ]
    )


with mp.policy_scope("mixed_float16"):
    generator, discriminator = network(4, 2), network(2, 1)
schedule = mp.DynamicLossScale(initial_scale=2.0**20, growth_interval=100)
g_optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(1e-3, 0.5), loss_scale=schedule)
d_optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(1e-3, 0.5), loss_scale=schedule)
g_optimizer.build(generator.trainable_variables)
d_optimizer.build(discriminator.trainable_variables)
loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)


@tf.function
def train_step(real, noise):
    with tf.GradientTape(persistent=True) as tape:
        fake = generator(noise)
        judged_real, judged_fake = discriminator(real), discriminator(fake)
        d_loss = loss_fn(tf.ones_like(judged_real), judged_real)
        d_loss += loss_fn(tf.zeros_like(judged_fake), judged_fake)
        g_loss = loss_fn(tf.ones_like(judged_fake), judged_fake)
        scaled_d_loss = d_optimizer.scale_loss(d_loss)
        scaled_g_loss = g_optimizer.scale_loss(g_loss)
    d_variables, g_variables = discriminator.trainable_variables, generator.trainable_variables
    d_optimizer.apply(tape.gradient(scaled_d_loss, d_variables), d_variables)
    g_optimizer.apply(tape.gradient(scaled_g_loss, g_variables), g_variables)


rng = np.random.default_rng(0)


def distance_from_ring():
    points = np.asarray(generator(rng.normal(size=(512, 4)).astype("float32")))
    return float(np.abs(np.linalg.norm(points, axis=1) - 1).mean())


before = distance_from_ring()
for _ in range(1500):
    angle = rng.uniform(0, 2 * np.pi, size=(128, 1))
    ring = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype("float32")
    train_step(tf.constant(ring), tf.constant(rng.normal(size=(128, 4)).astype("float32")))
after = distance_from_ring()

for name, optimizer in (("generator", g_optimizer), ("discriminator", d_optimizer)):
    print(f"{name}: scale {optimizer.loss_scale:g}, skipped {optimizer.skipped_steps} of 1500")
print(f"mean distance from the ring: {before:.2f} -> {after:.2f}")
assert after < before / 2
