"""`fit` on JAX over several devices, or over two processes, with a bad row in one shard.

The devices are set by the environment of the process: see `helpers.processes`.
"""

import keras
import numpy as np
from helpers.bad_batch import ROWS, SCALE, batches, network, outcome, targets

import kerasmp as mp


def _data_parallel():
    return keras.distribution.DataParallel(auto_shard_dataset=False)


def _model_parallel():
    mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"])
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*kernel"] = ("model", None)
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


DISTRIBUTIONS = {"data": _data_parallel, "model": _model_parallel}


def train(devices, how, value, bad_rows, guarded=False):  # noqa: FBT002 - JSON names it
    """Train on `devices` devices once for each of `bad_rows`, None for no bad batch."""
    assert len(keras.distribution.list_devices()) == devices
    keras.distribution.set_distribution(DISTRIBUTIONS[how]())
    return [_fit(batches(row, value), guarded=guarded) for row in bad_rows]


def train_in_cluster(rank, ports, value, bad_rows):
    """Do the same in one process of several, each of which reads its own rows of every batch."""
    addresses = ",".join(f"127.0.0.1:{ports[0]}" for _ in ports)
    keras.distribution.initialize(addresses, num_processes=len(ports), process_id=rank)
    assert len(keras.distribution.list_devices()) == len(ports)
    keras.distribution.set_distribution(_data_parallel())
    rows = ROWS // len(ports)
    mine = slice(rank * rows, (rank + 1) * rows)
    return [_fit([b[mine] for b in batches(row, value)]) for row in bad_rows]


def _fit(data, *, guarded=False):
    between = [keras.layers.BatchNormalization(dtype="mixed_float16")] if guarded else []
    model = network(mp if guarded else keras, between)
    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(0.1), initial_scale=SCALE)
    model.compile(optimizer, "mse")
    x = np.concatenate(data)
    model.fit(x, targets(x), batch_size=len(data[0]), shuffle=False, verbose=0)
    return outcome(model, optimizer)
