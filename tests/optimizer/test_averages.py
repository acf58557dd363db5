"""Averages of the weights (`use_ema`): never written, or swapped in, before there are any.

Fault 6: Keras's averages start at zero, and a run whose first steps are skipped meets them.
"""

import keras
import numpy as np
import pytest
from helpers.marks import by_name, few, full_on, marks_on
from helpers.stepping import assert_same_bits, built, numpy, variables_of

import kerasmp as mp
from kerasmp.optimizer import LossScaleOptimizer as Ours

pytestmark = marks_on("oldest")

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = X[:, :1] * 2 - 1
BAD = np.full_like(X, np.nan)
SETTINGS = {
    "at the end": {},
    "every second step": {"ema_overwrite_frequency": 2},
    "with accumulation": {"gradient_accumulation_steps": 2},
}


def every_setting(quick):
    return pytest.mark.parametrize("settings", by_name(SETTINGS, [quick]))


def averaging(settings):
    return keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5, **settings)


def compiled(optimizer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer, keras.losses.MeanSquaredError())
    return model


def fit(model, x, epochs=1, callbacks=()):
    # The last batch is left out, so that a window of two stays open.
    model.fit(
        x[:24], Y[:24], batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks
    )


class Watch(keras.callbacks.Callback):
    """Record the weights that an evaluation sees; comes after SwapEMAWeights in the list."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_test_begin(self, logs=None):  # noqa: ARG002 - Keras's
        self.seen.append(numpy(self.model.trainable_variables))


@every_setting("with accumulation")
def test_a_run_whose_first_steps_are_skipped_ends_as_one_without_them(settings):
    model, plain = (
        compiled(Ours(averaging(settings), loss_scale=2.0**10)),
        compiled(averaging(settings)),
    )
    start = numpy(model.variables)
    fit(model, BAD)
    assert_same_bits(numpy(model.variables), start)
    fit(model, X)
    fit(plain, X)
    assert_same_bits(numpy(model.variables), numpy(plain.variables))
    inner = model.optimizer.inner_optimizer
    assert_same_bits(numpy(inner.variables), numpy(plain.optimizer.variables))


@every_setting("at the end")
def test_before_the_first_applied_step_an_evaluation_by_averages_sees_the_weights(settings):
    model = compiled(Ours(averaging(settings)))
    before = numpy(model.trainable_variables)
    watch = Watch()
    model.fit(
        BAD,
        Y,
        batch_size=8,
        verbose=0,
        validation_data=(X, Y),
        callbacks=[keras.callbacks.SwapEMAWeights(), watch],
    )
    assert_same_bits(watch.seen[0], before)
    # TensorFlow swaps by adding and subtracting, which rounds.
    for value, start in zip(numpy(model.trainable_variables), before, strict=True):
        np.testing.assert_allclose(value, start, rtol=1e-6)


@pytest.mark.parametrize("swap_on_epoch", few([False, True], [True]))
@every_setting("every second step")
@full_on("jax")
def test_swapping_averages_after_a_skipped_batch_equals_swapping_without_it(
    settings, swap_on_epoch
):
    def run(optimizer, module, x, y):
        keras.utils.set_random_seed(0)
        model = module.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(optimizer, "mse")
        watch = Watch()
        logs = model.fit(
            x,
            y,
            batch_size=8,
            epochs=3,
            shuffle=False,
            verbose=0,
            validation_data=(X, Y),
            callbacks=[keras.callbacks.SwapEMAWeights(swap_on_epoch), watch],
        )
        return numpy(model.trainable_variables), watch.seen, logs.history

    x, y = np.concatenate([BAD[:8], X]), np.concatenate([Y[:8], Y])
    weights, seen, logs = run(Ours(averaging(settings), loss_scale=2.0**10), mp, x, y)
    expected, expected_seen, expected_logs = run(averaging(settings), keras, X, Y)
    assert_same_bits(weights, expected)
    for ours, plain in zip(seen, expected_seen, strict=True):
        assert_same_bits(ours, plain)
    assert logs == expected_logs


def test_a_second_fit_continues_the_averages_of_the_first():
    """On JAX a plain optimizer fails here: weight and average share a buffer, donated twice."""
    model, once = compiled(Ours(averaging({}), loss_scale=1.0)), compiled(averaging({}))
    fit(model, X)
    fit(once, X)
    assert_same_bits(numpy(model.variables), numpy(once.variables))
    fit(model, X)
    assert model.optimizer.applied_steps == 6
    averages = numpy(model.optimizer.inner_optimizer._model_variables_moving_average)
    assert_same_bits(numpy(model.variables), averages)


def test_averages_that_an_inner_optimizer_already_has_are_kept():
    variables = variables_of([1.0, 2.0])
    inner = averaging({})
    inner.build(variables)
    inner._model_variables_moving_average[0].assign([3.0, 4.0])
    built(Ours(inner), variables)
    assert numpy(inner._model_variables_moving_average)[0].tolist() == [3.0, 4.0]


def test_averages_of_an_inner_optimizer_that_has_not_stepped_start_as_the_weights_too():
    variables = variables_of([1.0, 2.0])
    inner = averaging({})
    inner.build(variables)
    built(Ours(inner), variables)
    assert numpy(inner._model_variables_moving_average)[0].tolist() == [1.0, 2.0]


def test_a_variable_without_an_average_is_left_out():
    variables = variables_of([1.0], [2.0])
    variables[0].overwrite_with_gradient = True
    optimizer = Ours(averaging({}))
    optimizer.build(variables)
    none, average = optimizer.inner_optimizer._model_variables_moving_average
    assert none is None
    assert numpy([average])[0].tolist() == [2.0]


@pytest.mark.backend("tensorflow")
def test_a_graph_that_makes_the_optimizers_state_starts_the_averages_too():
    import tensorflow as tf

    optimizer = Ours(averaging({}))
    variables = []

    @tf.function
    def step(gradient):
        optimizer.apply([gradient] * len(variables), variables)

    variables += variables_of([1.0, 2.0])
    step(tf.constant([np.inf, 0.0]))
    assert numpy(optimizer.inner_optimizer._model_variables_moving_average)[0].tolist() == [
        1.0,
        2.0,
    ]


@pytest.mark.backend("tensorflow")
def test_averages_of_tensorflow_variables_start_as_the_variables():
    import tensorflow as tf

    variables = [tf.Variable([1.0, 2.0])]
    optimizer = Ours(averaging({}))
    optimizer.apply([tf.constant([np.inf, 0.0])], variables)
    averages = numpy(optimizer.inner_optimizer._model_variables_moving_average)
    assert averages[0].tolist() == [1.0, 2.0]


@pytest.mark.backend("tensorflow")
def test_a_graph_that_makes_the_weights_as_well_still_runs():
    import tensorflow as tf

    optimizer = Ours(averaging({}), loss_scale=1.0)
    layer = keras.layers.Dense(1, kernel_initializer="ones")

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x))
        grads = tape.gradient(loss, layer.trainable_variables)
        optimizer.apply(grads, layer.trainable_variables)

    step(tf.ones((1, 2)))
    np.testing.assert_allclose(numpy(layer.trainable_variables)[0].ravel(), [0.95, 0.95])
    averages = numpy(optimizer.inner_optimizer._model_variables_moving_average)
    assert_same_bits(averages, numpy(layer.trainable_variables))
