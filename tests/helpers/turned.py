"""A user's model that is turned and saved in one process, and loaded in another."""

import keras
import numpy as np

import kerasmp as mp

X = np.arange(8, dtype="float32").reshape(2, 4)


@keras.saving.register_keras_serializable("turned")
class Net(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(2)

    def call(self, x):
        return self.dense(x)


def save(path):
    model = Net()
    model(X)
    mp.Model.from_keras(model).save(path)
    return model.predict(X, verbose=0).tolist()


def load(path):
    model = keras.models.load_model(path)
    assert isinstance(model, mp.Model)
    assert isinstance(model, Net)
    return model.predict(X, verbose=0).tolist()


def train(path):
    """Return what a loaded model says of training, and the dtype of its outputs."""
    model = keras.models.load_model(path)
    model.compile("sgd", "mse")
    try:
        model.fit(X, X[:, :2], verbose=0)
    except mp.errors.PolicyError as error:
        return {"error": str(error), "outputs": model.predict(X, verbose=0).dtype.name}
    raise AssertionError
