"""An exported converted model takes float32 and returns what `predict` returns."""

import keras
import numpy as np
import pytest
from helpers.marks import full

import kerasmp as mp

layers = keras.layers
X = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype("float32")
POLICIES = pytest.mark.parametrize("policy", ["mixed_float16", full("mixed_bfloat16")])


def build():
    return keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(16, activation="relu"),
            layers.Dense(4, activation="softmax"),
        ]
    )


def converted(policy):
    """Return a converted model and its predictions, which differ from those in float32."""
    model = build()
    exact = model.predict(X, verbose=0)
    mp.convert(model, policy)
    predictions = model.predict(X, verbose=0)
    assert predictions.dtype == np.float32
    assert 0 < np.abs(predictions - exact).max() < 0.05
    return model, exact, predictions


@POLICIES
@pytest.mark.backend("tensorflow")
def test_a_saved_model_predicts_like_the_converted_one(policy, tmp_path):
    import tensorflow as tf

    model, _, predictions = converted(policy)
    model.export(tmp_path / "saved", format="tf_saved_model", verbose=False)
    artifact = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_array_equal(artifact.serve(X).numpy(), predictions)
    layer = keras.layers.TFSMLayer(tmp_path / "saved", call_endpoint="serve")
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(X)), predictions)


@POLICIES
@pytest.mark.backend("torch")
# torch's own code, on which `torch.export` is built
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
def test_an_exported_program_predicts_like_the_converted_one(policy, tmp_path):
    import torch

    model, _, predictions = converted(policy)
    # Without a signature Keras exports for a batch of 1.
    signature = [keras.InputSpec(shape=X.shape, dtype="float32")]
    path = tmp_path / "model.pt2"
    model.export(path, format="torch", verbose=False, input_signature=signature)
    found = torch.export.load(path).module()(torch.tensor(X)).detach().numpy()
    np.testing.assert_array_equal(found, predictions)


@pytest.mark.full
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.backend("tensorflow")
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")  # no other is installed
def test_tflite_has_no_half_precision_convolution_but_takes_a_restored_model(policy):
    import tensorflow as tf

    model, exact, _ = converted(policy)
    # A limit of stock Keras: a model built under the policy fails in the same way.
    with pytest.raises(Exception, match="Conv2D"):
        tf.lite.TFLiteConverter.from_keras_model(model).convert()
    mp.convert(model, "float32")
    content = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    interpreter = tf.lite.Interpreter(model_content=content)
    place = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(place, X.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(place, X)
    interpreter.invoke()
    found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)
