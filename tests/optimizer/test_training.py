"""Training by `compile` and `fit`, in every way of running a step, traced only once."""

import keras
import numpy as np
import pytest
from helpers.marks import by_name, full

import kerasmp as mp

X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
Y = X[:, :1] * 2 - 1
WAYS = {
    "tensorflow": [
        {},
        {"jit_compile": True},
        {"run_eagerly": True},
        {"steps_per_execution": 4},
    ],
    "jax": [{}, {"run_eagerly": True}],
    "torch": [{}],
}[keras.backend.backend()]


class Counting(keras.layers.Layer):
    """Counts how often its Python code runs: once for each trace."""

    traces = 0

    def call(self, inputs):
        type(self).traces += 1
        return inputs


def fit(loss_scale="dynamic", epochs=3, layers=(), **compile_arguments):
    keras.utils.set_random_seed(0)
    with mp.policy_scope("mixed_float16"):
        model = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(16, activation="tanh"),
                *layers,
                mp.layers.DenseHead(1),
            ]
        )
    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(0.02), loss_scale=loss_scale)
    model.compile(optimizer, "mse", **compile_arguments)
    history = model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return model, history.history["loss"]


@pytest.mark.parametrize(
    ("way", "loss_scale"),
    [
        ({}, "dynamic"),
        *(full(way, "dynamic") for way in WAYS if way),
        *(full({}, loss_scale) for loss_scale in ("fixed", None)),
    ],
    ids=str,
)
def test_learns_with_float32_variables_and_float16_compute(way, loss_scale):
    model, losses = fit(loss_scale, epochs=10, **way)
    assert losses[-1] < losses[0] / 4
    assert {v.dtype for v in model.variables if "seed" not in v.path} == {"float32"}
    assert {layer.compute_dtype for layer in model.layers} == {"float16"}
    assert model.optimizer.applied_steps + model.optimizer.skipped_steps == 80


@pytest.mark.backend("tensorflow", "jax")
@pytest.mark.parametrize("module", by_name({"stock model": keras, "our model": mp}, ["our model"]))
def test_the_second_step_traces_nothing(module):
    Counting.traces = 0
    model = module.Sequential([keras.Input((4,)), Counting(), mp.layers.DenseHead(1)])
    schedule = mp.DynamicLossScale(2.0**22, growth_interval=2)
    model.compile(mp.LossScaleOptimizer("adam", loss_scale=schedule), "mse")
    model.train_on_batch(X[:8], Y[:8])
    traces = Counting.traces
    assert traces > 0
    # Skipped steps, applied steps and a changing scale are one program.
    for factor in (np.inf, 1.0, 1.0, 1.0):
        model.train_on_batch(X[:8] * np.float32(factor), Y[:8])
    assert model.optimizer.skipped_steps > 0
    assert model.optimizer.applied_steps > 2
    assert Counting.traces == traces
