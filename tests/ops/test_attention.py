"""dot_product_attention is as accurate as float16 can be, whatever the scores are."""

import keras
import numpy as np
import pytest
from helpers.float16 import MODES, error, numpy_of, rounded, step
from helpers.marks import full, full_on, in_each_way
from helpers.references import attention
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from kerasmp import backend
from kerasmp.ops import dot_product_attention

stock = keras.ops.dot_product_attention
BATCH, QUERIES, KEYS = 2, 6, 9
ALLOWED = 4.0  # times the error of the best that float16 can do


def drawn(std, depth=16, heads=2, key_heads=2, seed=0):
    """Return query, key, value and the gradient of the output, all rounded to float16."""
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, QUERIES, heads), *[(BATCH, KEYS, key_heads)] * 2]
    inputs = [rounded(rng.normal(0, std, (*shape, depth))) for shape in shapes]
    return inputs, rng.normal(size=(BATCH, QUERIES, heads, depth)).astype("float16")


def assert_as_good_as_float16_can_be(got, inputs, upstream, **settings):
    """Compare outputs and gradients with float64; the best is float32, rounded once at the end."""
    settings = {"scale": inputs[0].shape[-1] ** -0.5, **settings}
    results = []
    for dtype in ("float64", "float32"):
        arrays = [x.astype(dtype) for x in inputs]
        out, _, gradients = attention(*arrays, upstream.astype(dtype), **settings)
        results.append([out, *gradients])
    outputs, gradients = got
    compared = 0
    for ours, want, best in zip([outputs, *gradients], *results, strict=True):
        least = error(rounded(best), want)
        # None: nothing that float16 can represent. If one key has all the weight, gradients are 0,
        # and no relative error is small.
        assert np.isfinite(ours).all() or np.abs(want).max() > 65504
        if least is not None and want.any():
            compared += 1
            assert error(ours, want) <= ALLOWED * least
    assert compared >= 2  # the outputs and the gradient of the values


@in_each_way
@pytest.mark.parametrize(
    ("std", "depth"),
    [(0.03, 16), (60, 128)]
    + [full(0.03, 128), full(60, 16)]
    + [full(std, depth) for std in (1, 10, 30, 300) for depth in (16, 128)],
)
def test_every_magnitude_is_within_four_times_the_best(std, depth, mode):
    inputs, upstream = drawn(std, depth)
    got = step(mode, dot_product_attention, inputs, upstream)
    assert_as_good_as_float16_can_be(got, inputs, upstream)


@pytest.mark.full
@settings(max_examples=4, deadline=None)
@given(
    std=st.floats(-3, 2).map(lambda power: 10.0**power),
    depth=st.sampled_from([4, 32]),
    seed=st.integers(0, 2**32 - 1),
    masked=st.booleans(),
    causal=st.booleans(),
)
def test_random_inputs_and_masks(std, depth, seed, masked, causal):
    inputs, upstream = drawn(std, depth, seed=seed)
    mask = np.ones((BATCH, 1, QUERIES, KEYS), bool)
    if masked:
        mask &= np.random.default_rng(seed).random(mask.shape) < 0.7
    got = step(
        MODES[-1],
        lambda *x: dot_product_attention(*x, mask=mask if masked else None, is_causal=causal),
        inputs,
        upstream,
    )
    if causal:
        mask &= np.tri(QUERIES, KEYS, dtype=bool)
    assert_as_good_as_float16_can_be(got, inputs, upstream, mask=mask)


@in_each_way
def test_the_longest_rows_lose_nothing_to_subnormal_weights(mode):
    rng = np.random.default_rng(0)
    query = rounded(rng.normal(0, 0.1, (1, 2, 1, 4)))
    key = rounded(rng.normal(0, 1, (1, 2**17, 1, 4)))
    value = rounded(rng.normal(1, 1, key.shape))
    upstream = rng.normal(size=query.shape).astype("float16")
    outputs, gradients = step(mode, dot_product_attention, [query, key, value], upstream)
    want, _, want_gradients = attention(query, key, value, upstream, scale=0.5)
    assert error(outputs, want) <= ALLOWED * error(rounded(want), want)
    assert error(gradients[0], want_gradients[0]) <= ALLOWED * error(
        rounded(want_gradients[0]), want_gradients[0]
    )


@full_on("jax")
@in_each_way
def test_large_upstream_gradients_do_not_overflow_inside(mode):
    inputs, upstream = drawn(1.0)
    inputs[2] = rounded(inputs[2] * 300)
    upstream = (upstream * 1e4).astype("float16")  # times the values: far above 65504
    inputs[0], inputs[1] = rounded(inputs[0] * 1e-2), rounded(inputs[1] * 1e-3)
    outputs, gradients = step(mode, dot_product_attention, inputs, upstream)
    assert np.isfinite(gradients[0]).all()
    assert_as_good_as_float16_can_be((outputs, gradients), inputs, upstream)


@in_each_way
def test_rows_without_any_key_give_zeros_and_zero_gradients(mode):
    inputs, upstream = drawn(60)
    mask = np.ones((BATCH, 1, QUERIES, KEYS), bool)
    mask[0, :, 2] = False
    mask[1] = False
    outputs, gradients = step(
        mode, lambda *x: dot_product_attention(*x, mask=mask), inputs, upstream
    )
    assert not outputs[0, 2].any()
    assert not outputs[1].any()
    assert outputs[0, 1].any()
    for gradient in (gradients[0][0, 2], *(g[1] for g in gradients)):
        assert not gradient.any()
    assert_as_good_as_float16_can_be((outputs, gradients), inputs, upstream, mask=mask)


@in_each_way
def test_a_mask_hides_keys_however_low_the_scores_of_the_others_are(mode):
    """Masked scores are 50000 and the unmasked one is -50000: stock adds at most -45850."""
    query = rounded(np.full((1, 1, 1, 1), 250.0))
    key = rounded(np.array([200.0, -200.0]).reshape(1, 2, 1, 1))
    value = rounded(np.array([1.0, 2.0]).reshape(1, 2, 1, 1))
    mask = np.array([[[[False, True]]]])
    outputs, gradients = step(
        mode,
        lambda *x: dot_product_attention(*x, mask=mask, scale=1.0),
        [query, key, value],
        np.ones((1, 1, 1, 1), "float16"),
    )
    assert outputs.item() == 2.0
    assert [g.ravel().tolist() for g in gradients] == [[0.0], [0.0, 0.0], [0.0, 1.0]]


@in_each_way
def test_a_bias_of_minus_infinity_masks_and_one_of_minus_1e9_does_not_overflow(mode):
    inputs, upstream = drawn(1.0)
    hidden = np.zeros((1, 1, QUERIES, KEYS), "float32")
    hidden[..., 4:] = -np.inf
    hidden[:, :, 2] = -np.inf
    soft = np.where(np.isinf(hidden), -1e9, 0.0).astype("float32")
    soft[:, :, 2] = -3.0
    for bias, mask in ((hidden, np.isfinite(hidden)), (soft, None)):
        got = step(mode, lambda *x, b=bias: dot_product_attention(*x, bias=b), inputs, upstream)
        numbers = np.where(np.isinf(bias), 0.0, bias)
        assert_as_good_as_float16_can_be(got, inputs, upstream, bias=numbers, mask=mask)


@full_on("jax")
@in_each_way
def test_the_gradient_of_a_bias(mode):
    inputs, upstream = drawn(1.0)
    bias = rounded(np.random.default_rng(1).normal(size=(1, 2, QUERIES, KEYS)))
    _, gradients = step(
        mode, lambda *x: dot_product_attention(*x[:3], bias=x[3]), [*inputs, bias], upstream
    )
    shift = 1e-6
    turn = np.zeros_like(bias)
    turn[0, 1, 3, 4] = shift
    up, down = (
        np.sum(attention(*inputs, upstream, scale=0.25, bias=b)[0] * upstream)
        for b in (bias + turn, bias - turn)
    )
    np.testing.assert_allclose(gradients[3][0, 1, 3, 4], (up - down) / (2 * shift), rtol=2e-3)


@full_on("jax")
@pytest.mark.parametrize("key_heads", [1, 2])
@in_each_way
def test_groups_of_query_heads_share_keys(mode, key_heads):
    inputs, upstream = drawn(10.0, heads=4, key_heads=key_heads)
    outputs, gradients = step(mode, dot_product_attention, inputs, upstream)
    repeated = [inputs[0], *(np.repeat(x, 4 // key_heads, axis=2) for x in inputs[1:])]
    want, _, want_gradients = attention(*repeated, upstream, scale=0.25)
    assert error(outputs, want) <= ALLOWED * error(rounded(want), want)
    for index in (1, 2):
        shared = want_gradients[index].reshape(BATCH, KEYS, key_heads, -1, 16).sum(3)
        assert error(gradients[index], shared) <= ALLOWED * error(rounded(shared), shared)


@full_on("jax")
def test_soft_cap_follows_the_formula_of_keras():
    inputs, upstream = drawn(5.0)
    outputs, _ = step(
        MODES[0], lambda *x: dot_product_attention(*x, attn_logits_soft_cap=2.0), inputs, upstream
    )
    scores = np.einsum("btnh,bsnh->bnts", *inputs[:2]) * 0.25
    bias = scores / (1 + np.abs(scores) / 2.0) - scores
    want, _, _ = attention(*inputs, upstream, scale=0.25, bias=bias)
    assert error(outputs, want) <= ALLOWED * error(rounded(want), want)


@full_on("jax")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_outputs_have_the_dtype_of_the_inputs_and_in_float32_the_values_of_keras(dtype):
    inputs, _ = drawn(1.0)
    tensors = [ops.cast(x, dtype) for x in inputs]
    outputs = dot_product_attention(*tensors)
    assert keras.backend.standardize_dtype(outputs.dtype) == dtype
    if dtype == "float32":
        mask = np.tri(QUERIES, KEYS, dtype=bool)[None, None]
        for settings_ in ({}, {"is_causal": True}, {"mask": mask}, {"scale": 0.1}):
            got, want = (f(*tensors, **settings_) for f in (dot_product_attention, stock))
            np.testing.assert_allclose(numpy_of(got), numpy_of(want), rtol=2e-5, atol=2e-6)


def test_inputs_of_several_dtypes_give_the_widest_dtype():
    inputs, _ = drawn(1.0)
    wide, narrow = ops.cast(inputs[0], "float32"), ops.cast(inputs[1], "float16")
    outputs = dot_product_attention(wide, narrow, narrow)
    assert keras.backend.standardize_dtype(outputs.dtype) == "float32"


@pytest.mark.backend("tensorflow", "torch")  # JAX narrows to float32 by default
def test_float64_stays_float64():
    inputs, upstream = drawn(1.0)
    mask = np.tri(QUERIES, KEYS, dtype=bool)
    outputs = dot_product_attention(*inputs, mask=mask[None, None])
    assert keras.backend.standardize_dtype(outputs.dtype) == "float64"
    want, _, _ = attention(*inputs, upstream, scale=0.25, mask=mask)
    np.testing.assert_allclose(np.array(ops.convert_to_numpy(outputs)), want, rtol=1e-12)


def test_non_finite_inputs_are_not_hidden():
    inputs, upstream = drawn(1.0)
    inputs[1][0, 0, 0, 0] = np.nan
    outputs, _ = step(MODES[0], dot_product_attention, inputs, upstream)
    assert np.isnan(outputs[0, :, 0]).all()
    assert np.isfinite(outputs[1]).all()


@full_on("jax")
def test_it_is_a_node_of_a_functional_model_that_saves_and_loads(tmp_path):
    query, key = keras.Input((None, 2, 16), dtype="float16"), keras.Input((None, 2, 16))
    outputs = dot_product_attention(query, key, key, is_causal=True, scale=0.5)
    assert (outputs.shape, outputs.dtype) == ((None, None, 2, 16), "float32")
    model = keras.Model([query, key], outputs)
    (x, y, _), _ = drawn(1.0)
    x, y = x.astype("float16"), y.astype("float32")
    want = numpy_of(dot_product_attention(x, y, y, is_causal=True, scale=0.5))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        np.testing.assert_allclose(numpy_of(each([x, y])), want, rtol=1e-6, atol=1e-6)


@pytest.mark.backend("tensorflow")
def test_lengths_may_be_unknown_when_the_graph_is_traced():
    import tensorflow as tf

    spec = tf.TensorSpec((None, None, 2, 16), "float16")
    mask_spec = tf.TensorSpec((None, 1, 1, None), "bool")

    @tf.function(input_signature=[spec, spec, mask_spec])
    def attend(query, key, mask):
        return dot_product_attention(query, key, key, mask=mask, is_causal=True)

    (x, y, _), upstream = drawn(1.0)
    mask = np.arange(KEYS) > 1
    got = attend(x.astype("float16"), y.astype("float16"), np.tile(mask, (BATCH, 1, 1, 1)))
    seen = mask & np.tri(QUERIES, KEYS, dtype=bool)
    want, _, _ = attention(x, y, y, upstream, scale=0.25, mask=seen)
    assert error(numpy_of(got), want) <= ALLOWED * error(rounded(want), want)
    assert not numpy_of(got)[:, :2].any()


# ------------------------------------------------------------------------------- flash attention


@pytest.fixture
def flash(monkeypatch):
    """Pretend that the device has flash attention; return the arguments of stock Keras's call."""
    calls = []

    def recorded(query, key, value, **settings):
        calls.append(settings)
        return stock(*(ops.cast(x, "float32") for x in (query, key, value)), mask=settings["mask"])

    monkeypatch.setattr(ops, "dot_product_attention", recorded)
    monkeypatch.setattr(backend.current(), "has_flash_attention", lambda *_, **__: True)
    return calls


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_is_used_where_the_device_has_it(flash, causal):
    inputs, _ = drawn(1.0)
    dot_product_attention(*inputs, is_causal=causal)
    (settings_,) = flash
    assert settings_["flash_attention"] is True
    assert settings_["is_causal"] is causal


@full_on("jax")
def test_flash_attention_is_not_used_where_it_would_lose_precision(flash):
    inputs, _ = drawn(1.0)
    mask = np.ones((1, 1, QUERIES, KEYS), bool)
    for settings_ in ({"mask": mask}, {"bias": 1.0 * mask}, {"flash_attention": False}):
        dot_product_attention(*inputs, **settings_)
    assert flash == []


@full_on("jax")
def test_flash_attention_that_is_asked_for_still_zeroes_rows_without_keys(flash):
    inputs, _ = drawn(1.0)
    mask = np.ones((1, 1, QUERIES, KEYS), bool)
    mask[:, :, 3] = False
    outputs = numpy_of(dot_product_attention(*inputs, mask=mask, flash_attention=True))
    assert len(flash) == 1
    assert not outputs[:, 3].any()
    assert outputs[:, 2].any()


@pytest.mark.backend("tensorflow")
def test_flash_attention_on_a_device_without_it_is_the_error_of_keras():
    inputs, _ = drawn(1.0)
    with pytest.raises(ValueError, match="Flash attention is not supported"):
        dot_product_attention(*inputs, flash_attention=True)
