"""Conversion together with Keras's quantization and LoRA, in both orders."""

import keras
import numpy as np
import pytest
from helpers.marks import few, full, marks_on

import kerasmp as mp

layers = keras.layers
X = np.random.default_rng(0).normal(size=(32, 16)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 4)).astype("float32")
# Float8 has a roundoff of 2**-4. int8, and int4 before Keras 3.15, round inputs to 8 bits: a value
# that half precision moves across the edge of one of 127 steps changes by that step.
STEP = {"int8": 1 / 127, "int4": 1 / 127, "float8": 2.0**-4}
WORKS = [
    ("int8", "mixed_bfloat16"),
    ("int4", "mixed_float16"),
    ("int4", "mixed_bfloat16"),
    ("float8", "mixed_float16"),
    ("float8", "mixed_bfloat16"),
]
# Keras raises this for an InputLayer.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize`"),
    *marks_on("jax", "oldest"),
]


def build():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((16,)),
            layers.Dense(32, activation="relu"),
            layers.Dense(32, activation="relu"),
            layers.Dense(4),
        ]
    )


def quantized(mode):
    model = build()
    model.quantize(mode)
    return model, model.predict(X, verbose=0)


def error(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize(("mode", "policy"), few(WORKS, WORKS[:1]))
def test_a_converted_model_is_quantized_as_one_in_float32_is(mode, policy):
    model, (_, exact) = build(), quantized(mode)
    mp.convert(model, policy)
    model.quantize(mode)
    assert [layer.quantization_mode for layer in model.layers] == [mode] * 3
    # One step in each of three layers, and half precision itself. Measured: at most 2.4 steps for
    # int8, 0.7 for int4, 1.4 for float8.
    assert 0 < error(model.predict(X, verbose=0), exact) < 4 * STEP[mode]


def test_safe_layers_are_quantized_except_for_the_head():
    model, exact = build(), build().predict(X, verbose=0)
    mp.convert(model, "mixed_bfloat16", safe_layers=True)
    with pytest.warns(UserWarning, match="Layer DenseHead does not have a `quantize`"):
        model.quantize("int8")
    assert [type(layer).__module__ for layer in model.layers[:2]] == ["kerasmp.layers.products"] * 2
    assert [layer.quantization_mode for layer in model.layers] == ["int8", "int8", None]
    assert 0 < error(model.predict(X, verbose=0), exact) < 4 * STEP["int8"]


@pytest.mark.full
def test_stock_keras_does_not_quantize_float16_layers_to_int8():
    model = build()
    mp.convert(model)
    with pytest.raises(ValueError, match="doesn't work well with compute_dtype='float16'"):
        model.quantize("int8")


def test_restoring_a_model_quantized_since_is_refused_and_changes_nothing():
    model = build()
    report = mp.convert(model, "mixed_bfloat16")
    model.layers[1].quantize("int8")
    before = str(mp.LayerPolicies.of(model))
    for _ in range(2):
        with pytest.raises(
            mp.errors.PolicyError, match=r'quantized since.*"sequential\w*/dense_\d"'
        ):
            report.restore()
    assert str(mp.LayerPolicies.of(model)) == before
    assert isinstance(model, mp.Sequential)


@pytest.mark.parametrize(
    ("policy", "rules", "dry_run"),
    [
        ("int8_from_float32", None, True),
        ("mixed_bfloat16", {layers.Dense: "int8_from_mixed_bfloat16"}, False),
    ],
)
def test_a_quantized_policy_is_refused_and_changes_nothing(policy, rules, dry_run):
    model = build()
    before, weights = str(mp.LayerPolicies.of(model)), model.get_weights()
    with pytest.raises(mp.errors.PolicyError, match=r'not quantize.*model\.quantize\("int8"\)'):
        mp.convert(model, policy, rules=rules, dry_run=dry_run)
    assert str(mp.LayerPolicies.of(model)) == before
    for one, wanted in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, wanted)


def test_a_rule_does_not_confuse_quantized_weights_with_others():
    model, _ = quantized("int8")
    with pytest.raises(mp.errors.PolicyError, match=r"cannot be brought back.*keeps \"int8\""):
        mp.convert(model, rules={layers.Dense: "mixed_bfloat16"})
    mp.convert(model, rules={layers.Dense: "int8_from_mixed_bfloat16"})
    assert {layer.dtype_policy.name for layer in model.layers} == {"int8_from_mixed_bfloat16"}
    assert np.isfinite(model.predict(X, verbose=0)).all()


@pytest.mark.parametrize("mode", few(STEP, ["int8"]))
def test_a_quantized_model_keeps_its_layers(mode):
    model, exact = quantized(mode)
    report = mp.convert(model)
    assert {row.reason for row in report.rows[1:]} == {"kept: it is quantized"}
    assert [layer.quantization_mode for layer in model.layers] == [mode] * 3
    np.testing.assert_array_equal(model.predict(X, verbose=0), exact)
    report.restore()
    np.testing.assert_array_equal(model.predict(X, verbose=0), exact)


def test_only_the_quantized_layer_is_kept():
    model = build()
    model.layers[1].quantize("int8")
    model.predict_function = None
    exact = model.predict(X, verbose=0)
    report = mp.convert(model)
    assert [layer.compute_dtype for layer in model.layers] == ["float16", "float32", "float32"]
    assert model.layers[1].quantization_mode == "int8"
    assert 0 < error(model.predict(X, verbose=0), exact) < 4 * STEP["int8"]
    report.restore()
    np.testing.assert_array_equal(model.predict(X, verbose=0), exact)


@pytest.mark.parametrize("first", ["convert", full("lora")])
def test_lora_trains_in_float16_and_is_restored(first):
    model, exact = build(), build().predict(X, verbose=0)
    if first == "convert":
        report = mp.convert(model)
    for layer in model.layers[:2]:
        layer.enable_lora(4)
    if first == "lora":
        report = mp.convert(model)
    assert [layer.compute_dtype for layer in model.layers] == ["float16", "float16", "float32"]
    assert 0 < error(model.predict(X, verbose=0), exact) < 8 * 2.0**-11
    kernels = [np.array(layer._kernel) for layer in model.layers[:2]]
    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(1e-2))
    model.compile(optimizer, "mse")
    losses = model.fit(X, Y, epochs=5, verbose=0).history["loss"]
    assert optimizer.skipped_steps == 0
    assert losses[-1] < losses[0]
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    for layer, kernel in zip(model.layers, kernels, strict=False):
        np.testing.assert_array_equal(np.array(layer._kernel), kernel)
        assert np.abs(np.array(layer.lora_kernel_b)).max() > 0
    half = model.predict(X, verbose=0)
    report.restore()
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    assert 0 < error(half, model.predict(X, verbose=0)) < 8 * 2.0**-11
