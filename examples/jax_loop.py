"""A custom training loop in JAX: all state is explicit, including the loss scale.

Backend: jax
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np

import kerasmp as mp

keras.utils.set_random_seed(0)
with mp.policy_scope("mixed_float16"):
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(32, activation="tanh"), mp.layers.DenseHead(1)]
    )
optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(1e-2))
optimizer.build(model.trainable_variables)
loss_fn = keras.losses.MeanSquaredError()


def scaled_loss(trainable, non_trainable, optimizer_state, x, y):
    prediction, non_trainable = model.stateless_call(trainable, non_trainable, x, training=True)
    loss = loss_fn(y, prediction)
    # The scale is part of the optimizer's state. Read it from this step's values; otherwise the
    # compiled step would contain the first scale as a constant.
    with keras.StatelessScope(list(zip(optimizer.variables, optimizer_state, strict=True))):
        return optimizer.scale_loss(loss), (loss, non_trainable)


@jax.jit
def train_step(state, x, y):
    trainable, non_trainable, optimizer_state = state
    gradients, (loss, non_trainable) = jax.grad(scaled_loss, has_aux=True)(
        trainable, non_trainable, optimizer_state, x, y
    )
    trainable, optimizer_state = optimizer.stateless_apply(optimizer_state, gradients, trainable)
    return (trainable, non_trainable, optimizer_state), loss


x = np.random.default_rng(0).normal(size=(512, 8)).astype("float32")
y = x[:, :1] * x[:, 1:2]
state = tuple(
    [v.value for v in variables]
    for variables in (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
    )
)
first = last = None
for _ in range(30):
    losses = []
    for start in range(0, 512, 64):
        state, loss = train_step(state, x[start : start + 64], y[start : start + 64])
        losses.append(float(loss))
    last = sum(losses) / len(losses)
    first = first or last

# After the loop, assign the values to the variables.
for variables, values in zip(
    (model.trainable_variables, model.non_trainable_variables, optimizer.variables),
    state,
    strict=True,
):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
print(f"loss {first:.3f} -> {last:.3f}, scale {optimizer.loss_scale:g}")
assert last < first / 2
assert optimizer.applied_steps + optimizer.skipped_steps == 240
