"""The optimizer inside: of the user's own class, wrapped twice, and reached for its attributes."""

import keras
import pytest
from helpers.stepping import assert_same_bits, eager, numpy, tensors, variables_of

from kerasmp.optimizer import LossScaleOptimizer


class Own(keras.optimizers.SGD):
    """Known to nobody but this file."""

    def __init__(self, *args, flavour="plain", **kwargs):
        super().__init__(*args, **kwargs)
        self.flavour = flavour

    def get_config(self):
        return {**super().get_config(), "flavour": self.flavour}


def test_a_class_of_the_users_own_is_named_in_custom_objects():
    config = keras.optimizers.serialize(LossScaleOptimizer(Own(0.25, flavour="sour")))
    again = keras.optimizers.deserialize(config, custom_objects={"Own": Own})
    assert type(again) is LossScaleOptimizer
    assert type(again.inner_optimizer) is Own
    assert again.inner_optimizer.flavour == "sour"
    with keras.saving.custom_object_scope({"Own": Own}):
        assert type(keras.optimizers.deserialize(config).inner_optimizer) is Own


def test_without_it_the_error_names_the_class():
    config = LossScaleOptimizer(Own(0.25)).get_config()
    with pytest.raises(TypeError, match="Own"):
        LossScaleOptimizer.from_config(config)


def test_its_attributes_are_reached_through_it_and_not_through_the_wrapper():
    optimizer = LossScaleOptimizer(Own(0.25, momentum=0.5, flavour="sour"))
    assert (optimizer.inner_optimizer.flavour, optimizer.inner_optimizer.momentum) == ("sour", 0.5)
    for name in ("flavour", "momentum"):
        assert not hasattr(optimizer, name)


def test_wrapped_a_second_time_it_keeps_its_state_and_the_scale_starts_anew():
    """Each wrapper has a scale and counters of its own, both move the same moments."""
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
