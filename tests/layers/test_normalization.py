"""BatchNormalization: a bad batch leaves no trace in the moving statistics."""

import keras
import numpy as np
import pytest
from helpers.marks import full, full_on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import ops

from kerasmp.layers import BatchNormalization
from kerasmp.optimizer import LossScaleOptimizer

Stock = keras.layers.BatchNormalization
# How a step can be run: `compile` arguments.
MODES = {
    "tensorflow": [
        {"run_eagerly": True},
        full({"jit_compile": False}),
        full({"jit_compile": True}),
    ],
    "jax": [full({"run_eagerly": True}), {"jit_compile": True}],
    "torch": [{"run_eagerly": True}],
}[keras.backend.backend()]
RENORM = pytest.param({"renorm": True}, marks=pytest.mark.keras("3.14"))  # older ones lack it
POLICIES = ["mixed_float16", full("mixed_bfloat16"), full("float32")]
BAD = [float("inf"), float("-inf"), float("nan")]


def numpy_of(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def statistics(layer):
    return {v.name: numpy_of(v) for v in layer.non_trainable_variables}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def batch(seed=0, shape=(8, 3)):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def with_a_bad_value(value):
    bad = batch()
    bad[2, 1] = value  # one channel of three
    return bad


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("arguments", [{}, RENORM], ids=str)
def test_a_bad_value_leaves_no_trace(value, arguments):
    layer = BatchNormalization(dtype="mixed_float16", **arguments)
    layer(batch(1), training=True)
    before = statistics(layer)
    outputs = layer(with_a_bad_value(value), training=True)
    assert_same(statistics(layer), before)
    assert not np.all(np.isfinite(numpy_of(ops.cast(outputs, "float32"))))  # nothing is hidden
    assert {v.dtype for v in layer.variables} == {"float32"}


def test_a_variance_that_overflows_under_a_finite_mean_leaves_no_trace():
    layer = BatchNormalization(dtype="float32")
    layer(batch(1), training=True)
    before = statistics(layer)
    layer(np.float32([[3e20] * 3, [-3e20] * 3]), training=True)
    assert_same(statistics(layer), before)


@full_on("jax")
@pytest.mark.parametrize("arguments", [{}, RENORM, {"axis": 1}], ids=str)
@pytest.mark.parametrize("policy", [*POLICIES, "float16"])
def test_finite_batches_give_the_results_of_the_stock_layer_bit_for_bit(arguments, policy):
    ours, stock = (cls(dtype=policy, **arguments) for cls in (BatchNormalization, Stock))
    for seed in range(3):
        x = batch(seed, (4, 5, 3))
        got, want = (layer(x, training=True) for layer in (ours, stock))
        assert keras.backend.standardize_dtype(got.dtype) == ours.compute_dtype
        np.testing.assert_array_equal(
            numpy_of(ops.cast(got, "float32")), numpy_of(ops.cast(want, "float32"))
        )
        assert_same(statistics(ours), statistics(stock))


MIXTURES = st.lists(st.sampled_from(["good", *BAD]), max_size=5)
MANY = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.full
@MANY
@given(MIXTURES)
def test_any_mixture_of_batches_equals_its_good_ones_alone(kinds):
    check_mixture(kinds)


@full_on("jax")
@settings(MANY, max_examples=5)
@given(MIXTURES)
def test_a_few_mixtures_of_batches_equal_their_good_ones_alone(kinds):
    check_mixture(kinds)


def check_mixture(kinds):
    with_bad, without = BatchNormalization(), Stock()
    for layer in (with_bad, without):
        layer.build((None, 3))
    for seed, kind in enumerate(kinds):
        x = batch(seed)
        if kind == "good":
            without(x, training=True)
        else:
            x[seed, seed % 3] = kind
        with_bad(x, training=True)
    assert_same(statistics(with_bad), statistics(without))


@full_on("jax")
def test_masks_count_as_in_stock_and_do_not_let_a_bad_value_in():
    mask = np.array([[True, True, False]] * 4)
    good = batch(1, (4, 3, 2))
    bad = good.copy()
    bad[0, 1, 0] = float("inf")
    ours, stock = BatchNormalization(), Stock()
    for layer in (ours, stock):
        layer(good, mask=mask, training=True)
    before = statistics(ours)
    assert_same(before, statistics(stock))
    unmasked = Stock()
    unmasked(good, training=True)
    assert np.any(statistics(unmasked)["moving_mean"] != before["moving_mean"])
    ours(bad, mask=mask, training=True)
    assert_same(statistics(ours), before)


def test_a_mask_of_another_rank_is_refused_as_in_stock():
    with pytest.raises(ValueError, match="one dimension less"):
        BatchNormalization()(batch(), mask=np.ones((8, 3), bool), training=True)


@full_on("jax")
@pytest.mark.parametrize(("trainable", "training"), [(True, False), (False, True), (True, None)])
def test_inference_and_frozen_layers_equal_the_stock_ones(trainable, training):
    ours, stock = (cls(trainable=trainable) for cls in (BatchNormalization, Stock))
    for layer in (ours, stock):
        layer.build((None, 3))
        layer.moving_mean.assign([1.0, 2.0, 3.0])
    before = statistics(ours)
    x = batch()
    np.testing.assert_array_equal(
        numpy_of(ours(x, training=training)), numpy_of(stock(x, training=training))
    )
    ours(np.full((8, 3), np.nan, "float32"), training=training)
    assert_same(statistics(ours), before)


def trained(cls, batches, mode, **arguments):
    """Return a stock model trained on `batches`, and its normalization layer."""
    keras.utils.set_random_seed(3)
    norm = cls(**arguments)
    positive = keras.initializers.RandomUniform(0.5, 1.0, seed=1)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, kernel_initializer=positive),
            norm,
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), loss_scale=64)
    model.compile(optimizer, "mse", **mode)
    x = np.concatenate(batches)
    model.fit(x, np.ones((len(x), 1)), batch_size=8, shuffle=False, verbose=0)
    return model, norm


def good_and_bad():
    """Return two good batches, and the same with one that overflows between them."""
    good = [batch(1), batch(2)]
    overflow = np.full((8, 3), 6e4, "float32")  # finite, until the Dense sums it in float16
    overflow[::2] *= -1
    return good, [good[0], overflow, good[1]]


RENORM_TOO = pytest.param({"renorm": True}, marks=[pytest.mark.keras("3.14"), pytest.mark.full])


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("arguments", [{}, RENORM_TOO], ids=str)
def test_training_goes_on_as_if_the_bad_batch_had_not_been(mode, arguments):
    keras.config.set_dtype_policy("mixed_float16")
    good, bad = good_and_bad()
    alone, _ = trained(BatchNormalization, good, mode, **arguments)
    model, norm = trained(BatchNormalization, bad, mode, **arguments)
    assert (model.optimizer.applied_steps, model.optimizer.skipped_steps) == (2, 1)
    for got, want in zip(model.variables, alone.variables, strict=True):
        np.testing.assert_array_equal(numpy_of(got), numpy_of(want), err_msg=got.path)
    assert {v.dtype for v in norm.variables} == {"float32"}
    assert np.all(np.isfinite(numpy_of(model(good[0]))))


@pytest.mark.full
def test_with_the_stock_layer_a_bad_batch_makes_predictions_nan():
    keras.config.set_dtype_policy("mixed_float16")
    good, bad = good_and_bad()
    model, _ = trained(Stock, bad, {})
    assert np.all(np.isfinite(numpy_of(model.layers[0].kernel)))
    assert not np.any(np.isfinite(numpy_of(model(good[0]))))


@pytest.mark.backend("tensorflow")
def test_one_bad_replica_restores_all_of_them():
    import tensorflow as tf

    cpus = tf.config.list_logical_devices("CPU")
    strategy = tf.distribute.MirroredStrategy([device.name for device in cpus])
    with strategy.scope():
        layer = BatchNormalization(synchronized=True)
        layer.build((None, 3))
    before = statistics(layer)
    bad = batch()
    bad[0, 0] = np.inf
    run = tf.function(lambda x: strategy.run(lambda: layer(x, training=True)))
    run(batch(1))
    after_good = statistics(layer)
    assert np.any(after_good["moving_mean"] != before["moving_mean"])
    run(bad)
    assert_same(statistics(layer), after_good)
