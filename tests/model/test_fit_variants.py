"""The less common ways to train: an inserted bad batch changes nothing, bit for bit."""

import keras
import numpy as np
import pytest
from helpers.marks import by_name, marks_on

import kerasmp as mp

pytestmark = marks_on("oldest")

BATCH = 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(5 * BATCH, 3, 4)).astype("float32")
Y = RNG.integers(0, 2, size=(5 * BATCH, 1)).astype("float32")
WEIGHTS = RNG.uniform(1, 2, size=5 * BATCH).astype("float32")
# The second and the last batch are bad in one run and left out in the other.
BAD = np.r_[BATCH : 2 * BATCH, 4 * BATCH : 5 * BATCH]
GOOD = np.setdiff1d(np.arange(5 * BATCH), BAD)


def layers(**settings):
    return [
        keras.layers.Flatten(),
        keras.layers.Dense(4, activation="relu", **settings),
        keras.layers.BatchNormalization(**settings),
        keras.layers.Dropout(0.25),
    ]


def through(x, **settings):
    for layer in layers(**settings):
        x = layer(x)
    return x


def one_to_one(module):
    inputs = keras.Input((3, 4), name="x")
    outputs = keras.layers.Dense(1, name="y")(through(inputs, dtype="mixed_float16"))
    return module.Model(inputs, outputs)


def many_to_many(module):
    inputs = {name: keras.Input((3, 4), name=name) for name in ("first", "second")}
    x = keras.layers.Add()([through(x, dtype="mixed_float16") for x in inputs.values()])
    heads = {n: keras.layers.Dense(1, dtype="mixed_float16", name=n)(x) for n in ("head", "other")}
    return module.Model(inputs, heads)


def stateful(module):
    inputs = keras.Input((3, 4), batch_size=BATCH)
    cells = keras.layers.LSTM(2, stateful=True, dtype="mixed_float16")
    return module.Model(inputs, keras.layers.Dense(1)(cells(inputs)))


def data_of(model, x):
    several = isinstance(model.input, dict)
    y = {"head": Y, "other": 2 * Y} if several else Y
    return ({"first": x, "second": x + 1} if several else x), y


def rows(arrays, chosen):
    return keras.tree.map_structure(lambda array: array[chosen], arrays)


def train(build, chosen, *, x, fit=(), accumulate=None, on_batch=False, module=mp):
    keras.utils.set_random_seed(0)
    model = build(module)
    adam = keras.optimizers.Adam(0.01, gradient_accumulation_steps=accumulate)
    model.compile(mp.LossScaleOptimizer(adam, loss_scale=64.0), "mse")
    x, y = rows(data_of(model, x), chosen)
    more = {k: v[chosen] if k == "sample_weight" else v for k, v in dict(fit).items()}
    if on_batch:
        for start in range(0, len(chosen), BATCH):
            batch = rows((x, y, WEIGHTS[chosen]), slice(start, start + BATCH))
            logs = model.train_on_batch(*batch, return_dict=True)
    else:
        logs = model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, **more).history
    return model, logs


CORNERS = {
    "several inputs and outputs, accumulation": (many_to_many, {"accumulate": 2}),
    "train_on_batch, sample weights": (one_to_one, {"on_batch": True}),
    "sample weights": (one_to_one, {"fit": {"sample_weight": WEIGHTS}}),
    "class weights": (one_to_one, {"fit": {"class_weight": {0: 1.0, 1: 3.0}}}),
}
# `fit` writes the weights to the model like `train_on_batch`.
CASES = by_name(CORNERS, [name for name, (_, way) in CORNERS.items() if "fit" not in way])


def both(build, way, module=mp):
    bad = X.copy()
    bad[BAD] = np.inf
    clean = train(build, GOOD, x=X, module=module, **way)
    return clean, train(build, np.arange(len(X)), x=bad, module=module, **way)


@pytest.mark.parametrize(("build", "way"), CASES)
def test_bad_batches_leave_no_trace(build, way):
    (clean_model, clean_logs), (model, logs) = both(build, way)
    assert model.optimizer.skipped_steps == 2
    assert model.optimizer.applied_steps == clean_model.optimizer.applied_steps == 3
    if "on_batch" not in way:  # whose last batch is bad: see below
        assert logs == clean_logs
    ours = [*model.variables, *model.optimizer.inner_optimizer.variables]
    theirs = [*clean_model.variables, *clean_model.optimizer.inner_optimizer.variables]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(
            *(keras.ops.convert_to_numpy(v.value) for v in (one, other)), err_msg=one.path
        )


def states(module):
    """Return the states of an LSTM after good batches only, and after bad ones as well."""
    return [
        np.concatenate([keras.ops.convert_to_numpy(v.value) for v in model.layers[1].states])
        for model, _ in both(stateful, {}, module)
    ]


@pytest.mark.backend(
    "tensorflow"
)  # on other backends Keras drops the states after each step of `fit`
def test_bad_batches_leave_the_states_of_rnn_layers_unchanged():
    clean, found = states(mp)
    assert np.abs(clean).min() > 0
    np.testing.assert_array_equal(found, clean)


@pytest.mark.full
@pytest.mark.backend("tensorflow")
def test_in_stock_models_bad_batches_change_the_states_of_rnn_layers():
    assert not np.array_equal(*states(keras))


@pytest.mark.parametrize("return_dict", [True, False])
def test_train_on_batch_returns_no_loss_of_a_skipped_batch(return_dict):
    model = one_to_one(mp)
    model.compile(mp.LossScaleOptimizer("sgd", loss_scale=64.0), "mse", metrics=["mae"])
    bad = np.full((BATCH, 3, 4), np.inf, "float32")
    for x, finite in ((bad, False), (X[:BATCH], True)):
        logs = model.train_on_batch(x, Y[:BATCH], return_dict=return_dict)
        assert isinstance(logs, dict if return_dict else list)
        values = np.array(list(logs.values()) if return_dict else logs)
        assert np.isfinite(values).all() if finite else np.isnan(values).all()
