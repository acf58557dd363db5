"""The network takes images of any size and follows the global policy."""

import keras
import numpy as np
import pytest
from helpers.marks import full

import kerasmp as mp
from kerasmp.demo.model import ImageSpec, activation_bytes, build_cnn, weight_bytes
from kerasmp.policy import policy_scope


@pytest.mark.parametrize("shape", [(8, 8, 1), (1, 1, 3), (28, 28, 1), (33, 17, 3)])
def test_any_image_size(shape):
    model = build_cnn(ImageSpec(shape, 7, 255.0))
    outputs = model(np.full((2, *shape), 255.0, "float32"))
    assert tuple(outputs.shape) == (2, 7)
    assert np.isfinite(keras.ops.convert_to_numpy(outputs)).all()


@pytest.mark.unit
def test_blocks_grow_with_the_image_up_to_five():
    convolutions = [
        sum(isinstance(layer, keras.layers.Conv2D) for layer in build_cnn(spec).layers)
        for spec in (ImageSpec((side, side, 1), 2, 1.0) for side in (4, 8, 28, 512))
    ]
    assert convolutions == [1, 2, 4, 5]


@pytest.mark.parametrize(
    ("policy", "compute"),
    [("float32", "float32"), ("mixed_float16", "float16"), ("mixed_bfloat16", "bfloat16")],
)
def test_convolutions_compute_low_but_pixels_logits_and_weights_are_float32(policy, compute):
    with policy_scope(policy):
        model = build_cnn(ImageSpec((8, 8, 1), 10, 16.0))
    assert model.get_layer("block1_conv").compute_dtype == compute
    assert model.get_layer("rescale").output.dtype == "float32"
    assert model.output.dtype == "float32"
    assert {variable.dtype for variable in model.weights} == {"float32"}


def test_bytes_follow_from_shapes_and_dtypes():
    spec = ImageSpec((2, 2, 1), 3, 1.0)
    with policy_scope("float32"):
        model = build_cnn(spec)
    # rescale 4; convolution, norm and ReLU 2 x 2 x 16 each; pooling 16 twice; logits 3.
    assert activation_bytes(model, 5) == 5 * 4 * (4 + 3 * 64 + 16 + 16 + 3)
    # The kernel 9 x 16, four vectors of 16 in the norm, the head 16 x 3 + 3.
    assert weight_bytes(model) == 4 * (144 + 64 + 51)
    with policy_scope("mixed_float16"):
        half = build_cnn(spec)
    assert activation_bytes(half, 5) == 5 * (4 * 4 + 2 * (3 * 64 + 16 + 16) + 4 * 3)
    assert weight_bytes(half) == weight_bytes(model)


@pytest.mark.parametrize("policy", ["mixed_float16", full("mixed_bfloat16")])
def test_nothing_is_wrong_with_the_network_before_and_after_training(policy, images):
    with policy_scope(policy):
        model = build_cnn(images.spec)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(mp.LossScaleOptimizer("adam"), loss)
    x, y = images.train
    for _ in range(2):
        assert not mp.diagnose(model, x.astype("float32"), y).findings
        model.fit(x.astype("float32"), y, batch_size=8, verbose=0)
