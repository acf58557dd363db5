"""Unusual calls and passed-on attributes behave as with a plain optimizer."""

import keras
import pytest
from helpers.marks import few
from helpers.stepping import (
    WAYS,
    Stock,
    assert_same_bits,
    each_of,
    numpy,
    stock_step,
    tensors,
    variables_of,
)
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.optimizer import LossScaleOptimizer

SETTINGS = [
    {},
    {"weight_decay": 0.5},
    {"global_clipnorm": 0.5},
    {"weight_decay": 0.5, "gradient_accumulation_steps": 2},
]


class TestLikeAPlainOptimizer:
    """Fault 21: calls that a plain optimizer refuses or accepts, without a TypeError about None."""

    def test_no_gradients_at_all_do_nothing(self):
        optimizer = LossScaleOptimizer("adam")
        optimizer.apply([], [])
        assert not optimizer.built
        variables = variables_of([1.0])
        optimizer.build(variables)
        before = numpy([*variables, *optimizer.variables])
        assert optimizer.apply([], []) is None
        assert_same_bits(numpy([*variables, *optimizer.variables]), before)

    def test_gradients_alone_go_to_the_built_variables(self):
        variables = variables_of([1.0])
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=1.0)
        optimizer.build(variables)
        optimizer.apply(tensors([1.0]))
        assert numpy(variables)[0].tolist() == [0.0]

    @pytest.mark.full
    def test_stock_keras_fails_on_none_or_is_silent_instead(self):
        with pytest.raises(TypeError, match="NoneType"):
            Stock(keras.optimizers.SGD()).apply(tensors([1.0]))
        # Three gradients for two variables.
        stock_step(Stock(keras.optimizers.SGD()), tensors([1], [1], [1]), variables_of([1.0], [2]))

    def test_apply_gradients_returns_iterations(self):
        variables = variables_of([1.0])
        optimizer = LossScaleOptimizer("sgd")
        returned = optimizer.apply_gradients(zip(tensors([1.0]), variables, strict=True))
        assert int(ops.convert_to_numpy(returned.value)) == 1

    def test_learning_rate_and_iterations_are_the_inner_optimizers(self):
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.25))
        assert float(optimizer.learning_rate.value) == 0.25
        optimizer.learning_rate = 0.5
        assert float(optimizer.inner_optimizer.learning_rate.value) == 0.5
        assert optimizer.iterations is optimizer.inner_optimizer.iterations

    def test_compile_recognises_it_as_a_wrapper(self):
        assert issubclass(LossScaleOptimizer, Stock)


@pytest.mark.backend("tensorflow")
class TestTensorFlowsOwnVariables:
    """A plain optimizer takes `tf.Variable` as well as `keras.Variable`."""

    @each_of(WAYS, WAYS[:2])
    @pytest.mark.parametrize("settings", few(SETTINGS, SETTINGS[-1:]), ids=str)
    def test_are_updated_like_by_a_plain_optimizer(self, step, settings):
        import tensorflow as tf

        results = []
        for wrap, scale in ((lambda plain: plain, 1.0), (LossScaleOptimizer, 2.0**15)):
            variable = tf.Variable([1.0, 2.0])
            optimizer = wrap(keras.optimizers.SGD(0.5, momentum=0.5, **settings))
            for _ in range(2):
                step(optimizer, tensors([scale, -scale]), [variable])
            results.append(variable.numpy().tolist())
        assert results[0] == results[1] != [1.0, 2.0]

    def test_that_are_unknown_are_named(self):
        import tensorflow as tf

        variable = tf.Variable([1.0], name="known")
        optimizer = LossScaleOptimizer("sgd")
        optimizer.build([variable])
        told = r"Unknown variable.*Received: other:0\. Expected: variables among known:0\."
        with pytest.raises(LossScaleError, match=told):
            optimizer.apply(tensors([1.0]), [tf.Variable([1.0], name="other")])
