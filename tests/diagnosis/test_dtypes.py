"""Findings of lint about layers and variables whose dtype is not what the policy intends."""

import keras
import numpy as np
import pytest
from helpers.linted import Holds, X, dense, found, made, only
from helpers.networks import attends_itself
from keras import ops

import kerasmp as mp

layers = keras.layers

# NumPy and JAX warn about the constants that lint looks for.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")


# half-master


class OwnWeight(layers.Layer):
    weight_dtype = "float16"

    def build(self, shape):
        self.weight = self.add_weight(shape=(shape[-1],), dtype=self.weight_dtype, name="mine")

    def call(self, inputs):
        return inputs * keras.ops.cast(self.weight, inputs.dtype)


class FloatWeight(OwnWeight):
    weight_dtype = "float32"


def test_a_half_precision_master_weight_is_an_error():
    each = only(made(OwnWeight), "half-master")
    assert each.severity == "error"
    assert "(mine)" in each.reason
    for half in ("float16", "bfloat16"):
        reason = only(made(dense(), policy=half), "half-master").reason
        assert f"in {half} (kernel, bias)" in reason


def test_float32_master_weights_and_frozen_weights_give_no_finding():
    assert not found(made(FloatWeight), "half-master")
    frozen = made(OwnWeight)
    frozen.layers[0].trainable = False
    assert not found(frozen, "half-master")


# float-ids


def embedding(size, policy="mixed_float16", **arguments):
    parts = (layers.Flatten, lambda: layers.Embedding(size, 8), layers.Flatten)
    return made(*parts, shape=(4,), policy=policy, **arguments)


@pytest.mark.unit
def test_ids_that_come_as_floats_are_an_error():
    each = only(embedding(2050), "float-ids")
    assert each.severity == "error"
    assert "2048" in each.reason
    assert "int32" in each.remedy
    assert found(embedding(258, "mixed_bfloat16"), "float-ids")
    inner = keras.Sequential([keras.Input((4,)), layers.Embedding(2050, 8)])
    each = only(made(layers.Flatten, lambda: inner, shape=(4,)), "float-ids")
    assert each.place == inner.layers[0].path


@pytest.mark.unit
def test_integers_few_ids_and_float32_give_no_finding():
    assert not found(embedding(5000, dtype="int32"), "float-ids")
    assert not found(embedding(2049), "float-ids")
    assert not found(embedding(257, "mixed_bfloat16"), "float-ids")
    assert not found(embedding(5000, "float32"), "float-ids")
    # Embedding itself rounds no ids.
    alone = made(lambda: layers.Embedding(5000, 8), layers.Flatten, shape=(4,))
    assert not found(alone, "float-ids")


# mask-value


def masking(value, **arguments):
    policy = arguments.pop("policy", "mixed_float16")
    module = arguments.pop("module", layers)
    part = lambda: module.Masking(value, name="masking")  # noqa: E731 - as the others
    return made(part, shape=(4, 8), policy=policy, **arguments)


class Masks(keras.Model):
    def __init__(self, part, **settings):
        super().__init__(**settings)
        self.part = part

    def call(self, inputs):
        return self.part(inputs)


@pytest.mark.backend("tensorflow")
def test_a_mask_value_that_half_precision_does_not_hold_is_an_error():
    for value, half in ((0.1, "float16"), (-5000.3, "bfloat16"), (-99999.0, "float16")):
        each = only(masking(value, policy=f"mixed_{half}"), "mask-value")
        assert (each.severity, each.place) == ("error", "masking")
        assert f"{half} inputs cannot hold the mask value {value}" in each.reason
        assert "kerasmp.layers.Masking" in each.remedy
    # The layer itself rounds nothing, but the model around it does.
    assert only(masking(0.1, policy="float32", dtype="float16"), "mask-value")
    model = Masks(layers.Masking(0.1, dtype="float32"), dtype="mixed_float16")
    assert only(model, "mask-value", np.ones((2, 4, 8), "float32"))


@pytest.mark.backend("tensorflow")
def test_representable_mask_values_and_float32_give_no_finding():
    for value in (0.0, -0.5, 1000.5, -99999, float("nan")):
        assert not found(masking(value), "mask-value")
    assert not found(masking(0.1, policy="float32"), "mask-value")
    assert not found(masking(0.1, module=mp.layers), "mask-value")
    model = masking(0.1)
    mp.convert(model)
    assert not mp.lint(model)


@pytest.mark.backend("jax", "torch")
def test_a_mask_value_that_keras_rounds_too_gives_no_finding():
    x = np.ones((8, 4, 8), "float32")
    x[:, 2:] = -99999.0
    assert not mp.lint(masking(-99999.0), x)


# dropout-rate


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize(
    "part",
    [
        lambda: layers.Dropout(0.001, name="part"),
        lambda: layers.Bidirectional(layers.GRU(4, dropout=0.001, name="part")),
        lambda: layers.ConvLSTM1D(8, 2, recurrent_dropout=0.001, name="part"),
    ],
)
def test_a_rate_at_which_too_many_are_dropped_is_a_warning(part):
    shape = (4, 4, 8) if isinstance(part(), layers.ConvLSTM1D) else (4, 8)
    each, *_ = found(made(part, shape=shape), "dropout-rate")
    assert each.severity == "warning"
    assert "part" in each.place
    assert "drops 0.195 % instead of 0.1 %" in each.reason


@pytest.mark.backend("tensorflow")
def test_usual_rates_and_kerasmp_layers_give_no_finding():
    attention = mp.layers.MultiHeadAttention(2, 4, dropout=0.001, dtype="mixed_float16")
    inputs = keras.Input((4, 8))
    inside = keras.Model(inputs, layers.Flatten()(attention(inputs, inputs)))
    parts = [
        lambda: layers.Dropout(0.1),
        lambda: mp.layers.Dropout(0.001),
        lambda: mp.layers.LSTM(8, dropout=0.001),
    ]
    for model in (inside, *(made(part, shape=(4, 8)) for part in parts)):
        assert not found(model, "dropout-rate")
    assert not found(made(lambda: layers.Dropout(0.001), policy="float32"), "dropout-rate")


# ignores-policy


class Widens(layers.Layer):
    def call(self, inputs):
        return keras.ops.cast(inputs, "float32")


class Keeps(layers.Layer):
    def call(self, inputs):
        return 2 * inputs


@pytest.mark.unit
def test_a_model_that_was_only_relabelled_is_a_warning():
    model = made(dense(), policy="float32")
    model.dtype_policy = "mixed_float16"
    each = only(model, "ignores-policy")
    assert each.severity == "warning"
    assert "convert" in each.remedy


def test_a_model_that_the_global_policy_did_not_reach_is_a_warning():
    model = made(dense(), policy="float32")
    with mp.policy_scope("mixed_float16"):
        assert "global policy" in only(model, "ignores-policy").reason
        assert not found(made(dense()), "ignores-policy")
    assert not found(model, "ignores-policy")


def test_a_converted_model_kept_in_float32_by_rules_gives_no_finding():
    model = made(dense(activation="softmax"), bare=True, policy="float32")
    model.dtype_policy = "mixed_float16"
    assert not found(model, "ignores-policy")
    mp.convert(model)
    assert not mp.lint(model)
    with mp.policy_scope("mixed_float16"):
        assert not mp.lint(model)


def test_a_layer_that_does_not_follow_its_policy_is_a_warning():
    each = only(made(lambda: Widens(name="wide")), "ignores-policy")
    assert each.place.endswith("wide")
    assert "float32" in each.reason
    assert not found(made(Keeps), "ignores-policy")
    holds = made(Holds, bare=True)
    assert keras.backend.standardize_dtype(holds(X).dtype) == "float16"
    assert not found(holds, "ignores-policy")
    assert not found(made(lambda: Widens(dtype="float32"), dense()), "ignores-policy")
    assert not found(made(lambda: mp.layers.DenseHead(8)), "ignores-policy")


# unsafe-layer


@pytest.mark.unit
def test_stock_layers_that_the_safe_rules_know_are_found():
    each = only(made(layers.UnitNormalization), "unsafe-layer")
    assert each.severity == "warning"
    assert "hazards 7, 8" in each.reason
    assert only(made(dense(activation="sigmoid")), "unsafe-layer").severity == "hint"
    assert not found(made(dense()), "unsafe-layer")
    model = made(layers.UnitNormalization)
    mp.convert(model)
    assert not found(model, "unsafe-layer")


def test_a_stock_layer_whose_values_show_nothing_is_a_hint():
    x = np.ones((2, 8), "float32")
    assert only(made(layers.UnitNormalization), "unsafe-layer", x).severity == "hint"
    assert not found(made(layers.UnitNormalization), "unsafe-layer", 1e4 * x)


# By the severity in bfloat16: layers that `convert` keeps in float32.
IN_BFLOAT16 = {
    "hint": [
        layers.UnitNormalization,
        lambda: layers.Activation("gelu"),
        dense(activation="sigmoid"),
        lambda: layers.AveragePooling1D(17),
    ],
    "warning": [layers.GlobalAveragePooling1D, lambda: HoldsData(layers.Discretization([0.1]))],
}


class HoldsData(layers.Layer):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def build(self, shape):
        self.part.build(shape)

    def call(self, inputs):
        return inputs


@pytest.mark.parametrize(
    ("severity", "part"), [(key, part) for key, parts in IN_BFLOAT16.items() for part in parts]
)
def test_what_convert_keeps_in_float32_is_found_in_bfloat16_too(severity, part):
    with mp.policy_scope("mixed_bfloat16"):
        layer = part()
    inputs = keras.Input((17, 8))
    x = layers.Masking(dtype="float32")(inputs) if layer.supports_masking else inputs
    model = keras.Model(inputs, layers.Dense(8, dtype="float32")(layer(x)))
    each = only(model, "unsafe-layer")
    assert each.severity == severity
    assert each.place.endswith(layer.name)
    assert "overflow" not in each.reason or severity == "warning"
    mp.convert(model, "mixed_bfloat16")
    assert layer.compute_dtype == "float32"
    assert not found(model, "unsafe-layer")


def test_a_bfloat16_head_is_a_hint():
    model = made(dense(name="head"), bare=True, policy="mixed_bfloat16")
    each = only(model, "unsafe-layer")
    assert each.severity == "hint"
    assert each.place.endswith("head")


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("cls", [layers.MultiHeadAttention, layers.GroupQueryAttention])
def test_an_attention_layer_is_one_finding(cls, half):
    sizes = (2, 8) if cls is layers.MultiHeadAttention else (8, 2, 2)
    with mp.policy_scope(f"mixed_{half}"):
        layer = cls(*sizes, dropout=0.5)
    each = only(attends_itself(layer), "unsafe-layer")
    assert each.place.endswith(layer.name)
    assert "hazards 2, 3" in each.reason


# For a layer with a warning in both half precisions, the backends.
IN_BOTH = [
    (lambda: layers.GaussianNoise(0.1), ["jax"]),
    (lambda: layers.Embedding(8, 4), ["jax", "torch"]),
    (layers.CutMix, ["tensorflow", "torch"]),
    (lambda: layers.UpSampling2D(interpolation="bilinear"), ["tensorflow"]),
    (lambda: layers.STFTSpectrogram(frame_length=16, fft_length=16), ["tensorflow"]),
]


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.backend(*on)) for part, on in IN_BOTH]
)
def test_hazards_that_bfloat16_shares_are_warnings_in_it_too(part, half):
    with mp.policy_scope(f"mixed_{half}"):
        layer = part()
    each = only(Masks(layer), "unsafe-layer")
    assert each.severity == "warning"
    assert f"In {half}" in each.reason
    assert not found(Masks(layers.Dense(8, dtype=f"mixed_{half}")), "unsafe-layer")


@pytest.mark.backend("tensorflow")
def test_an_operation_without_a_bfloat16_kernel_is_a_warning_in_bfloat16_only():
    for half in ("float16", "bfloat16"):
        model = made(lambda: layers.RandomRotation(0.1), shape=(8, 8, 3), policy=f"mixed_{half}")
        assert [each.reason[:11] for each in found(model, "unsafe-layer")] == (
            ["In bfloat16"] if half == "bfloat16" else []
        )


def test_an_activation_inside_of_a_layer_is_a_hint():
    each = only(made(dense(activation="gelu")), "unsafe-activation")
    assert each.severity == "hint"
    assert "kerasmp.ops.gelu" in each.remedy
    for activation in ("relu", mp.ops.gelu, "sigmoid"):
        assert not found(made(dense(activation=activation)), "unsafe-activation")
    assert not found(made(dense(activation="gelu"), policy="float32"), "unsafe-activation")


@pytest.mark.parametrize(("largest", "becomes"), [(2049.0, 2048.0), (7e4, np.inf)])
def test_stock_keras_computes_what_lint_reports(largest, becomes):
    model = made(layers.Identity, lambda: layers.Embedding(80000, 4), shape=(1,))
    given = np.full((1, 1), largest, "float32")
    rounded = model.layers[0](given)
    assert float(ops.convert_to_numpy(rounded)[0, 0]) == becomes
    rules = {each.rule for each in mp.lint(model, given)}
    assert "float-ids" in rules
    assert ("input-range" in rules) is (becomes == np.inf)
