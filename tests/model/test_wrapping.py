"""When `compile` wraps the optimizer, and what of it survives saving."""

import keras
import numpy as np
import pytest
from helpers.marks import full, full_on
from helpers.networks import KINDS, X, Y

import kerasmp as mp

Stock = keras.optimizers.LossScaleOptimizer


def network(*dtypes, module=mp):
    layers = [keras.layers.Dense(2, dtype=dtype) for dtype in dtypes]
    return module.Sequential([keras.Input((4,)), *layers])


@pytest.mark.parametrize(
    ("dtypes", "wrapped"),
    [
        (["float32"], False),
        (["mixed_bfloat16"], False),
        (["float32", "mixed_float16", "float32"], True),
    ],
    ids=str,
)
def test_compile_wraps_by_the_dtypes_of_the_layers(dtypes, wrapped):
    for optimizer in ("adam", keras.optimizers.Adam()):
        model = network(*dtypes)
        model.compile(optimizer, "mse")
        assert isinstance(model.optimizer, mp.LossScaleOptimizer) is wrapped


@pytest.mark.parametrize("module", [keras, mp], ids=["stock model", "our model"])
def test_a_loss_scale_optimizer_is_not_wrapped_again(module):
    with mp.policy_scope("mixed_float16"):
        model = network(None, module=module)
    optimizer = mp.LossScaleOptimizer("sgd", loss_scale=8.0)
    model.compile(optimizer, "mse")
    assert model.optimizer is optimizer
    assert not isinstance(optimizer.inner_optimizer, Stock)


def test_auto_scale_loss_false_leaves_the_optimizer_alone_and_survives_saving(tmp_path):
    model = network("mixed_float16")
    model.compile("adam", "mse", auto_scale_loss=False)
    assert not isinstance(model.optimizer, Stock)
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert not isinstance(loaded.optimizer, Stock)


def test_a_stock_loss_scale_optimizer_works_with_a_warning():
    model = network("mixed_float16")
    with pytest.warns(mp.errors.LossScaleWarning, match=r"kerasmp\.LossScaleOptimizer"):
        model.compile(Stock(keras.optimizers.SGD(0.1)), "mse")
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"][0])


class Late(mp.Model):
    """Makes its layer when it is built."""

    def build(self, input_shape):
        self.dense = keras.layers.Dense(2, dtype="mixed_float16")
        self.dense.build(input_shape)
        self.built = True

    def call(self, inputs):
        return self.dense(inputs)


def test_layers_that_come_after_compile_are_seen_when_training_begins():
    model = Late()
    model.compile("adam", "mse")
    assert not isinstance(model.optimizer, mp.LossScaleOptimizer)
    model.build((None, 4))
    model.fit(X, Y, batch_size=32, verbose=0)
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    assert model.optimizer.applied_steps + model.optimizer.skipped_steps == 2


def test_a_layer_set_to_float16_after_a_fit_is_scaled_in_the_next_one():
    model = network("float32")
    model.compile("adam", "mse")
    model.fit(X, Y, batch_size=32, verbose=0)
    model.layers[0].dtype_policy = "mixed_float16"
    model.fit(X, Y, batch_size=32, verbose=0)
    assert model.optimizer.applied_steps + model.optimizer.skipped_steps == 2


@pytest.mark.backend("tensorflow")
def test_layers_made_in_the_first_step_give_one_warning():
    model = Late()
    model.compile("adam", "mse")
    with pytest.warns(mp.errors.LossScaleWarning, match="Build the model before") as caught:
        model.fit(X, Y, batch_size=32, epochs=2, verbose=0)
    ours = [w for w in caught if issubclass(w.category, mp.errors.LossScaleWarning)]
    assert len(ours) == 1


@full_on("jax")
@pytest.mark.parametrize("kind", [full("sequential"), "functional"])
def test_a_saved_model_loads_as_a_kerasmp_model_with_its_optimizer(kind, tmp_path):
    model = KINDS[kind](mp)
    model.compile(mp.LossScaleOptimizer("adam", loss_scale=128.0), "mse")
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    assert loaded.optimizer.schedule == mp.FixedLossScale(128.0)
    assert loaded.optimizer.applied_steps == 2
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (loaded(X), model(X))))
    if kind == "functional":  # Keras clones any Sequential into a stock one
        assert type(keras.models.clone_model(loaded)) is type(model)


def test_a_registered_subclass_made_from_inputs_and_outputs_loads_as_itself(tmp_path):
    @keras.saving.register_keras_serializable(package="tests", name="Registered")
    class Registered(mp.Model):
        def answer(self):
            return 42

    inputs = keras.Input((4,))
    model = Registered(inputs, keras.layers.Dense(2)(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, Registered)
    assert loaded.answer() == 42
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (loaded(X), model(X))))


def test_a_user_defined_compile_is_left_alone(tmp_path):
    @keras.saving.register_keras_serializable(package="tests", name="OwnCompile")
    class OwnCompile(mp.Sequential):
        def compile(self, rate):
            super().compile(keras.optimizers.SGD(rate), "mse")

    model = OwnCompile([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile(0.1)
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="`compile\\(\\)` was not called"):
        keras.models.load_model(tmp_path / "model.keras")


def test_a_state_without_matching_variables_gives_a_warning():
    def build(name):
        dense = keras.layers.Dense(2, name=name)
        model = mp.Sequential([keras.Input((4,)), dense], name="net")
        model.compile(keras.optimizers.SGD(name="sgd"), "mse")
        return model

    one, other = build("one"), build("other")
    one.set_state_tree(one.get_state_tree())
    before = other.get_weights()
    said = "2 values .* left them out, net/one/.*`.keras`"
    with pytest.warns(mp.errors.KerasMPWarning, match=said):
        other.set_state_tree(one.get_state_tree())
    np.testing.assert_array_equal(other.get_weights()[0], before[0])


def test_metrics_that_a_user_adds_stay():
    class Adds(mp.Sequential):
        def get_metrics_result(self):
            return {**super().get_metrics_result(), "extra": 1.0}

    model = Adds([keras.Input((4,)), keras.layers.Dense(2, dtype="mixed_float16")])
    model.compile("adam", "mse")
    assert model.fit(X, Y, verbose=0).history["extra"] == [1.0]
