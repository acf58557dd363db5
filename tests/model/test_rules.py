"""kerasmp models follow the rules of the policy that they are made under; stock models do not."""

import keras
import numpy as np
import pytest

import kerasmp as mp

layers = keras.layers
SAFE = mp.Policy("mixed_float16", rules="safe")
X = np.ones((2, 6, 4), "float32")


def sequential(module):
    return module.Sequential([keras.Input((6, 4)), layers.Dense(8), layers.Dense(3)])


def not_built(module):
    return module.Sequential([layers.Dense(8), layers.Dense(3)])


def functional(module):
    inputs = keras.Input((6, 4))
    return module.Model(inputs, layers.Dense(3)(layers.Dense(8)(inputs)))


KINDS = pytest.mark.parametrize("build", [sequential, not_built, functional])


def made_under(policy, build, module=mp):
    with pytest.warns(mp.errors.PolicyWarning), mp.policy_scope(policy):
        return build(module)


@pytest.mark.unit
@KINDS
def test_the_head_is_float32_and_the_body_is_not(build):
    model = made_under(SAFE, build)
    output = model(X)
    assert [layer.compute_dtype for layer in model.layers[-2:]] == ["float16", "float32"]
    assert keras.backend.standardize_dtype(output.dtype) == "float32"
    assert model.outputs[0].dtype == "float32"
    assert {v.dtype for v in model.variables} == {"float32"}


@pytest.mark.full
def test_stock_models_do_not_follow_rules():
    model = made_under(SAFE, functional, keras)
    model(X)
    assert {layer.compute_dtype for layer in model.layers[-2:]} == {"float16"}


@pytest.mark.unit
@KINDS
def test_class_rules_are_followed(build):
    model = made_under(mp.Policy("mixed_float16", rules={layers.Dense: "float32"}), build)
    model(X)
    assert {layer.compute_dtype for layer in model.layers[-2:]} == {"float32"}


class Own(mp.Model):
    def __init__(self):
        super().__init__()
        self.attend = layers.MultiHeadAttention(2, 4)
        self.pool = layers.Softmax()

    def call(self, inputs):
        return self.pool(self.attend(inputs, inputs))


@pytest.mark.unit
def test_parts_that_are_made_when_the_model_is_built_follow_at_once():
    model = made_under(SAFE, lambda _: Own())
    output = model(X)
    assert keras.backend.standardize_dtype(output.dtype) == "float32"
    assert model.attend._softmax.compute_dtype == "float32"
    assert model.attend.query_dense.compute_dtype == "float32"
    assert model.attend.output_dense.compute_dtype == "float16"


def test_layers_of_a_model_built_by_fit_follow_rules():
    model = made_under(SAFE, lambda _: Own())
    model.compile("sgd", "mse")
    model.fit(X, np.ones((2, 6, 4)), epochs=2, verbose=0)
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    assert model.attend.query_dense.compute_dtype == "float32"


@pytest.mark.unit
def test_layers_with_their_own_dtype_keep_it():
    def build(module):
        return module.Sequential(
            [keras.Input((4,)), layers.Dense(2), layers.Softmax(dtype="bfloat16"), layers.ReLU()]
        )

    model = made_under(SAFE, build)
    assert [layer.compute_dtype for layer in model.layers] == ["float16", "bfloat16", "float32"]


@pytest.mark.unit
def test_path_rules_of_the_policy_win():
    def build(module):
        inputs = keras.Input((4,))
        return module.Model(inputs, layers.Dense(2, name="head")(inputs))

    rules = ["safe", {"head": "mixed_float16"}]
    model = made_under(mp.Policy("mixed_float16", rules=rules), build)
    assert model.layers[-1].compute_dtype == "float16"


@pytest.mark.unit
def test_layers_added_later_follow():
    model = made_under(SAFE, sequential)
    model.add(layers.Softmax(dtype="mixed_float16"))
    model(np.ones((2, 6, 4)))
    assert model.layers[-1].compute_dtype == "float32"


def test_what_is_saved_computes_the_same_when_loaded(tmp_path):
    model = made_under(SAFE, functional)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (loaded(X), model(X))))
    assert [layer.compute_dtype for layer in loaded.layers[-2:]] == ["float16", "float32"]


def test_a_model_that_cannot_be_traced_follows_rules_after_its_first_call():
    class Eager(mp.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2, activation="softmax")

        def call(self, inputs):
            if float(keras.ops.sum(inputs)) < 0:
                inputs = -inputs
            return self.dense(inputs)

    model = made_under(SAFE, lambda _: Eager())
    assert model(np.ones((2, 4), "float32")).shape == (2, 2)
    assert model.dense.compute_dtype == "float32"


class Narrow(layers.Dense):
    pass


@pytest.mark.unit
def test_rules_that_disagree_are_an_error_as_soon_as_layers_are_known():
    policy = mp.Policy("mixed_float16", rules={layers.Dense: "float32", Narrow: "mixed_bfloat16"})
    with pytest.raises(
        mp.errors.PolicyError, match="Two rules give different policies for the layer"
    ):
        made_under(policy, functional_of_narrow)
    model = made_under(policy, OwnNarrow)
    for _ in range(2):  # the second call does not go on without the rules
        with pytest.raises(
            mp.errors.PolicyError, match="Two rules give different policies for the layer"
        ):
            model(X)


def functional_of_narrow(module):
    inputs = keras.Input((6, 4))
    return module.Model(inputs, Narrow(3)(inputs))


class OwnNarrow(mp.Model):
    def __init__(self, _):
        super().__init__()
        self.narrow = Narrow(3)

    def call(self, x):
        return self.narrow(x)
