"""MirroredStrategy on logical CPU devices, one of which gets the bad part of a batch.

`train` runs in a separate process: see `helpers.processes`.
"""

import warnings

import keras
import numpy as np
import tensorflow as tf
from helpers.bad_batch import (
    CLASSES,
    ROWS,
    SCALE,
    batches,
    flat,
    guarded_network,
    network,
    outcome,
    targets,
)
from helpers.train_steps import BareStep
from keras import ops

import kerasmp as mp


def strategy_on(replicas):
    """Return a strategy on this many logical CPU devices; call it before any other use."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(cpu, devices)
    # Eager collectives block a thread while they wait for each other: with the few default threads
    # of a small machine steps take seconds.
    tf.config.threading.set_inter_op_parallelism_threads(4 * replicas)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def per_replica(strategy, parts):
    """Return a per-replica value that is `parts[i]` on replica `i`."""
    return strategy.experimental_distribute_values_from_function(
        lambda context: parts[context.replica_id_in_sync_group]
    )


def copies(strategy, variables):
    """Return for each replica all numbers that it holds."""
    held = [strategy.experimental_local_results(v.value) for v in variables]
    return [flat(each) for each in zip(*held, strict=True)]


def _loop(strategy, model, optimizer, *, unscale=False):
    def replica_step(x):
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(model(x, training=True) - 1))
            loss = optimizer.scale_loss(loss / strategy.num_replicas_in_sync)
        grads = tape.gradient(loss, model.trainable_variables)
        if unscale:
            grads = optimizer.get_unscaled_gradients(grads)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

    @tf.function
    def step(x):
        strategy.run(replica_step, args=(x,))

    def run(data):
        for batch in data:
            step(per_replica(strategy, tf.split(batch, strategy.num_replicas_in_sync)))

    return run


def _unscaling(*arguments):
    return _loop(*arguments, unscale=True)


def _fit(_, model, optimizer, *, run_eagerly=False):
    model.compile(optimizer, "mse", jit_compile=False, run_eagerly=run_eagerly)

    def run(data):
        x = np.concatenate(data)
        model.fit(x, targets(x), batch_size=ROWS, shuffle=False, verbose=0)

    return run


def _eager_fit(*arguments):
    return _fit(*arguments, run_eagerly=True)


WAYS = {"loop": _loop, "unscaling": _unscaling, "fit": _fit, "eager fit": _eager_fit}


def runs(strategy, cls, way, feeds, *, guarded=False, own_step=False, build=True):
    """Train on each of `feeds` from the same start and return the outcomes.

    Functions are traced once, since tracing takes longer than running them.
    """
    with strategy.scope():
        model = guarded_network(own_step) if guarded else network()
        optimizer = CLASSES[cls](keras.optimizers.Adam(0.1), initial_scale=SCALE)
        if build:
            optimizer.build(model.trainable_variables)
    train_on = WAYS[way](strategy, model, optimizer)
    outcomes, start = [], None
    for data in feeds:
        for variable, value in start or ():
            variable.assign(value)
        if start is None and build:
            start = [(v, v.numpy()) for v in [*model.variables, *optimizer.variables]]
        train_on(data)
        held = copies(strategy, [*model.trainable_variables, *optimizer.variables])
        outcomes.append(outcome(model, optimizer) | {"copies": held})
    return outcomes


def train(replicas, cases, where):
    """Train each case without a bad batch, then with its bad row on each replica of `where`."""
    strategy = strategy_on(replicas)
    rows = [None, *(replica * ROWS // replicas for replica in where)]
    results = []
    for case in cases:
        value = case.pop("value")
        clean, *bad = runs(strategy, feeds=[batches(row, value) for row in rows], **case)
        results.append({"clean": clean, "bad": bad})
    return results


class _Scales(BareStep):
    def to_differentiate(self, loss):
        return self.optimizer.scale_loss(loss)


def custom_train_steps(replicas):
    """Train with a step that scales no loss, with and without a scale, and with one that does.

    Returns:
        For each the weights and the number of warnings from kerasmp.
    """
    strategy, outcomes = strategy_on(replicas), []
    data = np.linspace(-1, 1, 64, dtype="float32").reshape(16, 4)
    for step, scale in ((BareStep, None), (BareStep, 1024.0), (_Scales, 1024.0)):
        keras.utils.set_random_seed(0)
        layers = [keras.Input((4,)), keras.layers.Dense(2, dtype="mixed_float16")]
        with strategy.scope():
            model = type("Own", (step, mp.Sequential), {})(layers)
            optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.1), loss_scale=scale)
            model.compile(optimizer, "mse", jit_compile=False)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", mp.errors.LossScaleWarning)
            model.fit(data, data[:, :2], batch_size=8, shuffle=False, verbose=0)
        times = sum(each.category is mp.errors.LossScaleWarning for each in said)
        outcomes.append((flat(model.get_weights()), times))
    return outcomes
