"""Classes of a user may compare all their objects as equal, and then have no hash.

Stock Keras trains with such optimizers. It calls and saves such models and layers if they are not
compiled.
"""

import keras
import numpy as np
import pytest

import kerasmp as mp

X = np.ones((4, 3), "float32")
Y = np.ones((4, 2), "float32")


class Equal:
    """Equal to everything."""

    __hash__ = None

    def __eq__(self, other):
        return True


@keras.saving.register_keras_serializable("no_hash")
class Descent(Equal, keras.optimizers.SGD):
    """A user-defined optimizer."""


@keras.saving.register_keras_serializable("no_hash")
class Scaling(Equal, mp.LossScaleOptimizer):
    """A user-defined optimizer that scales the loss."""


class Dense(Equal, keras.layers.Dense):
    """A user-defined layer."""


class Net(Equal, keras.Model):
    """A user's model."""

    def __init__(self):
        super().__init__()
        self.one, self.other = Dense(4), Dense(2)

    def call(self, inputs):
        return self.other(self.one(inputs))


class Holds(Equal, keras.Model):
    """A model without `call`."""

    def __init__(self, part):
        super().__init__()
        self.part = part


def test_optimizers_are_trained_replaced_restored_and_saved(tmp_path):
    layers = [keras.Input((3,)), keras.layers.Dense(3), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    model.compile(Descent(0.1), "mse")
    report = mp.convert(model)
    second = Scaling(Descent(0.1), loss_scale=8.0)
    model.compile(second, "mse", run_eagerly=keras.backend.backend() != "jax")
    model.fit(X, Y, verbose=0, callbacks=[mp.OverflowMonitor()])
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").optimizer.applied_steps == 1
    report.restore()
    assert model.optimizer is second  # not the first, which compares as equal


def test_models_and_layers_are_converted_and_restored():
    net = Net()
    net(X)
    holds = Holds(net)
    first = mp.convert(holds, "mixed_bfloat16", sample=X)
    assert first.notes == ("the sample was not used: the model has no call",)
    second = mp.convert(net, rules=None)
    assert keras.backend.standardize_dtype(net(X).dtype) == "float16"
    assert {each.rule for each in mp.lint(net, X)} == {"sizes"}
    # Conversions are distinguished by their layers, which all compare as equal.
    with pytest.raises(mp.errors.PolicyError):
        first.restore()
    second.restore()
    first.restore()
    with pytest.raises(mp.errors.PolicyError):
        first.restore()
    assert keras.backend.standardize_dtype(net(X).dtype) == "float32"
