"""With `keep_batch=True` the monitor keeps the batch of the first skipped step of a series."""

import keras
import numpy as np
import pytest

import kerasmp as mp

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(40, 8)).astype("float32")
Y = np.ones((40, 1), "float32")
BATCH, FIRST, SECOND = 4, 3, 4  # the bad batches, one after the other
X[FIRST * BATCH : (SECOND + 1) * BATCH] = np.inf
X[SECOND * BATCH] = np.nan


def trained(data, *, module=mp, steps_per_execution=1, **arguments):
    with mp.policy_scope("mixed_float16"):
        hidden = keras.layers.Dense(8)
        model = module.Sequential([keras.Input((8,)), hidden, mp.layers.DenseHead(1)])
    optimizer = mp.LossScaleOptimizer("sgd", loss_scale=mp.FixedLossScale(1.0))
    model.compile(optimizer, "mse", steps_per_execution=steps_per_execution)
    monitor = mp.OverflowMonitor(keep_batch=True, probe=False)
    settings = {"shuffle": False, "verbose": 0, "callbacks": [monitor], **arguments}
    history = model.fit(*data, **settings).history
    assert history["skipped_steps"][0] == 2
    return model, monitor


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return len(X) // BATCH

    def __getitem__(self, index):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return X[rows], Y[rows]


def tensorflow_dataset():
    import tensorflow as tf

    return (tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH),)


def loader():
    from torch import from_numpy
    from torch.utils.data import DataLoader, TensorDataset

    return (DataLoader(TensorDataset(from_numpy(X), from_numpy(Y)), batch_size=BATCH),)


DATA = {
    "arrays": (lambda: (X, Y), {"batch_size": BATCH}),
    "PyDataset": (lambda: (Batches(),), {}),
    **({"tf.data": (tensorflow_dataset, {})} if BACKEND == "tensorflow" else {}),
    **({"DataLoader": (loader, {})} if BACKEND == "torch" else {}),
}


@pytest.mark.parametrize("module", [mp, keras])
@pytest.mark.parametrize("name", DATA)
def test_the_first_bad_batch_is_kept_and_diagnosed(name, module):
    data, arguments = DATA[name]
    model, monitor = trained(data(), module=module, **arguments)
    np.testing.assert_array_equal(monitor.bad_batch["x"], X[FIRST * BATCH : SECOND * BATCH])
    np.testing.assert_array_equal(monitor.bad_batch["y"], Y[:BATCH])
    first = mp.diagnose(model, **monitor.bad_batch).findings[0]
    assert (first.place, first.rule) == ("x", "nonfinite-data")


@pytest.mark.backend("tensorflow", "jax")  # torch runs one step at a time
def test_the_batch_of_an_execution_of_several_steps_is_its_first():
    x = np.concatenate([X[:BATCH], X])  # both bad batches are in the third execution
    _, monitor = trained((x, np.ones((len(x), 1))), batch_size=BATCH, steps_per_execution=2)
    np.testing.assert_array_equal(monitor.bad_batch["x"], x[4 * BATCH : 5 * BATCH])


def test_training_is_the_same_and_the_train_function_is_back():
    losses, functions = [], []
    for keep in (False, True):
        keras.utils.set_random_seed(0)
        with mp.policy_scope("mixed_float16"):
            hidden = keras.layers.Dense(8, activation="tanh")
            model = mp.Sequential([keras.Input((8,)), hidden, mp.layers.DenseHead(8)])
        model.compile("sgd", "mse")
        monitor = mp.OverflowMonitor(keep_batch=keep)
        arguments = {"batch_size": BATCH, "epochs": 2, "verbose": 0, "callbacks": [monitor]}
        losses.append(model.fit(X[: 3 * BATCH], X[: 3 * BATCH], **arguments).history["loss"])
        functions.append(type(model.train_function))
        assert monitor.bad_batch is None
    assert losses[0] == losses[1]
    assert functions[0] is functions[1]
