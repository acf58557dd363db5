"""Why a step was skipped, and how that changes the scale."""

import keras
import numpy as np
import pytest
from helpers.marks import few, marks_on
from helpers.stepping import (
    WAYS,
    each_of,
    eager,
    numpy,
    stateless,
    tensors,
    variables_of,
)
from keras import ops

from kerasmp.loss_scale import DynamicLossScale, FixedLossScale, NoLossScale
from kerasmp.optimizer import LossScaleOptimizer

pytestmark = marks_on("oldest")

CAUSES = LossScaleOptimizer("sgd").skip_causes.keys()
ON_JAX = keras.backend.backend() == "jax"
NAN, INF = float("nan"), float("inf")
SCHEDULE = DynamicLossScale(initial_scale=8.0, min_scale=4.0)


def causes(**counts):
    return dict.fromkeys(CAUSES, 0) | counts


def noting(step):
    """Return `step` with a loss noted before it, in the same trace."""

    def noted(optimizer, loss, grads, variables):
        if step.__name__ in {"eager", "stateless"}:
            optimizer.note_loss(ops.convert_to_tensor(loss, dtype="float32"))
            step(optimizer, grads, variables)
            return
        import tensorflow as tf

        if not hasattr(optimizer, "_test_step"):

            @tf.function(jit_compile=step.__name__ == "xla")
            def traced(loss, grads):
                optimizer.note_loss(loss)
                optimizer.apply(grads, variables)

            optimizer._test_step = traced
        optimizer._test_step(tf.constant(loss, "float32"), grads)

    noted.__name__ = step.__name__
    return noted


NOTING = [noting(way) for way in WAYS]
with_loss = each_of(NOTING)
with_loss_traced_too = each_of(NOTING, NOTING[:2])


def built(loss_scale=SCHEDULE):
    variables = variables_of([1.0, 2.0])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), loss_scale=loss_scale)
    optimizer.build(variables)
    return optimizer, variables


@with_loss_traced_too
def test_a_loss_that_is_not_finite_leaves_the_whole_schedule_as_it_is(step):
    optimizer, variables = built(DynamicLossScale(8.0, growth_interval=2))
    step(optimizer, 1.0, tensors([1.0, 1.0]), variables)
    before = optimizer.loss_scale, int(optimizer.step_counter.numpy())
    for loss in (NAN, INF, -INF):
        step(optimizer, loss, tensors([NAN, 0.0]), variables)
    assert (optimizer.loss_scale, int(optimizer.step_counter.numpy())) == before == (8.0, 1)
    assert optimizer.skip_causes == causes(loss=3)
    assert (optimizer.skipped_steps, optimizer.consecutive_skips) == (3, 3)
    step(optimizer, 1.0, tensors([1.0, 1.0]), variables)
    assert optimizer.loss_scale == 16.0


@with_loss
def test_gradients_alone_lower_the_scale_until_it_is_at_its_floor(step):
    optimizer, variables = built()
    for expected, scale in ((causes(gradients=1), 4.0), (causes(gradients=1, floor=1), 4.0)):
        step(optimizer, 3.0, tensors([INF, 0.0]), variables)
        assert (optimizer.skip_causes, optimizer.loss_scale) == (expected, scale)


@with_loss
@pytest.mark.parametrize(
    ("loss_scale", "cause"), [(FixedLossScale(8.0), "gradients"), (NoLossScale(), "floor")], ids=str
)
def test_scales_that_do_not_move(step, loss_scale, cause):
    optimizer, variables = built(loss_scale)
    step(optimizer, 3.0, tensors([INF, 0.0]), variables)
    assert optimizer.skip_causes == causes(**{cause: 1})


@each_of(WAYS)
def test_an_unknown_loss_lowers_the_scale(step):
    optimizer, variables = built()
    step(optimizer, tensors([INF, 0.0]), variables)
    assert optimizer.skip_causes == causes(unknown=1)
    assert optimizer.loss_scale == 4.0


@with_loss
def test_a_step_that_is_fine_is_applied_whatever_its_loss_was(step):
    optimizer, variables = built()
    step(optimizer, NAN, tensors([8.0, 0.0]), variables)
    assert numpy(variables)[0].tolist() == [0.5, 2.0]
    assert optimizer.skip_causes == causes()
    assert optimizer.last_step_skipped is False


def test_one_bad_loss_among_several_is_to_blame():
    optimizer, variables = built()
    for loss in (1.0, NAN, 2.0):
        optimizer.note_loss(ops.convert_to_tensor(loss))
    eager(optimizer, tensors([NAN, NAN]), variables)
    assert optimizer.skip_causes == causes(loss=1)
    # And it is blamed only once.
    eager(optimizer, tensors([NAN, NAN]), variables)
    assert optimizer.skip_causes == causes(loss=1, unknown=1)


@pytest.mark.parametrize("loss", [[1.0, NAN], [[INF], [1.0]]], ids=str)
def test_a_loss_of_any_shape(loss):
    optimizer, variables = built()
    optimizer.note_loss(ops.convert_to_tensor(loss))
    eager(optimizer, tensors([NAN, NAN]), variables)
    assert optimizer.skip_causes == causes(loss=1)


# ---------------------------------------------------------------------------------------- fit

GOOD = np.random.default_rng(0).normal(size=(1, 3)).astype("float32")
BAD_INPUT = np.full((1, 3), NAN, "float32")
# mean absolute error: the loss is finite, its gradient is 3e38 times the scale.
HUGE = np.full((1, 3), [3e38, 0.0, 0.0], "float32")

OPTIONS = [{}, {"run_eagerly": True}]
if keras.backend.backend() != "torch":  # where Keras takes one step at a time
    OPTIONS.append({"steps_per_execution": 2})
if keras.backend.backend() == "tensorflow":
    OPTIONS.append({"jit_compile": True})


def fitted(module, batches, *, loss_scale=SCHEDULE, loss="mae", y=None, batch_size=1, **options):
    keras.utils.set_random_seed(2)
    model = module.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(LossScaleOptimizer("sgd", loss_scale=loss_scale), loss, **options)
    x = np.concatenate(batches)
    y = np.ones((len(x), 1)) if y is None else y
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
    return model.optimizer


@pytest.mark.parametrize(
    ("bad", "expected", "scale"),
    [
        (BAD_INPUT, causes(loss=2), 8.0),
        (HUGE, causes(gradients=1, floor=1), 4.0),
    ],
    ids=["loss", "gradients"],
)
@pytest.mark.parametrize("options", few(OPTIONS, OPTIONS[:1]), ids=str)
def test_fit_of_a_kerasmp_model_distinguishes_loss_and_gradients(bad, expected, scale, options):
    import kerasmp

    optimizer = fitted(kerasmp, [GOOD, bad, GOOD, bad], **options)
    assert (optimizer.skip_causes, optimizer.loss_scale) == (expected, scale)
    assert optimizer.applied_steps == 2


def _nan_without_a_gradient(y, prediction):
    return ops.mean(ops.abs(prediction)) + ops.stop_gradient(ops.mean(y * 0.0))


@pytest.mark.parametrize("options", few(OPTIONS, OPTIONS[:1]), ids=str)
def test_the_nan_loss_of_an_applied_step_does_not_affect_later_steps(options):
    import kerasmp

    y = np.array([[1.0], [INF], [1.0], [1.0]], "float32")
    batches = [GOOD, GOOD, HUGE, HUGE]
    optimizer = fitted(kerasmp, batches, loss=_nan_without_a_gradient, y=y, **options)
    assert optimizer.applied_steps == 2
    assert (optimizer.skip_causes, optimizer.loss_scale) == (causes(gradients=1, floor=1), 4.0)


def test_a_loss_whose_sum_over_the_batch_overflows_is_finite():
    import kerasmp

    def large(_, prediction):
        return 3e38 * (1.0 + ops.mean(prediction - ops.stop_gradient(prediction)))

    optimizer = fitted(kerasmp, [GOOD, GOOD], loss=large, batch_size=2)
    assert optimizer.skip_causes == causes(gradients=1)


def test_fit_of_a_stock_model_sees_the_loss_except_on_jax():
    optimizer = fitted(keras, [GOOD, BAD_INPUT])
    known = (causes(unknown=1), 4.0) if ON_JAX else (causes(loss=1), 8.0)
    assert (optimizer.skip_causes, optimizer.loss_scale) == known


@pytest.mark.backend("jax")
def test_on_jax_a_kerasmp_model_corrects_the_scale_as_if_the_loss_were_known():
    schedule = DynamicLossScale(initial_scale=8.0, min_scale=4.0, growth_interval=3, hysteresis=2)
    values = [1.0, 1.0, NAN, 1.0, INF, NAN, INF, INF]
    gradients = [1.0, 1.0, NAN, 1.0, INF, NAN, 1.0, NAN]
    late, variables = built(schedule)
    known, others = built(schedule)
    for loss, gradient in zip(values, gradients, strict=True):
        before = [v.value for v in late.variables]
        stateless(late, tensors([gradient, 1.0]), variables)
        after = late.with_known_loss(
            before, [v.value for v in late.variables], ops.isfinite(ops.convert_to_tensor(loss))
        )
        for variable, value in zip(late.variables, after, strict=True):
            variable.assign(value)
        known.note_loss(ops.convert_to_tensor(loss))
        stateless(known, tensors([gradient, 1.0]), others)
        for one, other in zip(late.variables, known.variables, strict=True):
            np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=one.path)


# ---------------------------------------------------------------------------------------- notes


@pytest.mark.backend("tensorflow")
def test_a_loss_of_another_trace_is_not_known():
    import tensorflow as tf

    optimizer, variables = built()
    tf.function(optimizer.scale_loss)(tf.constant(NAN))
    eager(optimizer, tensors([NAN, NAN]), variables)
    assert optimizer.skip_causes == causes(unknown=1)


@pytest.mark.backend("jax")
def test_a_note_within_the_differentiated_function_is_not_known_outside():
    import jax

    optimizer, variables = built()

    @jax.jit
    def step(weight, state):
        def loss(weight):
            optimizer.note_loss(weight[0])
            return ops.sum(weight)

        grads = [jax.grad(loss)(weight) * NAN]
        return optimizer.stateless_apply(state, grads, [weight])

    _, state = step(variables[0].value, [v.value for v in optimizer.variables])
    for variable, value in zip(optimizer.variables, state, strict=True):
        variable.assign(value)
    assert optimizer.skip_causes == causes(unknown=1)


def test_a_loss_of_a_step_that_is_not_taken_can_be_forgotten():
    optimizer, variables = LossScaleOptimizer("sgd"), variables_of([1.0])
    optimizer.note_loss(ops.convert_to_tensor(np.nan))
    optimizer.forget_unscaled()
    eager(optimizer, tensors([np.inf]), variables)
    assert optimizer.skip_causes == causes(unknown=1)
