"""Attention and AdditiveAttention round nothing to float16 except their outputs."""

import keras
import numpy as np
import pytest
from helpers.float16 import error, numpy_of, rounded, step
from helpers.marks import full, full_on, in_each_way
from helpers.references import softmax, softmax_gradient
from keras import ops

import kerasmp as mp
from kerasmp.layers import AdditiveAttention, Attention

BATCH, QUERIES, KEYS = 2, 4, 6
ALLOWED = 4.0  # times the error of the best that float16 can do
DOT = (Attention, keras.layers.Attention)
ADD = (AdditiveAttention, keras.layers.AdditiveAttention)
PAIRS = [DOT, ADD]
# Constructor arguments of Attention; None is AdditiveAttention.
KINDS = [{}, {"use_scale": True}, {"score_mode": "concat", "use_scale": True}, None]
# Without a scale there are fewer sources of error.
FEWER = [full({}), full({"use_scale": True}), *KINDS[2:]]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
some_kinds = pytest.mark.parametrize("kind", FEWER, ids=str)
SCALE = 1 + 2.0**-12  # not representable in float16


def made(kind, which=0, depth=16, dtype="mixed_float16", **settings):
    pair, arguments = (ADD, {}) if kind is None else (DOT, kind)
    layer = pair[which](**arguments, **settings, dtype=dtype)
    layer.build([(BATCH, QUERIES, depth), (BATCH, KEYS, depth)])
    for variable in layer.trainable_variables:
        spread = np.random.default_rng(5).normal(size=variable.shape) if variable.shape else 0.0
        variable.assign(SCALE + spread)
    return layer


def drawn(std, depth=16, seed=0):
    rng = np.random.default_rng(seed)
    query, value = (rounded(rng.normal(0, std, (BATCH, n, depth))) for n in (QUERIES, KEYS))
    return query, value, rng.normal(size=query.shape).astype("float16")


def reference(kind, layer, inputs, upstream, *, mask=None, dtype="float64", less=0.0):
    """Return outputs and gradients of query, value and the variables of the layer, in NumPy.

    `less` is the relative error of the weights.
    """
    weights_in = {v.name: np.array(v).astype(dtype) for v in layer.trainable_variables}
    query, value, upstream = (x.astype(dtype) for x in (*inputs, upstream))
    scale = weights_in.get("scale", np.ones((), dtype))
    summed = query[:, :, None] + value[:, None]
    if kind is None:
        inner, factor = np.tanh(summed), scale
        scores = (factor * inner).sum(-1)
    elif "score_mode" in kind:
        inner, factor = np.tanh(scale * summed), weights_in["concat_score_weight"]
        scores = factor * inner.sum(-1)
    else:
        products = query @ value.swapaxes(1, 2)
        scores = scale * products
    weights = softmax(scores, mask=mask) * np.asarray(1 - less, dtype)
    outputs = weights @ value
    to_scores = softmax_gradient(weights, upstream @ value.swapaxes(1, 2))
    to_value = weights.swapaxes(1, 2) @ upstream
    if kind is None or "score_mode" in kind:
        each = to_scores[..., None]
        to_sum = each * factor * (1 - inner**2)
        if kind is None:
            of_variables = [(each * inner).sum((0, 1, 2))]
        else:
            of_variables = [(to_sum * summed).sum(), (each * inner).sum()]
            to_sum *= scale
        return outputs, [to_sum.sum(2), to_value + to_sum.sum(1), *of_variables]
    to_products = to_scores * scale
    of_variables = [(to_scores * products).sum()] if kind else []
    to_value += to_products.swapaxes(1, 2) @ query
    return outputs, [to_products @ value, to_value, *of_variables]


def assert_as_good_as_float16_can_be(kind, layer, std, mode, *, seen=None, **call):
    *inputs, upstream = drawn(std)
    outputs, gradients = step(
        mode,
        lambda *x: layer(list(x), **call),
        inputs,
        upstream,
        layer.trainable_variables,
    )
    # TensorFlow multiplies by the reciprocal of a softmax's sum: a weight of 1 can be one float32
    # below it. If all others are 0, this is the only error.
    exact, best, below = (
        reference(kind, layer, inputs, upstream, mask=seen, dtype=dtype, less=less)
        for dtype, less in (("float64", 0.0), ("float32", 0.0), ("float32", 2.0**-24))
    )
    for ours, want, *least in zip(
        *([first, *rest] for first, rest in ([outputs, gradients], exact, best, below)),
        strict=True,
    ):
        bounds = [error(rounded(each), want) for each in least]
        if None not in bounds:
            # A scalar can be exact by chance.
            assert error(ours, want) <= ALLOWED * max(bounds) + 1e-7
    return outputs, gradients


@in_each_way
@pytest.mark.parametrize("std", [full(0.5), full(5), 30])
@every_kind
def test_outputs_and_gradients_are_within_four_times_the_best(kind, std, mode):
    assert_as_good_as_float16_can_be(kind, made(kind), std, mode)


@full_on("jax")
@in_each_way
@pytest.mark.parametrize("kind", [{}, None], ids=str)
def test_rows_without_any_key_give_zeros_and_zero_gradients(kind, mode):
    """Batch entry 1 has no unmasked value; with negative scores stock Keras gives NaN there."""
    seen = np.ones((BATCH, KEYS), bool)
    seen[0, 3:] = False
    seen[1] = False
    layer = made(kind)
    masks = [None, seen]
    outputs, gradients = assert_as_good_as_float16_can_be(
        kind, layer, 30, mode, seen=seen[:, None], mask=masks
    )
    for array in (outputs, *gradients[:2]):
        assert not array[1].any()


def of_the_low_one(layer):
    """Return the output if the only unmasked value has by far the lowest score."""
    query, value = np.full((1, 1, 1), 6e4), np.array([5e4, -5e4]).reshape(1, 2, 1)
    return numpy_of(layer([query, value], mask=[None, np.array([[False, True]])])).item()


def test_a_mask_hides_values_however_low_the_scores_of_the_others_are():
    assert of_the_low_one(Attention(dtype="mixed_float16")) == rounded(-5e4)


@pytest.mark.full
def test_stock_keras_subtracts_too_little_from_masked_scores_even_in_float32():
    assert of_the_low_one(keras.layers.Attention(dtype="float32")) != rounded(-5e4)


@full_on("jax")
@some_kinds
def test_masks_of_every_kind_are_those_of_stock_in_float32(kind):
    query, value, _ = drawn(0.5)
    query, value = query.astype("float32"), value.astype("float32")
    key = np.random.default_rng(1).normal(size=value.shape).astype("float32")
    query_mask = np.array([[True] * 3 + [False]] * BATCH)
    value_mask = np.array([[True] * 4 + [False] * 2] * BATCH)
    ours, stock = (made(kind, which, dtype="float32") for which in (0, 1))
    calls = [
        {},
        {"use_causal_mask": True},
        {"mask": [query_mask, value_mask]},
        {"mask": [None, value_mask], "use_causal_mask": True},
    ]
    for call in calls:
        got, want = (
            layer([query, value, key], return_attention_scores=True, **call)
            for layer in (ours, stock)
        )
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(numpy_of(one), numpy_of(other), rtol=2e-5, atol=2e-6)


@full_on("jax")
@pytest.mark.parametrize("pair", PAIRS)
def test_dropout_drops_while_training_and_only_then(pair):
    query, value, _ = drawn(1)
    layer = pair[0](dropout=0.5, seed=1, dtype="mixed_float16")
    plain = numpy_of(layer([query, value]))
    np.testing.assert_array_equal(numpy_of(layer([query, value])), plain)
    one, two = (numpy_of(layer([query, value], training=True)) for _ in range(2))
    assert np.any(one != plain)
    assert np.any(one != two)
    _, scores = layer([query, value], training=True, return_attention_scores=True)
    assert (numpy_of(scores) == 0).any()


@full_on("jax")
@pytest.mark.keras("3.14")  # older versions cannot return scores from symbolic calls
@some_kinds
@pytest.mark.parametrize(
    "policy", ["mixed_float16", full("mixed_bfloat16"), "float16", full("float32")]
)
def test_symbolic_and_eager_outputs_have_the_same_dtypes(kind, policy):
    layer = made(kind, dtype=policy)
    query, value, _ = drawn(1)
    symbols = [keras.Input((None, 16)), keras.Input((None, 16))]
    outputs = layer([query, value], return_attention_scores=True)
    symbolic = layer(symbols, return_attention_scores=True)
    for one, other in zip(outputs, symbolic, strict=True):
        assert keras.backend.standardize_dtype(one.dtype) == other.dtype == layer.compute_dtype
        assert one.shape[1:] == other.shape[1:] or None in other.shape[1:]
    expected = "float16" if policy == "float16" else "float32"
    assert {v.dtype for v in layer.trainable_variables} <= {expected}


@pytest.mark.parametrize("pair", [DOT, full(ADD)], ids=["dot", "add"])
def test_training_moves_the_float32_scale_by_less_than_float16_can_tell(pair):
    keras.config.set_dtype_policy("mixed_float16")
    layer = pair[0](use_scale=True)
    inputs = [keras.Input((None, 16)), keras.Input((None, 16))]
    model = keras.Model(inputs, ops.cast(ops.mean(layer(inputs), axis=(1, 2)), "float32"))
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(1e-3), loss_scale=64)
    model.compile(optimizer, "mse", run_eagerly=keras.backend.backend() == "tensorflow")
    before = np.array(layer.scale)
    query, value, _ = drawn(1)
    model.fit([query, value], np.ones(BATCH), verbose=0)
    moved = np.abs(np.array(layer.scale) - before)
    assert 0 < moved.min() < 2.0**-12
