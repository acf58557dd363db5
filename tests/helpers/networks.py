"""A small float16 network with everything that a bad step could damage, as each kind of model."""

import keras
import numpy as np

X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
Y = X[:, :2].copy()


def _layers():
    keras.utils.set_random_seed(0)
    return [
        keras.layers.Dense(8, activation="relu", dtype="mixed_float16"),
        keras.layers.BatchNormalization(dtype="mixed_float16"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(2),
    ]


def _through(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def sequential(module):
    """Return a `Sequential` of kerasmp or keras."""
    return module.Sequential([keras.Input((4,)), *_layers()])


def functional(module):
    """Return a functional model."""
    inputs = keras.Input((4,))
    return module.Model(inputs, _through(_layers(), inputs))


def subclassed(module):
    """Return a subclass with `call`."""

    class Own(module.Model):
        def __init__(self):
            super().__init__()
            self.parts = _layers()

        def call(self, inputs):
            return _through(self.parts, inputs)

    return Own()


def functional_subclass(module):
    """Return a user-defined subclass made from inputs and outputs."""

    class Named(module.Model):
        pass

    inputs = keras.Input((4,))
    return Named(inputs=inputs, outputs=_through(_layers(), inputs))


KINDS = {
    "sequential": sequential,
    "functional": functional,
    "subclassed": subclassed,
    "functional_subclass": functional_subclass,
}


def relu_after(layer, shape, count=1, before=()):
    """Return a model with `layer` after the layers `before` and third from the end."""
    inputs = [keras.Input(shape) for _ in range(count)]
    outputs = layer(inputs if count > 1 else _through(before, inputs[0]))
    outputs = keras.layers.Concatenate(axis=0)(outputs) if isinstance(outputs, list) else outputs
    return keras.Model(inputs, keras.layers.ReLU()(keras.layers.ReLU()(outputs)))


def attends_itself(layer, shape=(4, 8)):
    """Return a model with an attention layer third from the end, whose query is its value."""
    inputs = keras.Input(shape)
    return keras.Model(inputs, keras.layers.ReLU()(keras.layers.ReLU()(layer(inputs, inputs))))


def third_from_the_end(model):
    """Return the layer given to `relu_after` or `attends_itself`."""
    return model.layers[-3]
