"""The inner optimizer: user-defined, wrapped again, and its attributes."""

import keras
import pytest
from helpers.stepping import assert_same_bits, eager, numpy, tensors, variables_of

from kerasmp.optimizer import LossScaleOptimizer


class Own(keras.optimizers.SGD):
    """Not registered with Keras."""

    def __init__(self, *args, flavour="plain", **kwargs):
        super().__init__(*args, **kwargs)
        self.flavour = flavour

    def get_config(self):
        return {**super().get_config(), "flavour": self.flavour}


def test_a_user_defined_class_is_loaded_through_custom_objects():
    config = keras.optimizers.serialize(LossScaleOptimizer(Own(0.25, flavour="sour")))
    again = keras.optimizers.deserialize(config, custom_objects={"Own": Own})
    assert type(again) is LossScaleOptimizer
    assert type(again.inner_optimizer) is Own
    assert again.inner_optimizer.flavour == "sour"
    with keras.saving.custom_object_scope({"Own": Own}):
        assert type(keras.optimizers.deserialize(config).inner_optimizer) is Own


def test_without_custom_objects_the_error_names_the_class():
    config = LossScaleOptimizer(Own(0.25)).get_config()
    with pytest.raises(TypeError, match="Own"):
        LossScaleOptimizer.from_config(config)


def test_attributes_of_the_inner_optimizer_are_not_on_the_wrapper():
    optimizer = LossScaleOptimizer(Own(0.25, momentum=0.5, flavour="sour"))
    assert (optimizer.inner_optimizer.flavour, optimizer.inner_optimizer.momentum) == ("sour", 0.5)
    for name in ("flavour", "momentum"):
        assert not hasattr(optimizer, name)


def test_an_optimizer_wrapped_again_keeps_its_state_and_starts_a_new_scale():
    """Each wrapper has its own scale and counters, and both update the same moments."""
    variables, others = variables_of([1.0, 2.0]), variables_of([1.0, 2.0])
    inner, plain = keras.optimizers.Adam(0.1), keras.optimizers.Adam(0.1)
    first = LossScaleOptimizer(inner, initial_scale=4.0, fused=False)
    eager(first, tensors([4.0, 8.0]), variables)
    eager(first, tensors([float("inf"), 8.0]), variables)
    second = LossScaleOptimizer(inner, initial_scale=8.0, fused=False)
    eager(second, tensors([8.0, 16.0]), variables)
    eager(first, tensors([2.0, 4.0]), variables)
    for _ in range(3):
        eager(plain, tensors([1.0, 2.0]), others)
    assert_same_bits(numpy(inner.variables), numpy(plain.variables))
    assert (first.loss_scale, first.applied_steps, first.skipped_steps) == (2.0, 2, 1)
    assert (second.loss_scale, second.applied_steps, second.skipped_steps) == (8.0, 1, 0)
    assert int(numpy([second.iterations])[0]) == 3


class Signs(keras.optimizers.SGD):
    """Takes the sign of gradients in the methods that Keras's steps call, but not in apply."""

    def apply_gradients(self, grads_and_vars):
        return super().apply_gradients([(keras.ops.sign(g), v) for g, v in grads_and_vars])

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        signs = [keras.ops.sign(g) for g in grads]
        return super().stateless_apply(optimizer_variables, signs, trainable_variables)


def test_a_step_calls_the_same_method_as_without_the_wrapper():
    optimizer, variables = LossScaleOptimizer(Signs(0.5), loss_scale=2.0), variables_of([1.0])
    optimizer.apply_gradients(zip(tensors([6.0]), variables, strict=True))
    assert numpy(variables)[0].tolist() == [0.5]
    optimizer.apply(tensors([6.0]), variables)
    assert numpy(variables)[0].tolist() == [-1.0]
    if keras.backend.backend() == "jax":
        state, values = [[v.value for v in some] for some in (optimizer.variables, variables)]
        (value,), state = optimizer.stateless_apply(state, tensors([6.0]), values)
        assert value.tolist() == [-1.5]
        count = optimizer.iterations
        pairs = zip(state, optimizer.variables, strict=True)
        assert [int(value) for value, variable in pairs if variable is count] == [3]
