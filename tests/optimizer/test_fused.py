"""Fused updates, one kernel for each variable, equal those of Keras to rounding."""

import functools

import keras
import numpy as np
import pytest
from helpers.marks import by_name, full_on
from helpers.stepping import (
    BACKEND,
    WAYS,
    assert_same_bits,
    each_of,
    eager,
    graph,
    numpy,
    tensors,
    variables_of,
)

from kerasmp.errors import LossScaleError
from kerasmp.loss_scale import DynamicLossScale
from kerasmp.optimizer import LossScaleOptimizer

o = keras.optimizers
pytestmark = pytest.mark.backend("tensorflow", "torch")  # XLA fuses by itself


def leaving_out(optimizer):
    optimizer.exclude_from_weight_decay(var_names=["left"])
    return optimizer


FUSED = {
    "Adam": lambda **more: o.Adam(0.01, **more),
    "AdamW": lambda **more: o.AdamW(0.01, weight_decay=0.1, **more),
    "SGD": lambda **more: o.SGD(0.01, **more),
    "momentum": lambda **more: o.SGD(0.01, momentum=0.9, **more),
    "Nesterov": lambda **more: o.SGD(0.01, momentum=0.9, nesterov=True, weight_decay=0.1, **more),
    "clipped": lambda **more: o.Adam(0.01, global_clipnorm=1.0, **more),
    "by a schedule": lambda **more: o.AdamW(o.schedules.ExponentialDecay(0.01, 2, 0.9), **more),
    "but for some": lambda **more: leaving_out(o.AdamW(0.01, weight_decay=0.5, **more)),
}
SCALE = 2.0**10
SHAPES = [(3, 5), (7,), (2, 3, 2), (), *[(1,)] * 5]  # enough that TensorFlow checks them by a sum


def started():
    rng = np.random.default_rng(0)
    names = ["left" if number % 2 else "decayed" for number in range(len(SHAPES))]
    return [
        keras.Variable(rng.normal(size=shape).astype("float32"), name=name)
        for shape, name in zip(SHAPES, names, strict=True)
    ]


def gradients(seed, steps, sizes=(-12, 6)):
    """Return gradients for each step and variable, whose magnitudes differ between steps."""
    rng = np.random.default_rng(seed)
    powers = 10.0 ** rng.uniform(*sizes, size=(steps, len(SHAPES)))
    return [
        [(p * rng.normal(size=s)).astype("float32") for p, s in zip(row, SHAPES, strict=True)]
        for row in powers
    ]


def trained(optimizer, step, sequence):
    """Return the weights after each step."""
    variables, after = started(), []
    scale = np.float32(SCALE if isinstance(optimizer, LossScaleOptimizer) else 1)
    for grads in sequence:
        step(optimizer, tensors(*(g * scale for g in grads)), variables)
        after.append(numpy(variables))
    return after


# TensorFlow's Adam kernel computes 1 - beta_2 in float32, which for 0.999 is off by 1.3e-5, and the
# root of the second moment by half of it. Everything else is rounding.
def tolerance(optimizer):
    return 1e-5 if BACKEND == "tensorflow" and isinstance(optimizer, o.Adam) else 2e-6


@pytest.mark.parametrize("make", by_name(FUSED, ["Adam", "Nesterov", "clipped"]))
@each_of(WAYS, WAYS[:2])
def test_steps_equal_keras_to_rounding(make, step):
    check_steps(make, step, 40)


@pytest.mark.full
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_thousands_of_steps_equal_keras_to_rounding(make):
    check_steps(make, graph if BACKEND == "tensorflow" else eager, 2000)


@pytest.mark.parametrize("make", [FUSED["Adam"], FUSED["momentum"]], ids=["Adam", "momentum"])
@pytest.mark.parametrize("size", [-12, 6])
def test_small_and_large_gradients_give_steps_that_equal_keras_to_rounding(make, size):
    check_steps(make, eager, 10, (size, size))


def check_steps(make, step, steps, sizes=(-12, 6)):
    sequence, steps_taken = gradients(1, steps, sizes), steps
    wrapped = LossScaleOptimizer(make(), loss_scale=SCALE)
    assert wrapped.fused_update is not None
    got, expected = (trained(each, step, sequence) for each in (wrapped, make()))
    for index, start in enumerate(numpy(started())):
        steps = np.diff([start, *(weights[index] for weights in expected)], axis=0)
        way = np.abs(steps).sum(axis=0)
        off = np.abs(got[-1][index] - expected[-1][index])
        # Both round a weight twice a step, in the decay and in the update: the tolerance is three
        # deviations of that many roundings. For AdamW Keras is further off than the kernel.
        rounding = 3 * 2.0**-24 / 3**0.5 * (4 * steps_taken) ** 0.5
        assert np.all(off <= tolerance(make()) * way + rounding * np.abs(start))


BAD = {name: (make, np.inf) for name, make in FUSED.items()}
BAD |= {f"Adam, {bad}": (FUSED["Adam"], bad) for bad in (np.nan, -np.inf)}


@pytest.mark.parametrize(("make", "bad"), by_name(BAD, ["Adam", "momentum"]))
@each_of(WAYS, WAYS)
def test_a_bad_number_anywhere_changes_nothing(make, step, bad):
    variables = started()
    wrapped = LossScaleOptimizer(make(), loss_scale=SCALE)
    first, second, third = gradients(2, 3, (-2, 0))
    step(wrapped, tensors(*first), variables)
    before = numpy([*variables, *wrapped.inner_optimizer.variables])
    second[2][1, 2, 1] = bad
    step(wrapped, tensors(*second), variables)
    assert_same_bits(numpy([*variables, *wrapped.inner_optimizer.variables]), before)
    assert wrapped.nonfinite_counts.tolist() == [0, 0, 1, *[0] * 6]
    step(wrapped, tensors(*third), variables)
    assert (wrapped.applied_steps, wrapped.skipped_steps) == (2, 1)
    assert int(wrapped.iterations) == 2


@each_of(WAYS, WAYS)
def test_huge_gradients_are_finite_and_a_scale_below_1_can_make_them_infinite(step):
    variables = started()
    huge = [np.full(shape, 3e38, "float32") for shape in SHAPES]
    wrapped = LossScaleOptimizer("sgd", loss_scale=1.0)
    step(wrapped, tensors(*huge), variables)
    assert (wrapped.applied_steps, wrapped.skipped_steps) == (1, 0)
    # Of the second even the squares of the gradients are finite.
    for scale, size in ((0.5, 3e38), (2.0**-90, 1e15)):
        small = LossScaleOptimizer("sgd", loss_scale=scale)
        step(small, tensors(*(np.full(shape, size, "float32") for shape in SHAPES)), started())
        assert (small.applied_steps, small.skipped_steps) == (0, 1)


class OwnAdam(o.Adam):
    """A user-defined subclass, which could override anything."""


def overridden():
    adam = o.Adam(0.01)
    object.__setattr__(adam, "update_step", functools.partial(adam.update_step))
    return adam


KERAS_OWN = {
    "a subclass": lambda: OwnAdam(0.01),
    "a method of one object": overridden,
    "amsgrad": lambda: o.Adam(0.01, amsgrad=True),
    "use_ema": lambda: o.SGD(0.01, use_ema=True),
    "accumulation": lambda: o.SGD(0.01, gradient_accumulation_steps=2),
    "clipnorm": lambda: o.Adam(0.01, clipnorm=0.5),
    "clipvalue": lambda: o.Adam(0.01, clipvalue=0.5),
    "another class": lambda: o.RMSprop(0.01),
}


@pytest.mark.parametrize("make", by_name(KERAS_OWN, ["a subclass", "a method of one object"]))
def test_optimizers_that_do_more_than_the_kernel_are_left_to_keras(make):
    sequence = gradients(3, 4, (-2, 0))
    wrapped = LossScaleOptimizer(make(), loss_scale=SCALE)
    got, expected = (trained(each, eager, sequence)[-1] for each in (wrapped, make()))
    assert_same_bits(got, expected)


@full_on("torch")
def test_variables_other_than_plain_float32_ones_are_left_to_keras():
    for settings in ({"constraint": keras.constraints.NonNeg()}, {"dtype": "float16"}):
        results = []
        for wrapped in (LossScaleOptimizer(o.SGD(0.25), loss_scale=4.0), o.SGD(0.25)):
            variable = keras.layers.Layer().add_weight(shape=(3,), initializer="ones", **settings)
            factor = 4.0 if isinstance(wrapped, LossScaleOptimizer) else 1.0
            wrapped.apply(tensors([8 * factor, 2 * factor, -factor]), [variable])
            results.append(numpy([variable]))
        assert_same_bits(*results)


@pytest.mark.backend("tensorflow")
def test_a_sparse_gradient_is_left_to_keras_and_stays_sparse_beside_a_fused_one():
    import tensorflow as tf

    def trained(optimizer, factor):
        table, other = variables_of(np.ones((4, 2)), [10.0, 20.0])

        @tf.function
        def step(values, dense):
            rows = tf.IndexedSlices(values, tf.constant([2]), tf.constant([4, 2]))
            optimizer.apply([rows, dense], [table, other])

        optimizer.build([table, other])
        for values, dense in ([2.0, 4.0], [1.0, -1.0]), ([0.0, 1.0], [3.0, 2.0]):
            step(tf.constant([values]) * factor, tf.constant(dense) * factor)
        functions = (
            step.get_concrete_function(tf.constant([[0.0, 0.0]]), tf.constant([0.0, 0.0]))
            .graph.as_graph_def()
            .library.function
        )
        kernels = [n.op for f in functions for n in f.node_def if n.op == "ResourceApplyAdam"]
        return len(kernels), numpy([table, other, *optimizer.variables])

    scaled = LossScaleOptimizer(o.Adam(0.5, weight_decay=0.1), loss_scale=2.0)
    kernels, (table, other, *_) = trained(scaled, 2.0)
    _, (expected, near, *_) = trained(o.Adam(0.5, weight_decay=0.1), 1.0)
    assert kernels == 1
    np.testing.assert_array_equal(table, expected)
    np.testing.assert_allclose(other, near, rtol=1e-5)
    assert int(scaled.iterations) == 2


@pytest.mark.backend("torch")
@pytest.mark.parametrize("make", by_name(FUSED, ["Adam", "Nesterov"]))
def test_large_variables_are_updated_in_pieces(make):
    """Longer than a piece and not a multiple of it; one gradient is in column-major order."""
    rng = np.random.default_rng(0)
    shapes = [(600, 700), (5,), (900, 650)]
    start = [rng.normal(size=shape).astype("float32") for shape in shapes]
    results = []
    for optimizer in (LossScaleOptimizer(make(), loss_scale=1.0), make()):
        variables = variables_of(*start)
        optimizer.build(variables)
        for seed in range(3):
            draw = np.random.default_rng(seed)
            first, second, third = tensors(*(draw.normal(size=s) for s in shapes))
            optimizer.apply([first, second, third.t().contiguous().t()], variables)
        results.append(numpy(variables))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_part_of_the_variables_can_be_updated():
    results = []
    for optimizer in (
        LossScaleOptimizer(FUSED["Adam"](), loss_scale=4.0),
        FUSED["Adam"](),
    ):
        variables = started()
        optimizer.build(variables)
        factor = np.float32(4 if isinstance(optimizer, LossScaleOptimizer) else 1)
        for grads in gradients(6, 3, (-2, 0)):
            optimizer.apply(tensors(*(g * factor for g in grads[1:3])), variables[1:3])
        results.append(numpy(variables))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_optimizer_inside_and_the_schedule_may_change_before_the_build():
    wrapped = LossScaleOptimizer(o.Adam(0.01), loss_scale=SCALE)
    wrapped.inner_optimizer = o.SGD(1.0)
    variable = variables_of([1.0])[0]
    wrapped.apply(tensors([SCALE]), [variable])
    assert numpy([variable])[0].tolist() == [0.0]
    wrapped.fused = False
    assert wrapped.fused_update is None


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_gradients_of_another_dtype_are_clipped_and_applied_as_by_keras(dtype):
    results = []
    for optimizer in (
        LossScaleOptimizer(o.SGD(1.0, global_clipnorm=1.0), loss_scale=1.0),
        o.SGD(1.0, global_clipnorm=1.0),
    ):
        variable = variables_of([1.0, 1.0])[0]
        given = keras.ops.convert_to_tensor(np.asarray([3e-4, 4.0], dtype))
        if not isinstance(optimizer, LossScaleOptimizer):
            given = keras.ops.cast(given, "float32")
        optimizer.apply([given], [variable])
        results.append(numpy([variable])[0])
    np.testing.assert_allclose(*results, rtol=1e-5)


@pytest.mark.backend("torch")
def test_tensors_with_another_memory_layout_are_updated_correctly():
    rng = np.random.default_rng(0)
    value, gradient = rng.normal(size=(2, 3, 5)).astype("float32")
    results = []
    for wrap in (lambda plain: LossScaleOptimizer(plain, loss_scale=1.0), lambda plain: plain):
        straight, turned = keras.Variable(value), keras.Variable(value)
        turned.value.data = turned.value.data.T.contiguous().T
        optimizer = wrap(o.Adam(0.1))
        transposed = tensors(gradient.T)[0].T
        for _ in range(3):
            optimizer.apply([transposed, transposed], [straight, turned])
        results.append(numpy([straight, turned]))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("rate", [2.0**-27, 1e-14])
def test_a_small_learning_rate_keeps_its_precision(rate):
    moments = []
    for wrap, scale in ((lambda inner: inner, 1.0), (LossScaleOptimizer, SCALE)):
        inner = o.SGD(rate * SCALE, momentum=0.9)
        optimizer = wrap(inner, loss_scale=SCALE) if scale > 1 else wrap(inner)
        optimizer.apply(tensors(np.full((3,), 0.3 * scale, "float32")), [keras.Variable([0.0] * 3)])
        moments.append(numpy(inner.momentums))
    np.testing.assert_allclose(moments[1], moments[0], rtol=2e-7)


@pytest.mark.backend("torch")
@pytest.mark.parametrize("make", by_name(FUSED, ["Adam", "momentum", "clipped"]))
def test_torchs_pure_step_is_the_eager_one(make):
    grads = tensors(*(g * np.float32(SCALE) for g in gradients(8, 1, (-2, 0))[0]))
    eagerly, purely = (LossScaleOptimizer(make(), loss_scale=SCALE) for _ in range(2))
    variables, others = started(), started()
    eagerly.apply(grads, variables)
    purely.build(others)
    state = [v.value for v in purely.variables]
    weights, _ = purely.stateless_apply(state, grads, [v.value for v in others])
    assert_same_bits([keras.ops.convert_to_numpy(w) for w in weights], numpy(variables))


def test_scales_that_a_learning_rate_cannot_be_divided_by_are_left_to_keras():
    schedule = DynamicLossScale(max_scale=2.0**80)
    assert LossScaleOptimizer("sgd", loss_scale=schedule).fused_update is None
    assert LossScaleOptimizer("sgd", loss_scale=2.0**80).fused_update is None
    wrapped = LossScaleOptimizer("sgd", loss_scale=2.0)
    wrapped.build(started())
    with pytest.raises(LossScaleError, match="fused=False"):
        wrapped.loss_scale = 2.0**80
    assert wrapped.loss_scale == 2.0


def test_fusing_can_be_turned_off_and_files_keep_that():
    wrapped = LossScaleOptimizer(FUSED["Adam"](), loss_scale=SCALE, fused=False)
    assert wrapped.fused_update is None
    config = keras.saving.serialize_keras_object(wrapped)
    assert keras.saving.deserialize_keras_object(config).fused_update is None
    sequence = gradients(4, 3)
    got, expected = (trained(each, eager, sequence)[-1] for each in (wrapped, FUSED["Adam"]()))
    assert_same_bits(got, expected)


def test_the_gradients_are_left_as_they_are():
    given = tensors(*gradients(5, 1)[0])
    before = [np.array(keras.ops.convert_to_numpy(g)) for g in given]
    for make in FUSED.values():
        wrapped = LossScaleOptimizer(make(), loss_scale=SCALE)
        wrapped.apply(given, started())
    assert_same_bits([keras.ops.convert_to_numpy(g) for g in given], before)


@pytest.mark.full
@pytest.mark.backend("torch")
@pytest.mark.filterwarnings("ignore")  # torch's compiler gives many, of what it traces
def test_torch_compile_takes_no_kernel_that_it_cannot_trace():
    def trained(**how):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        model.compile(LossScaleOptimizer("adam", loss_scale=64.0), "mse", **how)
        model.fit(np.ones((8, 4), "float32"), np.ones((8, 2), "float32"), verbose=0)
        return model.get_weights()

    for each, wanted in zip(trained(jit_compile=True), trained(jit_compile=False), strict=True):
        np.testing.assert_allclose(each, wanted, rtol=1e-5)
