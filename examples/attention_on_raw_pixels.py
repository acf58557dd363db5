"""A transformer that stock Keras cannot train in float16, and kerasmp can.

It reads an image row by row, with raw pixels from 0 to 255. The attention scores exceed float16, so
with stock layers every loss is NaN. kerasmp's layers compute the scores in float32.

    python examples/attention_on_raw_pixels.py --dataset fashion_mnist --data-dir DIRECTORY

Backend: tensorflow
"""

import argparse
from pathlib import Path

import keras
import numpy as np

import kerasmp as mp
from kerasmp.demo.dataset import load
from kerasmp.demo.settings import DemoSettings

# For each run: the policy, the module with Model, the module with layers, and the last layer.
RUNS = {
    "float32": ("float32", keras, keras.layers, keras.layers.Dense),
    "stock mixed_float16": ("mixed_float16", keras, keras.layers, keras.layers.Dense),
    "kerasmp mixed_float16": ("mixed_float16", mp, mp.layers, mp.layers.DenseHead),
}
WIDTH = 64


def block(x, layers):
    """Apply attention and a small MLP, each with a residual connection and normalization."""
    attended = layers.MultiHeadAttention(num_heads=1, key_dim=WIDTH)(x, x)
    x = keras.layers.LayerNormalization()(keras.layers.Add()([x, attended]))
    hidden = keras.layers.Dense(2 * WIDTH, activation="relu")(x)
    changed = keras.layers.Dense(WIDTH)(hidden)
    return keras.layers.LayerNormalization()(keras.layers.Add()([x, changed]))


def accuracy(run, train, test, epochs, batch_size):
    """Train and return the accuracy on the test images."""
    policy, models, layers, head = RUNS[run]
    keras.utils.set_random_seed(0)
    mp.set_global_policy(policy)
    inputs = keras.Input(train[0].shape[1:])
    x = keras.layers.Dense(WIDTH)(inputs)
    for _ in range(2):
        x = block(x, layers)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = models.Model(inputs, head(10, activation="softmax")(x))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(*train, batch_size=batch_size, epochs=epochs, verbose=0)
    _, reached = model.evaluate(*test, batch_size=256, verbose=0)
    print(
        f"{run:22} loss {history.history['loss'][-1]:.3f}, test accuracy {reached:.4f}", flush=True
    )
    return reached


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="kerasmp_digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--limit", type=int, help="train on at most this many images")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    images = load(DemoSettings(dataset=arguments.dataset, data_dir=arguments.data_dir))
    scale = 255 / images.spec.brightest
    train, test = (
        (np.float32(x[: arguments.limit, ..., 0]) * scale, y[: arguments.limit])
        for x, y in (images.train, images.test)
    )
    reached = {
        run: accuracy(run, train, test, arguments.epochs, arguments.batch_size) for run in RUNS
    }
    assert reached["stock mixed_float16"] < 0.3
    assert abs(reached["kerasmp mixed_float16"] - reached["float32"]) < 0.05


if __name__ == "__main__":
    main()
