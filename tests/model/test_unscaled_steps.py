"""A train step that scales no loss trains without loss scaling; one that does is never mistaken.

Each test compares with a model whose optimizer scales nothing, `loss_scale=None`.
"""

import contextlib
import functools
import gc
import weakref

import keras
import numpy as np
import pytest
from helpers.marks import full
from helpers.networks import X, Y
from helpers.train_steps import BareStep

import kerasmp as mp

BACKEND = keras.backend.backend()
SOME = {"batch_size": 16, "shuffle": False, "verbose": 0}


def network(*bases, dtype="mixed_float16"):
    """Return a model of a class with these bases."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((4,)), keras.layers.Dense(3, "tanh", dtype=dtype), keras.layers.Dense(2)]
    return type("Own", bases, {})(layers)


def compiled(model, loss_scale, **how):
    """Compile a model with a built optimizer, and without XLA, which takes seconds."""
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.1), loss_scale=loss_scale)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, "mse", **({"jit_compile": BACKEND == "jax"} | how))
    return model


def fitted(model, loss_scale, x=X, y=Y, **how):
    """Train a model for an epoch, and return its weights."""
    compiled(model, loss_scale, **how).fit(x, y, **SOME)
    return model.get_weights()


def assert_same(weights, wanted):
    for each, other in zip(weights, wanted, strict=True):
        np.testing.assert_allclose(each, other, rtol=1e-3, atol=1e-4)


def times(said):
    """Return the number of warnings from kerasmp."""
    return sum(each.category is mp.errors.LossScaleWarning for each in said)


def test_a_step_that_scales_no_loss_trains_without_scaling_and_warns_once():
    wanted = fitted(network(BareStep, mp.Sequential), None)
    model = network(BareStep, mp.Sequential)
    schedule = mp.DynamicLossScale(growth_interval=2)
    x = np.concatenate([X, np.full_like(X[:16], np.inf)])
    with pytest.warns(mp.errors.LossScaleWarning, match=r"optimizer\.scale_loss\(loss\)") as said:
        weights = fitted(model, schedule, x, np.concatenate([Y, Y[:16]]))
    assert times(said) == 1
    model.make_train_function(force=True)
    model.fit(x[-16:], Y[:16], **SOME)
    for each, other in zip(weights, wanted, strict=True):
        np.testing.assert_array_equal(each, other)
    # Steps are counted and skipped; the unused schedule does not change.
    optimizer = model.optimizer
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (4, 2)
    assert optimizer.loss_scale == schedule.initial_scale
    assert int(optimizer.step_counter) == 0


def test_an_unscaled_step_of_a_converted_model_trains_without_scaling():
    wanted = fitted(network(BareStep, mp.Sequential), None)
    model = network(BareStep, keras.Sequential, dtype="float32")
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=BACKEND == "jax")
    mp.convert(model, "mixed_float16")
    assert model.optimizer.loss_scale == 2.0**15
    with pytest.warns(mp.errors.LossScaleWarning, match="does not scale the loss"):
        model.fit(X, Y, **SOME)
    assert_same(model.get_weights(), wanted)


@pytest.mark.parametrize("place", ["the model", "the model, as the step of before", "its class"])
def test_an_unscaled_step_set_later_trains_without_scaling(place):
    wanted = fitted(network(BareStep, mp.Sequential), None)
    model = network(mp.Sequential)
    for name in ("train_step", "loss_and_gradients", "to_differentiate"):
        method = getattr(BareStep, name)
        if place == "its class":
            setattr(type(model), name, method)
        else:
            setattr(model, name, method.__get__(model))
    if place.endswith("before"):
        step = functools.partial(BareStep.train_step, model)
        model.train_step = functools.update_wrapper(step, mp.Model.train_step)
    with pytest.warns(mp.errors.LossScaleWarning, match="does not scale the loss") as said:
        weights = fitted(model, 1024.0)
    assert times(said) == 1
    assert_same(weights, wanted)


def by_scale_loss(self, loss):
    return self.optimizer.scale_loss(loss)


def as_in_keras_2(self, loss):
    return self.optimizer.get_scaled_loss(loss)


def by_hand(self, loss):
    return loss * self.optimizer.dynamic_scale


def in_parts(self, loss):
    return self.optimizer.scale_loss(loss / 4) + self.optimizer.scale_loss(3 * loss / 4)


HOW = {
    "tensorflow": [{"steps_per_execution": 2}, {"run_eagerly": True}, {"jit_compile": True}],
    "jax": [{"steps_per_execution": 2}],
    "torch": [],
}[BACKEND]


@pytest.mark.parametrize(
    ("way", "how"),
    [
        (by_scale_loss, {}),
        (by_hand, {}),
        *(full(way, {}) for way in (as_in_keras_2, in_parts)),
        *(full(by_scale_loss, how) for how in HOW),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value) or "fit",
)
def test_however_a_step_scales_its_gradients_are_unscaled(way, how):
    wanted = fitted(network(BareStep, mp.Sequential), None)
    scales = type("Scales", (BareStep,), {"to_differentiate": way})
    assert_same(fitted(network(scales, mp.Sequential), 1024.0, **how), wanted)


@pytest.mark.backend("tensorflow", "jax")
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("in a step", "traced"),
        ("outside", "compiled anew"),
        full("in a step", "compiled anew"),
        full("outside", "traced"),
    ],
)
def test_a_scale_in_a_function_that_was_traced_before_is_not_overlooked(first, then):
    rest = (X, Y) if first == "outside" else (X[16:], Y[16:])
    wanted = fitted(network(BareStep, mp.Sequential), None)
    traced = []

    class Scales(BareStep):
        def to_differentiate(self, loss):
            traced.append(loss)
            return (by_hand if first == "outside" else by_scale_loss)(self, loss)

        def loss_and_gradients(self, *args):
            return inner(*args)

    model = compiled(network(Scales, mp.Sequential), 1024.0)
    written = BareStep.loss_and_gradients.__get__(model)
    if BACKEND == "jax":
        import jax

        inner = jax.jit(written)
    else:
        import tensorflow as tf

        inner = tf.function(written)
    if first == "outside":
        of_model = (model.trainable_variables, model.non_trainable_variables)
        state = (*of_model, model.optimizer.variables) if BACKEND == "jax" else ()
        values = [[v.value for v in variables] for variables in state]
        inner(*values, *map(keras.ops.convert_to_tensor, (X[:16], Y[:16])))
    else:
        model.fit(X[:16], Y[:16], **SOME)
    before = len(traced)
    if then == "traced":
        model.make_train_function(force=True)
    else:
        former = model.optimizer  # keeps the scale that the function captured
        assert compiled(model, 1024.0).optimizer is not former
    told = pytest.warns(mp.errors.LossScaleWarning, match="the previous optimizer")
    with told if then == "compiled anew" else contextlib.nullcontext():
        model.fit(*rest, **SOME)
    assert len(traced) == before  # kerasmp did not see the scale
    assert_same(model.get_weights(), wanted)


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
        full(lambda: keras.optimizers.SGD(0.1, loss_scale_factor=1024.0)),
    ],
)
@pytest.mark.filterwarnings("ignore:loss_scale_factor=1024.0 of the inner optimizer")
def test_a_step_traced_with_the_scale_of_keras_is_an_error_until_it_is_traced_again(optimizer):
    import tensorflow as tf

    class Scales(BareStep):
        def loss_and_gradients(self, *args):
            return self.inner(*args)

        to_differentiate = by_scale_loss

    model = network(Scales, keras.Sequential, dtype="float32")
    model.inner = tf.function(BareStep.loss_and_gradients.__get__(model))
    model.compile(optimizer(), "mse", jit_compile=False)
    model.fit(X, Y, **SOME)
    mp.convert(model, "mixed_bfloat16").restore()
    mp.convert(model, "mixed_bfloat16")
    if not isinstance(model.optimizer, mp.LossScaleOptimizer):
        mp.convert(model, "mixed_float16")
    before = model.get_weights()
    gc.collect()
    with pytest.raises(mp.errors.LossScaleError, match="functions that you compiled yourself"):
        model.fit(X, Y, **SOME)
    assert_same(model.get_weights(), before)
    model.inner = tf.function(BareStep.loss_and_gradients.__get__(model))
    model.fit(X, Y, **SOME)
    assert model.optimizer.applied_steps == len(X) // 16


@pytest.mark.parametrize("way", ["dry run", "restored", full("failed")])
def test_a_restored_conversion_leaves_no_record_of_the_scale_of_keras(way):
    model = network(BareStep, keras.Sequential, dtype="float32")
    scaling = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
    scaling.build(model.trainable_variables)
    model.compile(scaling, "mse", jit_compile=False)
    model.train_function = len  # as if it had been trained
    if way == "dry run":
        mp.convert(model, dry_run=True, sample=X)
    elif way == "restored":
        mp.convert(model).restore()
    else:
        with pytest.raises(mp.errors.ArgumentError):
            mp.convert(model, sample=X[:, :1])
    model.compile("sgd", "mse", jit_compile=False)
    mp.convert(model)
    with pytest.warns(mp.errors.LossScaleWarning, match="does not scale the loss"):
        model.fit(X[:16], Y[:16], **SOME)


def test_model_and_former_optimizers_do_not_keep_each_other_alive():
    def converted():
        model = network(BareStep, keras.Sequential, dtype="float32")
        inner = keras.optimizers.SGD(learning_rate=lambda: 0.1 * len(model.layers))
        model.compile(keras.optimizers.LossScaleOptimizer(inner), "mse")
        model.optimizer.build(model.trainable_variables)
        model.train_function = len  # as if it had been trained
        before = [weakref.ref(model.optimizer), weakref.ref(inner), weakref.ref(model)]
        mp.convert(model)
        return model, before

    model, before = converted()
    model.compile("sgd", "mse")
    gc.collect()
    assert [each() for each in before] == [None, None, model]
    del model
    gc.collect()
    assert before[-1]() is None


@pytest.mark.backend("tensorflow", "torch")
def test_gradients_of_earlier_steps_are_unscaled_where_the_step_itself_scales_nothing():
    wanted = fitted(network(BareStep, mp.Sequential), None, X[:16], Y[:16])

    class Delayed(BareStep):
        """Applies the gradients of the previous step in each step."""

        def __init__(self, *args):
            super().__init__(*args)
            self.held = []

        def train_step(self, data):
            if self.held:
                self.optimizer.apply(self.held, self.trainable_variables)
                return {"loss": self.held[0][0, 0]}
            loss, gradients = self.loss_and_gradients(*data)
            self.held.extend(gradients)
            return {"loss": loss}

        to_differentiate = by_scale_loss

    model = network(Delayed, mp.Sequential)
    how = {"run_eagerly": True} if BACKEND == "tensorflow" else {}
    assert_same(fitted(model, 1024.0, X[:32], Y[:32], **how), wanted)


def test_the_train_step_of_keras_scales_only_its_own_loss():
    class Turns(BareStep):
        """Trains with Keras's step first, and then with one that scales nothing."""

        first = True

        def train_step(self, *args):
            if self.first:
                return mp.Model.train_step(self, *args)
            return super().train_step(*args)

    def trained(loss_scale):
        model = network(Turns, mp.Sequential)
        fitted(model, loss_scale, X[:16], Y[:16])
        model.first = False
        model.make_train_function(force=True)
        model.fit(X[16:], Y[16:], **SOME)
        return model.get_weights()

    wanted = trained(None)
    with pytest.warns(mp.errors.LossScaleWarning, match="does not scale the loss"):
        assert_same(trained(1024.0), wanted)


@pytest.mark.backend("tensorflow", "torch")
def test_a_loss_that_is_scaled_after_gradients_were_applied_is_an_error():
    class Late(BareStep):
        def train_step(self, data):
            logs = super().train_step(data)
            self.optimizer.scale_loss(logs["loss"])
            return logs

    model = network(Late, mp.Sequential)
    with (
        pytest.warns(mp.errors.LossScaleWarning, match="does not scale the loss"),
        pytest.raises(mp.errors.LossScaleError, match="Call scale_loss earlier in the train step"),
    ):
        fitted(model, 1024.0)


def test_the_scale_may_be_read_for_the_logs_after_the_gradients_were_applied():
    class Logs(BareStep):
        def train_step(self, *args):
            result = super().train_step(*args)
            logs, state = result if BACKEND == "jax" else (result, None)
            reading = contextlib.nullcontext()
            if state:
                pairs = zip(self.optimizer.variables, state[2], strict=True)
                reading = keras.StatelessScope(list(pairs))
            with reading:
                logs["scale"] = self.optimizer.dynamic_scale + 0
            return (logs, state) if state else logs

    wanted = network(BareStep, mp.Sequential)
    fitted(wanted, None)
    wanted.fit(X, Y, **SOME)
    model = network(Logs, mp.Sequential)
    with pytest.warns(mp.errors.LossScaleWarning, match="does not scale the loss"):
        fitted(model, 1024.0)
    model.make_train_function(force=True)
    assert model.fit(X, Y, **SOME).history["scale"] == [1024.0]
    assert_same(model.get_weights(), wanted.get_weights())


@pytest.mark.backend("tensorflow", "torch")
@pytest.mark.parametrize("scaled_by", ["both", "neither", "one"])
def test_two_optimizers_each_scale_their_own_loss(scaled_by):
    class Two(BareStep):
        """Trains its first layer and its head with one optimizer each."""

        def train_step(self, data):
            parts = [(self.optimizer, self.layers[0]), (self.head_optimizer, self.layers[1])]
            loss, gradients = self.loss_and_gradients(*data)
            for (optimizer, layer), some in zip(parts, (gradients[:2], gradients[2:]), strict=True):
                factor = optimizer.scale_loss(1.0) if scaled_by == "both" else 1.0
                optimizer.apply([g * factor for g in some], layer.trainable_variables)
            return {"loss": loss}

        def to_differentiate(self, loss):
            return self.optimizer.scale_loss(loss) if scaled_by == "one" else loss

    model = network(Two, mp.Sequential)
    model.head_optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.1), loss_scale=512.0)
    model.head_optimizer.build(model.layers[1].trainable_variables)
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.1), loss_scale=1024.0)
    optimizer.build(model.layers[0].trainable_variables)
    model.compile(optimizer, "mse", jit_compile=False)
    if scaled_by == "one":
        with pytest.raises(mp.errors.LossScaleError, match="Call scale_loss of each optimizer"):
            model.fit(X, Y, **SOME)
        return
    warning = pytest.warns(mp.errors.LossScaleWarning, match="does not scale the loss")
    with warning if scaled_by == "neither" else contextlib.nullcontext() as said:
        model.fit(X, Y, **SOME)
    assert times(said or ()) == (2 if scaled_by == "neither" else 0)
    assert_same(model.get_weights(), fitted(network(BareStep, mp.Sequential), None))


@pytest.mark.backend("tensorflow", "torch")
@pytest.mark.parametrize("steps", ["scaled, then bare", "bare, then scaled by the other"])
def test_optimizers_that_take_turns_must_each_scale(steps):
    class Turns(BareStep):
        step = 0

        def train_step(self, data):
            self.step += 1
            loss, gradients = self.loss_and_gradients(*data)
            first = self.step == 1 and steps == "scaled, then bare"
            optimizer, some = (
                (self.optimizer, slice(0, 2)) if first else (self.head_optimizer, slice(2, 4))
            )
            optimizer.apply(gradients[some], self.trainable_variables[some])
            return {"loss": loss}

        def to_differentiate(self, loss):
            scales = self.step == (1 if steps == "scaled, then bare" else 2)
            return self.optimizer.scale_loss(loss) if scales else loss

    model = compiled(network(Turns, mp.Sequential), 1024.0, run_eagerly=True)
    model.head_optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.1), loss_scale=512.0)
    told = pytest.warns(mp.errors.LossScaleWarning, match="does not scale the loss")
    with told if steps.startswith("bare") else contextlib.nullcontext():
        model.fit(X[:16], Y[:16], **SOME)
    before = model.get_weights()
    with pytest.raises(mp.errors.LossScaleError, match="Call scale_loss of each optimizer"):
        model.fit(X[:16], Y[:16], **SOME)
    assert_same(model.get_weights(), before)
