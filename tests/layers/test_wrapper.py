"""WithDtype runs any layer, with all its parts, in a given dtype."""

import keras
import numpy as np
import pytest
from helpers.flattened import flatten_layers
from helpers.marks import full, marks_on
from keras import layers, ops

from kerasmp.layers import DenseHead, WithDtype
from kerasmp.optimizer import LossScaleOptimizer

pytestmark = marks_on("jax")

SEQUENCE = (2, 5, 4)


def numpy_of(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def wide(tensor):
    return numpy_of(ops.cast(tensor, "float32"))


def assert_same(got, want):
    np.testing.assert_array_equal(wide(got), wide(want))


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def data(shape=SEQUENCE, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@keras.saving.register_keras_serializable("kerasmp_tests")
class Witness(layers.Layer):
    """Records the dtype in which it computes."""

    def build(self, input_shape):
        self.weight = self.add_weight(shape=(input_shape[-1],), initializer="ones")

    def call(self, inputs):
        self.seen = {dtype_of(inputs), dtype_of(ops.convert_to_tensor(self.weight))}
        return inputs * self.weight


def nested():
    inner = keras.Sequential([layers.Dense(3), Witness()])
    return keras.Sequential([inner, layers.Dense(2, activation="relu")])


# Makers of layers for inputs of the shape SEQUENCE, one for each way in which a layer has parts.
MAKERS = {
    "Dense": lambda: layers.Dense(3),
    "Dropout": lambda: layers.Dropout(0.5),
    "Bidirectional": lambda: layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
    "DenseHead": lambda: DenseHead(3),
    "BatchNormalization": layers.BatchNormalization,
    "nested": nested,
    "stacked RNN": lambda: layers.RNN([layers.GRUCell(3), layers.LSTMCell(2)]),
}
every_maker = pytest.mark.parametrize("name", MAKERS)
POLICIES = {
    "float32": "float32",
    "mixed_float16": "float16",
    "mixed_bfloat16": "bfloat16",
}
# The policy around the layer, and the one it gets.
PAIRS = [
    ("mixed_float16", "float32"),
    ("float32", "mixed_float16"),
    full("float32", "mixed_bfloat16"),
]


@every_maker
@pytest.mark.parametrize(("around", "given"), PAIRS)
def test_all_parts_compute_in_the_given_dtype(name, around, given):
    keras.config.set_dtype_policy(around)
    wrapped = WithDtype(MAKERS[name](), given)
    outputs = wrapped(ops.cast(data(), POLICIES[around]))
    assert {part.compute_dtype for part in flatten_layers(wrapped)} == {POLICIES[given]}
    assert {v.dtype for v in wrapped.variables if "seed" not in v.path} <= {"float32"}
    expected = "float32" if name == "DenseHead" else POLICIES[given]
    assert dtype_of(outputs) == expected


@pytest.mark.parametrize("given", ["mixed_float16", full("mixed_bfloat16")])
def test_a_part_of_a_part_sees_inputs_and_weights_in_that_dtype(given):
    model = nested()
    witness = model.layers[0].layers[1]
    model(data())
    assert witness.seen == {"float32"}
    WithDtype(model, given)(data())
    assert witness.seen == {POLICIES[given]}


def test_parts_that_are_made_when_the_layer_is_built_follow_too():
    class Lazy(layers.Layer):
        def build(self, input_shape):
            self.dense = layers.Dense(2)
            self.dense.build(input_shape)

        def call(self, inputs):
            return self.dense(inputs)

    layer = Lazy()
    outputs = WithDtype(layer, "mixed_float16")(data())
    assert layer.dense.compute_dtype == dtype_of(outputs) == "float16"


def test_dtype_alone_does_not_reach_all_parts():
    """An existing model keeps the dtypes of its parts, whatever its policy is."""
    model = nested()
    model.dtype_policy = "mixed_float16"
    assert {part.compute_dtype for part in flatten_layers(model.layers[0])} == {"float32"}
    WithDtype(model, "mixed_float16")
    assert {part.compute_dtype for part in flatten_layers(model)} == {"float16"}


@pytest.mark.parametrize("output_dtype", ["float16", "float32", "float64", None])
def test_outputs_are_cast_to_the_output_dtype(output_dtype):
    if output_dtype == "float64" and keras.backend.backend() == "jax":
        output_dtype = "bfloat16"
    wrapped = WithDtype(
        layers.LSTM(3, return_state=True), "mixed_float16", output_dtype=output_dtype
    )
    expected = output_dtype or "float16"
    assert {dtype_of(out) for out in wrapped(data())} == {expected}
    assert {out.dtype for out in wrapped(keras.Input(SEQUENCE[1:]))} == {expected}


def test_outputs_that_are_no_floats_are_left_alone():
    class Places(layers.Layer):
        def call(self, inputs):
            return inputs, ops.argmax(inputs, axis=-1)

    values, places = WithDtype(Places(), "float16", output_dtype="float32")(data())
    assert dtype_of(values) == "float32"
    assert dtype_of(places).startswith("int")


# --------------------------------------------------------------- several inputs, training, masks


@pytest.mark.parametrize("given", ["float32", full("mixed_float16")])
def test_attention_with_several_inputs(given):
    layer = layers.MultiHeadAttention(2, 4)
    wrapped = WithDtype(layer, given, output_dtype="float32")
    query, value = data(), data(seed=1)
    by_position = wrapped(query, value)
    layer.dtype_policy = keras.DTypePolicy(given)
    cast = [ops.cast(x, POLICIES[given]) for x in (query, value)]
    assert_same(by_position, layer(*cast))
    assert_same(wrapped(query, value=value), by_position)
    for got, want in zip(
        wrapped(query, value, return_attention_scores=True),
        layer(*cast, return_attention_scores=True),
        strict=True,
    ):
        assert_same(got, want)
    assert {part.compute_dtype for part in flatten_layers(layer)} == {POLICIES[given]}
    assert dtype_of(by_position) == "float32"


def test_a_list_of_inputs():
    big = np.full((1, 2), 4e4, "float16")
    keras.config.set_dtype_policy("mixed_float16")
    assert numpy_of(WithDtype(layers.Average())([big, big])).tolist() == [[4e4, 4e4]]


@pytest.mark.parametrize("given", ["float32", full("float16"), full("mixed_bfloat16")])
def test_training_reaches_dropout(given):
    wrapped = WithDtype(layers.Dropout(0.5), given)
    ones = np.ones((8, 8), "float32")
    assert np.any(wide(wrapped(ones, training=True)) == 0)
    for outputs in (wrapped(ones), wrapped(ones, training=False)):
        assert np.all(wide(outputs) == 1)
    model = keras.Sequential([keras.Input((8,)), wrapped])
    assert np.any(wide(model(ones, training=True)) == 0)


@pytest.mark.keras("3.14")  # earlier, every stock layer that casts its input loses the mask
@pytest.mark.parametrize(("around", "given"), PAIRS)
def test_masks_are_used_and_passed_on(around, given):
    keras.config.set_dtype_policy(around)
    ids = np.array([[1, 2, 0, 0, 0], [1, 2, 3, 4, 0]])
    embed = layers.Embedding(6, 4, mask_zero=True)
    lstm = layers.LSTM(3, return_sequences=True)
    wrapped = WithDtype(lstm, given)
    assert wrapped.supports_masking
    embedded = embed(ids)
    outputs = wrapped(embedded)
    assert numpy_of(outputs._keras_mask).tolist() == (ids != 0).tolist()
    plain = ops.cast(ops.convert_to_tensor(numpy_of(embedded)), POLICIES[given])
    assert_same(outputs, lstm(plain, mask=ops.convert_to_tensor(ids != 0)))
    assert np.any(wide(outputs) != wide(lstm(plain)))
    cast = WithDtype(lstm, given, output_dtype=POLICIES[around])(embedded)
    assert numpy_of(cast._keras_mask).tolist() == (ids != 0).tolist()
    inputs = keras.Input((5,), dtype="int32")
    model = keras.Model(inputs, wrapped(embed(inputs)))
    np.testing.assert_allclose(wide(model(ids)), wide(outputs), rtol=1e-2, atol=1e-3)


def test_a_mask_that_the_layer_makes_is_passed_on():
    ids = np.array([[1, 2, 0, 0, 0], [1, 2, 3, 4, 0]])
    embed = layers.Embedding(6, 4, mask_zero=True)
    outputs = WithDtype(embed, "mixed_float16", output_dtype="float32")(ids)
    assert numpy_of(outputs._keras_mask).tolist() == (ids != 0).tolist()


@pytest.mark.keras("3.14")
def test_a_layer_that_drops_masks_still_does():
    embedded = layers.Embedding(6, 4, mask_zero=True)(np.array([[1, 0]]))
    wrapped = WithDtype(Witness(), "mixed_float16")
    assert not wrapped.supports_masking
    with pytest.warns(UserWarning, match="does not support masking"):
        outputs = wrapped(embedded)
    assert getattr(outputs, "_keras_mask", None) is None


def test_mask_and_training_may_be_passed_together():
    lstm = layers.LSTM(3)
    wrapped = WithDtype(lstm, "mixed_float16")
    mask = ops.convert_to_tensor(np.array([[True, True, False, False, False]] * 2))
    outputs = wrapped(data(), mask=mask, training=True)
    assert_same(outputs, lstm(ops.cast(data(), "float16"), mask=mask))
    state = [np.ones((2, 3), "float32")] * 2
    assert dtype_of(wrapped(data(), initial_state=state)) == "float16"


# ------------------------------------------------------------------- building, errors, and saving


@every_maker
def test_an_explicit_build_builds_the_layer(name):
    wrapped = WithDtype(MAKERS[name](), "mixed_float16")
    wrapped.build((None, *SEQUENCE[1:]))
    assert wrapped.built
    assert wrapped.layer.built
    before = [numpy_of(w) for w in wrapped.weights]
    wrapped(data())
    for old, new in zip(before, wrapped.weights, strict=True):
        if "seed" not in new.path and "moving" not in new.path:
            np.testing.assert_array_equal(old, numpy_of(new))


def test_a_layer_of_several_inputs_builds_when_called():
    wrapped = WithDtype(layers.MultiHeadAttention(2, 4), "mixed_float16")
    wrapped.build((None, 5, 4))
    assert not wrapped.layer.built
    wrapped(data(), data())
    assert len(wrapped.trainable_variables) == 8


@pytest.mark.parametrize("name", ["Dense", full("Bidirectional"), "nested"])
def test_a_built_layer_keeps_its_weights(name):
    layer = MAKERS[name]()
    before = wide(layer(data()))
    weights = [numpy_of(w) for w in layer.weights]
    outputs = WithDtype(layer, "mixed_float16", output_dtype="float32")(data())
    for old, new in zip(weights, layer.weights, strict=True):
        np.testing.assert_array_equal(old, numpy_of(new))
    assert np.any(wide(outputs) != before)
    np.testing.assert_allclose(wide(outputs), before, rtol=2e-2, atol=2e-2)


@every_maker
@pytest.mark.parametrize("around", [full("float32"), "mixed_float16"])
def test_a_saved_model_predicts_the_same(name, around, tmp_path):
    keras.config.set_dtype_policy(around)
    given = "float32" if around == "mixed_float16" else "mixed_float16"
    inputs = keras.Input(SEQUENCE[1:])
    wrapped = WithDtype(MAKERS[name](), given, output_dtype="float32", name="wrapped")
    model = keras.Model(inputs, wrapped(inputs))
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")  # only the file decides
    loaded = keras.models.load_model(tmp_path / "model.keras")
    again = loaded.get_layer("wrapped")
    assert type(again) is WithDtype
    assert again.output_dtype == "float32"
    assert {part.compute_dtype for part in flatten_layers(again)} == {POLICIES[given]}
    np.testing.assert_array_equal(numpy_of(loaded(data())), numpy_of(model(data())))


def test_a_saved_model_with_attention_predicts_the_same(tmp_path):
    inputs = keras.Input(SEQUENCE[1:])
    wrapped = WithDtype(layers.MultiHeadAttention(2, 4), "mixed_float16", "float32")
    model = keras.Model(inputs, wrapped(inputs, inputs))
    assert model.output.dtype == "float32"
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy_of(loaded(data())), numpy_of(model(data())))


@pytest.mark.parametrize(
    ("name", "around", "given"),
    [
        ("nested", "mixed_float16", "float32"),
        ("Dense", "float32", "mixed_float16"),
        full("stacked RNN", "float32", "mixed_float16"),
    ],
)
def test_gradients_reach_every_weight(name, around, given):
    keras.config.set_dtype_policy(around)
    wrapped = WithDtype(MAKERS[name](), given)
    model = keras.Sequential(
        [keras.Input(SEQUENCE[1:]), layers.Dense(4), wrapped, layers.Flatten(), DenseHead(1)]
    )
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=64)
    model.compile(optimizer, "mse", run_eagerly=keras.backend.backend() == "tensorflow")
    before = [numpy_of(w) for w in model.trainable_variables]
    model.fit(data((16, *SEQUENCE[1:])), np.ones((16, 1)), batch_size=16, verbose=0)
    assert model.optimizer.applied_steps == 1
    for old, new in zip(before, model.trainable_variables, strict=True):
        assert np.any(numpy_of(new) != old), new.path
