"""Arguments and states that layers refuse, and what the messages say."""

import keras
import pytest
from helpers.flattened import flatten_layers
from keras import layers, ops

from kerasmp.errors import PolicyError
from kerasmp.layers import DenseHead, SpectralNormalization, WithDtype

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("policy", ["int8_from_mixed_bfloat16", "float8_from_mixed_float16"])
def test_a_head_with_a_quantized_policy_is_refused(policy):
    """Dense's quantized code would give the compute dtype while the symbol says float32."""
    with pytest.raises(PolicyError, match=f'quantized policies. Received: the policy "{policy}"'):
        DenseHead(3, dtype=policy)


@pytest.mark.parametrize(
    ("dtype", "given"),
    [("float16", "float32"), ("float16", "mixed_float16"), ("float32", "float16")],
)
@pytest.mark.parametrize("depth", ["layer", "part of it"])
def test_a_built_layer_with_other_variables_is_refused_and_unchanged(dtype, given, depth):
    layer = layers.Dense(2, dtype=dtype)
    layer.build((None, 4))
    wrapped = layer
    if depth == "part of it":  # and another part is as expected
        other = layers.Dense(4, dtype=given)
        wrapped = keras.Sequential([keras.Input((4,)), other, layer])
    policies = [part.dtype_policy for part in flatten_layers(wrapped)]
    wanted = keras.DTypePolicy(given).variable_dtype
    with pytest.raises(PolicyError) as caught:
        WithDtype(wrapped, given)
    held = dtype if depth == "layer" else "float16 and float32"
    assert caught.value.received == f"{held} variables, and a policy with {wanted} variables"
    assert caught.value.expected == f"a policy with {held} variables"
    assert 'use a "mixed_" policy' in caught.value.fix
    assert [part.dtype_policy for part in flatten_layers(wrapped)] == policies
    assert {v.dtype for v in wrapped.variables} == set(held.split(" and "))


def test_an_argument_that_is_not_a_layer_is_refused_by_keras():
    with pytest.raises(ValueError, match="isn't a supported layer type"):
        WithDtype(ops.relu)


def test_zero_power_iterations_are_refused():
    with pytest.raises(ValueError, match="power_iterations"):
        SpectralNormalization(layers.Dense(1), power_iterations=0)
