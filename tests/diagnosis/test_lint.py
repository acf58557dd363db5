"""Each rule of lint: a model that it finds fault with, and one that it leaves in peace."""

import keras
import numpy as np
import pytest

import kerasmp as mp
from kerasmp.diagnosis.sizes import MULTIPLE

layers = keras.layers

# NumPy and JAX say so of the constants that are looked for.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")


def made(*parts, shape=(8,), policy="mixed_float16", module=keras, **arguments):
    """Return a Sequential; a float32 layer comes last, unless `bare`."""
    bare = arguments.pop("bare", False)
    with mp.policy_scope(policy):
        made_now = [part() for part in parts]
    tail = [] if bare else [layers.Dense(8, dtype="float32", name="tail")]
    return module.Sequential([keras.Input(shape, **arguments), *made_now, *tail])


def found(model, rule, x=None):
    return [each for each in mp.lint(model, x) if each.rule == rule]


def only(model, rule, x=None):
    [each] = found(model, rule, x)
    return each


def dense(units=8, **settings):
    return lambda: layers.Dense(units, **settings)


def compiled(model, loss, optimizer=None):
    model.compile(optimizer or mp.LossScaleOptimizer("sgd"), loss)
    return model


# float16-head


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_float16_head_of_probabilities_is_an_error(activation):
    each = only(made(dense(name="head", activation=activation), bare=True), "float16-head")
    assert each.severity == "error"
    assert each.place.endswith("head")


def test_a_softmax_of_its_own_is_an_error_too():
    assert only(made(dense(), layers.Softmax, bare=True), "float16-head").severity == "error"


def test_another_float16_head_is_a_warning():
    each = only(made(dense(name="head"), bare=True), "float16-head")
    assert each.severity == "warning"
    assert "DenseHead" in each.remedy


def test_heads_in_float32_or_bfloat16_are_in_peace():
    heads = [dense(dtype="float32"), lambda: mp.layers.DenseHead(8, activation="softmax")]
    for head in heads:
        assert not found(made(dense(), head, bare=True), "float16-head")
    assert not found(made(dense(), bare=True, policy="mixed_bfloat16"), "float16-head")


def test_a_model_of_ours_that_casts_its_outputs_is_in_peace_unless_they_are_probabilities():
    def model(activation):
        with pytest.warns(mp.errors.PolicyWarning):
            scope = mp.policy_scope("compute=float16,output=float32")
        with scope:
            head = layers.Dense(8, activation=activation)
            return mp.Sequential([keras.Input((8,)), head])

    assert not found(model(None), "float16-head")
    assert found(model("softmax"), "float16-head")


def test_heads_are_found_inside_of_models():
    inner = made(dense(name="head"), bare=True)
    inputs = keras.Input((8,))
    assert only(keras.Model(inputs, inner(inputs)), "float16-head").place.endswith("head")


# float16-probabilities


CROSS_ENTROPIES = [
    "categorical_crossentropy",
    "binary_crossentropy",
    keras.losses.SparseCategoricalCrossentropy(),
    keras.losses.categorical_crossentropy,
]


@pytest.mark.parametrize("loss", CROSS_ENTROPIES)
def test_a_cross_entropy_on_float16_probabilities_is_an_error(loss):
    model = compiled(made(dense(activation="softmax"), bare=True), loss)
    assert only(model, "float16-probabilities").severity == "error"


@pytest.mark.parametrize(
    "loss", ["mse", keras.losses.CategoricalCrossentropy(from_logits=True), None]
)
def test_other_losses_are_in_peace(loss):
    assert not found(compiled(made(dense(), bare=True), loss), "float16-probabilities")


def test_float32_probabilities_are_in_peace():
    model = compiled(made(dense(activation="softmax", dtype="float32"), bare=True), "bce")
    assert not found(model, "float16-probabilities")


def test_each_loss_belongs_to_its_output():
    inputs = keras.Input((8,))
    half = layers.Dense(8, dtype="mixed_float16")(inputs)
    full = layers.Dense(8, activation="softmax", dtype="float32")(inputs)
    model = keras.Model(inputs, [half, full])
    assert not found(compiled(model, ["mse", "categorical_crossentropy"]), "float16-probabilities")
    assert found(compiled(model, ["categorical_crossentropy", "mse"]), "float16-probabilities")


# unscaled


def test_float16_without_scaling_is_an_error():
    model = compiled(made(dense()), "mse", keras.optimizers.SGD())
    assert only(model, "unscaled").severity == "error"


def test_scaled_bfloat16_frozen_not_compiled_and_ours_are_in_peace():
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


# half-master


class OwnWeight(layers.Layer):
    weight_dtype = "float16"

    def build(self, shape):
        self.weight = self.add_weight(shape=(shape[-1],), dtype=self.weight_dtype, name="mine")

    def call(self, inputs):
        return inputs * keras.ops.cast(self.weight, inputs.dtype)


class FloatWeight(OwnWeight):
    weight_dtype = "float32"


def test_a_half_precision_master_is_an_error():
    each = only(made(OwnWeight), "half-master")
    assert each.severity == "error"
    assert "(mine)" in each.reason
    assert "(kernel, bias)" in only(made(dense(), policy="float16"), "half-master").reason


def test_float32_masters_and_frozen_weights_are_in_peace():
    assert not found(made(FloatWeight), "half-master")
    frozen = made(OwnWeight)
    frozen.layers[0].trainable = False
    assert not found(frozen, "half-master")


# vanishing-epsilon, possibly-vanishing


class Divides(layers.Layer):
    def __init__(self, epsilon=1e-8, **settings):
        super().__init__(**settings)
        self.epsilon = epsilon

    def call(self, inputs):
        return inputs / (keras.ops.max(inputs, -1, keepdims=True) + self.epsilon)


class SmallNumber(layers.Layer):
    def call(self, inputs):
        return inputs / (keras.ops.max(inputs, -1, keepdims=True) + 1e-9)


class CarefulSmallNumber(layers.Layer):
    def call(self, inputs):
        wide = keras.ops.cast(inputs, "float32")
        return keras.ops.cast(wide / (wide + 1e-9), inputs.dtype)


def test_an_epsilon_that_vanishes_is_a_warning():
    each = only(made(Divides), "vanishing-epsilon")
    assert each.severity == "warning"
    assert "1e-08" in each.reason


def test_larger_epsilons_stock_layers_and_float32_are_in_peace():
    assert not found(made(lambda: Divides(1e-6)), "vanishing-epsilon")
    assert not found(made(lambda: Divides(0.0)), "vanishing-epsilon")
    assert not found(made(lambda: Divides(dtype="float32")), "vanishing-epsilon")
    assert not found(made(lambda: layers.LayerNormalization(epsilon=1e-9)), "vanishing-epsilon")


def test_a_small_number_in_the_source_is_possibly_a_fault():
    each = only(made(SmallNumber), "possibly-vanishing")
    assert each.severity == "warning"
    assert each.reason.startswith("Possible")
    assert "`call`" in each.reason


def test_code_that_names_float32_and_layers_in_float32_are_in_peace():
    assert not found(made(CarefulSmallNumber), "possibly-vanishing")
    assert not found(made(lambda: SmallNumber(dtype="float32")), "possibly-vanishing")
    assert not found(made(Divides), "possibly-vanishing")  # a constructor computes nothing


# infinite-constant, possibly-infinite


class MaskedSum(layers.Layer):
    def call(self, inputs):
        mask = keras.ops.cast(inputs > 0, inputs.dtype)
        return inputs + (1.0 - mask) * -1e9


class MaskedChoice(layers.Layer):
    def call(self, inputs):
        return keras.ops.where(inputs > 0, inputs, -1e9)


class Clips(layers.Layer):
    def call(self, inputs):
        return keras.ops.clip(inputs, -1e9, 1e9)


class Modest(layers.Layer):
    def call(self, inputs):
        return keras.ops.where(inputs > 0, inputs, -3e4) + 6e4 * inputs


X = np.ones((8, 8), "float32")
HAS_GRAPH = keras.backend.backend() != "torch"


@pytest.mark.backend("tensorflow", "jax")
def test_computing_with_an_infinite_constant_is_an_error():
    model = made(lambda: MaskedSum(name="mine"))
    each = only(model, "infinite-constant", X)
    assert each.severity == "error"
    assert each.place == model.layers[0].path
    assert not found(model, "possibly-infinite", X)  # for the graph has told


@pytest.mark.backend("tensorflow", "jax")
def test_choosing_one_is_a_warning():
    assert only(made(MaskedChoice), "infinite-constant", X).severity == "warning"


@pytest.mark.backend("tensorflow", "jax")
def test_constants_in_arrays_are_seen():
    class Adds(layers.Layer):
        def call(self, inputs):
            return inputs + keras.ops.cast(np.full((8,), -1e9, "float32"), inputs.dtype)

    assert only(made(Adds), "infinite-constant", X).severity == "error"


@pytest.mark.parametrize(
    "layer",
    [Clips, Modest, lambda: MaskedSum(dtype="float32"), lambda: layers.Reshape((8, 1))],
)
def test_harmless_constants_are_in_peace(layer):
    assert not found(made(layer, layers.Flatten), "infinite-constant", X)


def test_pooling_is_in_peace():
    model = made(lambda: layers.MaxPooling1D(2, padding="same"), layers.Flatten, shape=(8, 8))
    assert not mp.lint(model, np.ones((8, 8, 8), "float32")).warnings


def test_without_data_a_large_number_in_the_source_is_possibly_a_fault():
    for layer in (MaskedSum, MaskedChoice):
        each = only(made(layer), "possibly-infinite")
        assert each.severity == "warning"
        assert "Possible" in each.reason
    assert not found(made(Modest), "possibly-infinite")
    assert bool(found(made(MaskedSum), "possibly-infinite", X)) != HAS_GRAPH


# float-ids


def embedding(size, policy="mixed_float16", **arguments):
    parts = (lambda: layers.Embedding(size, 8), layers.Flatten)
    return made(*parts, shape=(4,), policy=policy, **arguments)


def test_ids_that_come_as_floats_are_an_error():
    each = only(embedding(2050), "float-ids")
    assert each.severity == "error"
    assert "2048" in each.reason
    assert "int32" in each.remedy
    assert found(embedding(258, "mixed_bfloat16"), "float-ids")


def test_whole_numbers_few_ids_and_float32_are_in_peace():
    assert not found(embedding(5000, dtype="int32"), "float-ids")
    assert not found(embedding(2049), "float-ids")
    assert not found(embedding(257, "mixed_bfloat16"), "float-ids")
    assert not found(embedding(5000, "float32"), "float-ids")


# input-range


LARGE = np.full((8, 8), 7e4, "float32")


def test_values_that_float16_cannot_hold_are_an_error():
    each = only(made(dense()), "input-range", LARGE)
    assert each.severity == "error"
    assert "70000" in each.reason
    assert not found(made(dense()), "input-range", LARGE / 2)
    assert not found(made(dense()), "input-range")
    assert not found(made(dense()), "input-range", LARGE.astype("int32"))


def test_a_float32_layer_in_front_gives_peace():
    scaling = lambda: layers.Rescaling(1e-5, dtype="float32")  # noqa: E731 - as the others
    assert not found(made(scaling, dense()), "input-range", LARGE)
    assert found(made(lambda: layers.Rescaling(1e-5), dense()), "input-range", LARGE)


def test_only_the_input_that_is_too_large_is_named():
    small, large = keras.Input((8,), name="small"), keras.Input((8,), name="large")
    outputs = layers.Add(dtype="mixed_float16")([small, 2 * large])
    model = keras.Model({"small": small, "large": large}, layers.Dense(8)(outputs))
    each = only(model, "input-range", {"small": X, "large": LARGE})
    assert each.place == "input large"


def test_inputs_are_followed_into_models():
    inputs = keras.Input((8,))
    model = keras.Model(inputs, made(dense())(inputs))
    assert found(model, "input-range", LARGE)
    model = keras.Model(inputs, made(dense(), policy="float32")(inputs))
    assert not found(model, "input-range", LARGE)


class Own(keras.Model):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.dense = layers.Dense(8)

    def call(self, inputs):
        return self.dense(inputs)


def test_models_without_a_graph_cast_what_they_are_given():
    with mp.policy_scope("mixed_float16"):
        own = Own()
    with np.errstate(over="ignore"):
        assert found(own, "input-range", LARGE)
        assert not found(Own(), "input-range", LARGE)


# sizes


def test_sizes_that_miss_multiples_are_hints():
    first, second = found(made(dense(30), dense(8)), "sizes")
    assert first.severity == "hint"
    assert first.reason.startswith("output size 30:")
    assert second.reason.startswith("input size 30:")
    assert MULTIPLE == 8
    assert "batch size 7" in only(made(dense()), "sizes", X[:7]).reason


def test_sizes_in_peace():
    def convolution(channels, filters=8, **settings):
        part = lambda: layers.Conv2D(filters, 1, **settings)  # noqa: E731 - as the others
        return made(part, shape=(2, 2, channels), bare=True)

    assert not found(made(dense(16)), "sizes", X)
    assert not found(made(dense(30), policy="float32"), "sizes", X[:7])
    assert not found(convolution(3), "sizes")  # an image
    assert found(convolution(12), "sizes")
    assert not found(made(dense(10), bare=True), "sizes")  # classes
    assert found(made(dense(1001), bare=True), "sizes")
    assert not found(convolution(32, 32, groups=32), "sizes")


def test_transposed_kernels_and_heads_of_attention_are_read_rightly():
    part = lambda: layers.Conv2DTranspose(12, 1)  # noqa: E731 - as the others
    model = made(part, layers.ReLU, shape=(2, 2, 16))
    assert only(model, "sizes").reason.startswith("output size 12:")
    inputs = keras.Input((4, 8))
    for layer in (layers.MultiHeadAttention(2, 6), layers.GroupQueryAttention(6, 2, 2)):
        layer.dtype_policy = "mixed_float16"
        assert "head size 6" in only(keras.Model(inputs, layer(inputs, inputs)), "sizes").reason


# ignores-policy


class Widens(layers.Layer):
    def call(self, inputs):
        return keras.ops.cast(inputs, "float32")


class Keeps(layers.Layer):
    def call(self, inputs):
        return 2 * inputs


def test_a_model_that_was_only_relabelled_is_a_warning():
    model = made(dense(), policy="float32")
    model.dtype_policy = "mixed_float16"
    each = only(model, "ignores-policy")
    assert each.severity == "warning"
    assert "convert" in each.remedy


def test_a_model_that_the_global_policy_did_not_reach_is_a_warning():
    model = made(dense(), policy="float32")
    with mp.policy_scope("mixed_float16"):
        assert "global policy" in only(model, "ignores-policy").reason
        assert not found(made(dense()), "ignores-policy")
    assert not found(model, "ignores-policy")


def test_a_layer_that_leaves_its_policy_is_a_warning():
    each = only(made(lambda: Widens(name="wide")), "ignores-policy")
    assert each.place.endswith("wide")
    assert "float32" in each.reason
    assert not found(made(Keeps), "ignores-policy")
    assert not found(made(lambda: Widens(dtype="float32"), dense()), "ignores-policy")
    assert not found(made(lambda: mp.layers.DenseHead(8)), "ignores-policy")


# unsafe-layer


def test_stock_layers_that_the_safe_rules_know_are_found():
    each = only(made(layers.UnitNormalization), "unsafe-layer")
    assert each.severity == "warning"
    assert "hazards 7, 8" in each.reason
    assert only(made(dense(activation="sigmoid")), "unsafe-layer").severity == "hint"
    assert not found(made(dense()), "unsafe-layer")
    assert not found(made(layers.UnitNormalization, policy="mixed_bfloat16"), "unsafe-layer")
    model = made(layers.UnitNormalization)
    mp.convert(model)
    assert not found(model, "unsafe-layer")


# The report


def test_the_report_is_sorted_counts_and_reads():
    model = compiled(made(dense(30), SmallNumber), "mse", keras.optimizers.SGD())
    report = mp.lint(model)
    assert [each.severity for each in report] == ["error", "warning", "hint", "hint"][: len(report)]
    assert len(report.errors) == len(report.warnings) == 1
    assert len(report) == len(str(report).splitlines())
    for each, line in zip(report, str(report).splitlines(), strict=True):
        assert all(part in line for part in (each.severity, each.place, each.rule, each.remedy))
    assert str(mp.lint(made(dense(), policy="float32"))) == "no findings"


def test_each_finding_comes_once():
    inputs = keras.Input((8,))
    shared = layers.UnitNormalization(dtype="mixed_float16")
    model = keras.Model(inputs, layers.Dense(8)(shared(shared(inputs))))
    assert len(found(model, "unsafe-layer")) == 1


def test_a_model_that_is_not_built_is_built_by_the_batch():
    with mp.policy_scope("mixed_float16"):
        own = Own()
    assert isinstance(mp.lint(own, X), mp.LintReport)
    assert own.built


def test_looking_changes_nothing():
    model = made(dense(), layers.BatchNormalization)
    model.compile(mp.LossScaleOptimizer("sgd"), "mse")
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    mp.lint(model, X)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    model.fit(X, X, verbose=0)
