"""Steps on two replicas with given gradients, and steps on one device with their sums.

`run` calls functions of this module in a separate process: see `helpers.processes`.
"""

import tempfile
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from helpers.bad_batch import CLASSES, ROWS, SCALE, batches, flat, network, targets
from helpers.mirrored import copies, per_replica, runs, strategy_on
from keras import ops

import kerasmp as mp

INF = float("inf")
START = [[1.0, -2.0], [0.5, 3.0]]


class Outer(keras.optimizers.Optimizer):
    """A user's optimizer around others, held in any way."""

    def __init__(self, inside, name="outer"):
        super().__init__(learning_rate=0.0, name=name)
        self.inside = inside

    def build(self, var_list):
        super().build(var_list)
        self.inside.build(var_list)

    def apply(self, grads, trainable_variables=None):
        self.inside.apply(grads, trainable_variables)


class InList(Outer):
    """A user-defined optimizer that holds a list with one optimizer."""

    def build(self, var_list):
        keras.optimizers.Optimizer.build(self, var_list)
        self.inside[0].build(var_list)

    def apply(self, grads, trainable_variables=None):
        self.inside[0].apply(grads, trainable_variables)


def _several():
    adam, sgd = keras.optimizers.Adam(0.5), keras.optimizers.SGD(0.5, momentum=0.5)
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(sgd, {".*v0": adam}))


OPTIMIZERS = {
    "nested": lambda: Outer(keras.optimizers.SGD(0.5)),
    "nested twice": lambda: Outer(InList([keras.optimizers.SGD(0.5)])),
    "averages": lambda: keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5),
    "weight decay": lambda: keras.optimizers.AdamW(0.5, weight_decay=0.25),
    "constraint": lambda: keras.optimizers.Adam(0.5),
    "several": _several,
}
SCHEDULES = {
    "fixed": lambda: mp.FixedLossScale(8.0),
    "none": mp.NoLossScale,
    "growing": lambda: mp.DynamicLossScale(8.0, growth_interval=2),
    "log max": lambda: mp.LogMaxLossScale(8.0),
    "underflow": lambda: mp.UnderflowLossScale(8.0, growth_interval=2),
}


def run(cases, replicas=2):
    """Call `function(strategy, **arguments)` for each case `[function, arguments]`."""
    strategy = strategy_on(replicas)
    return [globals()[name](strategy, **arguments) for name, arguments in cases]


def train(strategy, value, **case):
    """Train without a bad batch, then with a bad row on each replica: see `helpers.mirrored`."""
    count = strategy.num_replicas_in_sync
    feeds = [batches(row, value) for row in (None, *(i * ROWS // count for i in range(count)))]
    clean, *bad = runs(strategy, "ours", feeds=feeds, **case)
    return {"clean": clean, "bad": bad}


def apply_once(strategy, parts, cls="ours", **clipping):
    """Return a weight after a step of SGD(1) with the gradient `parts[i]` on replica `i`."""
    with strategy.scope():
        weight = keras.Variable([0.0] * len(parts[0]))
        optimizer = CLASSES[cls](keras.optimizers.SGD(1.0, **clipping), initial_scale=SCALE)
        optimizer.build([weight])

    def replica_step(gradient):
        optimizer.apply([gradient * optimizer.scale_loss(1.0)], [weight])

    parts = [tf.constant(part) for part in parts]
    strategy.run(tf.function(replica_step), args=(per_replica(strategy, parts),))
    return {"weight": weight.numpy().tolist(), "skipped": getattr(optimizer, "skipped_steps", None)}


def _variables(*, constrained):
    variables = [keras.Variable(value, name=f"v{i}") for i, value in enumerate(START)]
    if constrained:
        variables[0].constraint = keras.constraints.NonNeg()
    return variables


def _gradients(steps, bad=()):
    """Return gradients by step, replica and variable, whose sums are exact; inf in `bad` steps."""
    grads = np.random.default_rng(0).integers(-8, 9, (steps, 2, *np.shape(START))) / 4
    grads[list(bad), 1, 0, 0] = np.inf  # the second replica's first variable
    return grads.astype("float32")


def _trained(strategy, optimizer_of, gradients, *, constrained=False):
    """Return all state after each step; a single device gets the sums over the replicas."""
    with strategy.scope():
        variables = _variables(constrained=constrained)
        optimizer = optimizer_of()
        optimizer.build(variables)
    ours = isinstance(optimizer, mp.LossScaleOptimizer)

    def replica_step(grads):
        scale = optimizer.scale_loss(1.0) if ours else 1.0
        optimizer.apply([grads[i] * scale for i in range(len(variables))], variables)

    step = tf.function(lambda grads: strategy.run(replica_step, args=(grads,)))
    states = []
    for parts in gradients:
        several = strategy.num_replicas_in_sync > 1
        given = parts if several else parts.sum(axis=0, keepdims=True)
        step(per_replica(strategy, [tf.constant(each) for each in given]))
        inner = optimizer.inner_optimizer if ours else optimizer
        trained = copies(strategy, [*variables, *inner.variables])
        states.append({"trained": trained})
        if ours:
            states[-1]["own"] = copies(strategy, optimizer.own_variables)
            states[-1]["counted"] = [optimizer.applied_steps, optimizer.skipped_steps]
    return states


def companion(strategy, name):
    """Return steps of a wrapped optimizer, the last one bad, and of a plain one on one device."""
    make, constrained = OPTIMIZERS[name], name == "constraint"
    gradients = _gradients(6, bad=[5])
    ours = _trained(
        strategy,
        lambda: mp.LossScaleOptimizer(make(), initial_scale=SCALE),
        gradients,
        constrained=constrained,
    )
    one = tf.distribute.get_strategy()
    return ours, _trained(one, make, gradients[:5], constrained=constrained)


def schedule(strategy, name):
    """Return the steps of a schedule on two replicas and on one device, the fifth of them bad."""

    def optimizer():
        return mp.LossScaleOptimizer(
            keras.optimizers.SGD(0.5, momentum=0.5), loss_scale=SCHEDULES[name]()
        )

    gradients = _gradients(7, bad=[4])
    return [_trained(s, optimizer, gradients) for s in (strategy, tf.distribute.get_strategy())]


def sparse(strategy):
    """Return a table after steps with duplicate rows, the last one bad, and the types SGD got."""
    seen = []

    class Seeing(keras.optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            seen.extend(type(g).__name__ for g in grads)
            super().apply(grads, trainable_variables)

    with strategy.scope():
        table = keras.Variable([[1.0, 2.0]] * 4)
        optimizer = mp.LossScaleOptimizer(Seeing(0.5), initial_scale=SCALE)
        optimizer.build([table])

    def replica_step(values, rows):
        values = values * optimizer.scale_loss(1.0)
        optimizer.apply([tf.IndexedSlices(values, rows, tf.constant([4, 2]))], [table])

    step = tf.function(lambda *arguments: strategy.run(replica_step, args=arguments))
    rows = per_replica(strategy, [tf.constant([0, 1, 0]), tf.constant([1, 3, 3])])
    tables = []
    for last in (4.0, INF):
        values = [[[1.0, 2.0]] * 3, [[0.5, 1.0], [2.0, 0.0], [last, 8.0]]]
        step(per_replica(strategy, [tf.constant(v) for v in values]), rows)
        tables.append(copies(strategy, [table]))
    return {"tables": tables, "seen": sorted(set(seen)), "skipped": optimizer.skipped_steps}


def sent(strategy, cls):
    """Return the shapes in each `all_reduce` of a step, and the collectives of its graph."""
    calls = []
    reduce = tf.distribute.ReplicaContext.all_reduce

    def counted(context, op, value, options=None):
        calls.append([g.shape.as_list() for g in value])
        return reduce(context, op, value, options)

    with strategy.scope():
        shapes = [(3, 2), (2,), ()]
        variables = [keras.Variable(np.zeros(shape, "float32")) for shape in shapes]
        optimizer = CLASSES[cls](keras.optimizers.Adam(), initial_scale=SCALE)
        optimizer.build(variables)

    def replica_step():
        scale = optimizer.scale_loss(1.0)
        optimizer.apply([ops.ones(shape) * scale for shape in shapes], variables)

    step = tf.function(lambda: strategy.run(replica_step))
    with mock.patch.object(tf.distribute.ReplicaContext, "all_reduce", counted):
        graph = step.get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    return calls, [n.op for n in nodes if n.op.startswith("Collective")]


def refusals(strategy):
    """Return the messages where replicas cannot agree, and the state before and after."""
    with strategy.scope():
        weight = keras.Variable([1.0])
        optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=SCALE)
        optimizer.build([weight])
        before = copies(strategy, [weight, *optimizer.variables])
        said = [_refusal(lambda: optimizer.apply([tf.constant([1.0])], [weight]))]
        # The method in which supported versions of Keras sum; another version may differ.
        with mock.patch.object(keras.optimizers.SGD, "_all_reduce_sum_gradients", None):
            other = mp.LossScaleOptimizer(keras.optimizers.SGD(1.0))
            said.append(_refusal(lambda: other.build([weight])))

    def unscaled_outside(gradient):
        grads = optimizer.get_unscaled_gradients([gradient])
        strategy.run(lambda: optimizer.apply(grads, [weight]))

    said.append(_refusal(tf.function(lambda: unscaled_outside(tf.ones(1)))))
    optimizer.forget_unscaled()
    return said, before, copies(strategy, [weight, *optimizer.variables])


def _refusal(call):
    try:
        call()
    except Exception as error:  # noqa: BLE001 - while tracing, TensorFlow changes its class
        return str(error)
    return None


def unbuilt(strategy):
    """Return the weight after a first step that builds the optimizer, and a bad second one."""
    with strategy.scope():
        weight = keras.Variable([1.0])
        optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=SCALE)

    def replica_step(gradient):
        optimizer.apply([gradient * optimizer.scale_loss(1.0)], [weight])

    for second in (2.0, INF):
        parts = [tf.constant([1.0]), tf.constant([second])]
        strategy.run(replica_step, args=(per_replica(strategy, parts),))
    return copies(strategy, [weight]), [optimizer.applied_steps, optimizer.skipped_steps]


def saving(strategy):
    """Return the state after training, restored copies of it, and all after more training."""
    x = np.concatenate(batches(ROWS - 1))

    def fitted(model):
        model.fit(x, targets(x), batch_size=ROWS, shuffle=False, verbose=0)
        return model

    def compiled(*, build):
        with strategy.scope():
            model = network()
            optimizer = mp.LossScaleOptimizer(keras.optimizers.Adam(0.1), initial_scale=SCALE)
            if build:
                optimizer.build(model.trainable_variables)
            model.compile(optimizer, "mse", jit_compile=False)
        return model

    def held(model):
        return copies(strategy, [*model.trainable_variables, *model.optimizer.variables])

    model, others = fitted(compiled(build=True)), {}
    with tempfile.TemporaryDirectory() as directory:
        model.save(f"{directory}/model.keras")
        alone = keras.models.load_model(f"{directory}/model.keras")
        with strategy.scope():
            model.save(f"{directory}/within.keras")
            others["loaded"] = keras.models.load_model(f"{directory}/within.keras")
        path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(f"{directory}/c")
        for way, build in (("built", True), ("to be built", False)):
            others[way] = compiled(build=build)
            checkpoint = tf.train.Checkpoint(model=others[way], optimizer=others[way].optimizer)
            checkpoint.restore(path)
            with strategy.scope():
                others[way].optimizer.build(others[way].trainable_variables)
    return {
        "alone": flat(v.numpy() for v in [*alone.trainable_variables, *alone.optimizer.variables]),
        "saved": held(model),
        "restored": {way: held(other) for way, other in others.items()},
        "counted": [model.optimizer.applied_steps, model.optimizer.skipped_steps],
        "later": held(fitted(model)),
        "restored later": {way: held(fitted(other)) for way, other in others.items()},
    }
