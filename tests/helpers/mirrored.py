"""MirroredStrategy on logical CPU devices, one of which gets the bad part of a batch.

Runs in a process of its own: see `helpers.processes`.
"""

import keras
import numpy as np
import tensorflow as tf
from helpers.bad_batch import CLASSES, ROWS, SCALE, batches, flat, network, outcome, targets
from keras import ops

import kerasmp as mp


def strategy_on(replicas):
    """Return a strategy on as many logical CPU devices; callable before any other use only."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(cpu, devices)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def per_replica(strategy, parts):
    """Return one value that is `parts[i]` on replica `i`."""
    return strategy.experimental_distribute_values_from_function(
        lambda context: parts[context.replica_id_in_sync_group]
    )


def _loop(strategy, model, optimizer, data, *, by_hand=False):
    def replica_step(x):
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(model(x, training=True) - 1))
            loss = optimizer.scale_loss(loss / strategy.num_replicas_in_sync)
        grads = tape.gradient(loss, model.trainable_variables)
        if by_hand:
            grads = optimizer.get_unscaled_gradients(grads)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

    @tf.function
    def step(x):
        strategy.run(replica_step, args=(x,))

    for batch in data:
        step(per_replica(strategy, tf.split(batch, strategy.num_replicas_in_sync)))


def _unscaling(*arguments):
    _loop(*arguments, by_hand=True)


def _fit(_, model, optimizer, data, *, run_eagerly=False):
    model.compile(optimizer, "mse", jit_compile=False, run_eagerly=run_eagerly)
    x = np.concatenate(data)
    model.fit(x, targets(x), batch_size=ROWS, shuffle=False, verbose=0)


def _eager_fit(*arguments):
    _fit(*arguments, run_eagerly=True)


WAYS = {"loop": _loop, "unscaling": _unscaling, "fit": _fit, "eager fit": _eager_fit}


def _train(strategy, cls, way, data, *, guarded):
    with strategy.scope():
        between = [keras.layers.BatchNormalization(dtype="mixed_float16")] if guarded else []
        model = network(mp if guarded else keras, between)
        optimizer = CLASSES[cls](keras.optimizers.Adam(0.1), initial_scale=SCALE)
        optimizer.build(model.trainable_variables)
    WAYS[way](strategy, model, optimizer, data)
    return model, optimizer


def _copies(strategy, variables):
    """Return for each replica all numbers that it holds."""
    held = [strategy.experimental_local_results(v.value) for v in variables]
    return [flat(copies) for copies in zip(*held, strict=True)]


def train(cls, ways, replicas, value, guarded=False):  # noqa: FBT002 - JSON names it
    """Train in each way without a bad batch, then with its bad row on each replica in turn."""
    strategy = strategy_on(replicas)
    rows = [None, *range(0, ROWS, ROWS // replicas)]
    results = {}
    for way in ways:
        clean, *bad = [
            _run(strategy, cls, way, batches(row, value), guarded=guarded) for row in rows
        ]
        results[way] = {"clean": clean, "bad": bad}
    return results


def _run(strategy, cls, way, data, *, guarded):
    model, optimizer = _train(strategy, cls, way, data, guarded=guarded)
    variables = [*model.trainable_variables, *optimizer.variables]
    return outcome(model, optimizer) | {"copies": _copies(strategy, variables)}


def apply_once(replicas, cases):
    """Return, for each of `cases`, what `_apply_once` returns for it."""
    strategy = strategy_on(replicas)
    return [_apply_once(strategy, **case) for case in cases]


def _apply_once(strategy, parts, cls="ours", **clipping):
    """Return a weight after SGD(1) was given `parts[i]` as gradient on replica `i`."""
    with strategy.scope():
        weight = keras.Variable([0.0] * len(parts[0]))
        optimizer = CLASSES[cls](keras.optimizers.SGD(1.0, **clipping), initial_scale=SCALE)
        optimizer.build([weight])

    def replica_step(gradient):
        optimizer.apply([gradient * optimizer.scale_loss(1.0)], [weight])

    parts = [tf.constant(part) for part in parts]
    strategy.run(tf.function(replica_step), args=(per_replica(strategy, parts),))
    return {"weight": weight.numpy().tolist(), "skipped": getattr(optimizer, "skipped_steps", None)}
