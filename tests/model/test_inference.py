"""A model with half-precision variables refuses to train, also after loading."""

import keras
import numpy as np
import pytest
from helpers import adopted_model
from helpers.adopted_model import Net
from helpers.marks import few, full, full_on
from helpers.networks import KINDS, X, Y
from helpers.train_steps import OwnStep

import kerasmp as mp
from kerasmp.errors import PolicyError

REFUSED = "inference only.*Received.*Expected: predict, evaluate or a call.*restore"


def compiled(kind="sequential", module=mp):
    model = KINDS[kind](module)
    model.compile("adam", "mse", metrics=["mae"])
    model(X[:8])
    model.optimizer.build(model.trainable_variables)
    return model


def only_for_inference(model):
    """Prepare a model as a conversion to half-precision variables does, without the variables."""
    model._for_inference = True
    model.optimizer = None


def refuses(model):
    before = model.get_weights()
    for train in (
        lambda: model.fit(X, Y, verbose=0),
        lambda: model.fit(X, Y, verbose=0, validation_data=(X, Y)),
        lambda: model.train_on_batch(X[:8], Y[:8]),
    ):
        with pytest.raises(PolicyError, match=REFUSED):
            train()
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", few(KINDS, ["subclassed"]))
def test_training_is_refused_and_predict_and_evaluate_work(kind):
    model = compiled(kind)
    predicted, evaluated = model.predict(X, verbose=0), model.evaluate(X, Y, verbose=0)
    only_for_inference(model)
    refuses(model)
    np.testing.assert_array_equal(model.predict(X, verbose=0), predicted)
    np.testing.assert_allclose(model.evaluate(X, Y, verbose=0), evaluated, rtol=1e-6)
    model.test_on_batch(X[:8], Y[:8])


def test_training_is_refused_after_another_compile():
    model = compiled()
    only_for_inference(model)
    model.compile("sgd", "mse")
    refuses(model)


def test_a_user_defined_train_step_is_refused():
    class Own(OwnStep, mp.Sequential):
        pass

    model = Own([keras.Input((X.shape[1],)), keras.layers.Dense(1)])
    only_for_inference(model)
    with pytest.raises(PolicyError, match=REFUSED):
        model.train_step((X, Y))


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("functional", keras),
        full("functional", mp),
        full("sequential", keras),
        full("sequential", mp),
    ],
)
def test_a_loaded_model_refuses_training_and_evaluates(kind, module, tmp_path):
    model = mp.Model.from_keras(compiled(kind, module))
    only_for_inference(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    refuses(loaded)
    expected = model.evaluate(X, Y, verbose=0)
    np.testing.assert_allclose(loaded.evaluate(X, Y, verbose=0), expected, rtol=1e-6)
    loaded.save(tmp_path / "again.keras")
    refuses(keras.models.load_model(tmp_path / "again.keras"))


@full_on("jax", "torch")
def test_an_adopted_user_class_loads_and_refuses_training_in_another_process(
    tmp_path, another_process
):
    model = Net()
    model(adopted_model.X)
    mp.convert(model, "compute=float16,output=float16", rules=None)
    only_for_inference(model)
    model.save(tmp_path / "model.keras")
    said = another_process("helpers.adopted_model:train", path=str(tmp_path / "model.keras"))
    predicted = model.predict(adopted_model.X, verbose=0)
    assert "inference only" in said["error"]
    assert said["classes"] == ["Net", "Model"]
    assert said["outputs"] == predicted.dtype == "float16"
    assert said["predicted"] == predicted.tolist()


def test_models_that_train_have_no_such_entry_in_their_config():
    assert "kerasmp" not in compiled().get_config()
