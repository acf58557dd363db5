"""Several kinds of models to convert, train and save here and to load in another process."""

import re

import keras
import numpy as np
from helpers.flattened import flatten_layers

import kerasmp as mp

layers = keras.layers
X = np.random.default_rng(0).normal(size=(4, 6, 4)).astype("float32")
Y = np.zeros((4, 3), "float32")


def sequential():
    return keras.Sequential(
        [
            keras.Input((6, 4)),
            layers.Dense(8, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def functional():
    inputs = keras.Input((6, 4))
    inner = keras.Sequential([keras.Input((6, 4)), layers.Dense(8), layers.LayerNormalization()])
    x = inner(inputs)
    x = layers.MultiHeadAttention(2, 4)(x, x)
    shared = layers.Dense(8, activation="relu")
    x = layers.TimeDistributed(layers.Dense(8))(shared(shared(x)))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def attention():
    inputs = keras.Input((6, 4))
    x = layers.MultiHeadAttention(2, 4)(inputs, inputs)
    x = layers.GroupQueryAttention(4, 2, 1)(x, x)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(3)(x))


def recurrent():
    inputs = keras.Input((6, 4))
    x = layers.Bidirectional(layers.LSTM(2, return_sequences=True))(inputs)
    x = layers.TimeDistributed(layers.Dense(3, activation="softmax"))(x)
    x = layers.SpectralNormalization(layers.Dense(4))(x)
    x = layers.RNN([layers.GRUCell(2), layers.SimpleRNNCell(2)])(x)
    return keras.Model(inputs, layers.Dense(3)(x))


def nested():
    inner = keras.Sequential(
        [keras.Input((6, 4)), layers.Dense(4, activation="gelu"), layers.UnitNormalization()]
    )
    return keras.Sequential(
        [keras.Input((6, 4)), inner, layers.Flatten(), layers.BatchNormalization(), layers.Dense(3)]
    )


@keras.saving.register_keras_serializable("converted")
class Block(layers.Layer):
    """A user-defined layer with layers in a list."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [layers.Dense(4, activation="relu"), layers.Softmax()]

    def build(self, shape):
        self.parts[0].build(shape)
        self.parts[1].build(shape)

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


@keras.saving.register_keras_serializable("converted")
class Net(keras.Model):
    """A user-defined model with attention, which makes its softmax layer in `build`."""

    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.attend = layers.MultiHeadAttention(2, 4)
        self.block = Block()
        self.flatten = layers.Flatten()
        self.dense = layers.Dense(units)

    def call(self, x):
        return self.dense(self.flatten(self.block(self.attend(x, x))))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def subclassed():
    model = Net()
    model(X)
    return model


KINDS = {"attention": attention, "recurrent": recurrent, "nested": nested, "subclassed": subclassed}


def facts_of_policies(model):
    """Return the policies as text, without the numbers that Keras gives parts of a subclass."""
    return re.sub(r"_\d+ \(", " (", str(mp.LayerPolicies.of(model)))


def facts(model):
    """Return everything that must be the same after loading."""
    values = [keras.ops.convert_to_numpy(v.value) for v in model.optimizer.variables]
    return {
        "class": type(model).__name__,
        "policies": facts_of_policies(model),
        "symbolic": [out.dtype for out in model.outputs] if hasattr(model, "outputs") else None,
        "optimizer": type(model.optimizer).__name__,
        "scale": getattr(model.optimizer, "loss_scale", None),
        "values": [np.asarray(value, "float64").tolist() for value in values],
        "outputs": keras.ops.convert_to_numpy(model(X)).astype("float64").tolist(),
    }


def save(model, path):
    """Train one step, save the model and return its facts."""
    model.fit(X, Y, verbose=0)
    model.save(path)
    return facts(model)


def predictions(model):
    """Return policies, dtypes and outputs of a model, and the error that training raises."""
    try:
        model.train_on_batch(X, Y)
    except mp.errors.PolicyError as error:
        said = str(error)
    else:
        said = "none"
    return {
        "policies": facts_of_policies(model),
        "classes": [type(layer).__module__.split(".")[0] for layer in flatten_layers(model)],
        # SpectralNormalization makes this one in the dtype of its kernel; only training reads it.
        "dtypes": [v.dtype for v in model.variables if v.name != "vector_u"],
        "outputs": keras.ops.convert_to_numpy(model(X)).astype("float64").tolist(),
        "error": re.sub(r"_\d+", "", said),
    }


def load_one(path):
    """Return the `predictions` of a saved model, loaded under another global policy."""
    keras.config.set_dtype_policy("mixed_float16")
    return predictions(keras.models.load_model(path))


def load_facts(path, policy="float32"):
    """Return the `facts` of a saved model, loaded under a global policy."""
    keras.config.set_dtype_policy(policy)
    return facts(keras.models.load_model(path))
