"""The recommendation for the machine that runs the tests."""

import subprocess
import sys

import keras
import pytest

from kerasmp.policy import recommend_policy


def test_the_recommendation_for_this_machine_is_usable():
    advice = recommend_policy()
    assert advice.policy.variable_dtype == "float32"
    assert advice.device
    outputs = keras.layers.Dense(1, dtype=advice.policy.to_keras())(keras.ops.ones((1, 2)))
    assert keras.backend.standardize_dtype(outputs.dtype) == advice.policy.compute_dtype


@pytest.mark.full  # test_policy_devices.py shows how little is asked of TensorFlow
@pytest.mark.backend("tensorflow")
def test_tensorflow_is_not_initialised_by_looking():
    code = (
        "import tensorflow as tf\n"
        "from kerasmp.policy import recommend_policy\n"
        "recommend_policy()\n"
        "(cpu,) = tf.config.list_physical_devices('CPU')\n"
        "half = tf.config.LogicalDeviceConfiguration()\n"
        "# This raises once TensorFlow has made its context.\n"
        "tf.config.set_logical_device_configuration(cpu, [half, half])\n"
        "assert len(tf.config.list_logical_devices('CPU')) == 2\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
