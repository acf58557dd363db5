"""Multiply-adds, activations and casts of a model equal the expected counts."""

import keras
import numpy as np
import pytest
from helpers.flattened import flatten_layers
from helpers.marks import by_name, marks_on

import kerasmp as mp

pytestmark = marks_on("jax", "oldest")

layers, ops = keras.layers, keras.ops
BACKEND = keras.backend.backend()
B, T = 2, 3  # batch and time
# Except on JAX, Keras's loop computes the first step of a cell twice, for its shapes.
LOOPED = T if BACKEND == "jax" else T + 1
# torch has kernels for whole LSTMs and GRUs, also on a CPU; the others run the loop.
FUSED = T if BACKEND == "torch" else LOOPED


def attended(heads, key_heads, depth, dim):
    """Return the multiply-adds of attention over T steps, with projections of `dim` features."""
    projected = heads + 2 * key_heads + heads
    return B * T * dim * depth * projected + 2 * B * heads * T * T * depth


LAYERS = {
    "Dense": (lambda: layers.Dense(3), (4,), B * 4 * 3),
    "Dense-rank-3": (lambda: layers.Dense(3), (T, 4), B * T * 4 * 3),
    "EinsumDense": (
        lambda: layers.EinsumDense("abc,cde->abde", (None, 3, 2)),
        (T, 4),
        B * T * 4 * 6,
    ),
    "Conv1D": (lambda: layers.Conv1D(6, 3), (9, 4), B * 7 * 3 * 4 * 6),
    "Conv1D-causal": (lambda: layers.Conv1D(6, 3, padding="causal"), (9, 4), B * 9 * 3 * 4 * 6),
    "Conv2D-strides": (
        lambda: layers.Conv2D(6, 3, strides=2, padding="same"),
        (8, 8, 4),
        B * 16 * 9 * 4 * 6,
    ),
    "Conv2D-dilation": (
        lambda: layers.Conv2D(6, (3, 1), dilation_rate=2),
        (8, 8, 4),
        B * 4 * 8 * 3 * 4 * 6,
    ),
    "Conv2D-groups": (lambda: layers.Conv2D(6, 3, groups=2), (8, 8, 4), B * 36 * 9 * 2 * 6),
    "Conv3D": (lambda: layers.Conv3D(2, 2), (3, 3, 3, 4), B * 8 * 8 * 4 * 2),
    "DepthwiseConv2D": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        (8, 8, 4),
        B * 36 * 9 * 8,
    ),
    "SeparableConv2D": (
        lambda: layers.SeparableConv2D(6, 3, depth_multiplier=2),
        (8, 8, 4),
        B * 36 * (9 * 8 + 8 * 6),
    ),
    "Conv2DTranspose": (
        lambda: layers.Conv2DTranspose(6, 3, strides=2),
        (4, 4, 2),
        B * 16 * 2 * 9 * 6,
    ),
    "Embedding": (lambda: layers.Embedding(7, 3), (T,), 0),
    "LayerNormalization": (layers.LayerNormalization, (4,), 0),
    "SimpleRNN": (lambda: layers.SimpleRNN(3), (T, 4), B * LOOPED * (4 * 3 + 3 * 3)),
    "LSTM": (lambda: layers.LSTM(3), (T, 4), B * FUSED * 4 * (4 * 3 + 3 * 3)),
    "GRU": (lambda: layers.GRU(3), (T, 4), B * FUSED * 3 * (4 * 3 + 3 * 3)),
    "Bidirectional": (
        lambda: layers.Bidirectional(layers.SimpleRNN(3)),
        (T, 4),
        2 * B * LOOPED * (4 * 3 + 3 * 3),
    ),
    "TimeDistributed": (
        lambda: layers.TimeDistributed(layers.Dense(3)),
        (T, 4),
        B * T * 4 * 3,
    ),
    "SpectralNormalization": (
        lambda: layers.SpectralNormalization(layers.Dense(3)),
        (4,),
        B * 4 * 3,
    ),
    "kerasmp.DenseHead": (lambda: mp.layers.DenseHead(3), (4,), B * 4 * 3),
    "kerasmp.Conv1D": (lambda: mp.layers.Conv1D(6, 3), (9, 4), B * 7 * 3 * 4 * 6),
}
ATTENTION = {
    "MultiHeadAttention": (
        lambda dtype: layers.MultiHeadAttention(2, 3, flash_attention=False, dtype=dtype),
        attended(2, 2, 3, 4),
    ),
    "GroupedQueryAttention": (
        lambda dtype: layers.GroupQueryAttention(3, 4, 2, flash_attention=False, dtype=dtype),
        attended(4, 2, 3, 4),
    ),
    "kerasmp.MultiHeadAttention": (
        lambda dtype: mp.layers.MultiHeadAttention(2, 3, dtype=dtype),
        attended(2, 2, 3, 4),
    ),
}


# One for each function that multiplies; other layers use the same functions.
QUICK = {
    *("Dense-rank-3", "EinsumDense", "Conv2D-strides", "Conv2D-groups", "DepthwiseConv2D"),
    *("Conv2DTranspose", "Embedding", "SpectralNormalization", "kerasmp.Conv1D"),
}
QUICK |= {"SimpleRNN", "LSTM"}
if BACKEND == "jax":  # which compiles each
    QUICK = {"Dense-rank-3", "Conv2D-groups", "SimpleRNN"}
CASES = by_name(
    {f"{name}-float16": (*case, "float16") for name, case in LAYERS.items()}
    | {"Dense-float32": (*LAYERS["Dense"], "float32")},
    [f"{name}-float16" for name in QUICK],
)


def measured(model, x):
    """Return the report of a model on `x` with its current policies."""
    return mp.convert(model, mp.LayerPolicies.of(model), sample=x, dry_run=True)


def costs_of(model, x):
    """Return the cost of each layer, by `id`; None where `x` does not reach it."""
    return {id(row.layer): row.cost for row in measured(model, x).rows}


def totals(model, shape):
    return measured(model, np.ones((B, *shape), "float32")).multiply_adds


@pytest.mark.parametrize(("make", "shape", "count", "half"), CASES)
def test_products_equal_the_expected_counts(make, shape, count, half):
    keras.config.set_dtype_policy(half if half == "float32" else "mixed_float16")
    layer = make()
    keras.config.set_dtype_policy("float32")
    model = keras.Sequential([keras.Input(shape), layer])
    found = totals(model, shape)
    assert sum(found.values()) == count
    # kerasmp convolves in float32 where TensorFlow's CPU kernel sums in float16.
    wide = "kerasmp" in type(layer).__module__ and layer.name.startswith("conv")
    assert set(found) <= {"float32" if wide and BACKEND == "tensorflow" else half}


@pytest.mark.parametrize(("make", "count"), ATTENTION.values(), ids=ATTENTION)
def test_all_products_of_attention_are_counted(make, count):
    inputs = keras.Input((T, 4))
    model = keras.Model(inputs, make("mixed_bfloat16")(inputs, inputs))
    found = totals(model, (T, 4))
    assert sum(found.values()) == count
    assert set(found) <= {"float32", "bfloat16"}


@keras.saving.register_keras_serializable("costs")
class Twice(keras.Model):
    """A user-defined model that calls one layer twice, and one never."""

    def __init__(self):
        super().__init__()
        self.dense, self.unused = layers.Dense(4), layers.Dense(4)

    def build(self, shape):
        self.dense.build(shape)
        self.unused.build(shape)

    def call(self, x):
        return self.dense(self.dense(x))


def test_a_layer_called_twice_has_the_sum_and_one_not_called_has_none():
    model = Twice()
    x = np.ones((B, 4), "float32")
    model(x)
    costs = costs_of(model, x)
    assert costs[id(model.dense)].multiply_adds == {"float32": 2 * B * 4 * 4}
    assert costs[id(model.dense)].activation_bytes == 2 * B * 4 * 4
    assert costs[id(model.unused)] is None
    report = mp.convert(model, rules=None, sample=x, dry_run=True)
    assert report.multiply_adds == {"float16": 2 * B * 4 * 4}
    assert report.rows[-1].cost is None
    assert str(report).splitlines()[-1].split().count("unknown") == 4


def net():
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, name="first"),
            layers.LayerNormalization(name="norm"),
            layers.Dense(3, name="head"),
        ]
    )


def test_a_report_shows_products_bytes_and_casts():
    model, x = net(), np.ones((B, 4), "float32")
    report = mp.convert(model, sample=x)
    first, second = B * 4 * 8, B * 8 * 3
    assert report.multiply_adds == {"float16": first, "float32": second}
    assert report.half_share == first / (first + second)
    # first, norm in float16, head in float32
    assert report.activation_bytes == 2 * B * 8 + 2 * B * 8 + 4 * B * 3
    casts = {row.path.rpartition("/")[2]: row.cost.cast_bytes for row in report.rows}
    # Its kernel and bias; the head's input.
    assert casts["head"] == 4 * B * 8
    weights = 2 * (4 * 8 + 8)
    # torch multiplies in float32 on a CPU: inputs and kernel there, and the result back.
    wide = 4 * (B * 4 + 4 * 8) + 2 * B * 8 if BACKEND == "torch" else 0
    data = 2 * B * 4  # the input of the model, cast by the first layer that needs it
    assert casts["first"] + casts[model.name] == weights + data + wide
    assert report.cast_bytes == sum(casts.values())
    text = str(report)
    assert f"{first / (first + second):.1%} of {first + second} multiply-adds in half" in text
    lines = {line.split()[0].rpartition("/")[2]: line.split() for line in text.splitlines()[3:]}
    assert lines["first"][4:7] == [str(first), "100%", "32"]
    assert lines["norm"][4:6] == ["0", "-"]
    assert lines["head"][4:6] == [str(second), "0%"]


class Own(layers.Layer):
    """A user-defined layer that multiplies in an unknown way."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3))

    def call(self, x):
        return ops.sum(ops.expand_dims(x, -1) * self.kernel, -2)


def test_what_cannot_be_traced_is_unknown():
    model = keras.Sequential([keras.Input((4,)), Own(name="own"), layers.Dense(2)])
    report = mp.convert(model, sample=np.ones((B, 4)), dry_run=True)
    assert report.multiply_adds is None
    assert report.half_share is None
    assert report.activation_bytes > 0
    assert "unknown of unknown multiply-adds" in str(report)
    assert report.rows[1].class_name == "Own"
    assert str(report).splitlines()[-2].split()[4:6] == ["unknown", "unknown"]


def test_a_product_that_is_called_in_an_unknown_way_is_unknown():
    class Scaled(layers.Layer):
        def call(self, x):
            return ops.dot(ops.convert_to_tensor(2.0), x)

    model = keras.Sequential([keras.Input((4,)), Scaled(), layers.Dense(2)])
    report = mp.convert(model, rules=None, sample=np.ones((B, 4)), dry_run=True)
    assert report.multiply_adds is None
    assert not report.rows[1].cost.known


def test_nothing_changes_and_nothing_is_remembered():
    class Noisy(layers.Layer):
        def __init__(self):
            super().__init__()
            self.seeds = keras.random.SeedGenerator(1)

        def build(self, _):
            self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x):
            self.calls.assign_add(1.0)
            self.add_loss(ops.sum(x))
            return x + keras.random.normal(ops.shape(x), seed=self.seeds)

    inputs = keras.Input(batch_shape=(B, T, 4))
    x = layers.LSTM(3, stateful=True)(layers.BatchNormalization()(Noisy()(inputs)))
    model = keras.Model(inputs, layers.Dense(2)(x))
    data = np.ones((B, T, 4), "float32")
    model(data)
    losses = [ops.convert_to_numpy(loss) for loss in model.losses]
    states = next(layer for layer in model.layers if isinstance(layer, layers.LSTM)).states
    kept = [*model.variables, *states]
    before = [ops.convert_to_numpy(v.value) for v in kept]
    measured(model, data)
    for variable, value in zip(kept, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable.value), value)
    assert [ops.convert_to_numpy(loss) for loss in model.losses] == losses


@pytest.mark.parametrize("sample", [np.ones((B, 7)), "text", {}, True], ids=str)
def test_a_sample_that_does_not_fit_leaves_the_model_as_it_was(sample):
    model = net()
    call = keras.Layer.__call__
    with pytest.raises(mp.errors.ArgumentError, match="`sample`"):
        mp.convert(model, sample=sample)
    assert {layer.compute_dtype for layer in flatten_layers(model)} == {"float32"}
    assert type(model) is keras.Sequential
    assert keras.Layer.__call__ is call


def test_several_inputs_are_given_as_the_model_expects_them():
    one, other = keras.Input((4,), name="one"), keras.Input((3,), name="other")
    outputs = layers.Dense(2)(layers.Concatenate()([one, other]))
    data = [np.ones((B, 4), "float32"), np.ones((B, 3), "float32")]
    for inputs, sample in (
        ([one, other], data),
        ({"one": one, "other": other}, dict(zip(("one", "other"), data, strict=True))),
    ):
        costs = costs_of(keras.Model(inputs, outputs), sample)
        assert sum(c.multiply_adds.get("float32", 0) for c in costs.values()) == B * 7 * 2
