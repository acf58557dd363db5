"""The smallest model of each family of `keras.applications`: converted, trained, restored.

`benchmarks/applications.py` does the same with all of them.
"""

import keras
import pytest
from helpers import applications

import kerasmp as mp
from kerasmp.probe import probe_findings

SMALLEST = {
    "convnext": "ConvNeXtTiny",
    "densenet": "DenseNet121",
    "efficientnet": "EfficientNetB0",
    "efficientnet_v2": "EfficientNetV2B0",
    "inception_resnet_v2": "InceptionResNetV2",
    "inception_v3": "InceptionV3",
    "mobilenet": "MobileNet",
    "mobilenet_v2": "MobileNetV2",
    "mobilenet_v3": "MobileNetV3Small",
    "nasnet": "NASNetMobile",
    "resnet": "ResNet50",
    "resnet_v2": "ResNet50V2",
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    "xception": "Xception",
}
EVERYWHERE = {"mobilenet"}  # the others on TensorFlow: JAX compiles each layer


def _case(family, name):
    marks = () if family in EVERYWHERE else (pytest.mark.backend("tensorflow"),)
    return pytest.param(name, marks=marks)


@pytest.mark.unit
def test_every_family_of_keras_is_listed():
    found = applications.architectures()
    assert SMALLEST.keys() == found.keys()
    assert all(SMALLEST[family] in names for family, names in found.items())
    assert sum(map(len, found.values())) >= 40


@pytest.mark.full
@pytest.mark.parametrize("name", [_case(*item) for item in SMALLEST.items()])
def test_an_architecture_is_converted_trained_and_restored(name):
    result = applications.check(name, eager=keras.backend.backend() != "jax")
    assert result.float16 > 3 * result.float32
    # Untrained networks amplify each rounding, so the bound is what rounding kernels and inputs
    # costs in float32. Layers round their results as well, each normalization and activation its
    # own: three more roundings for each kernel. Measured: at most 2.6 times.
    assert 0 < result.error < 4 * result.rounded
    assert not result.skipped, result
    assert result.moved
    assert result.restored
    assert result.converted_back


@pytest.mark.full
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [_case(*item) for item in SMALLEST.items()])
def test_the_probe_is_silent_on_an_architecture(name, half):
    keras.utils.set_random_seed(0)
    model, size = applications.build(name)
    x = applications.inputs(name, size)
    applications.calibrate(model, x)
    mp.convert(model, f"mixed_{half}")
    found = probe_findings(model, x[: applications.BATCH])
    assert not [each for each in found if each.severity != "hint"]
