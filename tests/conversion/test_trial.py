"""Layers that cannot run in half precision stay in float32, with a reason; the others convert."""

import re

import keras
import numpy as np
import pytest
from helpers.marks import few, full, marks_on
from keras import ops

import kerasmp as mp
from kerasmp.backend import layers_without_kernel

layers = keras.layers
TENSORFLOW = pytest.mark.backend("tensorflow")
ONES = np.ones((2, 4), "float32")
WIDE = np.ones(4, "float32")


class Sampling(layers.Layer):
    """The sampling layer of Keras's variational autoencoder: noise in the global float dtype."""

    def call(self, inputs):
        mean, log_variance = inputs
        return mean + ops.exp(0.5 * log_variance) * keras.random.normal(ops.shape(mean))


class Scaled(layers.Layer):
    """Has `compute_output_shape`, so that Keras does not trace its call."""

    def call(self, inputs):
        return inputs * ops.convert_to_tensor(WIDE)

    def compute_output_shape(self, shape):
        return shape


def encoder(x):
    return Sampling(name="mixes")([layers.Dense(4)(x), layers.Dense(4)(x)])


def scaled(x):
    return x * ops.convert_to_tensor(WIDE)


class ScaledOperation(keras.Operation):
    """A user-defined operation, which is not a layer and follows no policy."""

    def call(self, inputs):
        return inputs * ops.convert_to_tensor(WIDE)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, inputs.dtype)


MIXING = {
    "layer": encoder,
    "layer-with-a-shape": lambda x: Scaled(name="mixes")(1 * x),
    "lambda": lambda x: layers.Lambda(scaled, output_shape=(4,), name="mixes")(1 * x),
    "activation": lambda x: layers.Dense(4, activation=scaled, name="mixes")(1 * x),
    "wrapped": lambda x: layers.TimeDistributed(Scaled(name="mixes"))(x[:, None])[:, 0],
}


def float32_rows(report):
    return {row.path.rpartition("/")[2]: row for row in report.rows if "cannot" in row.reason}


@TENSORFLOW
@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("half", ["mixed_float16", full("mixed_bfloat16")])
def test_what_mixes_dtypes_stays_in_float32_and_the_rest_converts(kind, half):
    inputs = keras.Input((4,))
    x = layers.Dense(4, name="before")(inputs)
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(4, name="after")(MIXING[kind](x))))
    report = mp.convert(model, half)
    rows = float32_rows(report)
    assert {row.after for row in rows.values()} == {"float32"}
    assert "mixes" in rows
    said = rows["mixes"].reason.removeprefix(f"cannot compute in {half.removeprefix('mixed_')}: ")
    assert re.match("(Type|Value)Error: .*float32", said)
    assert {row.after for row in report.rows if row.layer.name in {"before", "after"}} == {half}
    model.compile("sgd", "mse")
    model.fit(ONES, ONES[:, :2], verbose=0)
    assert np.isfinite(model.predict(ONES, verbose=0)).all()
    report.restore()
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}


@TENSORFLOW
def test_what_feeds_an_operation_that_mixes_dtypes_stays_in_float32():
    inputs = keras.Input((4,))
    x = layers.Dense(4, name="feeds")(layers.Dense(4, name="before")(inputs))
    model = keras.Model(inputs, layers.Dense(2)(ScaledOperation(name="mixes")(2 * x)))
    report = mp.convert(model)
    rows = float32_rows(report)
    assert [*rows] == ["feeds"]
    assert '"mixes" takes its output, and raised' in rows["feeds"].reason
    assert model.get_layer("before").compute_dtype == "float16"
    assert np.isfinite(model.predict(ONES, verbose=0)).all()


class Block(layers.Layer):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.dense = layers.Dense(4, name="inside")

    def call(self, inputs):
        return self.dense(inputs) + keras.random.normal((4,))


class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.block, self.last = layers.Dense(4), Block(), layers.Dense(2)

    def call(self, inputs):
        return self.last(self.block(self.first(inputs)))


@TENSORFLOW
@pytest.mark.parametrize("way", ["built by a call", "not built", "inside of a graph"])
def test_in_a_subclassed_model_only_the_layer_that_mixes_dtypes_stays_in_float32(way):
    net = Net()
    model, sample = net, None
    if way == "inside of a graph":
        inputs = keras.Input((4,))
        model = keras.Model(inputs, layers.Dense(2)(net(inputs)))
    elif way == "not built":
        sample = ONES
    else:
        net(ONES)
    report = mp.convert(model, sample=sample)
    assert [net.first.compute_dtype, net.last.compute_dtype] == ["float16", "float16"]
    assert [net.block.compute_dtype, net.block.dense.compute_dtype] == ["float32", "float32"]
    assert not report.notes
    assert np.isfinite(model.predict(ONES, verbose=0)).all()


@TENSORFLOW
def test_an_operation_without_a_kernel_is_found_where_it_runs_and_in_its_gradient():
    import tensorflow as tf

    @tf.custom_gradient
    def backwards(x):
        return tf.identity(x), tf.math.erfinv

    for function, shape, operation in (
        (tf.math.erfinv, (4,), "Erfinv"),
        (backwards, (4,), "Erfinv"),
        (lambda x: tf.nn.max_pool3d(x, 2, 2, "VALID"), (4, 4, 4, 1), "MaxPool3D"),
    ):
        inputs = keras.Input(shape)
        x = layers.Lambda(function, name="lambda")(layers.ReLU()(inputs))
        model = keras.Model(inputs, layers.Dense(2)(layers.ReLU()(x)))
        rows = float32_rows(mp.convert(model))
        kernel = f"no float16 kernel for {operation} on this device"
        said = f"cannot compute in float16: TensorFlow has {kernel}"
        assert {name: row.reason for name, row in rows.items()} == {"lambda": said}


LINEAR_ALGEBRA = {
    "svd": lambda x: ops.svd(x)[2],
    "cholesky": lambda x: ops.cholesky(positive(x)),
    "qr": lambda x: ops.qr(x)[0],
    "eigh": lambda x: ops.eigh(positive(x))[1],
    "lu_factor": lambda x: ops.lu_factor(x)[0],
    "inv": lambda x: ops.inv(positive(x)),
    "fft": lambda x: ops.fft((x, x))[0],
    "rfft": lambda x: ops.rfft(x)[0],
}
if keras.backend.backend() == "tensorflow":  # of which one has a kernel, and two fail in any case
    for each in ("inv", "qr", "lu_factor"):
        del LINEAR_ALGEBRA[each]


def positive(x):
    return ops.matmul(x, ops.transpose(x, (0, 2, 1))) + 4 * ops.cast(ops.eye(4), x.dtype)


@pytest.mark.parametrize("name", few(LINEAR_ALGEBRA, ["svd", "cholesky"]))
@pytest.mark.parametrize("half", ["float16", full("bfloat16")])
def test_linear_algebra_stays_in_float32_and_the_rest_converts(name, half):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.last = layers.Dense(4), layers.Dense(2)
            self.algebra = layers.Lambda(LINEAR_ALGEBRA[name], name="algebra")

        def call(self, inputs):
            return self.last(self.algebra(self.first(inputs)))

    model = Net()
    x = np.random.default_rng(0).normal(size=(2, 4, 4)).astype("float32")
    model(x)
    report = mp.convert(model, f"mixed_{half}")
    assert list(float32_rows(report)) == ["algebra"]
    assert {model.first.compute_dtype, model.last.compute_dtype} == {half}
    assert np.isfinite(model.predict(x, verbose=0)).all()
    assert not mp.lint(model, x).errors
    model.algebra.dtype_policy = f"mixed_{half}"  # set by the user, without convert
    (found,) = [each for each in mp.lint(model, x) if each.rule == "cannot-compute"]
    assert found.place.endswith("algebra")


def test_the_trial_changes_no_variable_and_no_loss():
    class Counts(layers.Layer):
        def build(self, _):
            self.seeds = keras.random.SeedGenerator(3)
            self.calls = self.add_weight(shape=(), trainable=False, name="calls")
            self.metric = keras.metrics.Mean()

        def call(self, inputs):
            self.calls.assign(self.calls + 1)
            self.metric.update_state(inputs)
            self.add_loss(ops.sum(ops.cast(inputs, "float32")))
            self.last = inputs
            noise = keras.random.normal(ops.shape(inputs), seed=self.seeds, dtype=inputs.dtype)
            return inputs + noise

    inputs = keras.Input((4,))
    counts = Counts()
    x = layers.BatchNormalization()(layers.Dropout(0.5)(counts(inputs)))
    model = keras.Model(inputs, layers.Dense(2)(x))
    model(ONES, training=True)

    def state():
        kept = [*model.variables, *model.metrics_variables, *model.losses, counts.last]
        return [np.array(ops.convert_to_numpy(each)) for each in kept]

    before = state()
    report = mp.convert(model)
    assert "float16" in {layer.compute_dtype for layer in model.layers}
    report.restore()
    for now, then in zip(state(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_what_cannot_be_traced_is_noted():
    class Eager(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.last = layers.Dense(4), layers.Dense(2)

        def call(self, inputs):
            x = self.first(inputs)
            values = ops.convert_to_numpy(ops.cast(x, "float32"))
            if np.isnan(values.sum()) or type(values) is not np.ndarray:
                raise ValueError("no numbers")
            return self.last(x)

    model = Eager()
    model(ONES)
    notes = [mp.convert(model, sample=sample, dry_run=True).notes for sample in (None, ONES)]
    if keras.backend.backend() == "torch":  # which traces with real values
        assert notes == [(), ()]
        return
    said = ["as its inputs are not known: give convert a sample", "as it cannot be traced"]
    for [note], words in zip(notes, said, strict=True):
        assert f"was not tried in half precision, {words}" in note


def test_a_call_that_cannot_be_traced_in_training_is_tried_in_inference():
    """Layers that cannot compute in half precision on the backend are found."""

    class Trains(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.mixes = layers.Dense(4), Refuses(name="mixes")

        def call(self, inputs, training=None):
            if training:
                raise ValueError("no training here")
            return self.mixes(self.first(inputs))

    model = Trains()
    model(ONES)
    report = mp.convert(model, rules=None, dry_run=True)
    assert list(float32_rows(report)) == ["mixes"]
    (note,) = report.notes
    assert "was not tried in half precision for training, as it cannot be traced" in note


class Refuses(layers.Layer):
    def call(self, inputs):
        if keras.backend.standardize_dtype(inputs.dtype) != "float32":
            raise TypeError("float32 alone")
        return inputs


def test_a_dry_run_builds_no_part_that_only_training_uses():
    class Noisy(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4, name="late")

        def build(self, _):
            self.built = True

        def call(self, inputs, training=None):
            return self.dense(inputs) if training else inputs

    inputs = keras.Input((4,))
    noisy = Noisy()
    model = keras.Model(inputs, layers.Dense(2)(noisy(inputs)))
    report = mp.convert(model, dry_run=True)
    assert not noisy.dense.built
    assert not noisy.variables
    (note,) = [note for note in report.notes if "late" in note]
    assert 'for training, as "' in note
    assert note.endswith('late" in it is not built')


def test_the_trial_leaves_no_tensor_in_a_layer():
    class Keeps(layers.Layer):
        def __init__(self):
            super().__init__()
            self.calls, self.seen, self.last, self.of = 0, [], None, {}

        def call(self, inputs):
            self.calls += 1
            self.seen.append(inputs)
            self.of["inputs"] = inputs
            self.last = (inputs, {"twice": 2 * inputs})
            self.new = [inputs]
            return inputs

    inputs = keras.Input((4,))
    keeps = Keeps()
    model = keras.Model(inputs, layers.Dense(2)(keeps(inputs)))
    model(ONES)
    del keeps.new
    kept = [keeps.calls, list(keeps.seen), keeps.last, dict(keeps.of)]
    holds = keeps.seen
    mp.convert(model, dry_run=True)
    now = [keeps.calls, list(keeps.seen), keeps.last, dict(keeps.of)]
    assert now[0] == kept[0]
    assert keeps.seen is holds
    assert keeps.last is kept[2]
    assert list(map(id, now[1])) == list(map(id, kept[1]))
    assert now[3]["inputs"] is kept[3]["inputs"]
    assert not hasattr(keeps, "new")


def test_a_layer_that_keeps_none_in_training_is_no_error():
    class Forgets(layers.Layer):
        def build(self, _):
            self.scores = ops.ones((2,))

        def call(self, inputs, training=None):
            if training:
                self.scores = self.new = None
            return inputs

    inputs = keras.Input((4,))
    forgets = Forgets()
    model = keras.Model(inputs, layers.Dense(2)(forgets(inputs)))
    scores = forgets.scores
    mp.convert(model)
    assert forgets.compute_dtype == "float16"
    assert forgets.scores is scores
    assert not hasattr(forgets, "new")


# All image layers of Keras, including future ones.
IMAGES = [
    name
    for name, layer in sorted(vars(layers).items())
    if isinstance(layer, type) and issubclass(layer, layers.RandomFlip.__base__)
    # Keras leaves the first out of the graph, and the second takes no images.
    if name not in {"Equalization", "MaxNumBoundingBoxes"}
]
ARGUMENTS = {
    **dict.fromkeys(("CenterCrop", "RandomCrop", "Resizing"), (8, 8)),
    **dict.fromkeys(("RandomShear", "RandomTranslation"), (0.2, 0.2)),
    **dict.fromkeys(("RandomBrightness", "RandomContrast", "RandomRotation"), (0.2,)),
    **dict.fromkeys(("RandomColorDegeneration", "RandomSaturation", "RandomSharpness"), (0.5,)),
    **dict.fromkeys(("RandomHue", "RandomZoom", "RandomPosterization"), (1,)),
}
WITHOUT_GRADIENT = {
    *("ContrastLimitedAdaptiveHistogramEqualization", "RandomHue", "RandomPosterization"),
    "RandomSaturation",
}
FAILS = {"RandomGaussianBlur", "RandomErasing", "RandomElasticTransform", "CutMix"}
FAILS_IN_BFLOAT16 = {"CutMix", "RandAugment", "AugMix"} | {
    f"Random{name}" for name in ("Perspective", "Rotation", "Shear", "Translation", "Zoom")
}


FAILING = {"float16": FAILS, "bfloat16": FAILS_IN_BFLOAT16}


@TENSORFLOW
@pytest.mark.parametrize(
    ("half", "name", "rules"),
    [
        ("float16", "RandomGaussianBlur", "safe"),
        *(full(half, name, "safe") for half in FAILING for name in IMAGES),
        # Without rules the trial finds them.
        *(full(half, name, None) for half in FAILING for name in sorted(FAILING[half])),
    ],
)
def test_layers_for_images_train(half, name, rules):
    layer = getattr(layers, name)(*ARGUMENTS.get(name, ()), name="augment")
    inputs = keras.Input((8, 8, 3))
    # Some have no gradient in any dtype: Keras warns about variables without one.
    x = layer(inputs if name in WITHOUT_GRADIENT else layers.Conv2D(3, 1)(inputs))
    x = layers.Flatten()(x)
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(4, name="body")(x)))
    report = mp.convert(model, f"mixed_{half}", rules=rules)
    reason = next(row.reason for row in report.rows if row.layer is layer)
    assert (name in FAILING[half]) is ("kernel" in reason)
    assert model.get_layer("body").compute_dtype == half
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(np.ones((2, 8, 8, 3)), np.zeros((2, 2)), verbose=0)


def test_layers_that_are_known_to_fail_are_known_on_this_backend():
    names = {layer.__name__ for layer in layers_without_kernel("float16")}
    assert ("CutMix" in names) is (keras.backend.backend() != "jax")
    assert ("RandomGaussianBlur" in names) is (keras.backend.backend() == "tensorflow")
    assert not layers_without_kernel("float32")


pytestmark = marks_on("oldest")
