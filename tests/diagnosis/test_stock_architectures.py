"""Stock architectures, prepared as the docs say, give no error and no warning."""

import keras
import numpy as np
import pytest
from helpers.marks import marks_on

import kerasmp as mp

pytestmark = marks_on("oldest")

# Tracing takes long: one architecture shows the constants of stock layers.
TRACED = {"MobileNetV2"}
SMALLEST = {"InceptionV3": 75}  # the others take images of 32 x 32
# Chosen for what they have: residual connections, hard_silu, rescaled inputs and silu, own layers,
# pooling within.
OTHERS = ["ResNet50", "MobileNetV3Small", "EfficientNetB0", "ConvNeXtTiny", "InceptionV3"]
# One is enough on the other backends: only tracing differs.
ONCE = [pytest.mark.full, pytest.mark.backend("tensorflow")]
ARCHITECTURES = [
    pytest.param("MobileNetV2", marks=marks_on("jax", "torch")),
    *(pytest.param(name, marks=ONCE) for name in OTHERS),
]


def built(name):
    size = SMALLEST.get(name, 32)
    architecture = getattr(keras.applications, name)
    return architecture(weights=None, input_shape=(size, size, 3), classes=10)


def assert_clean(model, name):
    x = np.ones((8, 32, 32, 3), "float32") if name in TRACED else None
    report = mp.lint(model, x)
    assert not report.errors + report.warnings, str(report)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_converted_architecture_gives_no_finding(name):
    model = built(name)
    mp.convert(model)
    compute = {layer.compute_dtype for layer in model.layers}
    assert compute == {"float16", "float32"}
    model.compile(mp.LossScaleOptimizer("sgd"), "sparse_categorical_crossentropy")
    assert_clean(model, name)


@pytest.mark.full
@pytest.mark.backend("tensorflow")
def test_an_architecture_built_under_a_policy_with_a_head_gives_no_finding():
    with mp.policy_scope("mixed_float16"):
        body = keras.applications.MobileNetV2(
            include_top=False, pooling="avg", weights=None, input_shape=(32, 32, 3)
        )
        model = mp.Model(body.input, mp.layers.DenseHead(10, activation="softmax")(body.output))
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert_clean(model, "MobileNetV2")


@pytest.mark.full
@pytest.mark.backend("tensorflow")
def test_an_architecture_built_under_the_policy_alone_has_a_float16_head():
    with mp.policy_scope("mixed_float16"):
        model = built("MobileNetV2")
    assert [each.rule for each in mp.lint(model).errors] == ["float16-head"]
