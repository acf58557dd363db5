"""`diagnose` names the place and the cause of a fault, and finds none where there is none."""

import keras
import numpy as np
import pytest
from helpers.marks import full, full_on
from helpers.train_steps import OwnStep
from keras import ops

import kerasmp as mp

layers = keras.layers
X = np.random.default_rng(0).normal(size=(8, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")


class Fault(layers.Layer):
    """A layer of the user."""

    def __init__(self, function, **kwargs):
        super().__init__(name="fault", **kwargs)
        self.function = function

    def call(self, inputs):
        return self.function(inputs)

    def compute_output_shape(self, shape):
        return shape


class Branch(layers.Layer):
    """A branch with weights of its own whose gradients become 0."""

    def __init__(self):
        super().__init__(name="fault")
        self.dense = layers.Dense(8)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, inputs):
        return inputs + 1e-10 * self.dense(inputs)


def functional(parts):
    x = inputs = keras.Input((8,), name="data")
    for part in parts:
        x = part(x)
    return mp.Model(inputs, x)


def nested(parts):
    first, *rest = parts
    inputs = keras.Input((8,), name="data")
    inner = keras.Sequential([keras.Input((8,)), *rest], name="inner")
    return mp.Model(inputs, inner(first(inputs)))


class Subclass(mp.Model):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def call(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return inputs


KINDS = pytest.mark.parametrize("kind", [functional, nested, Subclass])
# For faults that are found in the same way in each kind.
ONE_OF_KINDS = pytest.mark.parametrize("kind", [functional, full(nested), full(Subclass)])


def diagnosed(kind, function, *, x=X, y=Y, half="float16", optimizer="sgd", **kwargs):
    """Return the diagnosis of a model with a fault between its layers."""
    keras.utils.set_random_seed(0)
    with mp.policy_scope(f"mixed_{half}"):
        fault = function() if isinstance(function, type) else Fault(function)
        parts = [layers.Dense(8, name="first"), fault, mp.layers.DenseHead(2, name="head")]
        model = kind(parts)
    model.compile(optimizer, "mse")
    return mp.diagnose(model, x, y, **kwargs)


def serious(diagnosis):
    return [
        (x.place.rpartition("/")[2], x.rule) for x in diagnosis.findings if x.severity != "hint"
    ]


def fixed(scale):
    return mp.LossScaleOptimizer("sgd", loss_scale=mp.FixedLossScale(scale))


def steep(x):
    """Have a large gradient between small ones."""
    return (x * 1e-4) * 1e4


FAULTS = {
    "overflow": (lambda x: ops.sqrt(ops.square(x * 2000)), "square", "not-finite"),
    "long sum": (lambda x: x + ops.sum(9e3 + x, -1, keepdims=True) / 8, "sum", "not-finite"),
    "division by zero": (lambda x: x + (x - x) / (x - x + 1e-8), "add", "underflow"),
    "root of zero": (lambda x: x + ops.sqrt(x - x), "sqrt", "nonfinite-float32"),
    "logarithm of zero": (lambda x: x + ops.log(x - x), "log", "nonfinite-float32"),
    "one branch": (Branch, "multiply", "gradient-underflow"),
}


@KINDS
@pytest.mark.parametrize("name", FAULTS)
def test_place_and_cause_of_a_fault(name, kind):
    function, place, rule = FAULTS[name]
    diagnosis = diagnosed(kind, function)
    assert (place, rule) in serious(diagnosis), str(diagnosis)


@KINDS
def test_gradients_that_overflow_where_outputs_do_not(kind):
    diagnosis = diagnosed(kind, steep, optimizer=fixed(2.0**15))
    assert serious(diagnosis) == [("multiply_1", "gradient-not-finite")], str(diagnosis)
    [each] = diagnosis.findings
    assert "Use a loss scale of" in each.remedy
    assert diagnosis.first_nonfinite("forward") is None
    assert diagnosis.first_nonfinite("backward") == each.place


DATA = {
    "NaN in the batch": ("x", (3, 2), np.nan),
    "inf in the labels": ("y", (3, 1), np.inf),
}


@ONE_OF_KINDS
@pytest.mark.parametrize("name", DATA)
def test_data_that_are_not_finite(name, kind):
    where, index, value = DATA[name]
    arrays = {"x": X.copy(), "y": Y.copy()}
    arrays[where][index] = value
    diagnosis = diagnosed(kind, ops.tanh, **arrays)
    assert serious(diagnosis) == [(where, "nonfinite-data")], str(diagnosis)
    assert "not the cause" in diagnosis.advice[0]


@ONE_OF_KINDS
@pytest.mark.parametrize(("value", "rule"), [(1e5, "weight-range"), (np.nan, "nonfinite-weights")])
def test_weights_that_do_not_fit(value, rule, kind):
    with mp.policy_scope("mixed_float16"):
        parts = [layers.Dense(8, name=name) for name in ("first", "second")]
        model = kind([*parts, mp.layers.DenseHead(2, name="head")])
    model.compile("sgd", "mse")
    model(X)
    kernel, bias = parts[1].get_weights()
    kernel[2, 2] = value
    parts[1].set_weights([kernel, bias])
    diagnosis = mp.diagnose(model, X, Y)
    assert serious(diagnosis)[0] == ("kernel", rule), str(diagnosis)
    assert diagnosis.findings[0].place.endswith("second/kernel")


@ONE_OF_KINDS
def test_a_learning_rate_that_diverges(kind):
    diagnosis = diagnosed(kind, ops.tanh, optimizer=keras.optimizers.SGD(1e3))
    assert ("loss_scale_optimizer", "diverging") in serious(diagnosis)
    assert "not the cause" in diagnosis.advice[0]


@ONE_OF_KINDS
def test_a_head_in_float16(kind):
    with mp.policy_scope("mixed_float16"):
        model = kind([layers.Dense(8, name="first"), layers.Dense(2, name="last")])
    model.compile("sgd", "mse")
    assert serious(mp.diagnose(model, X, Y)) == [("last", "float16-head")]


@full_on("jax")
@ONE_OF_KINDS
@pytest.mark.filterwarnings("ignore:Layer '(fault|inner)'")  # Keras says it at each call
def test_a_mask_that_a_layer_loses(kind):
    with mp.policy_scope("mixed_float16"):
        words = layers.Embedding(8, 4, mask_zero=True)
        parts = [Fault(ops.tanh), layers.LSTM(4), mp.layers.DenseHead(2)]
        if kind is nested:
            inner = keras.Sequential([keras.Input((None, 4)), *parts], name="inner")
            parts = [inner]
        kind = Subclass if kind is Subclass else functional
        model = kind([words, *parts])
    model.compile("sgd", "mse")
    assert ("fault", "lost-mask") in serious(mp.diagnose(model, np.abs(X).astype("int32"), Y))


def test_probabilities_in_float16_whose_loss_is_scaled():
    """Hazard 1: softmax in float16, before a cross-entropy of probabilities."""
    rng = np.random.default_rng(0)
    with mp.policy_scope("mixed_float16"):
        inputs = keras.Input((32,))
        model = keras.Model(inputs, layers.Dense(1000, activation="softmax", name="head")(inputs))
    model.compile(mp.LossScaleOptimizer("sgd"), "sparse_categorical_crossentropy")
    diagnosis = mp.diagnose(model, rng.normal(size=(64, 32)), rng.integers(0, 1000, 64))
    assert diagnosis.first_nonfinite("backward") is not None
    assert ("head", "float16-head") in serious(diagnosis)


@pytest.mark.backend("tensorflow")  # the others scale the query first
def test_attention_whose_scores_overflow():
    """Hazard 2: large products of query and key."""
    rng = np.random.default_rng(0)
    with mp.policy_scope("mixed_float16"):
        inputs = keras.Input((8, 128))
        x = layers.MultiHeadAttention(1, 128, name="attention")(inputs, inputs)
        model = mp.Model(inputs, mp.layers.DenseHead(2)(x))
    attention = model.get_layer("attention")
    query, *rest = attention.get_weights()
    attention.set_weights([4000 * query, *rest])
    model.compile("sgd", "mse")
    diagnosis = mp.diagnose(model, rng.normal(size=(2, 8, 128)), rng.normal(size=(2, 8, 2)))
    [found] = [each for each in diagnosis.findings if each.place == "attention"]
    assert "kerasmp.layers.MultiHeadAttention" in found.remedy


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@KINDS
def test_nothing_is_wrong_with_a_healthy_model(kind, half):
    diagnosis = diagnosed(kind, ops.tanh, half=half)
    assert not serious(diagnosis), str(diagnosis)
    assert np.isclose(diagnosis.loss, diagnosis.loss_in_float32, rtol=0.05)


def own_step(optimizer="sgd", function=steep):
    """Return a model with a train step of its own, and a layer between others."""
    keras.utils.set_random_seed(0)
    with mp.policy_scope("mixed_float16"):
        is_layer = isinstance(function, layers.Layer)
        fault = function if is_layer else Fault(function)
        parts = [layers.Dense(8, name="first"), fault, mp.layers.DenseHead(2, name="head")]

        class Own(OwnStep, mp.Sequential):
            pass

        model = Own([keras.Input((8,)), *parts])
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def test_a_train_step_of_the_users_own():
    model = own_step(fixed(2.0**15))
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    before = [ops.convert_to_numpy(v) for v in variables]
    diagnosis = mp.diagnose(model, X, Y)
    assert serious(diagnosis) == [("multiply_1", "gradient-not-finite")], str(diagnosis)
    assert np.isfinite(diagnosis.loss_in_float32)
    for one, other in zip(before, variables, strict=True):
        np.testing.assert_array_equal(one, ops.convert_to_numpy(other))


def gradients(loss_of, optimizer, variables):
    """Return the gradients of the scaled loss that a function returns, as in a train step."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            scaled = optimizer.scale_loss(loss_of())
        return tape.gradient(scaled, variables)
    for variable in variables:
        variable.value.grad = None
    optimizer.scale_loss(loss_of()).backward()
    return [variable.value.grad for variable in variables]


class Adversaries(keras.Model):
    """A GAN: two models, each with an optimizer, in one step, which reports no "loss"."""

    def __init__(self):
        super().__init__()
        head = mp.layers.DenseHead(1, name="head")
        parts = [layers.Dense(8, name="judge"), Fault(steep), head]
        self.critic = keras.Sequential([keras.Input((8,)), *parts], name="critic")
        self.generator = keras.Sequential(
            [keras.Input((4,)), layers.Dense(8, name="maker")], name="generator"
        )
        self.built = True

    def compile(self, of_critic, of_generator):
        super().compile()
        self.of_critic, self.of_generator = of_critic, of_generator
        self.judged = keras.losses.BinaryCrossentropy(from_logits=True)

    def train_step(self, data):
        real = data[0] if isinstance(data, tuple) else data
        noise, (ones, zeros) = real[:, :4], (ops.ones((8, 1)), ops.zeros((8, 1)))

        def of_critic():
            fake = self.generator(noise)
            return self.judged(ones, self.critic(real)) + self.judged(zeros, self.critic(fake))

        def of_generator():
            return self.judged(ones, self.critic(self.generator(noise)))

        for optimizer, model, loss in (
            (self.of_critic, self.critic, of_critic),
            (self.of_generator, self.generator, of_generator),
        ):
            grads = gradients(loss, optimizer, model.trainable_variables)
            optimizer.apply(grads, model.trainable_variables)
        return {"fooled": ops.ones(())}


@pytest.mark.backend("tensorflow", "torch")  # Keras's JAX trainer has one optimizer
@pytest.mark.parametrize("trained", [False, True])
def test_a_step_of_two_models_with_two_optimizers(trained):
    with mp.policy_scope("mixed_float16"):
        model = Adversaries()
    both = fixed(2.0**12), fixed(2.0**12)
    model.compile(*both)
    if trained:
        model.fit(X, batch_size=8, verbose=0)
    is_built = model.optimizer.built
    before = [o.built and o.skipped_steps for o in both], model.get_weights()
    diagnosis = mp.diagnose(model, X)
    place = "critic/fault/multiply_1"
    assert {(x.place, x.rule) for x in diagnosis.findings if x.severity == "error"} == {
        (place, "gradient-not-finite")
    }
    assert f"at a loss scale of {2**12}" in diagnosis.findings[0].reason
    assert model.optimizer.built is is_built  # Keras's default, which the step does not use
    assert f"error   {place} " in str(diagnosis)
    assert str(diagnosis).startswith("the train step reports no loss\n")
    assert [o.built and o.skipped_steps for o in both] == before[0]
    for one, other in zip(before[1], model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    model.fit(X, batch_size=8, verbose=0)  # each optimizer has its own variables still
    assert [len(o.target_variables) for o in both] == [4, 2]


def test_dropout_does_nothing_in_a_train_step_of_the_users_own():
    diagnosis = mp.diagnose(own_step(function=layers.Dropout(0.5)), X, Y)
    assert diagnosis.loss == pytest.approx(diagnosis.loss_in_float32, rel=0.01)


class Penalty(layers.Layer):
    def call(self, inputs):
        self.add_loss(ops.mean(ops.square(inputs)))
        return inputs


def test_the_gradients_are_those_of_training():
    """A step of SGD at rate 1 subtracts them. Layers are shared, and add losses."""
    inputs = {
        "data": keras.Input((8,), name="data"),
        "ids": keras.Input((3,), dtype="int32", name="ids"),
    }
    words, shared = layers.Embedding(5, 8), layers.Dense(8, kernel_regularizer="l2")
    x = shared(inputs["data"]) + ops.mean(shared(words(inputs["ids"])), 1)
    x = Penalty()(ops.tanh(x + ops.mean(words((inputs["ids"] + 1) % 5), 1)))
    outputs = {"one": layers.Dense(2, name="one")(x), "two": layers.Dense(2, name="two")(x)}
    model = mp.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(1.0), {"one": "mse", "two": "mae"})
    x = {"data": X, "ids": np.arange(24).reshape(8, 3) % 5}
    batch = x, {"one": Y, "two": Y}, {"one": np.arange(8.0), "two": np.ones(8)}
    found = mp.diagnose(model, *batch[:2], sample_weight=batch[2])
    rows = {row.place: row for row in found.layers if row.direction == "weights"}
    before = {v.path: ops.convert_to_numpy(v) for v in model.trainable_variables}
    model.train_on_batch(*batch)
    assert rows.keys() == before.keys()
    for variable in model.trainable_variables:
        step = np.abs(before[variable.path] - ops.convert_to_numpy(variable))
        np.testing.assert_allclose(rows[variable.path].magnitudes.largest, step.max(), rtol=1e-4)


@pytest.mark.parametrize("half", ["float32", "mixed_float16"])
@pytest.mark.parametrize(
    ("activation", "loss", "y"),
    [
        ("softmax", "categorical_crossentropy", np.eye(2)[np.arange(8) % 2]),
        ("sigmoid", "binary_crossentropy", Y > 0),
    ],
)
def test_the_gradients_are_those_of_a_loss_from_logits(activation, loss, y, half):
    """Keras computes it from the logits of saturated probabilities, where it can."""
    with mp.policy_scope(half):
        head = mp.layers.DenseHead(2, activation=activation, name="head")
        model = functional([layers.Dense(8, activation="tanh"), head])
    model.compile(mp.LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale=1.0), loss)
    head.set_weights([100 * w for w in head.get_weights()])
    y = y.astype("float32")
    rows = {x.place: x for x in mp.diagnose(model, X, y).layers if x.direction == "weights"}
    before = head.get_weights()
    model.train_on_batch(X, y)
    steps = [np.abs(a - b).max() for a, b in zip(before, head.get_weights(), strict=True)]
    largest = [rows[v.path].magnitudes.largest for v in head.trainable_variables]
    np.testing.assert_allclose(largest, steps, rtol=0.01, atol=1e-5)  # what weights resolve


def test_a_loss_that_only_layers_add():
    class Penalized(mp.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4)

        def call(self, inputs):
            outputs = self.dense(inputs)
            self.add_loss(1e-9 * ops.mean(ops.square(ops.cast(outputs, "float32"))))
            return outputs

    with mp.policy_scope("mixed_float16"):
        model = Penalized()
    model.compile(fixed(1.0))
    diagnosis = mp.diagnose(model, X)
    assert [x.place for x in diagnosis.layers if x.direction == "weights"]
    assert any(x.rule == "gradient-underflow" for x in diagnosis.findings)


def test_a_table_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with mp.policy_scope("mixed_float16"):
        parts = [layers.Dense(8, name=f"a_layer_with_a_long_name_{i}") for i in range(20)]
        model = functional([*parts, mp.layers.DenseHead(2)])
    model.compile("sgd", "mse")
    table, found, _ = str(mp.diagnose(model, X, Y)).partition("more rows are in")
    assert found
    assert max(map(len, table.splitlines())) <= 80


WRONG = {
    "no batch": (lambda m: mp.diagnose(m, [], Y), "is not a batch"),
    "a scalar": (lambda m: mp.diagnose(m, 1.0, Y), "is not a batch"),
    "other shape": (lambda m: mp.diagnose(m, X[:, :3], Y), "does not fit the inputs"),
    "other number of targets": (lambda m: mp.diagnose(m, X, Y[:3]), "same number of rows"),
    "other targets": (lambda m: mp.diagnose(m, X, np.zeros((8, 3))), "loss .* cannot be computed"),
    "an iterator": (lambda m: mp.diagnose(m, iter([(X, Y)])), "is not a batch"),
    "a generator": (lambda m: mp.diagnose(m, (x for x in [X])), "is not a batch"),
    "loss scale 0": (lambda m: mp.diagnose(m, X, Y, loss_scale=0), "not a loss scale"),
    "no model": (lambda _: mp.diagnose(X, Y), "Only a Keras model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_an_error_that_changes_nothing(name):
    call, text = WRONG[name]
    model = functional([mp.layers.DenseHead(2)])
    model.compile("sgd", "mse")
    before = model.get_weights()
    with pytest.raises((mp.errors.ArgumentError, mp.errors.ArgumentTypeError), match=text):
        call(model)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_model_that_is_not_compiled_is_an_error():
    model = functional([mp.layers.DenseHead(2)])
    with pytest.raises(mp.errors.NotCompiledError, match="not compiled"):
        mp.diagnose(model, X, Y)
    model = functional([layers.Dense(8), layers.Dense(2)])
    model = mp.convert(model, "mixed_float16", variables="float16").model
    with pytest.raises(mp.errors.NotCompiledError, match="inference only"):
        mp.diagnose(model, X, Y)


def test_gradients_that_are_zero_but_for_rounding_are_no_fault():
    """Those of a bias before a normalization, whatever their relative error is."""
    with mp.policy_scope("mixed_bfloat16"):
        parts = [layers.Dense(8, name="first"), layers.BatchNormalization()]
        model = functional([*parts, layers.Activation("tanh"), mp.layers.DenseHead(2)])
    model.compile("sgd", "mse")
    diagnosis = mp.diagnose(model, X, Y)
    [bias] = [x for x in diagnosis.layers if x.place == "first/bias"]
    assert bias.error > 1
    assert not serious(diagnosis), str(diagnosis)
