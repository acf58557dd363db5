"""LSTM and GRU: each kernel is cast once, and gradients are as good as float16 products allow."""

import contextlib

import keras
import numpy as np
import pytest
from helpers import traced_casts
from helpers.float16 import error, numpy_of, step
from helpers.marks import full, full_on, in_each_way
from keras import ops

from kerasmp import layers

NAMES = ["LSTM", "GRU"]
UNITS, FEATURES = 3, 5


def sequences(batch=2, steps=4, features=FEATURES, seed=0):
    values = np.random.default_rng(seed).normal(size=(batch, steps, features))
    return values.astype("float16")


def pair(name, shape, ours="mixed_float16", stock="mixed_float16", **kwargs):
    """Return the kerasmp and the stock layer with the same weights."""
    made = [
        getattr(module, name)(UNITS, dtype=dtype, **kwargs)
        for module, dtype in ((layers, ours), (keras.layers, stock))
    ]
    for layer in made:
        layer.build(shape)
    random = np.random.default_rng(1)
    for target, source in zip(made[0].weights, made[1].weights, strict=True):
        value = random.normal(size=target.shape) * 0.5
        target.assign(value)
        source.assign(value)
    return made


def flat(outputs):
    return [numpy_of(x) for x in keras.tree.flatten(outputs)]


def assert_close(got, want, tolerance=4e-3):
    got, want = flat(got), flat(want)
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------- counts of casts


ONCE = (2, 0)  # two kernels, none in the loop; a bias is added in float32


def shapes(layer):
    return [v.shape for v in layer.cell.weights if v.name != "seed_generator_state"]


def casts(layer, x, *, trained=False):
    """Count the casts of weights in a call, or in a call with its gradients."""

    def call(x):
        if not trained:
            return layer(x, training=True)
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, training=True))
        return tape.gradient(loss, [v.value for v in layer.trainable_variables])

    return traced_casts.count(call, x, shapes(layer))


@pytest.mark.backend("tensorflow", "jax")
@pytest.mark.parametrize("name", NAMES)
def test_each_weight_is_cast_once_and_not_in_the_loop(name):
    x = sequences(steps=8)
    ours, _ = pair(name, x.shape)
    assert casts(ours, x) == ONCE
    if keras.backend.backend() == "tensorflow":
        assert casts(ours, x, trained=True) == ONCE


NO_DROPOUT, RECURRENT, OF_INPUTS = {}, {"recurrent_dropout": 0.5}, {"dropout": 0.5}


@full_on("jax")
@pytest.mark.backend("tensorflow", "jax")
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("LSTM", NO_DROPOUT),
        ("GRU", OF_INPUTS),
        full("LSTM", RECURRENT),
        full("LSTM", OF_INPUTS),
        full("GRU", NO_DROPOUT),
        full("GRU", RECURRENT),
    ],
)
def test_each_weight_is_cast_once_in_an_unrolled_loop(name, kwargs):
    x = sequences(steps=4)
    ours, _ = pair(name, x.shape, unroll=True, **kwargs)
    assert casts(ours, x) == ONCE


@pytest.mark.full
@pytest.mark.backend("tensorflow", "jax")
@pytest.mark.parametrize("name", NAMES)
def test_stock_keras_casts_them_in_each_step(name):
    x = sequences(steps=8)
    _, stock = pair(name, x.shape)
    if keras.backend.backend() == "tensorflow":
        assert casts(stock, x) == (6, 3)  # in the loop, and before it for the shape
    elif name == "LSTM":  # a stock GRU has its own loop on JAX
        assert casts(stock, x) == (3, 3)
    _, stock = pair(name, x.shape, unroll=True)
    assert casts(stock, x)[0] >= 8 * 3


@pytest.mark.backend("tensorflow", "jax")
def test_each_weight_of_stacked_cells_and_of_both_directions_is_cast_once():
    x = sequences(steps=8)
    keras.config.set_dtype_policy("mixed_float16")
    stacked = layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)])
    both = keras.layers.Bidirectional(layers.LSTM(3))
    for layer in (stacked, both):
        layer.build(x.shape)
        of = [v.shape for v in layer.trainable_variables]
        total, inside = traced_casts.count(layer, x, of)
        assert inside == 0
        # Keras calls stacked cells once more, for their shapes, and drops the results.
        assert total == (8 if layer is stacked else 4)


# --------------------------------------------------------------------------------------- errors


def half(x):
    """Return gates that are always half open."""
    return ops.zeros_like(x) + 0.5


@in_each_way
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_kernels_are_summed_over_the_steps_in_float32(name, mode):
    """The last step gives 4096 and the others 1 each, which a float16 sum would lose."""
    x = np.full((1, 64, 1), 1.0)
    upstream = np.full((1, 64, 1), 2.0)
    upstream[:, -1] = 2.0**13
    found = []
    for package, dtype in ((keras.layers, "float32"), (layers, "mixed_float16")):
        layer = getattr(package, name)(
            1,
            activation="linear",
            recurrent_activation=half,
            kernel_initializer="ones",
            recurrent_initializer="zeros",
            return_sequences=True,
            use_cudnn=False,
            dtype=dtype,
        )
        layer.build(x.shape)
        kernels = [layer.cell.kernel, layer.cell.recurrent_kernel]
        _, gradients = step(mode, layer, [x], upstream, kernels, dtype=layer.compute_dtype)
        found.append(gradients[1:])
    for wanted, ours in zip(*found, strict=True):
        assert error(ours, wanted) < 2.0**-11


# -------------------------------------------------------------------------- the same as in stock

OPTIONS = [
    {"return_sequences": True, "return_state": True, "go_backwards": True},
    {"unroll": True, "activation": "relu", "recurrent_activation": "hard_sigmoid"},
    {"use_bias": False, "use_cudnn": False},  # without reset_after, stock GRU fails on JAX
    {"implementation": 1},
]


@full_on("jax")
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("LSTM", kwargs) for kwargs in (OPTIONS[0], OPTIONS[3])]
    + [("GRU", kwargs) for kwargs in OPTIONS[1:3]]
    + [full("LSTM", kwargs) for kwargs in OPTIONS[1:3]]
    + [full("GRU", kwargs) for kwargs in (OPTIONS[0], OPTIONS[3])],
    ids=str,
)
def test_outputs_equal_those_of_stock_keras(name, kwargs):
    x = sequences()
    ours, stock = pair(name, x.shape, **kwargs)
    got = ours(x)
    assert {keras.backend.standardize_dtype(y.dtype) for y in keras.tree.flatten(got)} == {
        "float16"
    }
    assert_close(got, stock(x))


@full_on("jax")
@pytest.mark.parametrize("name", NAMES)
def test_a_float32_layer_equals_the_stock_one_bit_for_bit(name):
    x = sequences()
    ours, stock = pair(name, x.shape, "float32", "float32")
    np.testing.assert_array_equal(flat(ours(x))[0], flat(stock(x))[0])


@full_on("jax")
def test_a_gru_that_resets_before_its_product():
    x = sequences()
    ours, stock = pair("GRU", x.shape, reset_after=False)
    assert_close(ours(x), stock(x))


@full_on("jax")
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("LSTM", {}), ("GRU", {"zero_output_for_mask": True}), full("GRU", {"go_backwards": True})],
)
def test_masks_count_as_in_stock(name, kwargs):
    x = sequences()
    mask = np.array([[True, True, False, True], [False, True, True, False]])
    ours, stock = pair(name, x.shape, return_sequences=True, use_cudnn=False, **kwargs)
    want = stock(x, mask=ops.convert_to_tensor(mask))
    assert_close(ours(x, mask=ops.convert_to_tensor(mask)), want)
    assert np.any(np.abs(flat(want)[0] - flat(stock(x))[0]) > 1e-2)


@full_on("jax")
@pytest.mark.backend("tensorflow", "jax")  # on torch stock Keras drops them, too
@pytest.mark.parametrize("name", NAMES)
def test_states_are_kept_from_batch_to_batch(name):
    x = sequences()
    ours, stock = pair(name, x.shape, stateful=True)
    first = flat(ours(x))[0]
    assert_close([first], stock(x))
    second = flat(ours(x))[0]
    assert_close([second], stock(x))
    assert np.any(first != second)
    assert {v.dtype for v in ours.states} == {"float32"}
    ours.reset_state()
    np.testing.assert_array_equal(flat(ours(x))[0], first)


@full_on("jax")
@pytest.mark.parametrize("name", NAMES)
def test_an_initial_state_is_taken(name):
    x = sequences()
    ours, stock = pair(name, x.shape)
    states = [np.full((2, UNITS), 0.5, "float32")] * len(ours.state_size)
    assert_close(ours(x, initial_state=states), stock(x, initial_state=states))


@full_on("jax")
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("LSTM", OF_INPUTS),
        ("GRU", RECURRENT),
        full("LSTM", RECURRENT),
        full("GRU", OF_INPUTS),
    ],
)
def test_dropout_drops_the_same_in_training_only(name, kwargs):
    x = sequences()
    ours, stock = (
        getattr(module, name)(UNITS, dtype=dtype, seed=7, use_cudnn=False, **kwargs)
        # The kerasmp layer draws in float32.
        for module, dtype in ((layers, "mixed_float16"), (keras.layers, "float32"))
    )
    for layer in (ours, stock):
        layer.build(x.shape)
    stock.set_weights(ours.get_weights())
    quiet = flat(ours(x))[0]
    assert_close([quiet], stock(x))
    loud = flat(ours(x, training=True))[0]
    assert_close([loud], stock(x, training=True))
    assert np.any(np.abs(loud - quiet) > 1e-2)


@full_on("jax")
@pytest.mark.parametrize("name", [full("LSTM"), "GRU"])
def test_lengths_may_differ_from_call_to_call(name):
    ours, stock = pair(name, (None, None, FEATURES))
    model = keras.Sequential([keras.Input((None, FEATURES)), ours])
    reference = keras.Sequential([keras.Input((None, FEATURES)), stock])
    for batch, steps in ((2, 3), (3, 5)):
        x = sequences(batch, steps)
        assert_close(model.predict(x, verbose=0), reference.predict(x, verbose=0))


@full_on("jax")
def test_bfloat16():
    x = sequences()
    ours, stock = pair("LSTM", x.shape, "mixed_bfloat16", "mixed_bfloat16")
    assert keras.backend.standardize_dtype(ours(x).dtype) == "bfloat16"
    assert_close(ours(x), stock(x), 4e-2)


@full_on("jax")
def test_a_cell_keeps_its_own_dtype():
    x = sequences()
    layer = layers.RNN(layers.LSTMCell(3, dtype="mixed_float16"), dtype="float32")
    assert keras.backend.standardize_dtype(layer(x).dtype) == "float32"
    layer = layers.RNN(layers.LSTMCell(3, dtype="float32"), dtype="mixed_float16")
    assert keras.backend.standardize_dtype(layer(x).dtype) == "float16"


# ---------------------------------------------------------------------------- nothing stays behind


@full_on("jax")
@pytest.mark.parametrize("fails", [False, True])
def test_after_a_call_weights_are_variables_again(fails):
    x = sequences()
    boom = RuntimeError("boom")

    def activation(x):
        if fails:
            raise boom
        return x

    layer = layers.LSTM(UNITS, activation=activation, dtype="mixed_float16")
    layer.build(x.shape)
    before = dict(vars(layer.cell))
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        layer(x)
    assert isinstance(layer.cell.kernel, keras.Variable)
    assert isinstance(layer.cell.bias, keras.Variable)
    assert vars(layer.cell).keys() - before.keys() <= {"_dropout_mask", "_recurrent_dropout_mask"}


def test_an_unbuilt_cell_has_no_kernel():
    cell = layers.LSTMCell(2)
    assert not hasattr(cell, "kernel")
    assert layers.LSTMCell.kernel is not None  # nor does it fail on the class


@full_on("jax")
def test_cells_run_outside_a_layer_and_stock_cells_inside_a_kerasmp_layer():
    x = sequences()
    for name in NAMES:
        ours = getattr(layers, f"{name}Cell")(UNITS, dtype="mixed_float16")
        stock = getattr(keras.layers, f"{name}Cell")(UNITS, dtype="mixed_float16")
        ours.build((2, FEATURES))
        stock.build((2, FEATURES))
        stock.set_weights(ours.get_weights())
        states = ours.get_initial_state(2)
        assert_close(ours(x[:, 0], states), stock(x[:, 0], states))
        assert_close(
            layers.RNN(stock, dtype="mixed_float16")(x),
            keras.layers.RNN(ours, dtype="mixed_float16")(x),
        )


class Holding(keras.layers.Layer):
    """A cell that calls a recurrent layer in each step."""

    def __init__(self, inside, **kwargs):
        super().__init__(**kwargs)
        self.state_size, self.inside = UNITS, inside

    def build(self, shape):
        self.inside.build((shape[0], 2, shape[-1]))

    def call(self, inputs, states):
        output = self.inside(ops.stack([inputs, inputs], axis=1)) + states[0]
        return output, [output]


@full_on("jax")
@pytest.mark.parametrize("name", NAMES)
def test_a_cell_may_hold_a_layer_with_its_own_loop(name):
    x = sequences()
    keras.config.set_dtype_policy("mixed_float16")
    ours, stock = (
        package.RNN(Holding(getattr(package, name)(UNITS))) for package in (layers, keras.layers)
    )
    for layer in (ours, stock):
        layer.build(x.shape)
    stock.set_weights(ours.get_weights())
    assert_close(ours(x), stock(x), 1e-2)


# ------------------------------------------------------------------------------- saving, training


def model_of(module):
    return keras.Sequential(
        [
            keras.Input((4, FEATURES)),
            module.LSTM(UNITS, return_sequences=True, name="lstm"),
            keras.layers.Bidirectional(module.GRU(UNITS, return_sequences=True), name="both"),
            module.RNN([module.LSTMCell(2), module.GRUCell(2)], name="stacked"),
        ]
    )


@full_on("jax")
def test_weights_and_configs_are_those_of_stock_keras(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    ours, stock = model_of(layers), model_of(keras.layers)
    stock.save_weights(tmp_path / "stock.weights.h5")
    ours.load_weights(tmp_path / "stock.weights.h5")
    for got, want in zip(ours.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)
    for name in NAMES:
        arguments = {"units": 2, "dropout": 0.25, "return_sequences": True, "name": "rnn"}
        config = getattr(layers, name)(**arguments).get_config()
        assert config == getattr(keras.layers, name)(**arguments).get_config()
        assert getattr(layers, name).from_config(config).get_config() == config


@full_on("jax")
def test_a_model_trains_like_the_stock_one():
    models = [
        keras.Sequential(
            [
                keras.Input((4, FEATURES)),
                module.LSTM(UNITS, return_sequences=True, dtype=dtype),
                module.GRU(2, dropout=0.25, seed=1, dtype=dtype),
            ]
        )
        # In float32 both draw the same masks; stock Keras draws others in float16.
        for module, dtype in ((layers, "mixed_float16"), (keras.layers, "float32"))
    ]
    models[1].set_weights(models[0].get_weights())
    x, y = sequences(8), np.ones((8, 2), "float32")
    before = [numpy_of(v) for v in models[0].trainable_variables]
    for model in models:
        model.compile(keras.optimizers.SGD(0.5), "mse", **how())
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    ours, stock = ([numpy_of(v) for v in m.trainable_variables] for m in models)
    assert {v.dtype for v in models[0].trainable_variables} == {"float32"}
    for old, got, want in zip(before, ours, stock, strict=True):
        assert np.any(old != got)
        np.testing.assert_allclose(got, want, rtol=1e-2, atol=2e-3)


def how():
    """Return arguments of `compile` that save time."""
    return {"tensorflow": {"run_eagerly": True}, "jax": {"jit_compile": True}}.get(
        keras.backend.backend(), {}
    )
