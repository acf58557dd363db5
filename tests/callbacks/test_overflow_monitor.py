"""OverflowMonitor: what it writes, how often it reads the scale, and what it leaves alone."""

import csv
import itertools
import warnings

import keras
import numpy as np
import pytest
from helpers.marks import full, marks_on
from helpers.monitored import STOCK, batches, fit, make

from kerasmp.callbacks import OverflowMonitor, readings
from kerasmp.errors import ArgumentTypeError, LossScaleError, LossScaleWarning, NotCompiledError
from kerasmp.loss_scale import DynamicLossScale
from kerasmp.model import Sequential
from kerasmp.optimizer import LossScaleOptimizer

pytestmark = marks_on("oldest")

ENTRIES = ["loss_scale", "skipped_steps", "total_skipped_steps", "overflow_rate"]


@pytest.fixture
def reads(monkeypatch):
    """Return what has been read from the device so far."""
    seen = []
    for cls in (readings.Source, readings.StockSource):

        def read(self, steps, original=cls.read):
            seen.append(original(self, steps))
            return seen[-1]

        monkeypatch.setattr(cls, "read", read)
    return seen


class Recorder(keras.callbacks.Callback):
    """Records the logs at the end of each epoch, and the order of the hook calls."""

    def __init__(self, name="recorder", calls=None):
        super().__init__()
        self.name, self.logs, self.calls = name, [], [] if calls is None else calls

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))
        self.calls.append((epoch, self.name))


# ---------------------------------------------------------------------------------------- entries


@pytest.mark.parametrize("model", [keras.Sequential, full(Sequential)])
def test_the_entries_of_each_epoch_and_of_each_fit(model):
    model = make(LossScaleOptimizer("sgd", loss_scale=DynamicLossScale(64.0)), model, loss="mae")
    monitor = OverflowMonitor()
    history = fit(model, "ghggh", [monitor], epochs=2)
    causes = {f"skips_{cause}" for cause in model.optimizer.skip_causes}
    assert history.keys() == {"loss", *ENTRIES, *causes}
    assert {name: history[name] for name in ENTRIES} == {
        "loss_scale": [16.0, 4.0],
        "skipped_steps": [2, 2],
        "total_skipped_steps": [2, 4],
        "overflow_rate": [0.4, 0.4],
    }
    history = fit(model, "gggh", [monitor])
    assert [history[name] for name in ENTRIES] == [[2.0], [1], [5], [0.25]]
    history = fit(model, "ggg", [monitor], epochs=2, initial_epoch=1)
    assert [history[name] for name in ENTRIES] == [[2.0], [0], [5], [0.0]]
    kinds = [type(history[name][0]) for name in ENTRIES]
    assert kinds == [float, int, int, float]


@pytest.mark.parametrize("position", ["before", full("after")])
def test_other_callbacks_see_the_entries_whatever_the_order(position, tmp_path):
    recorder, logger = Recorder(), keras.callbacks.CSVLogger(tmp_path / "log.csv")
    others = [recorder, logger]
    monitor = [OverflowMonitor()]
    fit(make(), "gbg", [*others, *monitor] if position == "before" else [*monitor, *others])
    assert set(ENTRIES) < set(recorder.logs[0])
    with (tmp_path / "log.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert [float(row[name]) for name in ENTRIES] == [8.0, 1.0, 1.0, pytest.approx(1 / 3)]


@pytest.mark.full
@pytest.mark.backend("tensorflow")  # Keras's TensorBoard writes through TensorFlow
def test_tensorboard_listed_before_has_the_scalars(tmp_path):
    import tensorflow as tf

    fit(make(), "gbg", [keras.callbacks.TensorBoard(tmp_path), OverflowMonitor()])
    (events,) = tmp_path.glob("train/*.v2")
    found = {
        value.tag: tf.make_ndarray(value.tensor).item()
        for event in tf.compat.v1.train.summary_iterator(str(events))
        for value in event.summary.value
        if value.tag.removeprefix("epoch_") in ENTRIES
    }
    assert found == {
        "epoch_loss_scale": 8.0,
        "epoch_skipped_steps": 1.0,
        "epoch_total_skipped_steps": 1.0,
        "epoch_overflow_rate": pytest.approx(1 / 3),
    }


def test_the_order_of_the_other_callbacks_is_kept():
    calls = []
    names = ["a", "b", "c"]
    recorders = [Recorder(name, calls) for name in names]
    fit(make(), "gb", [*recorders[:2], OverflowMonitor(), recorders[2]], epochs=2)
    assert calls == list(itertools.product([0, 1], names))


def test_a_user_defined_callback_list_without_params():
    class OwnList(keras.callbacks.CallbackList):
        epochs = 0

        def on_epoch_end(self, epoch, logs=None):
            type(self).epochs += 1
            super().on_epoch_end(epoch, logs)

    model, recorder = make(), Recorder()
    own = OwnList([recorder, OverflowMonitor()], add_history=True, model=model)
    model.fit(*batches("gbgb"), batch_size=1, shuffle=False, verbose=0, callbacks=own)
    assert OwnList.epochs == 1
    assert model.history.history["skipped_steps"] == [2]
    assert recorder.logs[0]["overflow_rate"] == 0.5
    assert isinstance(own.callbacks[0], OverflowMonitor)
    assert len(own.callbacks) == 3


def test_a_callback_that_owns_the_monitor_calls_it_once():
    """The monitor must not add itself to a list: it would run twice."""

    class Owner(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.monitor, self.ends = OverflowMonitor(), 0

        def set_model(self, model):
            super().set_model(model)
            self.monitor.set_model(model)

        def on_train_begin(self, logs=None):
            self.monitor.on_train_begin(logs)
            end = self.monitor.on_epoch_end

            def counted(epoch, logs=None):
                self.ends += 1
                end(epoch, logs)

            self.monitor.on_epoch_end = counted

        def on_epoch_begin(self, epoch, logs=None):
            self.monitor.on_epoch_begin(epoch, logs)

        def on_epoch_end(self, epoch, logs=None):
            self.monitor.on_epoch_end(epoch, logs)

    owner = Owner()
    fit(make(), "gb", [owner], epochs=2)
    assert owner.ends == 2


def test_validation_adds_nothing_and_is_not_counted():
    model = make()
    x, y = batches("ggbb")
    history = fit(model, "gb", [OverflowMonitor()], validation_data=(x, y), epochs=2)
    assert [history[name] for name in ENTRIES] == [[8.0, 8.0], [1, 1], [1, 2], [0.5, 0.5]]
    assert not [name for name in history if name.startswith("val_") and name[4:] in ENTRIES]
    logs = model.evaluate(x, y, verbose=0, return_dict=True, callbacks=[OverflowMonitor()])
    assert set(logs) == {"loss"}
    model.predict(x, verbose=0, callbacks=[OverflowMonitor()])


# ----------------------------------------------------------------------------- where steps end


def generator(pattern):
    for x, y in zip(*batches(pattern), strict=True):
        yield x[None], y[None]


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [
        (LossScaleOptimizer, None),
        (STOCK, 9),
        full(LossScaleOptimizer, 7),
        full(LossScaleOptimizer, 9),
        full(STOCK, None),
        full(STOCK, 7),
    ],
)
def test_a_generator_of_unknown_length(optimizer, steps):
    """Keras begins one batch too many; it must not count as skipped."""
    model = make(optimizer(keras.optimizers.SGD(0.1)))
    history = model.fit(
        generator("gbggggg"),
        steps_per_epoch=steps,
        shuffle=False,
        verbose=0,
        callbacks=[OverflowMonitor()],
    ).history
    assert history["skipped_steps"] == history["total_skipped_steps"] == [1]
    assert history["overflow_rate"] == [pytest.approx(1 / 7)]


@pytest.mark.full
@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize("optimizer", [LossScaleOptimizer, STOCK], ids=["kerasmp", "stock"])
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_a_dataset_of_unknown_cardinality(optimizer):
    import tensorflow as tf

    x, y = batches("gbggb")
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(1).filter(lambda *_: True)
    model = make(optimizer(keras.optimizers.SGD(0.1)))
    history = model.fit(
        data, epochs=3, shuffle=False, verbose=0, callbacks=[OverflowMonitor()]
    ).history
    assert history["skipped_steps"] == [2, 2, 2]
    assert history["total_skipped_steps"] == [2, 4, 6]
    assert history["overflow_rate"] == [0.4, 0.4, 0.4]


@pytest.mark.backend("tensorflow", "jax")  # on torch Keras runs single steps
@pytest.mark.parametrize(
    ("optimizer", "pattern"),
    [
        (STOCK, "gbggggg"),  # does not divide the number of batches
        full(STOCK, "gbgggg"),
        full(LossScaleOptimizer, "gbggggg"),
        full(LossScaleOptimizer, "gbgggg"),
    ],
)
def test_several_steps_per_execution(optimizer, pattern):
    model = make(optimizer(keras.optimizers.SGD(0.1)), steps_per_execution=3)
    history = fit(model, pattern, [OverflowMonitor(check_every=2)], epochs=2)
    assert history["skipped_steps"] == [1, 1]
    assert history["overflow_rate"] == [pytest.approx(1 / len(pattern))] * 2


def test_training_that_a_callback_stops_within_an_epoch():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002 - Keras's signature
            self.model.stop_training = batch == 3

    for optimizer in (LossScaleOptimizer, STOCK):
        model = make(optimizer(keras.optimizers.SGD(0.1)))
        history = fit(model, "gbgggbbb", [Stop(), OverflowMonitor()], epochs=3)
        assert history["skipped_steps"] == [1]
        assert history["overflow_rate"] == [0.25]


# ------------------------------------------------------------------------------- other optimizers


@pytest.mark.parametrize("accumulate", [full(None), 2, full(3)])
def test_the_stock_optimizer_with_and_without_accumulation(accumulate):
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulate)
    model = make(STOCK(inner, initial_scale=64.0))
    history = fit(model, "gbggg", [OverflowMonitor(2)], epochs=3)
    assert {name: history[name] for name in ENTRIES} == {
        "loss_scale": [32.0, 16.0, 8.0],
        "skipped_steps": [1, 1, 1],
        "total_skipped_steps": [1, 2, 3],
        "overflow_rate": [0.2, 0.2, 0.2],
    }
    # It has no counters, so each fit starts from zero.
    assert fit(model, "gb", [OverflowMonitor()])["total_skipped_steps"] == [1]


def test_the_kerasmp_optimizer_with_accumulation():
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    history = fit(make(LossScaleOptimizer(inner)), "gbggg", [OverflowMonitor()], epochs=2)
    assert history["skipped_steps"] == [1, 1]
    assert history["overflow_rate"] == [0.2, 0.2]


@pytest.mark.parametrize("dtype", [full("float32"), "mixed_bfloat16"])
def test_a_plain_optimizer_without_float16_gives_no_warning(dtype, warned):
    history = fit(make(keras.optimizers.SGD(0.1), dtype=dtype), "gg", [OverflowMonitor()])
    assert list(history) == ["loss"]
    assert warned() == []


@pytest.mark.parametrize("dtype", ["mixed_float16", full("float16")])
def test_a_plain_optimizer_under_float16_gives_a_warning(dtype, warned):
    warnings.filterwarnings("ignore", "Before the first step")  # other findings
    model = make(keras.optimizers.SGD(0.1), dtype=dtype)
    assert not isinstance(model.optimizer, STOCK)
    assert list(fit(model, "gg", [OverflowMonitor(1)], epochs=2)) == ["loss"]
    (message,) = warned()
    assert message.startswith("Layers compute in float16 (only) and nothing scales the loss")
    assert "kerasmp.LossScaleOptimizer" in message


def test_a_model_without_an_optimizer():
    model = make()
    model.compile(optimizer=None, loss="mse")
    monitor = OverflowMonitor()
    monitor.set_model(model)
    with pytest.raises(NotCompiledError, match=f'model "{model.name}" without an optimizer'):
        monitor.on_train_begin()


@pytest.mark.unit
@pytest.mark.parametrize("name", ["check_every", "streak", "stalled"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, LossScaleError),
        (-3, LossScaleError),
        (1.5, ArgumentTypeError),
        ("9", ArgumentTypeError),
        (True, ArgumentTypeError),
        (None, ArgumentTypeError),
    ],
)
def test_invalid_arguments_are_refused(name, value, error):
    with pytest.raises(error, match=f"`{name}` has.*Expected: an integer of at least 1") as caught:
        OverflowMonitor(**{name: value})
    assert repr(value) in caught.value.received


@pytest.mark.unit
def test_valid_arguments_are_accepted():
    monitor = OverflowMonitor(1, streak=1, stalled=1)
    assert (monitor.check_every, monitor.streak, monitor.stalled) == (1, 1, 1)
    with pytest.raises(TypeError):
        OverflowMonitor(1, 2)


# ---------------------------------------------------------------------------- looking at the device


@pytest.mark.parametrize(
    ("check_every", "steps", "epochs"),
    [(2, 7, 3), (7, 7, 1), full(50, 7, 3), full(3, 9, 1), full(1, 4, 2)],
)
def test_it_looks_at_epoch_ends_and_every_n_batches(check_every, steps, epochs, reads):
    fit(make(), "g" * steps, [OverflowMonitor(check_every)], epochs=epochs)
    within = (steps - 1) // check_every
    assert len(reads) == 1 + epochs * (1 + within)  # 1 when training begins


def test_a_look_within_an_epoch_sees_the_state_of_that_moment(reads):
    """On JAX the variables are stale during an epoch, unless they are synchronised."""
    fit(make(), "gbgbbgg", [OverflowMonitor(2)])
    seen = [(r.applied, r.skipped, r.in_a_row) for r in reads]
    assert seen == [(0, 0, 0), (1, 1, 1), (2, 2, 1), (3, 3, 0), (4, 3, 0)]


@pytest.mark.parametrize("optimizer", [LossScaleOptimizer, full(STOCK)])
def test_training_is_the_same_with_and_without_it(optimizer):
    final = []
    for callbacks in ([], [OverflowMonitor(1)]):
        model = make(optimizer(keras.optimizers.Adam(0.1), initial_scale=64.0))
        fit(model, "gbggbg", callbacks, epochs=2)
        final.append([np.array(keras.ops.convert_to_numpy(v)) for v in model.variables])
        final[-1] += [np.array(keras.ops.convert_to_numpy(v)) for v in model.optimizer.variables]
    for without, with_monitor in zip(*final, strict=True):
        np.testing.assert_array_equal(without, with_monitor)


def test_keras_keeps_dispatching_batch_ends_to_its_own_thread():
    plain = keras.callbacks.CallbackList([])
    assert keras.callbacks.CallbackList([OverflowMonitor()])._async_train == plain._async_train
    looks = OverflowMonitor.on_batch_end, OverflowMonitor.on_test_batch_end
    assert all(keras.callbacks.Callback.__dict__[look.__name__] is look for look in looks)


def test_batch_ends_may_come_out_of_order():
    """Keras's thread pool guarantees no order."""
    model, monitor = make(STOCK(keras.optimizers.SGD(0.1))), OverflowMonitor()
    told_by_keras, held = monitor.on_train_batch_end, []

    def shuffled(batch, logs=None):
        held.append(batch)
        if len(held) == 4:
            for late in reversed(held):
                told_by_keras(late, logs)

    monitor.on_train_batch_end = shuffled
    monitor.params = {}
    assert fit(model, "ggbg", [monitor])["skipped_steps"] == [1]


@pytest.mark.parametrize("optimizer", [full(LossScaleOptimizer), STOCK])
def test_an_interrupted_fit_leaves_nothing_behind(optimizer):
    class Failure(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):  # noqa: ARG002 - Keras's signature
            if batch == 4:
                raise RuntimeError

    model, monitor = make(optimizer(keras.optimizers.SGD(0.1))), OverflowMonitor(1, streak=2)
    with (
        pytest.warns(LossScaleWarning, match="The last 2 training steps"),
        pytest.raises(RuntimeError),
    ):
        fit(model, "gbbggg", [monitor, Failure()])
    history = fit(model, "gbgg", [monitor], epochs=2)
    assert history["skipped_steps"] == [1, 1]
    assert history["overflow_rate"] == [0.25, 0.25]
    ours = optimizer is LossScaleOptimizer
    assert history["total_skipped_steps"] == ([3, 4] if ours else [1, 2])
