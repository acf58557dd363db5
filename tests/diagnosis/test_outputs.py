"""Findings of lint about float16 outputs, and about losses that take them as probabilities."""

import keras
import pytest
from helpers.linted import Holds, compiled, dense, found, made, only

import kerasmp as mp

layers = keras.layers

# NumPy and JAX warn about the constants that lint looks for.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")


# float16-head


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_float16_head_of_probabilities_is_an_error(activation):
    each = only(made(dense(name="head", activation=activation), bare=True), "float16-head")
    assert each.severity == "error"
    assert each.place.endswith("head")


@pytest.mark.unit
def test_a_float16_softmax_layer_at_the_end_is_an_error():
    assert only(made(dense(), layers.Softmax, bare=True), "float16-head").severity == "error"


def test_another_float16_head_is_a_warning_if_a_loss_is_computed_from_it():
    model = made(dense(name="head"), bare=True)
    each = only(model, "float16-head")
    assert each.severity == "hint"
    assert "DenseHead" in each.remedy
    assert only(compiled(model, "mse"), "float16-head").severity == "warning"


@pytest.mark.parametrize("module", [keras, mp], ids=["stock", "ours"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
def test_each_proposed_remedy_removes_the_finding(module, activation):
    head = lambda **settings: module.layers.Dense(8, activation=activation, **settings)  # noqa: E731 - as the others
    model = made(dense(), head, bare=True)
    remedy = only(model, "float16-head").remedy
    assert all(way in remedy for way in ("DenseHead", 'dtype="float32"', "kerasmp.convert"))
    mp.convert(model)
    assert not found(model, "float16-head")
    assert not found(made(dense(), lambda: head(dtype="float32"), bare=True), "float16-head")


@pytest.mark.backend("tensorflow", "jax")  # on torch Keras itself runs this head in float32
def test_the_remedy_says_which_heads_convert_does_not_reach():
    model = made(Holds, bare=True)
    mp.convert(model)
    assert "all but user-defined layers" in only(model, "float16-head").remedy
    assert not found(made(lambda: Holds(dtype="float32"), bare=True), "float16-head")


@pytest.mark.unit
def test_heads_in_float32_or_bfloat16_give_no_finding():
    heads = [dense(dtype="float32"), lambda: mp.layers.DenseHead(8, activation="softmax")]
    for head in heads:
        assert not found(made(dense(), head, bare=True), "float16-head")
    assert not found(made(dense(), bare=True, policy="mixed_bfloat16"), "float16-head")


def test_a_kerasmp_model_that_casts_its_outputs_gives_no_finding_except_for_probabilities():
    def model(activation):
        with pytest.warns(mp.errors.PolicyWarning):
            scope = mp.policy_scope("compute=float16,output=float32")
        with scope:
            head = layers.Dense(8, activation=activation)
            return mp.Sequential([keras.Input((8,)), head])

    assert not found(model(None), "float16-head")
    assert found(model("softmax"), "float16-head")


@pytest.mark.unit
def test_heads_are_found_inside_of_models():
    inner = made(dense(name="head"), bare=True)
    inputs = keras.Input((8,))
    assert only(keras.Model(inputs, inner(inputs)), "float16-head").place.endswith("head")


# By the losses of the outputs "a" and "b": the severities of their heads.
LOSSES = [
    ({"a": "mse", "b": None}, "warning", "hint"),
    ({"b": "mse"}, "hint", "error"),
    ([None, "mse"], "hint", "error"),
    ("mse", "warning", "error"),
    (None, "warning", "error"),  # a train step of one's own may compute a loss
]


@pytest.mark.parametrize(("loss", "first", "second"), LOSSES)
@pytest.mark.parametrize("as_dict", [False, True], ids=["list", "dict"])
def test_a_head_of_which_no_loss_is_computed_is_a_hint(loss, first, second, as_dict):
    inputs = keras.Input((8,))
    head = lambda **settings: layers.Dense(8, dtype="mixed_float16", **settings)(inputs)  # noqa: E731 - as the others
    outputs = {"a": head(name="a"), "b": head(name="b", activation="softmax")}
    model = keras.Model(inputs, outputs if as_dict else list(outputs.values()))
    severities = {
        each.place: each.severity for each in found(compiled(model, loss), "float16-head")
    }
    assert severities == {"a": first, "b": second}


# float16-probabilities


CROSS_ENTROPIES = [
    "categorical_crossentropy",
    "binary_crossentropy",
    keras.losses.SparseCategoricalCrossentropy(),
    keras.losses.categorical_crossentropy,
]


@pytest.mark.parametrize("loss", CROSS_ENTROPIES)
def test_a_cross_entropy_on_float16_probabilities_is_a_warning(loss):
    model = compiled(made(dense(activation="softmax"), bare=True), loss)
    each = only(model, "float16-probabilities")
    assert each.severity == "warning"
    assert "the gradient of their logarithm may overflow" in each.reason


@pytest.mark.parametrize(
    "loss", ["mse", keras.losses.CategoricalCrossentropy(from_logits=True), None]
)
def test_other_losses_give_no_finding(loss):
    assert not found(compiled(made(dense(), bare=True), loss), "float16-probabilities")


def test_float32_probabilities_give_no_finding():
    model = compiled(made(dense(activation="softmax", dtype="float32"), bare=True), "bce")
    assert not found(model, "float16-probabilities")


def test_each_loss_is_checked_against_its_output():
    inputs = keras.Input((8,))
    half = layers.Dense(8, dtype="mixed_float16")(inputs)
    full = layers.Dense(8, activation="softmax", dtype="float32")(inputs)
    model = keras.Model(inputs, [half, full])
    assert not found(compiled(model, ["mse", "categorical_crossentropy"]), "float16-probabilities")
    assert found(compiled(model, ["categorical_crossentropy", "mse"]), "float16-probabilities")
