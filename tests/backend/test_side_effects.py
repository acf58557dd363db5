"""What calls leave behind in a model is undone, even after an interrupt."""

import keras
import numpy as np
from helpers.interrupting import interrupted

from kerasmp.backend import side_effects


def test_an_interrupt_during_the_restore_leaves_no_side_effects():
    class Counts(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.calls, self.seen = 0, []

        def call(self, inputs):
            self.calls += 1
            self.seen.append(inputs)
            return inputs

    layer = Counts()
    layer.build((2,))

    def traced():
        with side_effects.preserve_layers(layer):
            layer(keras.KerasTensor((2,)))

    number = 0
    while interrupted(traced, number):
        assert layer.calls == len(layer.seen) == 0
        number += 1
    assert number > 5


def test_losses_are_restored():
    layer = keras.layers.Dense(1, activity_regularizer="l2")
    model = keras.Sequential([keras.Input((2,)), layer])
    model(np.ones((1, 2)))
    before = [float(keras.ops.convert_to_numpy(loss)) for loss in model.losses]
    with side_effects.preserve_losses(model):
        model(np.zeros((1, 2)))
        assert [float(keras.ops.convert_to_numpy(loss)) for loss in model.losses] != before
    assert [float(keras.ops.convert_to_numpy(loss)) for loss in model.losses] == before
