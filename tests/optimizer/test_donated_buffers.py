"""On JAX a step reuses the donated buffers: no second copy of weights or moments."""

import keras
import numpy as np
import pytest
from helpers.bad_batch import batches, network, targets
from helpers.marks import by_name, few
from helpers.stepping import variables_of
from keras import ops

import kerasmp as mp

pytestmark = pytest.mark.backend("jax")
SCHEDULES = [mp.DynamicLossScale(), mp.LogMaxLossScale()]
MODULES = {"stock model": keras, "kerasmp model": mp}


@pytest.mark.parametrize("module", by_name(MODULES, ["kerasmp model"]))
@pytest.mark.parametrize("schedule", few(SCHEDULES, SCHEDULES[:1]), ids=repr)
def test_fit_donates_every_buffer(module, schedule):
    model = network(module, [keras.layers.BatchNormalization()])
    inner = keras.optimizers.Adam(0.01, use_ema=True, gradient_accumulation_steps=2)
    model.compile(mp.LossScaleOptimizer(inner, loss_scale=schedule), "mse")
    x = np.concatenate(batches(bad_row=0))
    model.fit(x, targets(x), batch_size=8, verbose=0)  # compiles; its last step is applied
    before = [v.value for v in [*model.variables, *model.optimizer.variables]]
    model.fit(x[:8], targets(x[:8]), batch_size=8, verbose=0)
    assert all(buffer.is_deleted() for buffer in before)


@pytest.mark.parametrize("accumulation", few([None, 2], [2]))
def test_a_jitted_loop_uses_every_donated_buffer_again(accumulation):
    import jax

    variables = variables_of(np.ones((64, 64)), np.ones(64))
    inner = keras.optimizers.Adam(0.01, gradient_accumulation_steps=accumulation)
    optimizer = mp.LossScaleOptimizer(inner)
    optimizer.build(variables)
    state = [v.value for v in optimizer.variables], [v.value for v in variables]

    def step(state, grads):
        weights, slots = optimizer.stateless_apply(state[0], grads, state[1])
        return slots, weights

    grads = [ops.ones(v.shape) for v in variables]
    compiled = jax.jit(step, donate_argnums=0).lower(state, grads).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(
        buffer.nbytes for part in state for buffer in part
    )
