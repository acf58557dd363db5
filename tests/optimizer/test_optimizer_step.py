"""One step of the wrapped optimizer: what it applies, what it leaves alone, what it counts."""

import keras
import numpy as np
import pytest
from helpers.marks import by_name, few
from helpers.stepping import (
    BACKEND,
    EXACT_WAYS,
    WAYS,
    Stock,
    assert_same_bits,
    each_of,
    eager,
    numpy,
    stateless,
    step_of,
    stock_step,
    tensors,
    variables_of,
)
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.loss_scale import DynamicLossScale, FixedLossScale
from kerasmp.optimizer import LossScaleOptimizer

START = ([[1.0, -2.0], [3.0, 4.0]], [0.5, -0.5])
NO_GRADIENT = "ignore:Gradients do not exist for variables:UserWarning"


def _gradients(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return tensors(*(scale * rng.standard_normal(np.shape(value)) for value in START))


def _overflowing(seed=0, value=np.inf):
    good, last = numpy_of(_gradients(seed))
    last[1] = value
    return tensors(good, last)


def numpy_of(values):
    return [np.array(ops.convert_to_numpy(value)) for value in values]


@each_of(WAYS, WAYS[:2])
def test_one_bad_element_anywhere_skips_and_is_counted_for_its_variable(step):
    variables, counts, nan = variables_of(*START), [0, 0], [0, 0]
    optimizer = LossScaleOptimizer("sgd")
    for value in (np.inf, -np.inf, np.nan):
        for position in (0, 1):
            grads = numpy_of(_gradients(0))
            grads[position].flat[-1] = value
            before = optimizer.loss_scale
            step(optimizer, tensors(*grads), variables)
            assert_same_bits(numpy(variables), numpy(variables_of(*START)))
            counts[position] += 1
            nan[position] += np.isnan(value)
            assert optimizer.nonfinite_counts.tolist() == counts
            assert optimizer.nan_counts.tolist() == nan
            assert optimizer.loss_scale == before / 2


# Dtype of the variable, of the gradient, and the scale. Small tensors are checked in other ways.
AMONG_THOUSANDS = [
    ("float32", "float32", 2.0**15),
    ("float32", "float32", 0.5),
    ("float32", "bfloat16", 2.0**15),
    ("float16", "float16", 2.0**10),
]


@each_of([*WAYS, *EXACT_WAYS[:1]] if BACKEND == "jax" else WAYS, WAYS)
@pytest.mark.parametrize(("dtype", "gradients", "scale"), few(AMONG_THOUSANDS, AMONG_THOUSANDS[:1]))
def test_one_bad_element_among_thousands_skips(step, dtype, gradients, scale):
    variables = [keras.Variable(np.ones((70, 70)), dtype=dtype)]
    start = numpy(variables)
    optimizer = LossScaleOptimizer("sgd", loss_scale=FixedLossScale(scale))
    for value in (np.inf, -np.inf, np.nan):
        for place in (0, 2500, -1):
            gradient = np.ones((70, 70), "float32")
            gradient.flat[place] = value
            step(optimizer, [ops.cast(gradient, gradients)], variables)
    assert_same_bits(numpy(variables), start)
    assert optimizer.nonfinite_counts.tolist() == [9]
    assert optimizer.nan_counts.tolist() == [3]


@each_of(WAYS)
@pytest.mark.filterwarnings(NO_GRADIENT)
def test_counts_skip_variables_without_a_gradient(step):
    variables = variables_of([1.0], [2.0], [3.0], [4.0])
    optimizer = LossScaleOptimizer("sgd", loss_scale=1.0)
    step(optimizer, tensors([1.0], None, [np.nan], None), variables)
    assert optimizer.nonfinite_counts.tolist() == [0, 0, 1, 0]
    step(optimizer, tensors([1.0], None, [1.0], None), variables)
    assert optimizer.applied_steps == 1
    assert optimizer.nonfinite_counts.tolist() == [0, 0, 1, 0]


def test_counts_find_the_variables_of_a_call_with_some_of_them_in_another_order():
    variables = variables_of([1.0], [2.0], [3.0])
    optimizer = LossScaleOptimizer("sgd")
    optimizer.build(variables)
    optimizer.apply(tensors([np.inf], [1.0]), [variables[2], variables[0]])
    assert optimizer.nonfinite_counts.tolist() == [0, 0, 1]


def test_a_call_with_all_variables_in_another_order_finds_each_state():
    variables = variables_of([1.0], [2.0], [3.0])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0, momentum=0.5), loss_scale=1)
    optimizer.build(variables)
    optimizer.apply(tensors([1.0], [2.0], [4.0]), variables)
    optimizer.apply(tensors([4.0], [2.0], [1.0]), variables[::-1])
    assert np.concatenate(numpy(variables)).tolist() == [1 - 2.5, 2 - 5, 3 - 10]
    optimizer.apply(tensors([np.nan], [2.0], [1.0]), variables[::-1])
    assert optimizer.nonfinite_counts.tolist() == [0, 0, 1]
    assert optimizer.nan_counts.tolist() == [0, 0, 1]


class Recorder(keras.optimizers.SGD):
    """SGD that records the types of its gradients."""

    def apply(self, grads, trainable_variables=None):
        self.seen = [(type(g).__name__, keras.backend.standardize_dtype(g.dtype)) for g in grads]
        return super().apply(grads, trainable_variables)


@each_of(WAYS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_inner_optimizer_gets_unscaled_float32_gradients(step, dtype):
    optimizer = LossScaleOptimizer(Recorder(1.0), loss_scale=2.0**15)
    variables = variables_of([0.0, 0.0])
    # 2**-13 unscaled is 2**-28 here: float16 would lose it.
    step(optimizer, [ops.cast(tensors([2.0**-13, 2.0**10])[0], dtype)], variables)
    assert [d for _, d in optimizer.inner_optimizer.seen] == ["float32"]
    assert_same_bits(numpy(variables), [np.array([-(2.0**-28), -(2.0**-5)], "float32")])


@pytest.mark.full
@pytest.mark.backend("torch")
def test_stock_keras_loses_small_float16_gradients_by_unscaling():
    variables = variables_of([0.0])
    optimizer = Stock(keras.optimizers.SGD(1.0))
    step_of(optimizer)(optimizer, [ops.cast(tensors([2.0**-13])[0], "float16")], variables)
    assert numpy(variables)[0].tolist() == [0.0]


@pytest.mark.parametrize("built", [True, False])
def test_a_float16_loss_is_scaled_in_float32(built):
    optimizer = LossScaleOptimizer(keras.optimizers.SGD())
    if built:
        optimizer.build(variables_of([1.0]))
    scaled = optimizer.scale_loss(ops.cast(3.0, "float16"))
    assert keras.backend.standardize_dtype(scaled.dtype) == "float32"
    assert float(scaled) == 98304.0


@pytest.mark.full
@pytest.mark.backend("tensorflow", "jax")
def test_a_float16_loss_is_scaled_to_infinity_by_stock_keras_before_build():
    scaled = Stock(keras.optimizers.SGD()).scale_loss(ops.cast(3.0, "float16"))
    assert float(ops.cast(scaled, "float32")) == np.inf


@pytest.mark.parametrize("built", [True, False])
def test_scale_loss_before_and_after_build(built):
    optimizer = LossScaleOptimizer("sgd", loss_scale=8.0)
    if built:
        optimizer.build(variables_of([1.0]))
    assert float(optimizer.scale_loss(ops.array(0.5))) == 4.0
    assert ops.convert_to_numpy(optimizer.scale_loss(ops.array([1.0, 2.0]))).tolist() == [8, 16]


@each_of(WAYS)
def test_variables_overwritten_with_their_gradient_get_it_unchanged(step):
    variables = variables_of([1.0, 2.0], [3.0])
    variables[1].overwrite_with_gradient = True
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=4.0)
    step(optimizer, tensors([4.0, 8.0], [7.0]), variables)
    assert [v.tolist() for v in numpy(variables)] == [[0.0, 0.0], [7.0]]
    step(optimizer, tensors([4.0, np.inf], [9.0]), variables)
    assert [v.tolist() for v in numpy(variables)] == [[0.0, 0.0], [7.0]]


BELOW_ONE = [FixedLossScale(2.0**-10), DynamicLossScale(2.0**-10, min_scale=2.0**-20)]


@each_of(WAYS)
@pytest.mark.parametrize(
    "schedule", few(BELOW_ONE, BELOW_ONE[:1]), ids=lambda schedule: type(schedule).__name__
)
def test_gradients_that_overflow_when_they_are_unscaled_are_skipped(step, schedule):
    variables = variables_of([1.0])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=schedule)
    step(optimizer, tensors([1e37]), variables)
    assert optimizer.skipped_steps == 1
    assert numpy(variables)[0].tolist() == [1.0]


def test_build_twice_keeps_the_state():
    variables = variables_of(*START)
    optimizer = LossScaleOptimizer("adam")
    optimizer.apply(_overflowing(), variables)
    names = [v.path for v in optimizer.variables]
    optimizer.build(variables)
    assert [v.path for v in optimizer.variables] == names
    assert optimizer.skipped_steps == 1


def test_an_inner_optimizer_that_is_built_already_keeps_its_state():
    variables = variables_of(*START)
    inner = keras.optimizers.Adam(0.1)
    inner.apply(_gradients(0), variables)
    optimizer = LossScaleOptimizer(inner)
    optimizer.apply(_gradients(1, 2.0**15), variables)
    assert int(optimizer.iterations.value) == 2


def test_before_build_everything_reads_as_a_fresh_start():
    optimizer = LossScaleOptimizer("sgd", initial_scale=64.0, dynamic_growth_steps=7)
    assert (optimizer.loss_scale, optimizer.scale) == (64.0, 64.0)
    assert (optimizer.skipped_steps, optimizer.applied_steps) == (0, 0)
    assert (optimizer.consecutive_skips, optimizer.last_step_skipped) == (0, False)
    assert optimizer.nonfinite_counts.tolist() == []
    assert not any(optimizer.skip_causes.values())
    assert optimizer.initial_scale == 64.0
    assert optimizer.dynamic_growth_steps == 7


class TestSettingTheScale:
    def _built(self, **kwargs):
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), **kwargs)
        optimizer.build(variables_of(*START))
        return optimizer

    def test_takes_effect_at_once_and_starts_the_count_again(self):
        optimizer = self._built()
        optimizer.apply(_gradients(0))
        optimizer.loss_scale = 256
        assert (optimizer.loss_scale, optimizer.scale) == (256.0, 256.0)
        assert int(optimizer.step_counter.value) == 0
        assert float(optimizer.scale_loss(ops.array(1.0))) == 256.0
        optimizer.scale = 4.0
        assert optimizer.loss_scale == 4.0

    @pytest.mark.parametrize("value", [2.0**-15, 2.0**25, np.nan])
    def test_refuses_what_the_schedule_does_not_allow(self, value):
        optimizer = self._built()
        with pytest.raises(LossScaleError):
            optimizer.loss_scale = value
        assert optimizer.loss_scale == 2.0**15

    def test_a_fixed_one_is_in_the_configuration_too(self):
        optimizer = self._built(loss_scale=0.25)
        optimizer.loss_scale = 64.0
        again = LossScaleOptimizer.from_config(optimizer.get_config())
        assert again.schedule == FixedLossScale(64.0)
        assert optimizer.schedule == FixedLossScale(0.25)
        optimizer.dynamic_scale.assign(np.nan)
        again = LossScaleOptimizer.from_config(optimizer.get_config())
        assert again.schedule == FixedLossScale(0.25)

    def test_ends_a_recovery(self):
        optimizer = self._built()
        optimizer.recover_to.assign(2.0**15)
        optimizer.loss_scale = 4.0
        assert float(ops.convert_to_numpy(optimizer.recover_to.value)) == 0.0

    def test_refuses_before_build_and_says_what_to_do(self):
        with pytest.raises(LossScaleError, match="Pass loss_scale= to the constructor"):
            LossScaleOptimizer("sgd").loss_scale = 4.0

    def test_what_was_read_can_be_set_again(self):
        optimizer = self._built(loss_scale=DynamicLossScale(1.1, min_scale=1.1, max_scale=1.1))
        read = optimizer.loss_scale
        optimizer.loss_scale = read
        assert optimizer.loss_scale == read == float(np.float32(1.1))


class TestStatelessApply:
    def _parts(self):
        variables = variables_of(*START)
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0))
        optimizer.build(variables)
        return optimizer, [v.value for v in optimizer.variables], [v.value for v in variables]

    @pytest.mark.backend("jax")
    @pytest.mark.parametrize("good", [True, False])
    def test_changes_nothing_itself(self, good):
        optimizer, state, values = self._parts()
        before = numpy(optimizer.variables)
        optimizer.stateless_apply(state, _gradients(0) if good else _overflowing(), values)
        assert_same_bits(numpy(optimizer.variables), before)

    @pytest.mark.backend("jax", "torch")
    def test_takes_iterators(self):
        results = []
        for once in (iter, list):
            optimizer, state, values = self._parts()
            new = optimizer.stateless_apply(once(state), once(_gradients(1)), once(values))
            results.append([keras.ops.convert_to_numpy(value) for part in new for value in part])
        assert_same_bits(*results)


@pytest.mark.full
@pytest.mark.backend("jax")
def test_eager_apply_works_on_jax_where_stock_keras_leaks_tracers():
    """Fault 9."""
    variables = variables_of(*START)
    with pytest.raises(Exception, match="tracer"):
        eager(Stock(keras.optimizers.SGD(1.0)), _gradients(0), variables)
    variables = variables_of(*START)
    ours = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=1.0)
    eager(ours, _gradients(0), variables)
    plain = variables_of(*START)
    keras.optimizers.SGD(1.0).apply(_gradients(0), plain)
    assert_same_bits(numpy(variables), numpy(plain))
    assert stock_step is stateless


@pytest.mark.backend("tensorflow")
@each_of(WAYS)
def test_sparse_gradients_stay_sparse_where_stock_keras_densifies(step):
    """Fault 19."""
    import tensorflow as tf

    def slices(values):
        return tf.IndexedSlices(tf.constant(values), tf.constant([0, 2]), tf.constant([4, 1]))

    variables = variables_of([[0.0]] * 4)
    optimizer = LossScaleOptimizer(Recorder(1.0), loss_scale=4.0)
    step(optimizer, [slices([[4.0], [8.0]])], variables)
    assert optimizer.inner_optimizer.seen == [("IndexedSlices", "float32")]
    assert numpy(variables)[0].ravel().tolist() == [-1.0, 0.0, -2.0, 0.0]
    step(optimizer, [slices([[4.0], [np.nan]])], variables)
    assert numpy(variables)[0].ravel().tolist() == [-1.0, 0.0, -2.0, 0.0]
    assert optimizer.nonfinite_counts.tolist() == [1]


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("cls", by_name({"ours": LossScaleOptimizer, "stock": Stock}, ["ours"]))
def test_the_finite_check_of_a_sparse_gradient_builds_no_dense_tensor(cls):
    """Fault 19: an embedding of a million rows must not be densified to check three of them."""
    import tensorflow as tf

    variables = variables_of(np.zeros((1000, 2)))
    optimizer = cls(keras.optimizers.SGD(1.0))
    optimizer.build(variables)

    @tf.function
    def step(values):
        optimizer.apply([tf.IndexedSlices(values, tf.constant([1]), tf.constant([1000, 2]))])

    definition = step.get_concrete_function(tf.ones((1, 2))).graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    dense = any(node.op in {"TensorScatterUpdate", "UnsortedSegmentSum"} for node in nodes)
    assert dense is (cls is Stock)
