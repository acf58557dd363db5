"""User-defined loops, on each backend: the scale moves, and nothing is traced twice."""

import functools

import keras
import numpy as np
import pytest
from helpers.marks import few
from helpers.stepping import assert_same_bits, numpy
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.loss_scale import DynamicLossScale
from kerasmp.optimizer import LossScaleOptimizer

X = np.random.default_rng(0).normal(size=(6, 8, 4)).astype("float32")
Y = X[..., :1] * 2 - 1
BAD = np.full((8, 4), 5e18, "float32")  # the loss stays finite, its scaled gradients do not
# Grows after two good steps, backs off at the bad one: 64, 128 | 64, 64, 128, 128, 256.
BATCHES = [X[0], X[1], BAD, X[2], X[3], X[4], X[5]]
TARGETS = [Y[0], Y[1], Y[0], Y[2], Y[3], Y[4], Y[5]]
SCALES = [64.0, 128.0, 64.0, 64.0, 128.0, 128.0, 256.0]


def _parts():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    schedule = DynamicLossScale(initial_scale=64.0, growth_interval=2)
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.1), loss_scale=schedule)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def _tensorflow(**options):
    import tensorflow as tf

    model, optimizer = _parts()

    @tf.function(**options)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(model(x, training=True) - y))
            scaled = optimizer.scale_loss(loss)
        grads = tape.gradient(scaled, model.trainable_variables)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        return scaled / loss

    used, moved = [], []
    for x, y in zip(BATCHES, TARGETS, strict=True):
        used.append(float(step(tf.constant(x), tf.constant(y))))
        moved.append(optimizer.loss_scale)
    return model, optimizer, used, moved, step


def _jax():
    import jax

    model, optimizer = _parts()
    traces = []

    def scaled_loss(trainable, state, x, y):
        prediction, _ = model.stateless_call(trainable, [], x, training=True)
        loss = ops.mean(ops.square(prediction - y))
        with keras.StatelessScope(list(zip(optimizer.variables, state, strict=True))):
            scaled = optimizer.scale_loss(loss)
        return scaled, loss

    @jax.jit
    def step(trainable, state, x, y):
        traces.append(1)
        (scaled, loss), grads = jax.value_and_grad(scaled_loss, has_aux=True)(
            trainable, state, x, y
        )
        trainable, state = optimizer.stateless_apply(state, grads, trainable)
        return trainable, state, scaled / loss

    trainable = [v.value for v in model.trainable_variables]
    state = [v.value for v in optimizer.variables]
    used, moved = [], []
    for x, y in zip(BATCHES, TARGETS, strict=True):
        trainable, state, factor = step(trainable, state, x, y)
        used.append(float(factor))
        for variable, value in zip(
            [*model.trainable_variables, *optimizer.variables], [*trainable, *state], strict=True
        ):
            variable.assign(value)
        moved.append(optimizer.loss_scale)
    assert len(traces) == 1
    return model, optimizer, used, moved


def _torch():
    model, optimizer = _parts()
    used, moved = [], []
    for x, y in zip(BATCHES, TARGETS, strict=True):
        model.zero_grad()
        loss = ops.mean(ops.square(model(x, training=True) - ops.array(y)))
        scaled = optimizer.scale_loss(loss)
        scaled.backward()
        optimizer.apply([v.value.grad for v in model.trainable_variables])
        used.append(float((scaled / loss).detach()))
        moved.append(optimizer.loss_scale)
    return model, optimizer, used, moved


LOOP = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[keras.backend.backend()]


@functools.cache
def _first():
    """Return the result of the backend's loop, run once for all tests."""
    return LOOP()


def _hold(model, optimizer, used, moved):
    assert moved == SCALES
    good = [i for i in range(len(BATCHES)) if i != 2]
    # The loss of each step is multiplied by the scale after the previous one.
    before = [64.0, *SCALES[:-1]]
    assert np.array(used)[good] == pytest.approx(np.array(before)[good])
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (6, 1)
    assert all(np.isfinite(value).all() for value in numpy(model.variables))


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("jit_compile", few([False, True], [False]))
def test_a_gradient_tape_in_a_tf_function_sees_the_scale_move_and_traces_once(jit_compile):
    *parts, step = _tensorflow(jit_compile=True) if jit_compile else _first()
    _hold(*parts)
    assert step.experimental_get_tracing_count() == 1


@pytest.mark.backend("tensorflow")
def test_graph_and_eager_loops_end_in_the_same_weights():
    import tensorflow as tf

    graph = _first()[0]
    tf.config.run_functions_eagerly(True)
    try:
        eager = _tensorflow()[0]
    finally:
        tf.config.run_functions_eagerly(False)
    for one, other in zip(numpy(graph.variables), numpy(eager.variables), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.backend("jax")
def test_a_jitted_pure_step_sees_the_scale_move_and_traces_once():
    _hold(*_first())


@pytest.mark.backend("torch")
def test_an_eager_loop_with_backward_sees_the_scale_move():
    _hold(*_first())


@pytest.mark.backend("torch")
def test_a_step_leaves_no_autograd_graph():
    _, optimizer, _, _ = _first()
    assert not any(v.value.requires_grad for v in optimizer.variables)


@pytest.mark.backend("jax")
@pytest.mark.parametrize("built", [True, False])
def test_a_scale_that_jit_would_make_constant_is_an_error(built):
    """Fault 15."""
    import jax

    optimizer = LossScaleOptimizer("sgd", loss_scale=8.0)
    if built:
        optimizer.build([keras.Variable([1.0])])

    def loss(weight):
        return optimizer.scale_loss(ops.sum(weight**2))

    weight = ops.array([3.0])
    for transformed in (jax.jit(loss), jax.jit(jax.grad(loss)), jax.jit(jax.vmap(loss))):
        with pytest.raises(LossScaleError, match="StatelessScope"):
            transformed(weight)
    # Without jit the scale is read in each step.
    assert jax.grad(loss)(weight).tolist() == [48.0]
    assert loss(weight) == 72.0


@pytest.mark.full
@pytest.mark.backend("jax")
def test_stock_keras_keeps_using_the_scale_of_the_first_step():
    import jax

    stock = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    stock.build([keras.Variable([1.0])])
    step = jax.jit(stock.scale_loss)
    first = step(1.0)
    stock.dynamic_scale.assign(2.0)
    assert step(1.0) == first != 2.0


@pytest.mark.backend("jax")
@pytest.mark.parametrize("name", ["loss_scale", "skipped_steps", "nonfinite_counts"])
def test_a_value_that_jit_would_make_constant_is_an_error(name):
    import jax

    optimizer = LossScaleOptimizer("sgd", loss_scale=8.0)
    optimizer.build([keras.Variable([1.0])])
    with pytest.raises(LossScaleError, match=r"Read it after the step"):
        jax.jit(lambda weight: weight * getattr(optimizer, name))(ops.array([3.0]))
    assert optimizer.loss_scale == 8.0


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("jit_compile", few([False, True], [False]))
def test_a_graph_that_builds_the_optimizer_does_not_keep_the_first_scale(jit_compile):
    import tensorflow as tf

    weight = keras.Variable([1.0])
    optimizer = LossScaleOptimizer("sgd", loss_scale=DynamicLossScale(8.0))

    @tf.function(jit_compile=jit_compile)
    def step(gradient):
        scaled = optimizer.scale_loss(1.0)
        optimizer.apply([gradient], [weight])
        return scaled

    gradients = [[np.inf], [np.inf], [0.0], [0.0]]
    assert [float(step(tf.constant(g))) for g in gradients] == [8.0, 4.0, 2.0, 2.0]


def test_a_loop_is_repeatable_bit_for_bit():
    assert_same_bits(numpy(LOOP()[0].variables), numpy(_first()[0].variables))
