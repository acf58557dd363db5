"""Networks that are right in half precision give no error and no warning."""

import keras
import numpy as np
import pytest
from keras import ops

import kerasmp as mp

layers = keras.layers
RNG = np.random.default_rng(0)
BATCH = 8


def mlp():
    x = inputs = keras.Input((12,))
    for units in (32, 16):
        x = layers.Dropout(0.2)(layers.Dense(units, activation="relu")(x))
    # Standardised columns, as for a table.
    return keras.Model(inputs, layers.Dense(1)(x)), RNG.normal(size=(BATCH, 12))


def cnn():
    parts = [
        part
        for filters in (8, 16)
        for part in (
            layers.Conv2D(filters, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(2),
        )
    ]
    head = [layers.GlobalAveragePooling2D(), layers.Dense(10, activation="softmax")]
    scaling = layers.Rescaling(1 / 255)
    model = keras.Sequential([keras.Input((16, 16, 3)), scaling, *parts, *head])
    return model, RNG.integers(0, 256, (BATCH, 16, 16, 3))


def residual():
    x = inputs = keras.Input((8, 8, 8))
    for _ in range(2):
        y = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same")(x))
        squeezed = layers.GlobalAveragePooling2D(keepdims=True)(y)
        squeezed = layers.Dense(4, activation="relu")(squeezed)
        y = y * layers.Dense(8, activation="sigmoid")(squeezed)
        x = layers.ReLU()(x + y)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(5)(x)), RNG.normal(size=(BATCH, 8, 8, 8))


def unet():
    x = inputs = keras.Input((16, 16, 1))
    kept = []
    for filters in (8, 16):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        kept.append(x)
        x = layers.MaxPooling2D(2)(x)
    for filters, side in zip((16, 8), reversed(kept), strict=True):
        x = layers.Conv2DTranspose(filters, 2, strides=2)(x)
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(
            layers.Concatenate()([x, side])
        )
    outputs = layers.Conv2D(1, 1, activation="sigmoid")(x)
    return keras.Model(inputs, outputs), RNG.uniform(size=(BATCH, 16, 16, 1))


def text():
    ids = RNG.integers(1, 3000, (BATCH, 12))
    ids[:, 8:] = 0
    model = keras.Sequential(
        [
            keras.Input((12,), dtype="int32"),
            layers.Embedding(3000, 16, mask_zero=True),
            layers.Bidirectional(layers.LSTM(8)),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    return model, ids


class Positions(layers.Layer):
    def __init__(self, length, width, **settings):
        super().__init__(**settings)
        self.rows = layers.Embedding(length, width, dtype=self.dtype_policy)
        self.length = length

    def build(self, _):
        self.rows.build(())

    def call(self, inputs):
        return inputs + self.rows(ops.arange(self.length))


def transformer():
    inputs = keras.Input((12,), dtype="int32")
    x = Positions(12, 16)(layers.Embedding(500, 16)(inputs))
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(2, 8)(y, y)
        y = layers.Dense(32, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(16)(y)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(4)(x)), RNG.integers(0, 500, (BATCH, 12))


class Sampling(layers.Layer):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.seed = keras.random.SeedGenerator(1)

    def call(self, inputs):
        mean, log_variance = inputs
        noise = keras.random.normal(ops.shape(mean), dtype=mean.dtype, seed=self.seed)
        return mean + ops.exp(0.5 * log_variance) * noise


def vae():
    inputs = keras.Input((8, 8, 1))
    x = layers.Dense(32, activation="relu")(layers.Flatten()(inputs))
    z = Sampling()([layers.Dense(4)(x), layers.Dense(4)(x)])
    x = layers.Dense(64, activation="sigmoid")(layers.Dense(32, activation="relu")(z))
    return keras.Model(inputs, layers.Reshape((8, 8, 1))(x)), RNG.uniform(size=(BATCH, 8, 8, 1))


def recommender():
    users, items = (keras.Input((), dtype="int32", name=name) for name in ("users", "items"))
    towers = [
        layers.Dense(8)(layers.Dense(16, activation="relu")(layers.Embedding(5000, 16)(ids)))
        for ids in (users, items)
    ]
    outputs = layers.Activation("sigmoid")(layers.Dot(-1, normalize=True)(towers))
    return keras.Model([users, items], outputs), [RNG.integers(0, 5000, BATCH) for _ in range(2)]


QUICK = {mlp, transformer}
NETWORKS = [mlp, cnn, residual, unet, text, transformer, vae, recommender]


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "network",
    [pytest.param(each, marks=() if each in QUICK else pytest.mark.full) for each in NETWORKS],
)
def test_a_healthy_network_gives_no_error_and_no_warning(network, half):
    model, x = network()
    mp.convert(model, f"mixed_{half}")
    report = mp.lint(model, keras.tree.map_structure(np.asarray, x))
    assert not report.errors + report.warnings, str(report)


class HalfOnly(layers.Layer):
    """Is written for half precision, and fails in float32."""

    def call(self, inputs):
        if keras.backend.standardize_dtype(inputs.dtype) == "float32":
            raise TypeError("only half precision")
        return inputs * ops.convert_to_tensor(np.ones(8), inputs.dtype)


def test_a_layer_for_half_precision_only_is_no_finding_and_no_error():
    with mp.policy_scope("mixed_float16"):
        inputs = keras.Input((8,))
        hidden = HalfOnly()(layers.Dense(8)(inputs))
        model = keras.Model(inputs, mp.layers.DenseHead(8)(hidden))
    x = np.ones((8, 8), "float32")
    assert not mp.lint(model, x).errors
    assert not mp.convert(model, "mixed_float16", sample=x).findings


@pytest.mark.backend("tensorflow")
def test_what_a_layer_draws_by_the_framework_is_not_compared():
    import tensorflow as tf

    def noisy(x):
        return x + tf.random.normal(tf.shape(x), dtype=x.dtype)

    with mp.policy_scope("mixed_float16"):
        parts = [keras.Input((8,)), layers.Lambda(noisy, output_shape=(8,)), mp.layers.DenseHead(8)]
    assert not mp.lint(keras.Sequential(parts), np.ones((8, 8), "float32")).warnings
