"""The rules "safe": which layers they claim, and which they leave alone."""

import keras
import numpy as np
import pytest
from helpers.networks import attends_itself, relu_after, third_from_the_end

import kerasmp as mp
from kerasmp.policy.safe import RULES

layers = keras.layers
POLICY = mp.Policy("mixed_float16", rules="safe")


def rows(model, policy=POLICY):
    return mp.convert(model, policy, rules=None, dry_run=True).rows


def row_of(model, layer):
    return next(row for row in rows(model) if row.layer is layer)


def attends(layer):
    inputs = keras.Input((4, 8))
    return keras.Model(inputs, layers.ReLU()(layers.ReLU()(layer([inputs, inputs]))))


def masked(layer):
    inputs = keras.Input((4, 8))
    return keras.Model(inputs, layers.ReLU()(layers.ReLU()(layer(layers.Masking()(inputs)))))


class Custom(layers.Layer):
    activation = staticmethod(keras.activations.softmax)

    def call(self, inputs):
        return inputs


class Holding(layers.Layer):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def build(self, shape):
        self.part.build(shape)

    def call(self, inputs):
        return inputs


def feeds(layer, taker):
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.ReLU()(taker(layer(inputs))))


def nested(*parts):
    return keras.Sequential([keras.Input((4,)), *parts])


def named(name, **settings):
    return layers.Activation(name, **settings)


def spectrogram(**settings):
    return layers.STFTSpectrogram(frame_length=16, frame_step=8, **settings)


# By rule: layers that it claims, and similar ones that it leaves alone.
CASES = {
    "data": (
        [
            lambda: relu_after(Holding(layers.Normalization(mean=0.0, variance=1.0)), (4,)),
            lambda: feeds(layers.Reshape((4,)), layers.Discretization([0.1])),
            lambda: feeds(layers.Rescaling(0.1), layers.Embedding(2, 3)),
            lambda: feeds(layers.Reshape((4,)), nested(nested(layers.Embedding(2, 3)))),
            lambda: nested(layers.Reshape((4,)), nested(layers.Identity()), layers.Embedding(2, 3)),
        ],
        [
            lambda: relu_after(Holding(layers.Masking(0.0)), (4, 2)),
            lambda: relu_after(Holding(layers.Embedding(2, 3)), (4,)),
            lambda: feeds(layers.Reshape((4,)), layers.Masking(0.5)),
            lambda: feeds(layers.Reshape((4,)), nested(layers.Dense(4), layers.Normalization())),
        ],
    ),
    "activity": (
        [
            lambda: relu_after(layers.Dense(2, activity_regularizer="l2"), (4,)),
            lambda: relu_after(layers.ActivityRegularization(l2=0.1), (4,)),
        ],
        [lambda: relu_after(layers.Dense(2, kernel_regularizer="l2"), (4,))],
    ),
    "softmax": (
        [lambda: relu_after(layers.Softmax(), (4,))],
        [lambda: relu_after(layers.ReLU(), (4,)), lambda: relu_after(Custom(), (4,))],
    ),
    "attention": (
        [lambda: attends(layers.Attention()), lambda: attends(layers.AdditiveAttention())],
        [lambda: attends(layers.Dot(axes=2))],
    ),
    "probabilities": (
        [
            lambda: relu_after(layers.Dense(2, activation="sigmoid"), (4,)),
            lambda: relu_after(layers.Conv2D(2, 1, activation="softmax"), (4, 4, 2)),
        ],
        [
            lambda: relu_after(layers.Dense(2, activation="gelu"), (4,)),
            lambda: relu_after(layers.LSTM(2), (4, 2)),
            lambda: relu_after(mp.layers.DenseHead(2, activation="softmax"), (4,)),
        ],
    ),
    "activation": (
        [
            lambda name=name: relu_after(named(name), (4,))
            for name in ("gelu", "swish", "mish", "hard_silu", "squareplus", "tanh", "sigmoid")
        ]
        + [lambda: relu_after(named("softmax"), (4,))],
        [
            lambda name=name: relu_after(named(name), (4,))
            for name in ("relu", "elu", "selu", "softplus", "log_softmax", "linear", "relu6")
        ],
    ),
    "normalization": (
        [
            lambda: relu_after(layers.Normalization(), (4,)),
            lambda: relu_after(layers.UnitNormalization(), (4,)),
        ],
        [
            lambda: relu_after(layers.LayerNormalization(), (4,)),
            lambda: relu_after(layers.BatchNormalization(), (4,)),
            lambda: relu_after(mp.layers.BatchNormalization(), (4,)),
        ],
    ),
    "cosine": (
        [lambda: attends(layers.Dot(axes=2, normalize=True))],
        [lambda: attends(layers.Dot(axes=2))],
    ),
    "pooling": (
        [
            lambda: relu_after(layers.AveragePooling1D(17), (34, 2)),
            lambda: relu_after(layers.AveragePooling2D((3, 6)), (12, 12, 2)),
            lambda: relu_after(layers.AveragePooling3D(3), (6, 6, 6, 2)),
        ],
        [
            lambda: relu_after(layers.AveragePooling1D(16), (32, 2)),
            lambda: relu_after(layers.AveragePooling2D(4), (8, 8, 2)),
            lambda: relu_after(layers.MaxPooling2D(7), (14, 14, 2)),
        ],
    ),
    "masked-pooling": (
        [lambda: masked(layers.GlobalAveragePooling1D())],
        [
            lambda: relu_after(layers.GlobalAveragePooling1D(), (4, 2)),
            lambda: relu_after(layers.GlobalAveragePooling2D(), (4, 4, 2)),
        ],
    ),
    "average": (
        [lambda: relu_after(layers.Average(), (4,), count=2)],
        [lambda: relu_after(layers.Maximum(), (4,), count=2)],
    ),
    "spectral": (
        [lambda: relu_after(layers.SpectralNormalization(layers.Dense(2)), (4,))],
        [lambda: relu_after(layers.TimeDistributed(layers.Dense(2)), (4, 2))],
    ),
    "recurrent": (
        [
            lambda: relu_after(layers.SimpleRNN(2), (3, 2)),
            lambda: relu_after(layers.ConvLSTM1D(2, 1), (3, 4, 2)),
            lambda: relu_after(mp.layers.RNN([layers.GRUCell(2), layers.SimpleRNNCell(2)]), (3, 2)),
        ],
        [
            lambda: relu_after(layers.LSTM(2), (3, 2)),
            lambda: relu_after(layers.RNN(layers.GRUCell(2)), (3, 2)),
        ],
    ),
    "embedding": (
        [lambda: relu_after(layers.Embedding(4, 2), (3,))],
        [
            lambda: relu_after(mp.layers.Embedding(4, 2), (3,)),
            lambda: relu_after(layers.Dense(2), (3,)),
        ],
    ),
    "spectrum": (
        [
            lambda: relu_after(spectrogram(mode="log"), (64, 1)),
            lambda: relu_after(layers.MelSpectrogram(fft_length=64, sequence_stride=16), (64,)),
            # The next layer may overflow, too.
            lambda: relu_after(layers.Permute((2, 1)), (64, 1), before=[spectrogram(mode="psd")]),
            lambda: relu_after(
                layers.BatchNormalization(), (64, 1), before=[spectrogram(mode="psd")]
            ),
            # kerasmp layers, too: each casts its inputs before its own code runs.
            lambda: relu_after(
                mp.layers.BatchNormalization(), (64, 1), before=[spectrogram(mode="psd")]
            ),
            lambda: relu_after(mp.layers.DenseHead(2), (64, 1), before=[spectrogram(mode="psd")]),
        ],
        [
            lambda: relu_after(layers.Permute((2, 1)), (64, 1), before=[spectrogram(mode="log")]),
            lambda: relu_after(
                layers.Permute((2, 1)),
                (64, 1),
                before=[spectrogram(mode="psd"), layers.LayerNormalization()],
            ),
            lambda: relu_after(
                mp.layers.BatchNormalization(), (64, 1), before=[spectrogram(mode="log")]
            ),
        ],
    ),
}


# The NumPy backend of Keras 3.12, on which unit tests run too, passes no masks on.
MARKS = {"masked-pooling": pytest.mark.keras("3.15")}


def pairs(which):
    return [
        pytest.param(name, build, id=f"{name}-{number}", marks=MARKS.get(name, ()))
        for name, cases in CASES.items()
        for number, build in enumerate(cases[which])
    ]


@pytest.mark.unit
@pytest.mark.parametrize(("name", "build"), pairs(0))
def test_what_a_rule_claims(name, build):
    model = build()
    row = row_of(model, third_from_the_end(model))
    rule = next(rule for rule in RULES if rule.name == name)
    assert row.after == "float32"
    assert rule.name in row.reason
    assert rule.hazard in row.reason
    assert "hazard" in row.reason


@pytest.mark.unit
@pytest.mark.filterwarnings("ignore:The NumPy backend does not support masking")  # of Keras 3.12
@pytest.mark.parametrize(("name", "build"), pairs(1))
def test_what_it_leaves_alone(name, build):
    model = build()
    row = row_of(model, third_from_the_end(model))
    assert (row.after, row.reason) == ("mixed_float16", "the policy"), name


@pytest.mark.unit
def test_every_rule_is_tested():
    # The layers without a kernel differ between backends: tests/conversion has them.
    others = {"head", "kernel", "scores", "interpolation", "resampling"}
    assert {rule.name for rule in RULES} == {*CASES, *ON_ONE_BACKEND, *others}


# By rule: the backend on which stock Keras needs it, and layers as in CASES.
ON_ONE_BACKEND = {
    "mask-value": (
        "tensorflow",
        [lambda value=value: layers.Masking(value) for value in (0.1, -5000.3, -99999.0)],
        [lambda value=value: layers.Masking(value) for value in (0.0, -0.5, 1000.5, -99999)]
        + [lambda: mp.layers.Masking(0.1), lambda: layers.Masking(float("nan"))],
    ),
    "dropout": (
        "tensorflow",
        [lambda: layers.Dropout(0.001), lambda: layers.SpatialDropout1D(0.9999)],
        [lambda rate=rate: layers.Dropout(rate) for rate in (0.0, 0.1, 0.5, 1.0)]
        + [lambda: mp.layers.Dropout(0.001), lambda: layers.AlphaDropout(0.001)],
    ),
    "noise": (
        "jax",
        [lambda: layers.GaussianNoise(0.1), lambda: layers.GaussianDropout(0.1)],
        [lambda: mp.layers.GaussianNoise(0.1), lambda: layers.AlphaDropout(0.1)],
    ),
}


@pytest.mark.parametrize("name", ON_ONE_BACKEND)
def test_a_rule_of_one_backend_claims_there_alone(name):
    backend, claimed, left = ON_ONE_BACKEND[name]
    for make in claimed:
        model = relu_after(make(), (4, 2))
        row = row_of(model, third_from_the_end(model))
        assert (name in row.reason) is (keras.backend.backend() == backend), row
        assert (row.after == "float32") is (keras.backend.backend() == backend), row
    for make in left:
        model = relu_after(make(), (4, 2))
        assert row_of(model, third_from_the_end(model)).after == "mixed_float16"


def conv(**settings):
    return lambda: layers.Conv2D(2, 3, **{"padding": "same", **settings})


# By rule: layers, and those before them, that it claims or leaves alone. With each layer before
# them they trained under XLA or failed, on TensorFlow 2.18 and 2.21.
RESIZED = {
    "interpolation": (
        [
            (lambda: layers.UpSampling2D(interpolation="bilinear"), [conv(activation="relu")]),
            (lambda: layers.UpSampling2D(interpolation="bilinear"), [layers.ReLU, conv()]),
            (lambda: layers.UpSampling2D(interpolation="bilinear"), [conv(dilation_rate=2)]),
            (lambda: layers.Resizing(8, 8), [conv(), layers.ReLU]),
            (lambda: layers.Resizing(8, 8, crop_to_aspect_ratio=True), [conv()]),
        ],
        [
            (lambda: layers.UpSampling2D(interpolation="bilinear"), [conv()]),
            (lambda: layers.UpSampling2D(interpolation="bicubic"), [layers.ReLU]),
            (lambda: layers.Resizing(8, 8), []),
            (lambda: layers.Resizing(8, 8, interpolation="nearest"), [layers.ReLU]),
        ],
    ),
    "resampling": (
        [
            (lambda: layers.UpSampling2D(interpolation="lanczos3"), [conv()]),
            (lambda: layers.Resizing(8, 8, antialias=True), [conv()]),
        ],
        [(lambda: layers.Resizing(8, 8, antialias=True), [])],
    ),
}


@pytest.mark.parametrize("name", RESIZED)
def test_resized_images_are_claimed_where_tensorflow_fails(name):
    on_tensorflow = keras.backend.backend() == "tensorflow"
    for cases, is_claimed in zip(RESIZED[name], (on_tensorflow, False), strict=True):
        for make, before in cases:
            model = relu_after(make(), (4, 4, 2), before=[each() for each in before])
            row = row_of(model, third_from_the_end(model))
            assert (name in row.reason, row.after == "float32") == (is_claimed, is_claimed), row


@pytest.mark.backend("tensorflow")
def test_an_operation_missing_in_bfloat16_is_claimed_under_bfloat16_only():
    for make in (lambda: layers.Masking(1000.5), lambda: layers.Dropout(0.02)):
        model = relu_after(make(), (4, 2))
        layer = third_from_the_end(model)
        for half, after in (("float16", "mixed_float16"), ("bfloat16", "float32")):
            policy = mp.Policy(f"mixed_{half}", rules="safe")
            row = next(row for row in rows(model, policy) if row.layer is layer)
            assert row.after == after


@pytest.mark.parametrize("cls", [layers.MultiHeadAttention, layers.GroupQueryAttention])
def test_attention_computes_scores_in_float32_and_projects_in_float16(cls):
    layer = cls(2, 4) if cls is layers.MultiHeadAttention else cls(4, 2, 2)
    model = attends_itself(layer)
    after = {row.path: row.after for row in rows(model) if layer.name in row.path}
    float32 = {path.rpartition("/")[2] for path, name in after.items() if name == "float32"}
    wide = {"query", "key", "value"} if keras.backend.backend() == "torch" else {"query"}
    assert wide <= float32
    assert len(float32 - wide) == 2  # softmax and dropout
    rest = {path.rpartition("/")[2] for path, name in after.items() if name != "float32"}
    assert rest == {layer.name, "key", "value", "attention_output"} - wide


def heads(model):
    return [row.path for row in rows(model) if row.after == "float32" and "head" in row.reason]


@pytest.mark.unit
def test_the_head_is_the_layer_that_makes_an_output():
    inputs = keras.Input((4,))
    body = layers.Dense(8, name="body")(inputs)
    first = layers.Dense(4, name="first")(body)
    second = layers.Dense(6, name="second")(body)
    shaped = layers.Dropout(0.5, name="drop")(layers.Reshape((2, 3), name="shape")(second))
    model = keras.Model(inputs, [first, shaped])
    assert set(heads(model)) == {"first", "second", "shape", "drop"}


@pytest.mark.unit
def test_a_softmax_layer_is_the_head_and_the_layer_before_is_not():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="logits"), layers.Softmax(name="probabilities")]
    )
    assert heads(model) == ["probabilities"]


@pytest.mark.unit
def test_the_head_is_found_through_operations_and_inside_models():
    inputs = keras.Input((4,))
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="a"), layers.Dense(4, name="b")]
    )
    outer = keras.Model(inputs, 2 * inner(inputs))
    assert [path.rpartition("/")[2] for path in heads(outer)] == ["b"]


@pytest.mark.unit
def test_a_head_includes_its_parts():
    inputs = keras.Input((3, 4))
    model = keras.Model(inputs, layers.TimeDistributed(layers.Dense(2, name="inner"))(inputs))
    assert {row.after for row in rows(model)[1:]} == {"float32"}


def test_pooling_outside_a_graph_may_be_masked():
    class Pools(layers.Layer):
        def __init__(self):
            super().__init__()
            self.pool = layers.GlobalAveragePooling1D(name="pool")

        def call(self, inputs):
            return self.pool(inputs)

    model = relu_after(Pools(), (4, 2))
    (row,) = [row for row in rows(model) if row.path.endswith("pool")]
    assert (row.after, "masked-pooling" in row.reason) == ("float32", True)


def test_layers_inside_a_user_defined_layer_are_not_included():
    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def build(self, shape):
            self.dense.build(shape)

        def call(self, inputs):
            return self.dense(inputs)

    inputs = keras.Input((4,))
    model = keras.Model(inputs, Block()(inputs))
    assert not heads(model)


@pytest.mark.unit
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "mixed_bfloat16"])
def test_policies_that_need_no_rules_have_none_and_bfloat16_has_all(name):
    if name == "bfloat16":
        with pytest.raises(mp.errors.PolicyError, match="mixed_bfloat16"):
            mp.Policy(name, rules="safe")
        return
    with mp.policy_scope("float64" if name == "float64" else "float32"):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(2), layers.Softmax()])
    after = [row.after for row in rows(model, mp.Policy(name, rules="safe"))]
    assert after == [name, name, "float32" if "mixed" in name else name]


HEADS = {
    "Dense": lambda: mp.layers.Dense(3, activation="softmax"),
    "Softmax": mp.layers.Softmax,
    "SpectralNormalization": lambda: mp.layers.SpectralNormalization(layers.Dense(3)),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_dense_head_counts_as_a_head(name):
    layer = HEADS[name]()
    inputs = keras.Input((4, 8))
    model = keras.Model(inputs, layer(layers.Dense(4)(inputs)))
    mp.convert(model, "mixed_float16")
    assert model.outputs[0].dtype == "float32"


@pytest.mark.unit
def test_a_head_that_gives_float32_stays_in_float16():
    head = mp.layers.DenseHead(3, activation="softmax", activity_regularizer="l2")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), head])
    assert row_of(model, head).after == "mixed_float16"


@pytest.mark.parametrize("mode", ["log", "psd"])
def test_parts_of_kerasmp_attention_stay_in_half_precision_except_after_psd_spectra(mode):
    attention = mp.layers.MultiHeadAttention(1, 2, name="attention")
    inputs = keras.Input((64, 1))
    x = spectrogram(mode=mode)(inputs)
    model = keras.Model(inputs, layers.ReLU()(layers.ReLU()(attention(x, x))))
    inside = [row.after for row in rows(model) if "attention/" in row.path]
    assert inside
    assert set(inside) == {"float32" if mode == "psd" else "mixed_float16"}


def test_loud_spectra_stay_finite_with_safe_layers():
    inputs = keras.Input((64, 1))
    x = layers.Conv1D(2, 1)(spectrogram(mode="psd")(inputs))
    model = keras.Model(inputs, layers.Dense(1)(layers.LayerNormalization()(x)))
    mp.convert(model, safe_layers=True)
    loud = 2.0**12 * np.random.default_rng(0).normal(size=(1, 64, 1))
    assert np.isfinite(keras.ops.convert_to_numpy(model(loud))).all()
