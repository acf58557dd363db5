"""`fit` probes its first batch, loses no data for it, and goes on whatever happens."""

import functools
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import kerasmp as mp

layers = keras.layers
X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
Y = X[:, :1].copy()
BATCH = 8


def overflowing(x):
    return ops.sqrt(ops.square(2000 * x))


def made(module=mp, *, faulty=True, **settings):
    """Return a compiled model, with an operation that overflows in float16."""
    keras.utils.set_random_seed(1)
    with mp.policy_scope("mixed_float16"):
        x = inputs = keras.Input((8,))
        x = ops.sigmoid(layers.Dense(8)(x))
        x = layers.LayerNormalization()(overflowing(x) if faulty else x)
        model = module.Model(inputs, layers.Dense(1, dtype="float32")(x))
    # XLA takes longer to compile than it saves.
    settings.setdefault("jit_compile", "auto" if keras.backend.backend() == "jax" else False)
    model.compile(mp.LossScaleOptimizer("sgd", loss_scale=1.0), "mse", **settings)
    return model


def warned(action):
    """Return what an action returns, and the texts of the probe's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [str(x.message) for x in caught if "first batch" in str(x.message).lower()]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return len(X) // BATCH

    def __getitem__(self, index):
        part = slice(index * BATCH, (index + 1) * BATCH)
        return X[part], Y[part]


def generator():
    for start in range(0, len(X), BATCH):
        yield X[start : start + BATCH], Y[start : start + BATCH]


def tensorflow_dataset():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(32, seed=1).batch(BATCH)


def torch_loader():
    import torch

    pairs = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    drawing = torch.Generator().manual_seed(1)
    return torch.utils.data.DataLoader(pairs, BATCH, shuffle=True, generator=drawing)


SOURCES = {
    "arrays": lambda: {"x": X, "y": Y, "batch_size": BATCH},
    "validation_split": lambda: {"x": X, "y": Y, "batch_size": BATCH, "validation_split": 0.25},
    "PyDataset": lambda: {"x": Batches()},
    "generator": lambda: {"x": generator(), "shuffle": False},
    "tf.data": lambda: {"x": tensorflow_dataset()},
    "DataLoader": lambda: {"x": torch_loader()},
}
ONLY = {
    "tf.data": [pytest.mark.backend("tensorflow")],
    "DataLoader": [pytest.mark.backend("torch")],
}
FULL = {name: [pytest.mark.full] for name in ("validation_split", "PyDataset")}


@pytest.mark.parametrize(
    "source",
    [pytest.param(name, marks=[*FULL.get(name, ()), *ONLY.get(name, ())]) for name in SOURCES],
)
def test_the_loss_is_the_same_with_and_without_the_probe(source):
    epochs = 1 if source == "generator" else 2
    histories = {}
    for probe in (True, False):
        model = made(faulty=False)
        arguments = SOURCES[source]()
        history, texts = warned(
            lambda m=model, a=arguments, p=probe: m.fit(**a, epochs=epochs, verbose=0, probe=p)
        )
        assert texts == []
        histories[probe] = history.history
    assert histories[True] == histories[False]
    assert np.isfinite(histories[True]["loss"]).all()
    assert histories[True]["loss"][0] > 0


def test_the_warning_names_the_operation_once_for_a_model():
    model = made()
    fit = lambda **settings: warned(  # noqa: E731 - called thrice
        lambda: model.fit(X, Y, batch_size=BATCH, verbose=0, **settings)
    )[1]
    assert fit(probe=False) == []
    [text] = fit()
    assert "square  [not-finite] In float16 it returns inf" in text
    assert fit() == []
    assert fit(probe=True) == []
    mp.convert(model, "mixed_bfloat16")
    mp.convert(model, "mixed_float16")
    assert fit() == []  # as it was when it was looked at


@pytest.mark.backend("tensorflow", "jax")
# From Keras, with and without the probe: it cannot know the length of a generator.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("source", ["arrays", "generator"])
def test_several_steps_in_an_execution_get_their_batches(source):
    losses = {}
    for probe in (True, False):
        model = made(faulty=False, steps_per_execution=2)
        history = model.fit(**SOURCES[source](), verbose=0, probe=probe)
        losses[probe] = history.history["loss"]
        assert int(model.optimizer.iterations) == 4
    assert losses[True] == losses[False]
    model = made(steps_per_execution=2)
    _, [text] = warned(lambda: model.fit(**SOURCES[source](), verbose=0))
    assert "square" in text


def test_the_monitor_probes_a_stock_model():
    for probe, expected in ((False, 0), (True, 1)):
        model = made(keras)
        monitor = mp.callbacks.OverflowMonitor(probe=probe)
        fit = lambda m=model, c=monitor: m.fit(X, Y, batch_size=BATCH, verbose=0, callbacks=[c])  # noqa: E731 - see above
        texts = warned(fit)[1]
        assert len(texts) == expected
        assert all("square" in text for text in texts)
        assert warned(fit)[1] == []


def test_only_the_argument_of_fit_counts_for_a_kerasmp_model():
    model = made()
    monitor = mp.callbacks.OverflowMonitor()
    arguments = {"batch_size": BATCH, "verbose": 0, "callbacks": [monitor]}
    assert warned(lambda: model.fit(X, Y, probe=False, **arguments))[1] == []
    assert len(warned(lambda: model.fit(X, Y, **arguments))[1]) == 1


class OwnStep(mp.Model):
    """Can only be called inside its step."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)
        self.is_in_step, self.is_training = False, False

    def build(self, shape):
        self.dense.build(shape)

    def call(self, inputs):
        if self.is_training and not self.is_in_step:
            message = "only inside of its step"
            raise RuntimeError(message)
        return self.dense(inputs)

    def train_step(self, *arguments):
        self.is_in_step = True
        try:
            return super().train_step(*arguments)
        finally:
            self.is_in_step = False


def test_training_goes_on_where_the_probe_cannot_run():
    losses = {}
    for probe in (True, False):
        keras.utils.set_random_seed(1)
        with mp.policy_scope("mixed_float16"):
            model = OwnStep()
        model.build((None, 8))
        model.compile(mp.LossScaleOptimizer("sgd"), "mse")
        begin = keras.callbacks.LambdaCallback(
            on_train_begin=lambda _, m=model: setattr(m, "is_training", True)
        )
        arguments = {"batch_size": BATCH, "verbose": 0, "callbacks": [begin], "probe": probe}
        history, texts = warned(lambda m=model, a=arguments: m.fit(X, Y, **a))
        losses[probe] = history.history["loss"]
        if probe:
            [text] = texts
            assert "not probed" in text
            assert "RuntimeError: only inside of its step" in text
    assert losses[True] == losses[False]


def test_the_train_function_is_keras_own_afterwards():
    model = made()
    warned(lambda: model.fit(X, Y, batch_size=BATCH, verbose=0))
    function = model.train_function
    assert not hasattr(function, "__wrapped__") or function.__name__ != "look"
    model.fit(X, Y, batch_size=BATCH, verbose=0)
    assert model.train_function is function


@pytest.mark.backend("tensorflow")
def test_a_batch_that_is_spread_over_replicas_is_left_alone():
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = made()
    fit = functools.partial(model.fit, X, Y, verbose=0)
    assert ["could not be taken" in text for text in warned(fit)[1]] == [True]
    assert not warned(fit)[1]


def test_a_fit_without_steps_leaves_nothing_behind():
    model = made()
    model.fit(X, Y, epochs=0, verbose=0)
    assert not warned(lambda: model.fit(X, Y, verbose=0, probe=False))[1]
