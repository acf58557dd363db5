"""A CNN that overflows in one of twenty batches, which corrupts stock BatchNormalization.

With raw pixels and large initial weights, a few images come close to the limit of float16. In
training, Dropout scales up the values that it keeps, and some of them overflow. The step is
skipped, as it should be, but stock BatchNormalization keeps the inf, and from then on predictions
are NaN. kerasmp undoes every effect of such a step.

    python examples/overflowing_cnn.py --dataset fashion_mnist --data-dir DIRECTORY

Backend: any
"""

import argparse
from pathlib import Path

import keras
import numpy as np

import kerasmp as mp
from kerasmp.demo.dataset import load
from kerasmp.demo.settings import DemoSettings

# For each run: the policy, the module with Model, and the last layer.
RUNS = {
    "float32": ("float32", keras, keras.layers.Dense),
    "stock mixed_float16": ("mixed_float16", keras, keras.layers.Dense),
    "kerasmp mixed_float16": ("mixed_float16", mp, mp.layers.DenseHead),
}


def convolution(x, filters, strides=2, gain=None, seed=None):
    normal = keras.initializers.RandomNormal(stddev=gain, seed=seed) if gain else "he_normal"
    return keras.layers.Conv2D(
        filters, 3, strides=strides, padding="same", kernel_initializer=normal
    )(x)


def normalized(x):
    return keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(x))


def accuracy(run, train, test, arguments):
    """Train and return the accuracy on the test images."""
    policy, models, head = RUNS[run]
    keras.utils.set_random_seed(0)
    mp.set_global_policy(policy)
    inputs = keras.Input(train[0].shape[1:])
    x = keras.layers.ReLU()(convolution(inputs, 16, 1, arguments.gain, seed=1))
    x = keras.layers.SpatialDropout2D(0.2)(x)
    x = normalized(convolution(x, 16, 2, arguments.gain, seed=2))
    x = normalized(convolution(x, 32))
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = models.Model(inputs, head(10, activation="softmax")(x))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(*train, batch_size=arguments.batch_size, epochs=arguments.epochs, verbose=0)
    _, reached = model.evaluate(*test, batch_size=256, verbose=0)
    skipped = getattr(model.optimizer, "skipped_steps", "-")
    print(
        f"{run:22} loss {history.history['loss'][-1]:.3f}, test accuracy {reached:.4f}, "
        f"skipped steps {skipped}",
        flush=True,
    )
    return reached


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="kerasmp_digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--limit", type=int, help="train on at most this many images")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--gain", type=float, default=1.85, help="standard deviation of the first weights"
    )
    arguments = parser.parse_args()
    images = load(DemoSettings(dataset=arguments.dataset, data_dir=arguments.data_dir))
    scale = 255 / images.spec.brightest
    train, test = (
        (np.float32(x[: arguments.limit]) * scale, y[: arguments.limit])
        for x, y in (images.train, images.test)
    )
    reached = {run: accuracy(run, train, test, arguments) for run in RUNS}
    assert reached["stock mixed_float16"] < 0.3
    assert abs(reached["kerasmp mixed_float16"] - reached["float32"]) < 0.05


if __name__ == "__main__":
    main()
