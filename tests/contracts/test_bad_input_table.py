"""Invalid input raises an error of kerasmp and changes nothing: no weight, slot or file.

One row for each call. Its error says what the row names, what was received and expected, and a fix.
"""

# All calls of a table have the same parameters, and most use only some of them.
# ruff: noqa: ARG005

import math
import types

import keras
import numpy as np
import pytest
from keras import ops

import kerasmp as mp
from kerasmp.errors import ArgumentTypeError, KerasMPError, LossScaleError

BACKEND = keras.backend.backend()
NAN, INF = math.nan, math.inf
DYNAMIC, LOG_MAX, UNDERFLOW, FIXED, NONE = (
    mp.DynamicLossScale,
    mp.LogMaxLossScale,
    mp.UnderflowLossScale,
    mp.FixedLossScale,
    mp.NoLossScale,
)


class NoTensor:
    def __repr__(self):
        return "NoTensor()"


def dense(**settings):
    return keras.layers.Dense(2, **settings)


def attention(**settings):
    x = np.ones((1, 2, 1, 4), "float32")
    return mp.ops.dot_product_attention(x, x, x, **settings)


def rules(given):
    return mp.Policy("mixed_float16", rules=given)


def policy_of(**config):
    return mp.Policy.from_config(config)


def of_rules(*given):
    return policy_of(spec="float32", rules=[*given])


NO_CONFIG = "A policy cannot be created from this"
NO_RULES = "configuration of a policy has invalid rules"
NO_LINE = "is not a layer with its policy"
NO_ROWS = "LayerPolicies consist of LayerPolicy rows.*Received: "
NO_LAYERS = "Only a Keras model can have layer policies.*Received: "
NO_TENSOR = r"The argument cannot be converted to a tensor\. Received: "
INVALID = "`%s` has an invalid value"
NO_STATE_OF = "does not belong to this schedule"
SWITCH = INVALID + ".*True or False"
# What needs no framework: of the model `m`, a functional one.
PURE = {
    # ------------------------------------------------------------------------------- policies
    "policy of an empty configuration": (
        lambda m: policy_of(),
        NO_CONFIG + r" configuration\. Received: {}",
    ),
    "policy of no configuration": (lambda m: mp.Policy.from_config(None), NO_CONFIG),
    "policy of a name": (lambda m: mp.Policy.from_config("float32"), NO_CONFIG),
    "policy of more than is known": (lambda m: policy_of(spec="float32", rulez=[]), "rulez"),
    "policy of another spec": (lambda m: policy_of(spec=None), NO_CONFIG),
    "policy of a number": (lambda m: policy_of(spec="float32", rules=3), NO_RULES),
    "policy of names": (lambda m: of_rules("safe"), NO_RULES),
    "policy of an empty rule": (lambda m: of_rules({}), NO_RULES),
    "policy of half a rule": (lambda m: of_rules({"path": "a"}), NO_RULES),
    "policy of a rule of numbers": (lambda m: of_rules({"path": 3, "policy": "float32"}), NO_RULES),
    "policy of another rule set": (lambda m: of_rules({"set": "unsafe"}), "Unknown rule set"),
    "bytes": (lambda m: mp.Policy(b"float32"), NO_CONFIG),
    "rules that are a number": (lambda m: rules(3), "not a mapping.*Received: 3"),
    "an empty pattern": (lambda m: rules({"": "float32"}), r'empty.*"\.\*" matches every'),
    "a blank pattern": (lambda m: rules({" ": "float32"}), "pattern of a rule is empty"),
    "a pattern of None": (lambda m: rules({None: "float32"}), "neither a layer path pattern"),
    "no policy of a scope": (lambda m: mp.policy_scope(3), NO_CONFIG),
    # -------------------------------------------------------------------------- layer policies
    "layer policies of None": (lambda m: mp.LayerPolicies.of(None), NO_LAYERS + "None"),
    "layer policies of a number": (lambda m: mp.LayerPolicies.of(3), NO_LAYERS + "3"),
    "layer policies of a class": (lambda m: mp.LayerPolicies.of(keras.Model), NO_LAYERS),
    "layer policies for None": (lambda m: mp.LayerPolicies.of(m).assign(None), NO_LAYERS),
    "layer policies among None": (lambda m: mp.LayerPolicies.of(m).ours_in(None), NO_LAYERS),
    "layer policies of another model": (
        lambda m: mp.LayerPolicies.of(dense()).assign(m),
        "layers differ",
    ),
    "layer policies of numbers": (lambda m: mp.LayerPolicies([1]), NO_ROWS + "1 of type int"),
    "layer policies of nothing to go through": (lambda m: mp.LayerPolicies(3), NO_ROWS + "3"),
    "layer policies of text": (lambda m: mp.LayerPolicies("ab"), NO_ROWS + "'a'"),
    "comments alone": (lambda m: mp.LayerPolicies.parse("# a\n"), "contains no layer policies"),
    "a line without a name": (lambda m: mp.LayerPolicies.parse(" (A): float32"), NO_LINE),
    "a line without a class": (lambda m: mp.LayerPolicies.parse("a (): float32"), NO_LINE),
    "a line without a policy": (lambda m: mp.LayerPolicies.parse("a (A): "), NO_LINE),
    "a line half further in": (lambda m: mp.LayerPolicies.parse("   a (A): float32"), NO_LINE),
    # ------------------------------------------------------------------------------- schedules
    "growth beyond float32": (lambda m: DYNAMIC(growth_factor=1e39), "`growth_factor`.*1e.39"),
    "growth that float32 rounds to 1": (lambda m: DYNAMIC(growth_factor=1 + 1e-12), "float32"),
    "backoff below float32": (lambda m: DYNAMIC(backoff_factor=1e-50), "`backoff_factor`.*1e-50"),
    "backoff that float32 rounds to 1": (lambda m: DYNAMIC(backoff_factor=1 - 1e-12), "float32"),
    "growth beyond float32, by underflow": (lambda m: UNDERFLOW(growth_factor=1e39), "1e.39"),
    "backoff below float32, by underflow": (lambda m: UNDERFLOW(backoff_factor=1e-50), "1e-50"),
    "no growth": (lambda m: UNDERFLOW(growth_factor=NAN), "`growth_factor`.*Received: nan"),
    "a decay that float32 rounds to 1": (lambda m: LOG_MAX(mean_decay=1 - 1e-12), "`mean_decay`"),
    "a decay below float32": (lambda m: LOG_MAX(variance_decay=1e-50), "`variance_decay`"),
    "deviations below float32": (lambda m: LOG_MAX(deviations=1e-50), "`deviations`"),
    "a scale below float32": (lambda m: FIXED(1e-50), "the range of float32"),
    "a floor above the first scale": (lambda m: LOG_MAX(min_scale=2.0**16), "enclose"),
    "a schedule that switches by a word": (
        lambda m: DYNAMIC(consecutive_hysteresis="yes"),
        SWITCH % "consecutive_hysteresis",
    ),
    "a schedule of other settings": (
        lambda m: DYNAMIC.from_config({"growth_facto": 3}),
        "no such settings.*Received: 'growth_facto'.*Did you mean \"growth_factor\"",
    ),
    "a schedule of no configuration": (lambda m: LOG_MAX.from_config(None), "is not a dict"),
    "a schedule of a list": (lambda m: UNDERFLOW.from_config([1]), "is not a dict"),
    "a fixed schedule of other settings": (lambda m: FIXED.from_config({"a": 1}), "some of scale"),
    "none of settings": (lambda m: NONE.from_config({"scale": 1}), "no such settings"),
    "an empty state, dynamic": (lambda m: DYNAMIC().update({}, True), NO_STATE_OF),
    "an empty state, log max": (lambda m: LOG_MAX().update({}, False), NO_STATE_OF),
    "an empty state, underflow": (lambda m: UNDERFLOW().update({}, True), "'steps_to_wait'"),
    "an empty state, fixed": (lambda m: FIXED().update({}, True), NO_STATE_OF),
    "no state": (lambda m: DYNAMIC().update(None, True), "The state is not a dict"),
    "the state of another schedule": (
        lambda m: DYNAMIC().update(FIXED().init(), True),
        r"without \['recover_to'\].*init",
    ),
    # --------------------------------------------------------------------------------- monitor
    "a streak above a stall": (
        lambda m: mp.OverflowMonitor(streak=60),
        "streak=60, stalled=50.*streak <= stalled",
    ),
    "a monitor of no model": (lambda m: mp.OverflowMonitor().on_train_begin(), "no model"),
    "checks of NaN": (lambda m: mp.OverflowMonitor(NAN), INVALID % "check_every"),
    # ------------------------------------------------------------------------------------- ops
    "in_float32 of a number": (lambda m: mp.ops.in_float32(3), "Only a function.*Received: 3"),
    "in_float32 of None": (lambda m: mp.ops.in_float32(None), "Only a function"),
    "in_float32 of a name": (lambda m: mp.ops.in_float32("sum"), "Only a function"),
    "the sum of None": (lambda m: mp.ops.sum(None), NO_TENSOR + "None"),
    "the sum of text": (lambda m: mp.ops.sum("one"), NO_TENSOR + "'one'"),
    "the sum of a dict": (lambda m: mp.ops.sum({}), NO_TENSOR + "{}"),
    "the sum of an object": (lambda m: mp.ops.sum(NoTensor()), NO_TENSOR + "NoTensor"),
    "the mean of text": (lambda m: mp.ops.mean(["a", "b"]), NO_TENSOR),
    "the softmax of None": (lambda m: mp.ops.softmax(None), NO_TENSOR),
    "the norm of a set": (lambda m: mp.ops.norm({1.0}), NO_TENSOR),
    "gelu of None in a list": (lambda m: mp.ops.gelu([None]), NO_TENSOR),
    "an own function of None": (lambda m: mp.ops.in_float32(ops.square)(None), NO_TENSOR),
    "attention, causal by a word": (lambda m: attention(is_causal="no"), SWITCH % "is_causal"),
    "attention, causal by None": (lambda m: attention(is_causal=None), SWITCH % "is_causal"),
    "attention, flash by a word": (
        lambda m: attention(flash_attention="yes"),
        SWITCH % "flash_attention",
    ),
    "attention, scaled by NaN": (
        lambda m: attention(scale=NAN),
        "`scale` has an invalid value.*nan",
    ),
    "attention, scaled by text": (
        lambda m: attention(scale="x"),
        "`scale` has an invalid value.*'x'",
    ),
    "attention, capped at 0": (
        lambda m: attention(attn_logits_soft_cap=0),
        "`attn_logits_soft_cap` has an invalid value.*above 0",
    ),
    "attention, capped below 0": (lambda m: attention(attn_logits_soft_cap=-1.0), "above 0"),
    "attention, capped at text": (lambda m: attention(attn_logits_soft_cap="x"), "above 0"),
    # ---------------------------------------------------------------------------------- layers
    "outputs in half": (
        lambda m: mp.layers.WithDtype(dense(), output_dtype="half"),
        "output_dtype='half'.*float16, bfloat16, float32, float64 or None",
    ),
    "outputs in a misspelt dtype": (
        lambda m: mp.layers.WithDtype(dense(), output_dtype="flaot16"),
        'Did you mean "float16"',
    ),
    "outputs in whole numbers": (
        lambda m: mp.layers.WithDtype(dense(), output_dtype="int32"),
        "is not a float dtype",
    ),
    "outputs in a number": (
        lambda m: mp.layers.WithDtype(dense(), output_dtype=16),
        "is not a float dtype",
    ),
    # -------------------------------------------------------------------------------- converting
    "a dry run by a word": (lambda m: mp.convert(m, dry_run="no"), SWITCH % "dry_run"),
    "a dry run by a number": (lambda m: mp.convert(m, dry_run=0), SWITCH % "dry_run"),
    "a dry run by None": (lambda m: mp.convert(m, dry_run=None), SWITCH % "dry_run"),
    "safe layers by a word": (lambda m: mp.convert(m, safe_layers="yes"), SWITCH % "safe_layers"),
    "safe layers by a list": (lambda m: mp.convert(m, safe_layers=[]), SWITCH % "safe_layers"),
    "converting None": (lambda m: mp.convert(None), "Only a Keras model can be converted"),
    "converting a class": (lambda m: mp.convert(keras.Sequential), "Only a Keras model"),
    "converting what is not built": (lambda m: mp.convert(dense()), "is not built"),
    "converting by no policy": (lambda m: mp.convert(m, None), NO_CONFIG),
    "converting by another policy": (lambda m: mp.convert(m, "half"), "Unknown policy name"),
    "converting by a list": (lambda m: mp.convert(m, []), NO_CONFIG),
    "converting by other rules": (lambda m: mp.convert(m, rules="all"), "Unknown rule set"),
    "converting by a number for rules": (lambda m: mp.convert(m, rules=3), "not a mapping"),
    "converting by an empty pattern": (
        lambda m: mp.convert(m, rules={"": "float32"}),
        "pattern of a rule is empty",
    ),
    "converting by a pattern of no layer": (
        lambda m: mp.convert(m, rules={"nowhere": "float32"}),
        "not match any layer path",
    ),
    "variables in True": (lambda m: mp.convert(m, variables=True), "variables=True"),
    "saving None": (lambda m: mp.save_for_stock_keras(None, "a.keras"), "Only a Keras model"),
    "saving to nowhere": (lambda m: mp.save_for_stock_keras(m, ""), "ends in"),
    "turning None": (
        lambda m: mp.Model.from_keras(None),
        "Only a Keras model can be passed to from_keras",
    ),
    "turning a layer": (lambda m: mp.Model.from_keras(dense()), "Only a Keras model"),
    "turning with a word": (
        lambda m: mp.Model.from_keras(m, auto_scale_loss="no"),
        SWITCH % "auto_scale_loss",
    ),
    # ------------------------------------------------------------------------------------ lint
    "lint of None": (lambda m: mp.lint(None), "Only a Keras model can be checked"),
    "lint of a class": (lambda m: mp.lint(keras.Model), "Only a Keras model can be checked"),
    "lint with text": (lambda m: mp.lint(m, "abc"), "`x` is not a batch.*'abc' of type str"),
    "lint with a number": (lambda m: mp.lint(m, 3.0), "`x` is not a batch"),
    "lint with nothing": (lambda m: mp.lint(m, []), "`x` is not a batch"),
    "lint with an object": (lambda m: mp.lint(m, NoTensor()), "`x` is not a batch"),
    "lint with another batch": (
        lambda m: mp.lint(m, np.ones((2, 7))),
        r"does not fit the inputs of this model.*\(2, 7\).*\(None, 4\)",
    ),
    "lint with two batches": (
        lambda m: mp.lint(m, [np.ones((2, 4))] * 2),
        "does not fit the inputs",
    ),
    "lint with complex numbers": (lambda m: mp.lint(m, np.ones((2, 4)) * 1j), "real numbers"),
    "a finding of another severity": (
        lambda m: mp.Finding("bad", "a", "b", "c", "d"),
        "Received: 'bad'.*error, warning, hint",
    ),
    "a report of nothing": (lambda m: mp.LintReport(None), "`findings` has an invalid value"),
    "a report of text": (lambda m: mp.LintReport(("a",)), "`findings` has an invalid value"),
}


def assert_told(call, told, *given):
    with pytest.raises(KerasMPError, match=told) as caught:
        call(*given)
    assert "Received: " in str(caught.value)
    assert "Expected: " in str(caught.value)
    assert caught.value.expected
    assert caught.value.fix


@pytest.fixture(scope="module")
def model():
    inputs = keras.Input((4,))
    return keras.Model(inputs, dense()(dense()(inputs)))


@pytest.mark.unit
@pytest.mark.parametrize(("call", "told"), PURE.values(), ids=PURE)
def test_bad_input_raises_the_error_of_the_table(call, told, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def state():
        layers = [(layer.name, type(layer), layer.dtype_policy.name) for layer in model.layers]
        return type(model), layers, vars(model).keys(), model.get_weights()

    policy, (*before, weights) = keras.config.dtype_policy(), state()
    assert_told(call, told, model)
    *after, same = state()
    assert after == before
    assert all(map(np.array_equal, same, weights))
    assert keras.config.dtype_policy() is policy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.unit
@pytest.mark.parametrize("name", ["a dry run by a word", "a schedule that switches by a word"])
def test_a_flag_that_is_not_a_bool_is_the_same_error_everywhere(name, model):
    call, told = PURE[name]
    with pytest.raises(ArgumentTypeError, match=told):
        call(model)


@pytest.mark.unit
def test_reductions_of_nothing_are_those_of_keras():
    for name in ("sum", "cumsum", "sigmoid"):
        ours, keras_own = getattr(mp.ops, name)([]), getattr(ops, name)(ops.array([]))
        np.testing.assert_array_equal(ops.convert_to_numpy(ours), ops.convert_to_numpy(keras_own))
    with pytest.raises(TypeError, match=r"sum\(\) missing 1 required positional argument: 'x'"):
        mp.ops.sum()


# ---------------------------------------------------------------------------------- the optimizer

GOOD, BAD = ([64.0, 64.0], [64.0]), ([NAN, 1.0], [1.0])
UNKNOWN = r"Unknown variable.*Received: %s\. Expected: variables among v0, v1\. .*one optimizer"
NO_LIST = "`%s` is not a list"
NO_GRADIENT = r"A gradient is not a numeric tensor\. Received: .* for v0"
NO_PAIR = "An item of `grads_and_vars` is not a pair"
NO_RATE = r"`learning_rate` has an invalid value\. Received: "
NO_SCHEDULE = "%s does not meet the contract of a loss-scale schedule"


def tensors(*values):
    return [ops.convert_to_tensor(np.asarray(value, "float32")) for value in values]


def variables_of(*values):
    return [keras.Variable(np.asarray(v, "float32"), name=f"v{i}") for i, v in enumerate(values)]


def complex_gradient():
    return ops.convert_to_tensor(np.array([1 + 1j, 1.0], "complex64"))


def stateless(state=None, grads=GOOD, first=0):
    """Return a call of `stateless_apply` with some of the values that it needs."""
    return lambda o, v: o.stateless_apply(
        [x.value for x in o.variables[state:]], tensors(*grads), [x.value for x in v[first:]]
    )


def stateless_with(grads):
    return lambda o, v: o.stateless_apply(
        [x.value for x in o.variables], grads(), [x.value for x in v]
    )


def setting(name, value):
    return lambda o, v: setattr(o, name, value)


def wrapping(**settings):
    return lambda o, v: mp.LossScaleOptimizer("sgd", **settings)


def weights_with(value, place=3):
    def call(optimizer, _):
        weights = optimizer.get_weights()
        weights[place] = np.asarray(value)
        optimizer.set_weights(weights)

    return call


def owning(name="Own", **parts):
    """Return a user-defined schedule with these methods and default ones; None leaves one out."""
    usual = {
        "initial_scale": 8.0,
        "min_scale": 1.0,
        "max_scale": 16.0,
        "update": lambda _, state, finite: state,
    }
    parts = {key: value for key, value in (usual | parts).items() if value is not None}
    return types.new_class(name, (mp.LossScale,), exec_body=lambda space: space.update(parts))()


def own(told, **parts):
    return lambda o, v: mp.LossScaleOptimizer("sgd", loss_scale=owning(**parts)), told


def returning(**changes):
    return lambda _, state, finite: {**state, **changes}


NO_STATE = NO_SCHEDULE % "Own"
# For an optimizer `o` in which no value is 0, and its variables `v`.
STEPS = {
    "no gradients for variables": (
        lambda o, v: o.apply([], v),
        "Received: 0 gradients for 2 variables",
    ),
    "too few gradients": (
        lambda o, v: o.apply(tensors(GOOD[0]), v),
        "Received: 1 gradients for 2 variables. Expected: one gradient, or None, for each",
    ),
    "too few, no variables": (
        lambda o, v: o.apply(tensors(GOOD[0])),
        "Received: 1 gradients for 2 variables",
    ),
    "too many gradients": (
        lambda o, v: o.apply(tensors(*GOOD, [1.0]), v),
        "Received: 3 gradients for 2 variables",
    ),
    "too many, no variables": (
        lambda o, v: o.apply(tensors(*GOOD, [1.0])),
        "Received: 3 gradients for 2 variables",
    ),
    "too few, not finite": (
        lambda o, v: o.apply(tensors(BAD[0]), v),
        "Received: 1 gradients for 2 variables",
    ),
    "an unknown variable": (
        lambda o, v: o.apply(tensors(*GOOD), [v[0], *variables_of([1.0])]),
        UNKNOWN % "v0, v0",
    ),
    "unknown variables": (
        lambda o, v: o.apply(tensors(*GOOD), variables_of([1.0, 2.0], [3.0])),
        UNKNOWN % "v0, v1",
    ),
    "unknown variables, pairs": (
        lambda o, v: o.apply_gradients(
            [*zip(tensors(*GOOD), variables_of([1.0, 2.0], [3.0]), strict=True)]
        ),
        UNKNOWN % "v0, v1",
    ),
    "no variables": (lambda o, v: o.apply(tensors(*GOOD), [3, "w"]), UNKNOWN % "3, w"),
    "all None": (lambda o, v: o.apply([None, None], v), "No gradients provided for any variable"),
    "all None, no variables": (
        lambda o, v: o.apply([None, None]),
        "No gradients provided for any variable.*Received: 2 gradients, all None",
    ),
    # ------------------------------------------------------------------------------- gradients
    "gradients of text": (lambda o, v: o.apply("ab", v), NO_LIST % "grads"),
    "a number of gradients": (lambda o, v: o.apply(2, v), NO_LIST % "grads"),
    "no list of gradients": (lambda o, v: o.apply(None, v), NO_LIST % "grads"),
    "a dict of gradients": (
        lambda o, v: o.apply(dict(zip("ab", tensors(*GOOD), strict=True)), v),
        NO_LIST % "grads" + r".*list\(values.values\(\)\)",
    ),
    "a variable for a list": (
        lambda o, v: o.apply(tensors(*GOOD), v[0]),
        NO_LIST % "trainable_variables",
    ),
    "a gradient of text": (lambda o, v: o.apply(["ab", [1.0]], v), NO_GRADIENT),
    "a gradient of texts": (lambda o, v: o.apply([["a", "b"], [1.0]], v), NO_GRADIENT),
    "a gradient that is a dict": (lambda o, v: o.apply([{}, [1.0]], v), NO_GRADIENT),
    "a gradient of holes": (lambda o, v: o.apply([[None, 1.0], [1.0]], v), NO_GRADIENT),
    "an object for a gradient": (lambda o, v: o.apply([NoTensor(), [1.0]], v), "NoTensor"),
    "a symbol for a gradient": (
        lambda o, v: o.apply([keras.KerasTensor((2,)), [1.0]], v),
        NO_GRADIENT,
    ),
    "a complex gradient": (
        lambda o, v: o.apply([complex_gradient(), *tensors([1.0])], v),
        r"lose its imaginary part\. Received: complex64 for v0",
    ),
    "a list of complex numbers": (
        lambda o, v: o.apply([[1j, 1.0], [1.0]], v),
        "lose its imaginary part",
    ),
    "a gradient of another shape": (
        lambda o, v: o.apply(tensors([1.0, 2.0, 3.0], [1.0]), v),
        r"Received: \(3,\) for v0 of shape \(2,\)\. Expected: a gradient of shape \(2,\)",
    ),
    "a gradient of more axes": (
        lambda o, v: o.apply(tensors([[1.0, 2.0]], [1.0]), v),
        r"Received: \(1, 2\) for v0",
    ),
    "gradients in another order": (
        lambda o, v: o.apply(tensors(GOOD[1], GOOD[0]), v),
        r"Received: \(2,\) for v1 of shape \(1,\).*the same order",
    ),
    "a pair of one": (lambda o, v: o.apply_gradients([(1.0,)]), NO_PAIR + r".*\(1.0,\) .*length 1"),
    "a pair of three": (lambda o, v: o.apply_gradients([(1.0, v[0], 1)]), NO_PAIR + ".*length 3"),
    "no pairs": (lambda o, v: o.apply_gradients([1.0, 2.0]), NO_PAIR),
    "a number for pairs": (lambda o, v: o.apply_gradients(3), NO_LIST % "grads_and_vars"),
    "a dict for pairs": (lambda o, v: o.apply_gradients({}), NO_LIST % "grads_and_vars"),
    "unscaling a number": (lambda o, v: o.get_unscaled_gradients(3), NO_LIST % "grads"),
    "unscaling text": (lambda o, v: o.get_unscaled_gradients(["ab"]), "not a numeric tensor"),
    "unscaling complex numbers": (
        lambda o, v: o.get_unscaled_gradients([complex_gradient()]),
        "imaginary part",
    ),
    "unscaling for a number": (
        lambda o, v: o.get_unscaled_gradients(tensors(*GOOD), 3),
        NO_LIST % "trainable_variables",
    ),
    # ------------------------------------------------------------------------------------ loss
    "a loss of text": (lambda o, v: o.scale_loss("loss"), "The loss is not a numeric tensor"),
    "no loss": (lambda o, v: o.scale_loss(None), "The loss is not a numeric tensor"),
    "a dict of losses": (lambda o, v: o.scale_loss({"a": 1.0}), "The loss is not a numeric"),
    "a complex loss": (lambda o, v: o.scale_loss(1j), "The loss is complex"),
    "a complex loss from a function": (lambda o, v: o.get_scaled_loss(lambda: 1j)(), "complex"),
    "a note of text": (lambda o, v: o.note_loss("loss"), "The loss is not a numeric tensor"),
    "a note of None": (lambda o, v: o.note_loss(None), "The loss is not a numeric tensor"),
    # -------------------------------------------------------------------------------- settings
    "a rate of NaN": (setting("learning_rate", NAN), NO_RATE + "nan"),
    "an infinite rate": (setting("learning_rate", np.float32(INF)), NO_RATE),
    "a rate of text": (setting("learning_rate", "fast"), NO_RATE + "'fast' of type str"),
    "no rate": (setting("learning_rate", None), NO_RATE + "None"),
    "a rate of True": (setting("learning_rate", True), NO_RATE + "True"),
    "an optimizer with a rate of NaN": (
        lambda o, v: mp.LossScaleOptimizer(keras.optimizers.Adam(NAN)),
        NO_RATE + "nan",
    ),
    "an optimizer with an infinite rate": (
        lambda o, v: mp.LossScaleOptimizer(keras.optimizers.SGD(INF)),
        NO_RATE + "inf",
    ),
    "a scale of text": (setting("loss_scale", "8"), INVALID % "loss_scale"),
    "a scale of NaN": (setting("loss_scale", NAN), "the range of float32"),
    "a scale of a list": (setting("loss_scale", [8.0]), INVALID % "loss_scale"),
    "a schedule after build": (setting("schedule", FIXED(2)), "The schedule cannot be replaced"),
    "another optimizer inside": (
        setting("inner_optimizer", "sgd"),
        "The inner optimizer cannot be",
    ),
    "fused by a word": (setting("fused", "no"), SWITCH % "fused"),
    "skips that advance by a word": (
        setting("skips_advance_schedules", "yes"),
        SWITCH % "skips_advance_schedules",
    ),
    "made fused by a word": (wrapping(fused="no"), SWITCH % "fused"),
    "made of another scale": (wrapping(loss_scale="half"), "No loss-scale schedule"),
    "weights of a number": (lambda o, v: o.set_weights(3), NO_LIST % "weights"),
    "no weights": (lambda o, v: o.set_weights(None), NO_LIST % "weights"),
    "too few weights": (lambda o, v: o.set_weights([]), "Received: 0 values"),
    "a weight of text": (weights_with("8"), "does not fit.*nothing has changed"),
    "a weight of None": (weights_with(None), "does not fit"),
    "a complex weight": (weights_with(8j), "does not fit"),
    "a weight of another shape": (weights_with([8.0, 8.0]), "does not fit"),
    "a count that is a fraction": (weights_with(0.5, 2), "does not fit"),
    "a store of nothing": (lambda o, v: o.load_own_variables(None), "`store` is not a mapping"),
    "an optimizer of no configuration": (
        lambda o, v: mp.LossScaleOptimizer.from_config(None),
        "The configuration is not a dict",
    ),
    "an optimizer of an empty one": (
        lambda o, v: mp.LossScaleOptimizer.from_config({}),
        "has no inner optimizer",
    ),
    "an optimizer of half of one": (
        lambda o, v: mp.LossScaleOptimizer.from_config({"name": "a", "loss_scale": 8.0}),
        r"Received: the keys \['loss_scale', 'name'\]",
    ),
    "compiled with a word": (
        lambda o, v: mp.Sequential([dense()]).compile("sgd", auto_scale_loss="no"),
        SWITCH % "auto_scale_loss",
    ),
    # ----------------------------------------------------------------------- user-defined schedules
    "a schedule without a first scale": own(
        NO_STATE + ".*no attribute `initial_scale`", initial_scale=None
    ),
    "a schedule without a floor": own(NO_STATE + ".*no attribute `min_scale`", min_scale=None),
    "a schedule with a floor of text": own(INVALID % "min_scale", min_scale="1"),
    "a schedule above its ceiling": own("do not enclose", initial_scale=32.0),
    "a schedule that measures what nobody knows": own(
        r"measures = \('noise',\)", measures=("noise",)
    ),
    "a schedule whose first state is None": own(NO_STATE + ".*None from init", init=lambda _: None),
    "a schedule whose first state lacks a scale": own(
        'from init.*"scale"', init=lambda _: {"step_counter": 0}
    ),
    "a schedule whose first state holds text": own(
        "'x': 'y' from init", init=lambda _: {"scale": 1.0, "step_counter": 0, "x": "y"}
    ),
    "a schedule that counts in fractions": own(
        "'step_counter': 0.5", init=lambda _: {"scale": 1.0, "step_counter": 0.5}
    ),
    "a schedule whose update returns None": own(
        r"None from update\(init\(\), finite=True\)", update=lambda *_: None
    ),
    "a schedule whose update drops a key": own(
        r"no \['step_counter'\] from update", update=lambda *_: {"scale": 8.0}
    ),
    "a schedule whose update gives NaN": own(
        "the scale nan from update", update=returning(scale=NAN)
    ),
    "a schedule whose update gives 0": own("the scale 0", update=returning(scale=0.0)),
    "a schedule whose update gives text": own(
        "The scale is not a numeric tensor", update=returning(scale="8")
    ),
    "a schedule whose update gives two": own(
        "the scale .* from update", update=returning(scale=[8.0, 8.0])
    ),
    "a schedule that breaks at overflows": own(
        r"None from update\(init\(\), finite=False\)",
        update=lambda _, state, finite: state if finite else None,
    ),
}

if BACKEND == "tensorflow":
    STEPS["stateless"] = stateless(), "not supported with the TensorFlow backend.*Received: "
else:
    STEPS |= {
        "stateless, a gradient too few": (stateless(grads=GOOD[:1]), "`grads` does not match"),
        "stateless, a value too few": (stateless(state=1), "`optimizer_variables` does not match"),
        "stateless, a weight too few": (stateless(first=1), "`trainable_variables` does not match"),
        "stateless, all None": (
            stateless_with(lambda: [None, None]),
            "No gradients provided for any variable",
        ),
        "stateless, a number": (stateless_with(lambda: 3), NO_LIST % "grads"),
        "stateless, text": (stateless_with(lambda: ["a", [1.0]]), NO_GRADIENT),
        "stateless, complex": (
            stateless_with(lambda: [complex_gradient(), [1.0]]),
            "imaginary part",
        ),
        "stateless, another shape": (stateless(grads=[[1.0], [1.0, 2.0]]), "shape of its variable"),
    }


@pytest.fixture(scope="module")
def used():
    """Return an optimizer in which no value is 0, and its variables."""
    variables = variables_of([1.0, 2.0], [3.0])
    inner = keras.optimizers.Adam(0.1, use_ema=True, gradient_accumulation_steps=2)
    optimizer = mp.LossScaleOptimizer(inner, loss_scale=64.0)
    for grads in (GOOD, BAD, GOOD, GOOD):
        optimizer.apply(tensors(*grads), variables)
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (3, 1)
    return optimizer, variables


@pytest.mark.parametrize(("call", "told"), STEPS.values(), ids=STEPS)
def test_an_error_comes_before_any_change(call, told, used):
    optimizer, variables = used

    def state():
        values = [ops.convert_to_numpy(v) for v in (*variables, *optimizer.variables)]
        return values, {name for name in vars(optimizer) if name != "_lock"}, optimizer.fused

    (before, *others), applied = state(), optimizer.applied_steps
    assert_told(call, told, optimizer, variables)
    after, *same = state()
    assert same == others
    for one, other in zip(after, before, strict=True):
        np.testing.assert_array_equal(one, other)
    # And the next step is a normal one.
    optimizer.apply(tensors(*GOOD), variables)
    assert (optimizer.applied_steps, optimizer.skipped_steps) == (applied + 1, 1)


@pytest.mark.backend("tensorflow")
def test_a_graph_without_gradients_is_an_error(used):
    import tensorflow as tf

    optimizer, variables = used
    # In a function that AutoGraph converts, TensorFlow changes the type of the error.
    with pytest.raises(Exception, match="No gradients provided for any variable"):
        tf.function(lambda: optimizer.apply([None, None], variables))()


ON_STATELESS = "not supported" if BACKEND == "tensorflow" else "needs a built optimizer"


@pytest.mark.parametrize(
    ("call", "arguments", "error", "told"),
    [
        ("apply", [[1.0]], LossScaleError, "call build"),
        ("apply", [[1.0], [3]], ArgumentTypeError, "An item of `trainable_variables` is not"),
        ("apply", [["a"], None], LossScaleError, "call build"),
        ("build", [[3]], ArgumentTypeError, "An item of `var_list` is not a.*3 of type"),
        ("build", [["w"]], ArgumentTypeError, "is not a variable"),
        ("build", [None], ArgumentTypeError, "`var_list` is not a list"),
        ("build", [3], ArgumentTypeError, "`var_list` is not a list"),
        ("build", [{}], ArgumentTypeError, "`var_list` is not a list"),
        ("set_weights", [[1.0]], LossScaleError, "needs a built optimizer"),
        ("stateless_apply", [[], [1.0], []], LossScaleError, ON_STATELESS),
        ("__setattr__", ["schedule", 3], ArgumentTypeError, "`schedule` is not a loss-scale"),
        ("__setattr__", ["inner_optimizer", 3], ArgumentTypeError, "is not an optimizer"),
        ("skipped_last", [], LossScaleError, "needs a built optimizer"),
        ("__setattr__", ["loss_scale", 8.0], LossScaleError, "cannot be set before `build`"),
    ],
)
def test_a_failed_call_leaves_an_unbuilt_optimizer_unbuilt(call, arguments, error, told):
    optimizer = mp.LossScaleOptimizer("adam")
    before = vars(optimizer).copy()
    with pytest.raises(error, match=told):
        getattr(optimizer, call)(*arguments)
    assert not optimizer.built
    assert not optimizer.inner_optimizer.built
    assert vars(optimizer).keys() == before.keys()
    assert optimizer.schedule is before["schedule"]


@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_a_failed_build_leaves_no_variables_behind(inner, monkeypatch):
    optimizer = mp.LossScaleOptimizer(inner)
    variables = variables_of([1.0, 2.0], [3.0])
    cls = type(optimizer.inner_optimizer)
    build = cls.build

    def breaks(self, given):
        build(self, given)
        raise RuntimeError("no memory")

    monkeypatch.setattr(cls, "build", breaks)
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.build(variables)
    assert (optimizer.built, optimizer.inner_optimizer.built) == (False, False)
    monkeypatch.undo()
    optimizer.build(variables)
    other = mp.LossScaleOptimizer(inner)
    other.build(variables)
    assert [v.name for v in optimizer.variables] == [v.name for v in other.variables]
    optimizer.apply(tensors([0.0, 2.0**15], [0.0]), variables)
    assert optimizer.applied_steps == 1


@pytest.mark.parametrize(
    "gradient",
    [[2.0, 4.0], (2.0, 4.0), np.array([2.0, 4.0]), [2, 4], np.float16([2, 4])],
    ids=lambda g: f"{type(g).__name__} {g}",
)
def test_gradients_that_keras_accepts_are_accepted(gradient):
    weight, number = variables_of([1.0, 2.0], 3.0)
    optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=2.0)
    optimizer.apply([gradient, 2.0], [weight, number])
    assert ops.convert_to_numpy(weight).tolist() == [0.0, 0.0]
    assert float(ops.convert_to_numpy(number)) == 2.0
    optimizer.apply([4.0, 0.0])  # one number for all
    assert ops.convert_to_numpy(weight).tolist() == [-2.0, -2.0]
    optimizer.apply([[NAN, 1.0], 1.0])
    assert optimizer.last_step_skipped
