"""A custom training loop in torch: backpropagate the scaled loss, then apply the gradients.

Backend: torch
"""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch

import kerasmp as mp

keras.utils.set_random_seed(0)
with mp.policy_scope("mixed_float16"):
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(32, activation="tanh"), mp.layers.DenseHead(1)]
    )
optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(1e-2))
optimizer.build(model.trainable_variables)
loss_fn = keras.losses.MeanSquaredError()


def train_step(x, y):
    model.zero_grad()
    loss = loss_fn(y, model(x, training=True))
    optimizer.scale_loss(loss).backward()
    variables = model.trainable_variables
    with torch.no_grad():
        optimizer.apply([v.value.grad for v in variables], variables)
    return loss.item()


x = torch.tensor(np.random.default_rng(0).normal(size=(512, 8)), dtype=torch.float32)
y = x[:, :1] * x[:, 1:2]
first = last = None
for _ in range(30):
    last = sum(train_step(x[i : i + 64], y[i : i + 64]) for i in range(0, 512, 64)) / 8
    first = first or last
print(f"loss {first:.3f} -> {last:.3f}, scale {optimizer.loss_scale:g}")
assert last < first / 2
