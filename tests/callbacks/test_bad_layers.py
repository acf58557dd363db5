"""After a streak the monitor names the layers, where it began, and what to try."""

import keras
import numpy as np
import pytest

import kerasmp as mp
from kerasmp.callbacks.bad_layers import LayerCount, explain

LAYERS = ("first", "second", "third", "head")


def counts(*nonfinite, nan=0):
    return [LayerCount(*each, nan) for each in zip(LAYERS, nonfinite, strict=True)]


@pytest.mark.unit
def test_no_count_is_explained_by_nothing():
    for none in (counts(0, 0, 0, 0), []):
        assert explain(none, in_order=True, by_loss=False) == []


@pytest.mark.unit
def test_it_begins_at_the_last_of_the_layers_that_were_often_bad():
    names, place, advice = explain(counts(11, 10, 1, 0), in_order=True, by_loss=False)
    assert names == 'Gradients were inf or NaN in 2 of 4 layers: "second" (inf), "first" (inf).'
    assert place.startswith('They begin in "second", or in what follows it: in later layers')
    assert "a lower loss scale" in advice
    assert "large gradients" in advice
    advice = explain(counts(9, 9, 0, 0, nan=1), in_order=True, by_loss=False)[-1]
    assert "a division by 0" in advice


@pytest.mark.unit
def test_nothing_is_said_about_the_place_if_the_order_is_not_known():
    names, advice = explain(counts(9, 9, 0, 0), in_order=False, by_loss=False)
    assert '"second" (inf), "first" (inf)' in names
    assert "look in these layers" in advice


@pytest.mark.unit
def test_gradients_of_all_layers_point_to_the_loss():
    names, advice = explain(counts(9, 9, 9, 9, nan=9), in_order=True, by_loss=False)
    assert names.endswith('4 of 4 layers: "head" (NaN), "third" (NaN), "second" (NaN), ....')
    assert "look in the loss, in the outputs, or in the last layer for" in advice
    assert explain(counts(9, 9, 9, 9), in_order=True, by_loss=True) == [
        names.replace("NaN)", "inf)")
    ]


class Root(keras.layers.Layer):
    """Its gradient is 0 * inf where its input is 0."""

    def call(self, x):
        return keras.ops.sqrt(keras.ops.abs(x) * 0.0)


class Steep(keras.layers.Layer):
    """Its values are small, its gradient is too large for float16."""

    def call(self, x):
        return keras.ops.sin(x * 10000.0)


def trained(layer, scale=2.0**12, **arguments):
    """Train a model of five layers; `layer` is after the second."""
    with mp.policy_scope("mixed_float16"):
        dense = [keras.layers.Dense(8, name=name) for name in ("one", "two", "three")]
        inner = keras.Sequential([dense[1], layer], name="block")
        inputs = keras.Input((8,))
        outputs = mp.layers.DenseHead(1, name="head")(dense[2](inner(dense[0](inputs))))
    model = keras.Model(inputs, outputs)
    slow = keras.optimizers.SGD(1e-9)
    model.compile(mp.LossScaleOptimizer(slow, loss_scale=mp.FixedLossScale(scale)), "mse")
    x = np.random.default_rng(0).normal(size=(12, 8)).astype("float32")
    monitor = mp.OverflowMonitor(check_every=2, streak=4, probe=False, **arguments)
    model.fit(x, x[:, :1], batch_size=1, verbose=0, callbacks=[monitor])
    return model, monitor


@pytest.mark.parametrize("layer", [Root, Steep])
def test_the_layer_before_the_operation_is_named_by_its_path(layer, warned):
    trained(layer())
    (message,) = warned()
    assert 'in 2 of 4 layers: "block/two" (' in message
    assert 'They begin in "block/two", or in what follows it' in message
    assert "kerasmp.diagnose(model, x, y) names the operation and the cause." in message


def test_the_lower_scale_that_is_proposed_helps_if_gradients_are_only_large(warned):
    model, _ = trained(Steep())
    assert model.optimizer.applied_steps == 0
    assert "If a lower loss scale does not help" in warned()[0]
    model, _ = trained(Steep(), scale=2.0**-4)
    assert model.optimizer.applied_steps == 12


def test_a_kept_batch_is_named_in_the_advice_and_diagnosed_as_it_is(warned):
    model, monitor = trained(Root(name="root"), keep_batch=True)
    assert "kerasmp.diagnose(model, **monitor.bad_batch)" in warned()[0]
    found = mp.diagnose(model, **monitor.bad_batch)
    assert "root" in found.first_nonfinite("backward")
