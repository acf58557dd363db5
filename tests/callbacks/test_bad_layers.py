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
    assert explain(counts(0, 0, 0, 0), by_loss=False) == explain([], by_loss=False) == []


@pytest.mark.unit
def test_the_last_layer_of_those_with_most_steps_is_where_it_begins():
    assert explain(counts(9, 9, 0, 0), by_loss=False) == [
        'Gradients were inf or NaN in 2 of 4 layers: "second" (inf), "first" (inf).',
        'They begin at "second": those of later layers were finite.',
        'If a lower scale does not help, let "second" compute in float32.',
    ]
    assert '"first"' in explain(counts(9, 2, 2, 2), by_loss=False)[0]


@pytest.mark.unit
def test_gradients_of_all_layers_come_from_the_loss():
    names, cause, advice = explain(counts(9, 9, 9, 9, nan=9), by_loss=False)
    assert names.endswith('4 of 4 layers: "head" (NaN), "third" (NaN), "second" (NaN), ....')
    assert cause == 'As "head" is the last layer, they come from the loss or from its outputs.'
    assert advice.startswith('NaN in "head" comes from a division by 0')
    assert explain(counts(9, 9, 9, 9, nan=9), by_loss=True) == [names, cause]


class Root(keras.layers.Layer):
    """Its gradient is 0 * inf where its input is 0."""

    def call(self, x):
        return keras.ops.sqrt(keras.ops.abs(x) * 0.0)


class Steep(keras.layers.Layer):
    """Its values are small, its gradient is too large for float16."""

    def call(self, x):
        return keras.ops.sin(x * 10000.0)


def trained(layer, **arguments):
    """Train a model of five layers with a fixed scale; `layer` is after the second."""
    with mp.policy_scope("mixed_float16"):
        dense = [keras.layers.Dense(8, name=name) for name in ("one", "two", "three")]
        inner = keras.Sequential([dense[1], layer], name="block")
        inputs = keras.Input((8,))
        outputs = mp.layers.DenseHead(1, name="head")(dense[2](inner(dense[0](inputs))))
    model = keras.Model(inputs, outputs)
    model.compile(mp.LossScaleOptimizer("sgd", loss_scale=mp.FixedLossScale(2.0**12)), "mse")
    x = np.random.default_rng(0).normal(size=(12, 8)).astype("float32")
    monitor = mp.OverflowMonitor(check_every=2, streak=4, probe=False, **arguments)
    model.fit(x, x[:, :1], batch_size=1, verbose=0, callbacks=[monitor])
    return model, monitor


@pytest.mark.parametrize(("layer", "kind"), [(Root, "NaN"), (Steep, "inf")])
def test_the_layer_before_the_operation_is_named_by_its_path(layer, kind, warned):
    trained(layer())
    (message,) = warned()
    assert f'in 2 of 4 layers: "block/two" ({kind}), "one" (' in message
    assert 'They begin at "block/two": those of later layers were finite.' in message
    assert "kerasmp.diagnose(model, x, y) names the operation and the cause." in message


def test_a_kept_batch_is_named_in_the_advice_and_diagnosed_as_it_is(warned):
    model, monitor = trained(Root(name="root"), keep_batch=True)
    assert "kerasmp.diagnose(model, **monitor.bad_batch)" in warned()[0]
    found = mp.diagnose(model, **monitor.bad_batch)
    assert "root" in found.first_nonfinite("backward")
