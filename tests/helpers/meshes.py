"""Training on JAX over several devices or two processes, with a bad row in one shard.

The environment of the process sets the devices: see `helpers.processes`.
"""

import itertools

import jax
import keras
import numpy as np
from helpers.bad_batch import ROWS, SCALE, batches, guarded_network, network, outcome, targets
from keras import ops

import kerasmp as mp


def _data_parallel():
    return keras.distribution.DataParallel(auto_shard_dataset=False)


def _model_parallel():
    mesh = keras.distribution.DeviceMesh((2, 2), ["batch", "model"])
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*kernel"] = ("model", None)
    return keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")


DISTRIBUTIONS = {"data": _data_parallel, "model": _model_parallel}


def train(devices, how, cases, **more):
    """Train on several devices once for each case: a bad value and its row, or None."""
    assert len(keras.distribution.list_devices()) == devices
    keras.distribution.set_distribution(DISTRIBUTIONS[how]())
    return [_fit(_batches(case), **more) for case in cases]


def train_in_cluster(rank, ports, cases, **more):
    """Train in one of several processes, each of which reads its own rows of every batch."""
    addresses = ",".join(f"127.0.0.1:{ports[0]}" for _ in ports)
    keras.distribution.initialize(addresses, num_processes=len(ports), process_id=rank)
    assert len(keras.distribution.list_devices()) == len(ports)
    keras.distribution.set_distribution(_data_parallel())
    rows = ROWS // len(ports)
    mine = slice(rank * rows, (rank + 1) * rows)
    return [_fit([b[mine] for b in _batches(case)], **more) for case in cases]


def loop(devices, cases):
    """Train in a jitted user-defined loop, with the rows of each batch spread over the devices."""
    assert len(jax.devices()) == devices
    return [_loop(_batches(case)) for case in cases]


def _batches(case):
    return batches() if case is None else batches(bad_row=case[1], value=case[0])


def _fit(data, *, guarded=False, own_step=False, clipped=None):
    model = guarded_network(own_step) if guarded else network()
    adam, sgd = keras.optimizers.Adam(0.1), keras.optimizers.SGD(0.1, global_clipnorm=clipped)
    optimizer = mp.LossScaleOptimizer(sgd if clipped else adam, initial_scale=SCALE)
    model.compile(optimizer, "mse")
    x = np.concatenate(data)
    model.fit(x, targets(x), batch_size=len(data[0]), shuffle=False, verbose=0)
    return outcome(model, optimizer)


def _loop(data):
    model = network()
    optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(0.1), initial_scale=SCALE)
    optimizer.build(model.trainable_variables)

    def scaled_loss(trainable, state, x):
        prediction, _ = model.stateless_call(trainable, [], x, training=True)
        with keras.StatelessScope(list(zip(optimizer.variables, state, strict=True))):
            return optimizer.scale_loss(ops.mean(ops.square(prediction - 1)))

    @jax.jit
    def step(trainable, state, x):
        grads = jax.grad(scaled_loss)(trainable, state, x)
        return optimizer.stateless_apply(state, grads, trainable)

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ["batch"])
    rows, everywhere = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (["batch"], [])
    )
    variables = [model.trainable_variables, optimizer.variables]
    trainable, state = jax.device_put([[v.value for v in each] for each in variables], everywhere)
    for batch in data:
        trainable, state = step(trainable, state, jax.device_put(batch, rows))
    for variable, value in zip(itertools.chain(*variables), [*trainable, *state], strict=True):
        variable.assign(value)
    return outcome(model, optimizer)
