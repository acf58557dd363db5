"""MultiHeadAttention and GroupQueryAttention: float16 projections, float32 between them."""

import keras
import numpy as np
import pytest
from helpers.float16 import error, numpy_of, step
from helpers.float16 import rounded as float16_rounded
from helpers.marks import full, in_each_way, marks_on
from helpers.references import attention
from keras import ops

import kerasmp as mp
from kerasmp.errors import ArgumentError
from kerasmp.layers import GroupQueryAttention, MultiHeadAttention

pytestmark = marks_on("jax")

BATCH, QUERIES, KEYS, FEATURES, HEADS = 2, 5, 7, 24, 4
ALLOWED = 4.0  # times the error of the best that float16 projections can do
MULTI = (MultiHeadAttention, keras.layers.MultiHeadAttention)
GROUP = (GroupQueryAttention, keras.layers.GroupQueryAttention)
PAIRS = [MULTI, GROUP]
EAGERLY = keras.backend.backend() == "tensorflow"  # compilation takes longer
# Constructor arguments and call arguments for each path through the code. Such a small rate
# drops nothing, but the layer runs its dropout code.
PATHS = {
    "fused": ({}, {}),
    "scores": ({}, {"return_attention_scores": True}),
    "dropout": ({"dropout": 1e-7}, {"training": True}),
}


def made(cls, depth=8, dtype="mixed_float16", **settings):
    """Return a kerasmp or stock layer with four heads."""
    grouped = issubclass(cls, keras.layers.GroupQueryAttention)
    sizes = {"head_dim": depth, "num_query_heads": HEADS, "num_key_value_heads": 2}
    if not grouped:
        sizes = {"num_heads": HEADS, "key_dim": depth}
    keras.utils.set_random_seed(2)
    return cls(**sizes, dtype=dtype, **settings)


def drawn(std=1.0, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(BATCH, QUERIES, FEATURES), (BATCH, KEYS, FEATURES)]
    query, value = (rng.normal(0, std, s).astype("float16").astype("float64") for s in shapes)
    return query, value, rng.normal(size=query.shape).astype("float16")


def outputs_of(layer, **call):
    """Return a function of query and value that gives the outputs only."""

    def function(query, value):
        outputs = layer(query, value, **call)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    return function


def results(layer, inputs, upstream, mode, **call):
    """Return outputs, gradients of the inputs, and those of the kernels by name."""
    if not layer.built:
        layer.build(*(x.shape for x in inputs))
    variables = layer.trainable_variables
    outputs, gradients = step(mode, outputs_of(layer, **call), inputs, upstream, variables)
    names = [v.path.split("/")[-2] for v in variables]
    return outputs, {"inputs": gradients[:2]} | dict(zip(names, gradients[2:], strict=True))


def flattened(outputs, gradients):
    names = ["query", "key", "value", "attention_output"]
    return [outputs, *gradients["inputs"], *(gradients[name] for name in names)]


def weights_of(layer):
    """Return the kernels of the projections by name; biases are zero here."""
    named = {v.path.split("/")[-2]: np.array(v, "float64") for v in layer.trainable_variables}
    assert set(named) == {"query", "key", "value", "attention_output"}
    return named


def multi_head(query, value, kernels, upstream, *, rounded, mask=None):
    """Return outputs and the gradients of query, value and the kernels of the projections.

    Args:
        query: Shape (batch, time, features).
        value: Shape (batch, time, features); the keys too.
        kernels: From `weights_of`.
        upstream: The gradient of the outputs.
        rounded: Whether products with kernels are rounded to float16, as all tensors between
            layers are: the best that a float16 layer can do. Otherwise nothing is rounded.
        mask: Broadcasts to (batch, heads, queries, keys).
    """
    low = float16_rounded if rounded else np.asarray
    kernels = {name: float16_rounded(kernel) for name, kernel in kernels.items()}
    q, k, v = (
        low(np.einsum("btm,mnh->btnh", x, kernels[name]))
        for x, name in ((query, "query"), (value, "key"), (value, "value"))
    )
    groups = q.shape[2] // k.shape[2]
    repeated = [np.repeat(x, groups, axis=2) for x in (k, v)]
    dtype = "float32" if rounded else "float64"
    arrays = [x.astype(dtype) for x in (q, *repeated)]
    scale = q.shape[-1] ** -0.5
    combine = kernels["attention_output"]
    to_context = low(np.einsum("btm,nhm->btnh", upstream, combine))
    context, _, (to_q, *to_repeated) = attention(
        *arrays, to_context.astype(dtype), scale=scale, mask=mask
    )
    context, to_q = low(context), low(to_q)
    to_k, to_v = (low(x).reshape(*k.shape[:3], groups, -1).sum(3) for x in to_repeated)
    to_query = low(np.einsum("btnh,mnh->btm", to_q, kernels["query"]))
    to_value = sum(
        low(np.einsum("btnh,mnh->btm", g, kernels[name]))
        for g, name in ((to_k, "key"), (to_v, "value"))
    )
    gradients = {
        "inputs": [to_query, low(to_value)],
        "query": low(np.einsum("btm,btnh->mnh", query, to_q)),
        "key": low(np.einsum("btm,btnh->mnh", value, to_k)),
        "value": low(np.einsum("btm,btnh->mnh", value, to_v)),
        "attention_output": low(np.einsum("btnh,btm->nhm", context, upstream)),
    }
    return low(np.einsum("btnh,nhm->btm", context, combine)), gradients


def assert_as_good_as_float16_projections(layer, std, mode, mask=None, **call):
    query, value, upstream = drawn(std)
    outputs, gradients = results(layer, (query, value), upstream, mode, **call)
    got = flattened(outputs, gradients)
    settings = {"mask": mask, "kernels": weights_of(layer), "upstream": upstream.astype("float64")}
    exact, best = (
        flattened(*multi_head(query, value, rounded=rounded, **settings))
        for rounded in (False, True)
    )
    for ours, want, least in zip(got, exact, best, strict=True):
        bound = error(least, want)
        if bound is not None:
            assert error(ours, want) <= ALLOWED * bound
    return outputs, gradients


@in_each_way
def test_with_dropout_outputs_and_gradients_are_within_four_times_the_best(mode):
    """test_hazards.py has the other paths, and groups of heads."""
    settings, call = PATHS["dropout"]
    layer = made(MultiHeadAttention, 64, use_bias=False, **settings)
    assert_as_good_as_float16_projections(layer, 60, mode, **call)


@pytest.mark.parametrize(
    ("pair", "path"),
    [(MULTI, "fused"), (MULTI, "scores"), full(MULTI, "dropout"), (GROUP, "fused")],
    ids=[*PATHS, "group"],
)
def test_masks_of_every_kind_are_those_of_stock_in_float32(pair, path):
    query, value, _ = drawn()
    query_mask = np.array([[True] * 4 + [False]] * BATCH)
    value_mask = np.array([[True] * 5 + [False] * 2] * BATCH)
    attention_mask = np.random.default_rng(1).random((BATCH, QUERIES, KEYS)) < 0.8
    attention_mask[:, :, 0] = True
    # With Keras's own masks on the tensors MultiHeadAttention ignores the arguments.
    kinds = [
        {},
        {"use_causal_mask": True},
        {"attention_mask": attention_mask},
        {"value_mask": value_mask},
        {"value_mask": value_mask, "attention_mask": attention_mask, "use_causal_mask": True},
    ]
    settings, call = PATHS[path]
    ours, stock = (made(cls, dtype="float32", **settings) for cls in pair)
    for layer in (ours, stock):
        layer.build(query.shape, value.shape)
    ours.set_weights(stock.get_weights())
    query, value = (x.astype("float32") for x in (query, value))
    for masks in kinds:
        got, want = (outputs_of(layer, **masks, **call)(query, value) for layer in (ours, stock))
        np.testing.assert_allclose(numpy_of(got), numpy_of(want), rtol=2e-5, atol=2e-6)
    if pair is GROUP:
        got, want = (
            outputs_of(layer, query_mask=query_mask, **call)(query, value)
            for layer in (ours, stock)
        )
        np.testing.assert_allclose(
            numpy_of(got)[:, :4], numpy_of(want)[:, :4], rtol=2e-5, atol=2e-6
        )
        assert not numpy_of(got)[:, 4].any()


@in_each_way
@pytest.mark.parametrize("path", ["fused", full("scores"), "dropout"])
def test_rows_without_any_key_give_zeros_and_zero_gradients(path, mode):
    mask = np.ones((BATCH, QUERIES, KEYS), bool)
    mask[0, 3] = False
    mask[1] = False
    settings, call = PATHS[path]
    layer = made(MultiHeadAttention, use_bias=False, **settings)
    call = {**call, "attention_mask": mask}
    outputs, gradients = assert_as_good_as_float16_projections(
        layer, 10, mode, mask=mask[:, None], **call
    )
    assert not outputs[0, 3].any()
    assert not outputs[1].any()
    assert outputs[0, 2].any()
    assert not gradients["inputs"][0][1].any()
    assert not gradients["inputs"][1][1].any()


def test_scores_of_masked_keys_are_zero_and_the_others_add_up_to_one():
    query, value, _ = drawn(30)
    mask = np.ones((BATCH, QUERIES, KEYS), bool)
    mask[:, 1, 2:] = False
    mask[:, 3] = False
    layer = made(MultiHeadAttention)
    outputs, scores = layer(query, value, attention_mask=mask, return_attention_scores=True)
    assert {keras.backend.standardize_dtype(x.dtype) for x in (outputs, scores)} == {"float16"}
    scores = numpy_of(scores)
    assert not scores[:, :, 1, 2:].any()
    sums = np.ones((BATCH, HEADS, QUERIES))
    sums[..., 3] = 0
    np.testing.assert_allclose(scores.sum(-1), sums, atol=4e-3)


@pytest.mark.parametrize("pair", PAIRS, ids=["multi", "group"])
def test_a_causal_mask_alone_is_left_to_the_op_so_that_it_can_be_flash(pair, monkeypatch):
    seen = []

    def recorded(query, *_, **settings):
        seen.append(settings)
        return query

    monkeypatch.setattr(ops, "dot_product_attention", recorded)
    query, value, _ = drawn()
    layer = made(pair[0], flash_attention=True)
    layer(query, value, use_causal_mask=True)
    layer(query, value, use_causal_mask=True, attention_mask=np.ones((1, QUERIES, KEYS), bool))
    assert [s["is_causal"] for s in seen] == [True, False]
    assert [s["mask"] is None for s in seen] == [True, False]


def test_a_subclass_that_computes_attention_itself_is_given_a_mask():
    masks = []

    class Own(MultiHeadAttention):
        def _compute_attention(self, query, key, value, attention_mask=None, *settings):
            masks.append(attention_mask)
            return super()._compute_attention(query, key, value, attention_mask, *settings)

    query, value, _ = drawn()
    Own(2, 4)(query, value, use_causal_mask=True)
    assert tuple(masks[0].shape) == (1, QUERIES, KEYS)


MASK = {"attention_mask": np.random.default_rng(0).random((1, QUERIES, KEYS)) < 0.7}
SCORES = {"return_attention_scores": True}


@pytest.mark.parametrize(
    ("pair", "call"),
    [
        (MULTI, {}),
        (GROUP, MASK | SCORES),
        full(MULTI, MASK),
        full(MULTI, MASK | SCORES),
        full(GROUP, MASK),
        full(GROUP, SCORES),
    ],
)
def test_a_subclass_may_ask_for_causality_where_it_computes_attention(pair, call):
    """As Keras 3.15 allows it there, with a mask and alone."""

    class Own(pair[0]):
        def _compute_attention(self, *tensors, **more):
            return super()._compute_attention(*tensors, **more, use_causal_mask=True)

    query, value, _ = drawn()
    own, plain = made(Own), made(pair[0])
    for layer in (own, plain):
        layer.build(query.shape, value.shape)
    own.set_weights(plain.get_weights())
    got, want = own(query, value, **call), plain(query, value, **call, use_causal_mask=True)
    for one, other in zip(keras.tree.flatten(got), keras.tree.flatten(want), strict=True):
        np.testing.assert_allclose(numpy_of(one), numpy_of(other), atol=1e-3)


GATE, WINDOW = {"use_gate": True}, {"sliding_window": 2}


@pytest.mark.keras("3.15")
@pytest.mark.parametrize(
    ("pair", "extra"),
    [(MULTI, GATE), full(MULTI, WINDOW), full(GROUP, GATE), (GROUP, WINDOW)],
    ids=["multi-gate", "multi-window", "group-gate", "group-window"],
)
def test_gate_and_window_of_newer_keras(pair, extra):
    query, value, _ = drawn()
    query, value = query.astype("float32"), value.astype("float32")
    ours, stock = (made(cls, dtype="float32", **extra) for cls in pair)
    for layer in (ours, stock):
        layer.build(query.shape, value.shape)
    ours.set_weights(stock.get_weights())
    for causal in (False, True):
        got, want = (layer(query, value, use_causal_mask=causal) for layer in (ours, stock))
        np.testing.assert_allclose(numpy_of(got), numpy_of(want), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("axes", "training"), [((1, 2), True), ((2,), False)])
def test_attention_over_several_axes(axes, training):
    rng = np.random.default_rng(0)
    query, value = (rng.normal(size=(2, 3, 4, 8)).astype("float32") for _ in range(2))
    settings = {"attention_axes": axes, "dropout": 1e-7}
    ours, stock = (cls(2, 4, dtype="float32", **settings) for cls in MULTI)
    for layer in (ours, stock):
        layer.build(query.shape, value.shape)
    ours.set_weights(stock.get_weights())
    length = 12 if axes == (1, 2) else 4
    shape = (2, 3, 4, 3, 4) if axes == (1, 2) else (2, 3, length, length)
    mask = rng.random(shape) < 0.8
    mask[..., 0] = True
    for masks in ({}, {"attention_mask": mask}):
        got, want = (layer(query, value, training=training, **masks) for layer in (ours, stock))
        np.testing.assert_allclose(numpy_of(got), numpy_of(want), rtol=2e-5, atol=2e-6)
    low = MultiHeadAttention(2, 4, attention_axes=axes, dtype="mixed_float16")
    assert np.isfinite(numpy_of(low(300 * query, 300 * value))).all()


def test_dropout_drops_while_training_and_only_then():
    query, value, _ = drawn()
    layer = made(MultiHeadAttention, dropout=0.5, seed=1)
    plain = numpy_of(layer(query, value, training=False))
    np.testing.assert_array_equal(numpy_of(layer(query, value, training=False)), plain)
    one, two = (numpy_of(layer(query, value, training=True)) for _ in range(2))
    assert np.any(one != plain)
    assert np.any(one != two)


@in_each_way
def test_gradients_of_dropped_weights_need_not_fit_float16(mode):
    """The gradients are upstream gradients times values, here up to a million."""
    query, value, upstream = drawn()
    layer = made(MultiHeadAttention, use_bias=False, dropout=1e-7)
    call = {"key": ops.cast(value * 0.01, "float16"), "training": True}
    inputs, upstream = (query, value * 300), (upstream * 1e3).astype("float16")
    _, gradients = results(layer, inputs, upstream, mode, **call)
    assert np.isfinite(gradients["query"]).all()
    assert np.isfinite(gradients["inputs"][0]).all()


@pytest.mark.parametrize("pair", PAIRS, ids=["multi", "group"])
def test_scores_and_flash_attention_exclude_each_other_as_in_stock(pair):
    query, value, _ = drawn()
    for cls, expected in zip(pair, (ArgumentError, ValueError), strict=True):
        with pytest.raises(expected, match="Returning attention scores is not supported"):
            made(cls, flash_attention=True)(query, value, return_attention_scores=True)


@pytest.mark.parametrize("pair", PAIRS, ids=["multi", "group"])
def test_it_takes_the_arguments_of_the_stock_layer_and_is_saved_and_loaded(pair, tmp_path):
    arguments = {
        "dropout": 0.25,
        "use_bias": False,
        "kernel_initializer": "he_normal",
        "kernel_regularizer": keras.regularizers.L2(0.25),
        "activity_regularizer": keras.regularizers.L2(0.125),
        "kernel_constraint": "non_neg",
        "seed": 3,
        "name": "attention",
    }
    ours, stock = (made(cls, **arguments) for cls in pair)
    assert isinstance(ours, pair[1])
    assert ours.get_config() == stock.get_config()
    inputs = [keras.Input((None, FEATURES)), keras.Input((None, FEATURES))]
    model = keras.Model(inputs, ours(*inputs))
    assert model.output.dtype == "float16"
    query, value, _ = drawn()
    x = [query.astype("float32"), value.astype("float32")]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    layer = loaded.get_layer("attention")
    assert type(layer) is pair[0]
    assert layer.get_config() == ours.get_config()
    assert {v.dtype for v in layer.trainable_variables} == {"float32"}
    np.testing.assert_array_equal(numpy_of(loaded(x)), numpy_of(model(x)))


def test_a_model_of_padded_sentences_trains():
    keras.config.set_dtype_policy("mixed_float16")
    words = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(10, FEATURES, mask_zero=True)(words)
    x = made(MultiHeadAttention, dropout=0.1)(x, x, use_causal_mask=True)
    model = mp.Model(words, mp.layers.DenseHead(1)(ops.max(x, axis=1)))
    model.compile(mp.LossScaleOptimizer(keras.optimizers.Adam(0.03)), "mse", run_eagerly=EAGERLY)
    x = np.random.default_rng(0).integers(1, 10, (16, 6))
    x[:, 4:] = 0
    x[0] = 0  # nothing but padding
    history = model.fit(x, x[:, :1] / 5, batch_size=16, epochs=6, verbose=0)
    assert model.optimizer.skipped_steps == 0
    assert history.history["loss"][-1] < 0.5 * history.history["loss"][0]
    assert np.isfinite(numpy_of(model(x))).all()


def test_keras_masks_are_passed_on():
    embed = keras.layers.Embedding(5, FEATURES, mask_zero=True, dtype="mixed_float16")
    x = embed(np.array([[1, 2, 0]]))
    outputs = made(MultiHeadAttention, use_bias=False)(x, x)
    assert numpy_of(outputs._keras_mask).tolist() == [[1, 1, 0]]
    assert not numpy_of(outputs)[0, 2].any()


@pytest.mark.parametrize("policy", [full("mixed_bfloat16"), "float16", full("float32")])
def test_other_policies(policy):
    query, value, _ = drawn()
    layer = made(MultiHeadAttention, dtype=policy)
    outputs, scores = layer(query, value, return_attention_scores=True)
    for tensor in (outputs, scores, layer(query, value)):
        assert keras.backend.standardize_dtype(tensor.dtype) == layer.compute_dtype
        assert np.isfinite(numpy_of(ops.cast(tensor, "float32"))).all()
