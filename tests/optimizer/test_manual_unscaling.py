"""Loops that unscale before they apply, as in Keras 2: the same update, never a tiny one."""

import keras
import numpy as np
import pytest
from helpers.marks import few, marks_on
from helpers.stepping import WAYS, assert_same_bits, each_of, numpy, tensors, variables_of
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.optimizer import LossScaleOptimizer

pytestmark = marks_on("oldest")

SCALED = [[64.0, -32.0], [8.0]]


def made(scale=64.0, inner=None):
    variables = variables_of([1.0, 2.0], [3.0])
    optimizer = LossScaleOptimizer(inner or keras.optimizers.Adam(0.5), loss_scale=scale)
    optimizer.build(variables)
    return optimizer, variables


@each_of(WAYS, WAYS[:2])
@pytest.mark.parametrize("scale", few([64.0, 0.25, "dynamic"], [0.25]))
def test_applying_unscaled_gradients_is_the_same_update(step, scale):
    plain, expected = made(scale)
    optimizer, variables = made(scale)
    for gradients in (SCALED, [[1.0, np.inf], [1.0]], SCALED):
        grads = tensors(*gradients)
        step(plain, grads, expected)
        _by_hand(step, optimizer, grads, variables)
    assert_same_bits(numpy(variables), numpy(expected))
    assert_same_bits(numpy(optimizer.variables), numpy(plain.variables))
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (2, 1)


def _by_hand(step, optimizer, grads, variables):
    if step.__name__ not in {"graph", "xla"}:
        step(optimizer, optimizer.get_unscaled_gradients(grads), variables)
        return
    import tensorflow as tf

    if not hasattr(optimizer, "_test_step"):
        optimizer._test_step = tf.function(
            lambda grads: optimizer.apply(optimizer.get_unscaled_gradients(grads), variables),
            jit_compile=step.__name__ == "xla",
        )
    optimizer._test_step(grads)


def test_gradients_come_in_float32_with_none_left_in_place():
    optimizer, _ = made()
    ours = optimizer.get_unscaled_gradients([ops.array([128.0, 64.0], "float16"), None])
    assert ours[1] is None
    assert keras.backend.standardize_dtype(ours[0].dtype) == "float32"
    assert ops.convert_to_numpy(ours[0]).tolist() == [2.0, 1.0]


@pytest.mark.parametrize("built", [True, False])
def test_a_gradient_that_is_a_new_value_is_not_unscaled(built):
    variables = variables_of([1.0], [2.0], [3.0])
    variables[1].overwrite_with_gradient = True
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=64.0)
    if built:
        optimizer.build(variables)
        assert optimizer.get_unscaled_gradients(tensors([64.0], [64.0], [64.0]))[1][0] == 64.0
        optimizer.forget_unscaled()
        with pytest.raises(LossScaleError, match=r"2 gradients for 3 .*\(grads, variables\)"):
            optimizer.get_unscaled_gradients(tensors([64.0], [64.0]))
    grads = optimizer.get_unscaled_gradients(tensors([64.0], [64.0]), variables[:2])
    optimizer.apply(grads, variables[:2])
    assert [v.tolist() for v in numpy(variables)] == [[0.0], [64.0], [3.0]]


def test_the_wrong_number_of_variables_marks_nothing():
    optimizer, variables = made(inner=keras.optimizers.SGD(1.0))
    with pytest.raises(LossScaleError, match="2 gradients for 1 variables"):
        optimizer.get_unscaled_gradients(tensors(*SCALED), variables[:1])
    optimizer.apply(tensors(*SCALED), variables)
    assert numpy(variables)[1].tolist() == [2.875]


def test_clipping_in_between_clips_unscaled_gradients():
    optimizer, variables = made(inner=keras.optimizers.SGD(1.0))
    grads = [ops.clip(g, -0.25, 0.25) for g in optimizer.get_unscaled_gradients(tensors(*SCALED))]
    optimizer.apply(grads, variables)
    assert [v.tolist() for v in numpy(variables)] == [[0.75, 2.25], [2.875]]


def test_get_scaled_loss_equals_scale_loss_also_for_a_function():
    optimizer, _ = made()
    assert float(optimizer.get_scaled_loss(2.0)) == 128.0
    assert float(optimizer.get_scaled_loss(lambda: 2.0)()) == 128.0


def test_unscaling_twice_is_an_error_and_the_first_gradients_can_still_be_applied():
    optimizer, variables = made(inner=keras.optimizers.SGD(1.0))
    grads = optimizer.get_unscaled_gradients(tensors(*SCALED))
    with pytest.raises(LossScaleError, match=r"unscaled twice.*forget_unscaled\(\)"):
        optimizer.get_unscaled_gradients(grads)
    optimizer.apply(grads, variables)
    assert numpy(variables)[1].tolist() == [2.875]
    optimizer.apply(tensors(*SCALED), variables)  # scaled again: the mark held for one step
    assert numpy(variables)[1].tolist() == [2.75]


@pytest.mark.parametrize("as_none", [False, True])
def test_applying_them_in_parts_is_an_error(as_none):
    optimizer, variables = made(inner=keras.optimizers.SGD(1.0))
    one, other = optimizer.get_unscaled_gradients(tensors(*SCALED))
    part = ([one, None], variables) if as_none else ([one], variables[:1])
    before = numpy([*variables, *optimizer.variables])
    told = r"Received: 1 gradients.* returned 2\..*in one call.*forget_unscaled\(\)"
    with pytest.raises(LossScaleError, match=told):
        optimizer.apply(*part)
    assert_same_bits(numpy([*variables, *optimizer.variables]), before)
    optimizer.apply([one, other], variables)
    assert numpy(variables)[1].tolist() == [2.875]


def test_gradients_that_are_none_may_be_dropped_in_between():
    optimizer, variables = made(inner=keras.optimizers.SGD(1.0))
    grads = optimizer.get_unscaled_gradients([None, *tensors(SCALED[1])])
    pairs = [(g, v) for g, v in zip(grads, variables, strict=True) if g is not None]
    optimizer.apply_gradients(pairs)
    assert numpy(variables)[1].tolist() == [2.875]


@pytest.mark.parametrize("nothing", [[], [None, None]], ids=str)
def test_where_nothing_was_unscaled_nothing_is_remembered(nothing):
    optimizer, variables = made(inner=keras.optimizers.SGD(1.0))
    assert optimizer.get_unscaled_gradients(nothing) == nothing
    optimizer.apply(tensors(*SCALED), variables)
    assert numpy(variables)[1].tolist() == [2.875]


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda _, variables: ([None, None], variables),
        lambda grads, variables: (grads[:1], variables),
        lambda grads, variables: (grads[:1], variables[:1]),
    ],
    ids=["none", "too few", "a part"],
)
def test_a_refused_call_builds_nothing_and_keeps_mark_and_notes(wrong, built):
    variables = variables_of([1.0, 2.0], [3.0])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=64.0)
    if built:
        optimizer.build(variables)
    optimizer.note_loss(ops.convert_to_tensor(np.nan))
    grads = optimizer.get_unscaled_gradients(tensors([np.nan, 1.0], [1.0]))
    with pytest.raises(LossScaleError):
        optimizer.apply(*wrong(grads, variables))
    assert optimizer.built is built
    optimizer.apply(grads, variables)
    assert optimizer.skip_causes["loss"] == 1
    optimizer.apply(tensors(*SCALED), variables)
    assert numpy(variables)[1].tolist() == [2.875]


def test_no_gradients_at_all_leave_the_mark_where_it_is():
    optimizer, variables = made(inner=keras.optimizers.SGD(1.0))
    grads = optimizer.get_unscaled_gradients(tensors(*SCALED))
    optimizer.apply([], [])
    optimizer.apply(grads, variables)
    assert numpy(variables)[1].tolist() == [2.875]


def test_forgotten_gradients_leave_the_next_step_as_it_was():
    optimizer, variables = made(inner=keras.optimizers.SGD(1.0))
    optimizer.get_unscaled_gradients(tensors(*SCALED))
    optimizer.forget_unscaled()
    optimizer.apply(tensors(*SCALED), variables)
    assert numpy(variables)[1].tolist() == [2.875]


def _traced(function):
    """Return the function, compiled by the running backend."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    import jax

    return jax.jit(function)


def _unscaled_in_a_scope(optimizer):
    def unscaled(state, grads):
        with keras.StatelessScope(list(zip(optimizer.variables, state, strict=True))):
            return optimizer.get_unscaled_gradients(grads)

    return unscaled


@pytest.mark.backend("jax")
@pytest.mark.parametrize("built", [True, False])
def test_a_scale_that_jit_would_make_constant_is_an_error_that_marks_nothing(built):
    optimizer, variables = made(inner=keras.optimizers.SGD(1.0))
    if not built:
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=64.0)
    with pytest.raises(LossScaleError, match=r"get_unscaled_gradients in a tr.*StatelessScope"):
        _traced(optimizer.get_unscaled_gradients)(tensors(*SCALED))
    optimizer.apply(tensors(*SCALED), variables)
    assert numpy(variables)[1].tolist() == [2.875]


@pytest.mark.backend("jax")
def test_a_jitted_step_divides_by_the_scale_of_each_call():
    optimizer, variables = made(inner=keras.optimizers.SGD(1.0))

    def step(state, grads, values):
        grads = _unscaled_in_a_scope(optimizer)(state, grads)
        return optimizer.stateless_apply(state, grads, values)

    jitted = _traced(step)
    for scale, expected in ((64.0, 2.875), (128.0, 2.9375)):
        optimizer.loss_scale = scale
        state = [v.value for v in optimizer.variables]
        values, _ = jitted(state, tensors(*SCALED), [v.value for v in variables])
        assert values[1].tolist() == [expected]


@pytest.mark.backend("tensorflow", "jax")
def test_unscaling_in_a_function_and_applying_outside_is_an_error_that_changes_nothing():
    optimizer, variables = made()
    before = numpy([*variables, *optimizer.variables])
    state = [v.value for v in optimizer.variables]
    grads = _traced(_unscaled_in_a_scope(optimizer))(state, tensors(*SCALED))
    with pytest.raises(LossScaleError, match="cannot know whether its gradients are unscaled"):
        optimizer.apply(grads, variables)
    assert_same_bits(numpy([*variables, *optimizer.variables]), before)


@pytest.mark.backend("tensorflow")
def test_unscaling_outside_and_applying_in_a_function_is_an_error():
    optimizer, variables = made()
    grads = optimizer.get_unscaled_gradients(tensors(*SCALED))
    step = _traced(lambda grads: optimizer.apply(grads, variables))
    # While tracing, AutoGraph changes the type of errors.
    with pytest.raises(Exception, match="apply cannot know whether its gradients are unscaled"):
        step(grads)


@pytest.mark.backend("tensorflow")
def test_a_trace_that_failed_leaves_nothing_behind():
    import gc

    optimizer, variables = made(inner=keras.optimizers.SGD(1.0))

    def step(grads):
        optimizer.get_unscaled_gradients(grads)
        message = "a bug of the user's"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="a bug"):
        _traced(step)(tensors(*SCALED))
    gc.collect()
    optimizer.apply(tensors(*SCALED), variables)
    assert numpy(variables)[1].tolist() == [2.875]


@pytest.mark.backend("jax")
def test_after_a_trace_that_failed_the_error_says_what_to_do():
    """A finished trace is no proof of failure: it may have returned unscaled gradients."""
    optimizer, variables = made(inner=keras.optimizers.SGD(1.0))

    def step(state, grads, values, fail):
        grads = _unscaled_in_a_scope(optimizer)(state, grads)
        if fail:
            message = "a bug of the user's"
            raise RuntimeError(message)
        return optimizer.stateless_apply(state, grads, values)

    def run(*, fail):
        import jax

        state = [v.value for v in optimizer.variables]
        values = [v.value for v in variables]
        return jax.jit(step, static_argnums=3)(state, tensors(*SCALED), values, fail)

    with pytest.raises(RuntimeError, match="a bug"):
        run(fail=True)
    values, _ = run(fail=False)  # a step with both calls continues
    assert values[1].tolist() == [2.875]
    with pytest.raises(LossScaleError, match=r"function failed.*call optimizer\.forget_unscaled"):
        optimizer.apply(tensors(*SCALED), variables)
    optimizer.forget_unscaled()
    optimizer.apply(tensors(*SCALED), variables)
    assert numpy(variables)[1].tolist() == [2.875]


@pytest.mark.backend("tensorflow")
def test_sparse_gradients_stay_sparse():
    import tensorflow as tf

    optimizer, _ = made()
    sparse = tf.IndexedSlices(tf.constant([64.0]), tf.constant([1]), tf.constant([2]))
    ours, _ = optimizer.get_unscaled_gradients([sparse, None])
    assert isinstance(ours, tf.IndexedSlices)
    assert ours.values.numpy().tolist() == [1.0]
