"""Convert an existing network, fine-tune it in float16, and deploy it at half the size.

Backend: any
"""

import pathlib
import tempfile

import keras
import numpy as np

import kerasmp as mp

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
y = rng.integers(0, 2, size=512)
x = rng.normal(size=(512, 16, 16, 3)).astype("float32")
x[..., 0] += 0.5 * y[:, None, None]


def network():
    """Return a float32 network."""
    return keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            keras.layers.Conv2D(8, 3, strides=2),
            keras.layers.BatchNormalization(),
            keras.layers.Activation("gelu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )


model = network()
model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(x, y, batch_size=64, epochs=2, verbose=0)

# Convert to float16. The model keeps its weights and optimizer state.
report = mp.convert(model, "mixed_float16", safe_layers=True, sample=x[:64])
print(report)
model.fit(x, y, batch_size=64, epochs=6, verbose=0)
loss, accuracy = model.evaluate(x, y, verbose=0)
print(f"fine-tuned in float16: loss {loss:.3f}, accuracy {accuracy:.0%}")
print(f"{model.optimizer.applied_steps} steps applied, {model.optimizer.skipped_steps} skipped")
assert accuracy > 0.9

# Convert for inference. The model takes half the memory and cannot be trained any more.
folder = pathlib.Path(tempfile.mkdtemp())
exact = model.predict(x, verbose=0)
report = mp.convert(model, "float16", variables="float16", safe_layers=True)
print(*report.notes, sep="\n")
model.save(folder / "small.keras")
small = keras.models.load_model(folder / "small.keras")
error = np.abs(small.predict(x, verbose=0) - exact).max()
print(f"probabilities of the small model differ by at most {error:.1e}")
assert error < 0.01
