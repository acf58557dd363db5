"""Findings of lint about optimizers."""

import keras
import pytest
from helpers.linted import compiled, dense, found, made, only

import kerasmp as mp

layers = keras.layers

# NumPy and JAX warn about the constants that lint looks for.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")


# unscaled


def test_float16_without_scaling_is_an_error():
    model = compiled(made(dense()), "mse", keras.optimizers.SGD())
    assert only(model, "unscaled").severity == "error"


def test_scaled_bfloat16_frozen_uncompiled_and_kerasmp_models_give_no_finding():
    plain = keras.optimizers.SGD
    assert not found(compiled(made(dense()), "mse"), "unscaled")
    assert not found(made(dense()), "unscaled")
    model = made(dense(), policy="mixed_bfloat16")
    assert not found(compiled(model, "mse", plain()), "unscaled")
    frozen = made(dense())
    frozen.layers[0].trainable = False
    assert not found(compiled(frozen, "mse", plain()), "unscaled")
    assert not found(compiled(made(dense(), module=mp), "mse", plain()), "unscaled")
    ours = made(dense(), module=mp)
    ours.compile("sgd", "mse", auto_scale_loss=False)
    assert found(ours, "unscaled")


class Adversaries(keras.Model):
    """A model with two optimizers, as in a GAN, beside the one that Keras holds."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(8, dtype="mixed_float16")

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, inputs):
        return self.dense(inputs)

    def compile(self, d_opt, g_opt):
        super().compile(mp.LossScaleOptimizer("sgd"))
        self.d_opt, self.g_opt = d_opt, g_opt


def adversaries(*optimizers):
    model = Adversaries()
    model.build((None, 8))
    model.compile(*optimizers)
    return model


def test_unwrapped_optimizers_that_a_model_holds_are_named():
    scaled = mp.LossScaleOptimizer("sgd")
    each = only(adversaries(keras.optimizers.SGD(), scaled), "unscaled")
    assert each.severity == "error"
    assert "for d_opt:" in each.reason
    assert "scale_loss" in each.remedy
    assert not found(adversaries(scaled.inner_optimizer, scaled), "unscaled")


def test_unwrapped_optimizers_of_a_kerasmp_model_are_named_too():
    model = made(dense(), module=mp)
    model.compile("sgd", "mse")
    model.other = keras.optimizers.SGD()
    assert "for other:" in only(model, "unscaled").reason


class Critic(layers.Layer):
    """A layer that keeps the optimizers for its weights."""

    def __init__(self, **optimizers):
        super().__init__(name="critic", dtype="mixed_float16")
        self.inner = layers.Dense(8, dtype="mixed_float16")
        for name, value in optimizers.items():
            setattr(self, name, value)

    def build(self, shape):
        self.inner.build(shape)

    def call(self, inputs):
        return self.inner(inputs)


def test_unwrapped_optimizers_in_inner_layers_lists_and_dicts_are_named():
    sgd, scaled = keras.optimizers.SGD, mp.LossScaleOptimizer("sgd")
    critic = Critic(own=sgd(), many=[scaled, sgd()], named={"slow": [sgd()]}, fine=scaled)
    model = compiled(made(lambda: critic), "mse")
    model.more = [sgd(), scaled.inner_optimizer]
    reason = only(model, "unscaled").reason
    names = ["critic.own", "critic.many[1]", "critic.named['slow'][0]", "more[0]"]
    *_, named = reason.partition(":")[0].partition("the loss for ")
    assert sorted(each.rpartition("/")[2] for each in named.split(", ")) == sorted(names)
    assert not found(compiled(made(lambda: Critic(own=scaled)), "mse"), "unscaled")


class TwoSteps(keras.Sequential):
    def train_step(self, data):
        return self.layers[0].train_step(data)


def test_the_optimizer_of_an_inner_model_counts_if_a_step_may_use_it():
    for outer, names in ((TwoSteps, ["critic.optimizer"]), (keras.Sequential, [])):
        inner = keras.Sequential(
            [keras.Input((8,)), layers.Dense(8, dtype="mixed_float16")], name="critic"
        )
        inner.compile(keras.optimizers.SGD(), "mse")
        model = compiled(outer([keras.Input((8,)), inner]), "mse")
        reasons = [each.reason for each in found(model, "unscaled")]
        assert len(reasons) == len(names)
        assert all(f"{name}:" in reason for name, reason in zip(names, reasons, strict=True))
