"""What a plain optimizer does with odd calls, and what it passes on, the wrapped one does too."""

import keras
import pytest
from helpers.stepping import (
    WAYS,
    Stock,
    numpy,
    stock_step,
    tensors,
    variables_of,
)
from keras import ops

from kerasmp.errors import LossScaleError
from kerasmp.optimizer import LossScaleOptimizer

every_way = pytest.mark.parametrize("step", WAYS, ids=lambda w: w.__name__)


class TestLikeAPlainOptimizer:
    """Fault 21: what a plain optimizer refuses, or lets pass, without a TypeError about None."""

    def test_no_gradients_at_all_do_nothing(self):
        optimizer = LossScaleOptimizer("sgd")
        optimizer.apply([], [])
        assert not optimizer.built

    def test_gradients_alone_need_a_built_optimizer(self):
        with pytest.raises(ValueError, match="call build"):
            LossScaleOptimizer("sgd").apply(tensors([1.0]))

    def test_gradients_alone_go_to_the_built_variables(self):
        variables = variables_of([1.0])
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=1.0)
        optimizer.build(variables)
        optimizer.apply(tensors([1.0]))
        assert numpy(variables)[0].tolist() == [0.0]

    @pytest.mark.parametrize("with_variables", [True, False])
    @pytest.mark.parametrize("number", [1, 3])
    def test_the_wrong_number_of_gradients_is_told(self, number, with_variables):
        variables = variables_of([1.0], [2.0])
        optimizer = LossScaleOptimizer("sgd")
        optimizer.build(variables)
        grads = tensors(*[[1.0]] * number)
        with pytest.raises(ValueError, match=rf"Received: {number} gradients for 2 variables"):
            optimizer.apply(grads, variables if with_variables else None)

    def test_a_variable_that_it_was_not_built_with_is_told(self):
        optimizer = LossScaleOptimizer("sgd")
        optimizer.build(variables_of([1.0]))
        others = variables_of([2.0])
        told = r"Unknown variable.*Received: v0\. Expected: variables among v0\. .*one optimizer"
        with pytest.raises(LossScaleError, match=told):
            optimizer.apply(tensors([1.0]), others)
        assert numpy(others)[0].tolist() == [2.0]

    @every_way
    def test_no_gradient_for_any_variable_is_told(self, step):
        # In a function that AutoGraph converts, TensorFlow gives the message another type.
        with pytest.raises(Exception, match="No gradients provided for any variable"):
            step(LossScaleOptimizer("sgd"), [None, None], variables_of([1.0], [2.0]))

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

    def test_it_is_what_compile_takes_for_a_wrapper(self):
        assert issubclass(LossScaleOptimizer, Stock)

    @pytest.mark.backend("tensorflow")
    def test_stateless_apply_is_not_supported_on_tensorflow_and_changes_nothing(self):
        variables = variables_of([1.0])
        for optimizer in (keras.optimizers.SGD(1.0), LossScaleOptimizer(keras.optimizers.SGD(1.0))):
            optimizer.build(variables)
            state = [v.value for v in optimizer.variables]
            with pytest.raises(ValueError, match="not supported with the TensorFlow backend"):
                optimizer.stateless_apply(state, tensors([1.0]), [v.value for v in variables])
        assert numpy(variables)[0].tolist() == [1.0]


@pytest.mark.backend("tensorflow")
class TestTensorFlowsOwnVariables:
    """A plain optimizer takes `tf.Variable` as well as `keras.Variable`."""

    @every_way
    @pytest.mark.parametrize(
        "settings",
        [{}, {"weight_decay": 0.5}, {"global_clipnorm": 0.5}, {"gradient_accumulation_steps": 2}],
        ids=str,
    )
    def test_are_updated_as_by_a_plain_optimizer(self, step, settings):
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
