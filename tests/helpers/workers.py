"""Training in two processes of MultiWorkerMirroredStrategy, one with the bad part of a batch.

Each process calls `train`: see `helpers.processes.cluster`.
"""

import faulthandler
import json
import os

import keras
import tensorflow as tf
from helpers.bad_batch import CLASSES, ROWS, SCALE, batches, network, outcome
from keras import ops

CLEAN = "trained without a bad batch"


def strategy_of(rank, ports):
    """Join the cluster on loopback and return its strategy; call it before any other use."""
    workers = [f"127.0.0.1:{port}" for port in ports]
    task = {"type": "worker", "index": rank}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
    return tf.distribute.MultiWorkerMirroredStrategy()


def _trainer(strategy, rank, cls):
    with strategy.scope():
        model = network()
        optimizer = CLASSES[cls](keras.optimizers.Adam(0.1), initial_scale=SCALE)
        optimizer.build(model.trainable_variables)

    def replica_step(x):
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(model(x, training=True) - 1))
            loss = optimizer.scale_loss(loss / strategy.num_replicas_in_sync)
        grads = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

    @tf.function
    def step(x):
        strategy.run(replica_step, args=(x,))

    variables = [*model.variables, *optimizer.variables]
    start = [v.numpy() for v in variables]
    rows = ROWS // strategy.num_replicas_in_sync

    def train_on(data):
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        for batch in data:
            step(tf.constant(batch[rank * rows : (rank + 1) * rows]))
        return outcome(model, optimizer)

    return train_on


def train(rank, ports, cls, bad, patience=None):
    """Train without a bad batch, then with each of `bad`, a value and its row; row 0 is worker 0's.

    With `patience`, everything after the first training must take at most this many seconds.
    """
    train_on = _trainer(strategy_of(rank, ports), rank, cls)
    results = [train_on(batches())]
    print(CLEAN, flush=True)  # noqa: T201 - a hung process has no result
    if patience is not None:
        faulthandler.dump_traceback_later(patience, exit=True)
    for value, row in bad:
        results.append(train_on(batches(row, value)))
        print(f"trained with bad row {row}", flush=True)  # noqa: T201
    return results
