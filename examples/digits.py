"""Handwritten digits in float16, in ten lines.

Backend: any
"""

import keras
from sklearn.datasets import load_digits

import kerasmp as mp

x, y = load_digits(return_X_y=True)
mp.set_global_policy("mixed_float16")
model = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Rescaling(1 / 16),
        keras.layers.Dense(128, activation="relu"),
        mp.layers.DenseHead(10),
    ]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(mp.LossScaleOptimizer("adam"), loss, metrics=["accuracy"])
history = model.fit(
    x, y, epochs=10, validation_split=0.2, verbose=2, callbacks=[mp.OverflowMonitor()]
)
assert history.history["val_accuracy"][-1] > 0.85
