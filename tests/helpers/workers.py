"""Two processes of MultiWorkerMirroredStrategy, one of which gets the bad part of a batch.

Each process calls `train`: see `helpers.processes.cluster`.
"""

import json
import os

import keras
import tensorflow as tf
from helpers.bad_batch import CLASSES, ROWS, SCALE, batches, network, outcome
from keras import ops


def strategy_of(rank, ports):
    """Join the cluster on loopback and return its strategy; before any other use only."""
    workers = [f"127.0.0.1:{port}" for port in ports]
    task = {"type": "worker", "index": rank}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
    return tf.distribute.MultiWorkerMirroredStrategy()


def _train(strategy, rank, cls, data):
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

    rows = ROWS // strategy.num_replicas_in_sync
    for batch in data:
        step(tf.constant(batch[rank * rows : (rank + 1) * rows]))
    return model, optimizer


def train(rank, ports, cls, value, bad_rows):
    """Train once for each of `bad_rows`, None for no bad batch; row 0 is the first worker's."""
    strategy = strategy_of(rank, ports)
    runs = []
    for row in bad_rows:
        runs.append(outcome(*_train(strategy, rank, cls, batches(row, value))))
        print(f"trained with bad row {row}", flush=True)  # noqa: T201 - a hung process has no result
    return runs
