"""User-defined train steps that never call Keras's: a skipped step leaves no trace."""

import keras
import numpy as np
import pytest
from helpers.marks import full
from helpers.networks import X, Y, sequential
from helpers.train_steps import BareStep, OwnStep

import kerasmp as mp

BATCH = 8
BAD = np.full((BATCH, X.shape[1]), np.inf, "float32")
GOOD_X, GOOD_Y = X[: 4 * BATCH], Y[: 4 * BATCH]
# In the middle, and at the end, where the logs of the batch are those of the epoch.
BAD_X = np.concatenate([GOOD_X[:BATCH], BAD, GOOD_X[BATCH:], BAD])
BAD_Y = np.concatenate([GOOD_Y[:BATCH], GOOD_Y[:BATCH], GOOD_Y[BATCH:], GOOD_Y[:BATCH]])


def written_in_the_class(module):
    class Own(module.Sequential):
        train_step = OwnStep.train_step

    return Own


def from_a_mixin(module):
    class Own(OwnStep, module.Sequential):
        pass

    return Own


def around_keras_own(module):
    class Own(module.Sequential):
        def train_step(self, *args):
            result = super().train_step(*args)
            logs = result[0] if isinstance(result, tuple) else result
            logs["extra"] = logs["loss"] + 1
            return result

    return Own


def train(build, x, y, module=mp, **compile_arguments):
    class Module:
        Sequential = build(module)

    model = sequential(Module)
    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(0.01), loss_scale=64.0)
    model.compile(optimizer, "mse", metrics=["mae"], **compile_arguments)
    logs = model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0).history
    values = {v.path: np.array(keras.ops.convert_to_numpy(v.value)) for v in model.variables}
    return model, logs, values


WAYS = {
    "tensorflow": [{}, {"run_eagerly": True}],
    "jax": [{}, {"steps_per_execution": 2}],
    "torch": [{}],
}[keras.backend.backend()]


def _name(value):
    return getattr(value, "__name__", str(value))


# In the quick set the step of a mixin, in the usual way, represents all.
CASES = [(from_a_mixin, {}), *(full(written_in_the_class, way) for way in WAYS)]


@pytest.mark.parametrize(("build", "way"), CASES, ids=_name)
def test_a_skipped_step_leaves_no_trace(build, way):
    _, clean_logs, clean = train(build, GOOD_X, GOOD_Y, **way)
    model, logs, values = train(build, BAD_X, BAD_Y, **way)
    assert (model.optimizer.applied_steps, model.optimizer.skipped_steps) == (4, 2)
    assert logs == clean_logs
    assert set(logs) == {"loss", "mae"}
    for value, wanted in zip(values.values(), clean.values(), strict=True):
        np.testing.assert_array_equal(value, wanted)


def test_entries_that_a_step_adds_to_the_logs_stay():
    _, logs, _ = train(around_keras_own, GOOD_X, GOOD_Y)
    assert set(logs) == {"loss", "mae", "extra"}
    np.testing.assert_allclose(logs["extra"][0], logs["loss"][0] + 1, rtol=1e-6)
    _, with_bad, _ = train(around_keras_own, BAD_X, BAD_Y)
    assert (with_bad["loss"], with_bad["mae"]) == (logs["loss"], logs["mae"])


def test_a_batch_value_is_not_mistaken_for_the_metric_of_its_name():
    class Raw(OwnStep, mp.Sequential):
        """Returns the loss of the batch and never updates the metric "loss"."""

        def train_step(self, *args):
            result = super().train_step(*args)
            logs, *state = result if isinstance(result, tuple) else (result,)
            logs = {"loss": logs["compile_metrics"]["mae"]}
            return (logs, *state) if state else logs

        @property
        def metrics(self):
            return [m for m in super().metrics if m.name != "loss"]

    model = Raw([keras.Input((4,)), keras.layers.Dense(2, dtype="mixed_float16")])
    model.compile(mp.LossScaleOptimizer("sgd", loss_scale=64.0), "mse", metrics=["mae"])
    assert model.fit(GOOD_X, GOOD_Y, verbose=0).history["loss"][0] > 0


class Worst(keras.metrics.Metric):
    """Has its variable as the result, without averaging."""

    def __init__(self, name="worst", start="zeros"):
        super().__init__(name=name)
        self.worst = self.add_weight(name="worst", initializer=start)

    def update_state(self, y, y_pred):
        errors = keras.ops.abs(keras.ops.subtract(y, y_pred))
        self.worst.assign(keras.ops.maximum(self.worst, keras.ops.max(errors)))

    def result(self):
        return self.worst.value


class Least(Worst):
    """Starts with a value other than 0."""

    def __init__(self):
        super().__init__("least", keras.initializers.Constant(9.0))

    def update_state(self, y, y_pred, **_):
        errors = keras.ops.abs(keras.ops.subtract(y, y_pred))
        self.worst.assign(keras.ops.minimum(self.worst, keras.ops.min(errors)))

    def reset_state(self):
        self.worst.assign(9.0)


class WithTracker(OwnStep, mp.Sequential):
    """Has user-defined metrics."""

    def __init__(self, *args):
        super().__init__(*args)
        self.trackers = [keras.metrics.Mean(name="loss"), Worst()]

    @property
    def metrics(self):
        return self.trackers


class OfTheBatch(BareStep, mp.Sequential):
    """Returns the loss of the batch and never updates the metric of that name."""

    def to_differentiate(self, loss):
        return self.optimizer.scale_loss(loss)


@pytest.mark.parametrize(
    ("kind", "metric"),
    [(WithTracker, None), (OfTheBatch, None), (mp.Sequential, "mae"), (mp.Sequential, Least)],
    ids=_name,
)
def test_without_an_applied_step_the_logged_loss_is_not_zero(kind, metric):
    model = kind([keras.Input((4,)), keras.layers.Dense(2, dtype="mixed_float16")])
    # The loss is finite, its gradients are not.
    optimizer = mp.LossScaleOptimizer("sgd", loss_scale=2.0**40)
    how = {"metrics": [metric() if metric is Least else metric]} if metric else {}
    model.compile(optimizer, "mse", jit_compile=keras.backend.backend() == "jax", **how)
    seen = []
    see = keras.callbacks.LambdaCallback(on_train_batch_end=lambda _, logs: seen.append(dict(logs)))
    of_epochs = model.fit(
        GOOD_X, GOOD_Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[see]
    ).history
    assert optimizer.skipped_steps == len(seen) == 8
    if kind is mp.Sequential:
        assert np.isnan(keras.ops.convert_to_numpy(model.get_metrics_result()["loss"]))
        assert np.isnan(model.train_on_batch(GOOD_X[:BATCH], GOOD_Y[:BATCH])).all()
    errors = (model.predict(GOOD_X, verbose=0) - GOOD_Y).reshape(4, -1)
    true = {"loss": np.square(errors).mean(1), "mae": np.abs(errors).mean(1)}
    true |= {"worst": np.abs(errors).max(1), "least": np.abs(errors).min(1)}
    for name, values in of_epochs.items():
        found = [float(logs[name]) for logs in seen]
        np.testing.assert_allclose(found, np.tile(true[name], 2), rtol=1e-3)
        np.testing.assert_allclose(values, true[name][-1], rtol=1e-3)


@pytest.mark.backend("tensorflow", "torch")
def test_a_user_defined_test_step_returns_its_own_results():
    class Evaluates(mp.Sequential):
        """Updates its own metric, and never that of the loss."""

        def __init__(self, *args):
            super().__init__(*args)
            self.worst = Worst()

        def test_step(self, data):
            x, y = data
            y_pred = self(x, training=False)
            self.worst.update_state(y, y_pred)
            # Of the batch. Keras reads the metric for the value of all batches.
            return {"loss": self.compute_loss(x, y, y_pred), "worst": keras.ops.zeros(())}

    model = Evaluates([keras.Input((4,)), keras.layers.Dense(2, dtype="mixed_float16")])
    model.compile(mp.LossScaleOptimizer("sgd", loss_scale=64.0), "mse", jit_compile=False)
    model.fit(GOOD_X, GOOD_Y, verbose=0)
    errors = np.abs(model.predict(GOOD_X, verbose=0) - GOOD_Y)
    found = model.evaluate(GOOD_X, GOOD_Y, batch_size=len(GOOD_X), verbose=0, return_dict=True)
    found = {name: float(value) for name, value in found.items()}  # Keras 3.12 gives tensors
    wanted = {"loss": np.square(errors).mean(), "worst": errors.max()}
    assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.backend("tensorflow", "torch")
def test_a_skip_by_any_of_several_optimizers_is_a_skipped_step():
    base = OwnStep

    class Two(mp.Sequential):
        """Trains its head with another optimizer, which steps first."""

        def compile(self, head, optimizer):
            super().compile(optimizer, "mse")
            self.head_optimizer = head

        def train_step(self, data):
            optimizer = self.optimizer
            try:
                self.optimizer = self.head_optimizer
                base.train_step(self, data)
                self.optimizer = optimizer
                return base.train_step(self, (keras.ops.zeros_like(data[0]), data[1]))
            finally:
                self.optimizer = optimizer

    class Module:
        Sequential = Two

    model = sequential(Module)
    model.compile(*(mp.LossScaleOptimizer(o, loss_scale=64.0) for o in ("sgd", "adam")))
    if keras.backend.backend() == "tensorflow":
        model.head_optimizer.build(model.trainable_variables)
        model.optimizer.build(model.trainable_variables)
    model.fit(BAD_X, BAD_Y, batch_size=BATCH, shuffle=False, verbose=0)
    assert model.head_optimizer.skipped_steps == 2
    assert model.optimizer.skipped_steps == 0
    moving = [v for v in model.non_trainable_variables if "moving" in v.path]
    assert all(np.isfinite(keras.ops.convert_to_numpy(v.value)).all() for v in moving)
