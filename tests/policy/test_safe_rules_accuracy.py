"""The rules "safe" are needed: inputs that break a stock layer, and the layer under the rule."""

import keras
import numpy as np
import pytest
from helpers import gradients
from helpers.marks import full, marks_on
from helpers.networks import attends_itself, relu_after, third_from_the_end
from helpers.references import softmax

import kerasmp as mp

pytestmark = marks_on("jax")

layers = keras.layers


def normalized(x):
    return x / np.sqrt(np.sum(np.square(x), -1, keepdims=True))


def dot_attention(query, value, scale=1.0):
    return softmax(scale * query @ value.swapaxes(1, 2), -1) @ value


def rounded(*shape, scale=1.0, shift=0.0):
    values = np.random.default_rng(0).normal(shift, scale, shape)
    return values.astype("float16").astype("float64")


def far_from_zero(size):
    """Return queries and values whose scores are large and differ little."""
    x = rounded(2, 4, 6, 64, scale=0.5)
    x[..., 0] = size
    return x


HAZARDS = {
    "normalization": (
        lambda: relu_after(layers.Normalization(mean=[0.0] * 4, variance=[9e4] * 4), (4,)),
        rounded(8, 4, scale=300),
        lambda x: x / 300,
    ),
    "unit": (
        lambda: relu_after(layers.UnitNormalization(), (64,)),
        rounded(8, 64, scale=100),
        normalized,
    ),
    "pooling": (
        lambda: relu_after(layers.AveragePooling1D(1024), (1024, 4)),
        rounded(2, 1024, 4, shift=1),
        lambda x: x.mean(1, keepdims=True),
    ),
    "softmax": (
        lambda: relu_after(layers.Softmax(axis=(1, 2)), (8, 8)),
        rounded(4, 8, 8, scale=2),
        lambda x: softmax(x.reshape(4, -1), 1).reshape(4, 8, 8),
    ),
    "attention": (
        lambda: relu_after(layers.Attention(), (6, 64), count=2),
        far_from_zero(30),
        lambda x: dot_attention(*x),
    ),
}


def error(output, reference):
    return np.linalg.norm(output - reference) / np.linalg.norm(reference)


# The quick set has one of them.
MARKS = {
    **{name: [pytest.mark.full] for name in HAZARDS},
    # Torch sums in float32 when it pools.
    "pooling": [pytest.mark.full, pytest.mark.backend("tensorflow", "jax")],
    "unit": [],
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name]) for name in HAZARDS])
def test_the_rule_removes_the_hazard(name):
    build, x, reference = HAZARDS[name]
    expected = reference(x)
    best = error(expected.astype("float16"), expected)

    def measured(rules):
        model = build()
        mp.convert(model, "mixed_float16", rules=rules)
        layer = third_from_the_end(model)
        given = x.astype("float32")
        output = layer([*given] if name == "attention" else given)
        return error(keras.ops.convert_to_numpy(output).astype("float64"), expected)

    assert not measured(None) <= 4 * best
    assert measured("safe") <= best


def test_averages_do_not_overflow():
    x = np.full((1, 4), 4e4, "float32")

    def averaged(rules):
        model = relu_after(layers.Average(), (4,), count=2)
        mp.convert(model, "mixed_float16", rules=rules)
        return model.predict([x, x], verbose=0)

    assert np.all(np.isinf(averaged(None)))
    assert np.all(averaged("safe") == 4e4)


@pytest.mark.backend("tensorflow", "jax")  # torch does not round there
def test_spectral_normalization_keeps_its_float32_kernel():
    def kernel(rules):
        keras.utils.set_random_seed(0)
        layer = layers.SpectralNormalization(layers.Dense(8, use_bias=False))
        model = relu_after(layer, (4,))
        mp.convert(model, "mixed_float16", rules=rules)
        assert layer.layer.compute_dtype == "float16"
        with np.errstate(over="ignore"):  # JAX's cast of 1e-12, in float16
            layer(np.ones((2, 4), "float32"), training=True)
        return keras.ops.convert_to_numpy(layer.layer.kernel)

    def is_rounded(values):
        return np.array_equal(values, values.astype("float16").astype("float32"))

    assert is_rounded(kernel(None))
    assert not is_rounded(kernel("safe"))


@pytest.mark.backend("jax", "torch")
@pytest.mark.parametrize("name", sorted({"Embedding", "ReversibleEmbedding"} & {*dir(layers)}))
def test_the_gradient_of_a_row_is_not_summed_in_float16(name):
    def gradient(rules):
        model = relu_after(getattr(layers, name)(3, 1), (4096,))
        mp.convert(model, "mixed_float16", rules=rules)
        layer = third_from_the_end(model)
        run = gradients.compile_(layer, [layer.embeddings], "quick")
        _, (found,) = run([np.zeros((1, 4096), "int32")], None)
        return found[0, 0]

    assert gradient(None) == 2048
    assert gradient("safe") == 4096


def ones(x):
    """Return gates that are always open."""
    return keras.ops.ones_like(x)


# A layer on each backend whose bias gets the sum of 4096 ones, and the shape of its inputs.
STEPPING = {
    "tensorflow": (lambda **k: layers.SimpleRNN(2, activation=None, **k), (4096, 1, 1)),
    "jax": (
        lambda **k: layers.ConvLSTM1D(1, 1, activation=None, recurrent_activation=ones, **k),
        (64, 1, 64, 1),
    ),
}


@pytest.mark.backend(*STEPPING)
def test_the_gradient_of_a_recurrent_bias_is_not_summed_in_bfloat16():
    make, shape = STEPPING[keras.backend.backend()]

    def gradient(rules):
        layer = make(kernel_initializer="zeros", recurrent_initializer="zeros")
        model = relu_after(layer, shape[1:])
        mp.convert(model, "mixed_bfloat16", rules=rules)
        (bias,) = [v for v in layer.trainable_variables if v.name == "bias"]
        run = gradients.compile_(layer, [bias], "quick")
        _, found = run([np.zeros(shape, "float32")], None)
        return found[-1].max()

    assert gradient(None) < 4096
    assert gradient("safe") == 4096


@pytest.mark.parametrize("fused", [True, full(False)])
def test_attention_scores_do_not_overflow(fused):
    x = far_from_zero(64)
    expected = dot_attention(*x, scale=1 / 8)
    eye = np.eye(64, dtype="float32")

    def attended(rules):
        # With dropout Keras cannot use the fused operation; it drops nothing outside of training.
        layer = layers.MultiHeadAttention(1, 64, use_bias=False, dropout=0.0 if fused else 0.5)
        model = attends_itself(layer, (6, 64))
        weights = [w for w in layer.weights if w.path.endswith("kernel")]
        for weight in weights:
            weight.assign(eye.reshape(weight.shape))
        mp.convert(model, "mixed_float16", rules=rules)
        return keras.ops.convert_to_numpy(layer(*x.astype("float32"))).astype("float64")

    best = error(expected.astype("float16"), expected)
    assert error(attended("safe"), expected) <= 4 * best
    if not fused or keras.backend.backend() == "tensorflow":  # elsewhere no CPU kernel does it
        assert not error(attended(None), expected) <= 4 * best


@pytest.mark.full
@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize(
    "build", [lambda: layers.UpSampling2D(interpolation="bilinear"), lambda: layers.Resizing(8, 8)]
)
def test_interpolation_compiles_under_xla(build):
    import tensorflow as tf

    inputs = keras.Input((4, 4, 2))
    x = build()(layers.Conv2D(2, 3, activation="relu")(inputs))
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.Conv2D(1, 1)(x)))

    def trained(rules):
        report = mp.convert(model, "mixed_float16", rules=rules)
        optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD())
        model.compile(optimizer, "mse", jit_compile=True)
        model.train_on_batch(np.ones((2, 4, 4, 2)), np.ones((2, 1)))
        report.restore()

    with pytest.raises(tf.errors.InternalError, match="mixed precision is disallowed"):
        trained(None)
    trained("safe")


@pytest.mark.full
@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("products", [1, 2])
def test_interpolation_after_plain_products_needs_no_rule_under_xla(products):
    with mp.policy_scope("mixed_float16"):
        parts = [layers.Conv2D(4, 3, padding="same") for _ in range(products)]
        resized = layers.UpSampling2D(2, interpolation="bilinear")
        rest = [layers.GlobalAveragePooling2D(), mp.layers.DenseHead(1)]
    model = keras.Sequential([keras.Input((8, 8, 3)), *parts, resized, *rest])
    model.compile(mp.LossScaleOptimizer("sgd", loss_scale=1.0), "mse", jit_compile=True)
    assert not [each for each in mp.lint(model) if each.place.endswith(resized.name)]
    model.fit(np.ones((2, 8, 8, 3)), np.ones((2, 1)), verbose=0)
    assert model.optimizer.applied_steps == 1
