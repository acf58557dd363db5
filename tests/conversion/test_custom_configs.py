"""A file keeps the policies and variable dtypes of all layers, even those `get_config` omits."""

import pickle
from typing import ClassVar

import keras
import numpy as np
import pytest
from helpers.flattened import flatten_layers
from helpers.marks import few, full, full_on

import kerasmp as mp

layers = keras.layers
X = np.random.default_rng(0).normal(size=(2, 6, 4)).astype("float32")

CONFIGS = {
    "with_supers": lambda own, supers: {**supers(), **own},
    "alone": lambda own, _: own,
    "with_some_of_supers": lambda own, supers: {**own, "name": supers()["name"]},
}


@keras.saving.register_keras_serializable("own_configs")
class Block(layers.Layer):
    """A user-defined layer that makes others, and drops its policy and name."""

    def __init__(self, units=4, name="block"):
        super().__init__(name=name)
        self.units = units
        self.wide = layers.Dense(units)
        self.scores = layers.Softmax()

    def build(self, shape):
        self.wide.build(shape)

    def call(self, x):
        return self.scores(self.wide(x))

    def get_config(self):
        return {"units": self.units}


@keras.saving.register_keras_serializable("own_configs")
class Asking(layers.Layer):
    """A user-defined layer that sets the dtype of its weight."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", dtype="float32")

    def call(self, x):
        return x * keras.ops.cast(self.scale, x.dtype)


def of_inputs(units):
    inputs = keras.Input((6, 4))
    x = layers.Flatten()(Asking()(Block()(inputs)))
    return {"inputs": inputs, "outputs": layers.Dense(units)(x)}


def of_layers(self, units):
    self.block, self.asking, self.flatten = Block(), Asking(), layers.Flatten()
    self.top = layers.Dense(units)


def users_class(parent, config, kind, arguments):
    """Return a user-defined model class with one kind of `get_config` and of constructor."""

    class Users(parent):
        def __init__(self, units=3, **more):
            if kind == "graph":
                super().__init__(**of_inputs(units), **more)
            else:
                super().__init__(**more)
                of_layers(self, units)
            self.units = units

        def get_config(self):
            return CONFIGS[config]({"units": self.units}, super().get_config)

    if kind != "graph":
        Users.call = lambda self, x: self.top(self.flatten(self.asking(self.block(x))))

    class Strict(Users):
        def __init__(self, units=3):
            super().__init__(units)

        @classmethod
        def from_config(cls, config):
            return cls(config["units"])

    return {"kwargs": Users, "strict": Strict}[arguments]


PARENTS = {"keras": keras.Model, "ours": mp.Model}
# Parent, `get_config`, kind and constructor: any two of these meet in each combination.
CASES = {
    case: case.split("-")
    for case in (
        "keras-with_supers-subclassed-kwargs",
        "ours-with_supers-subclassed-strict",
        "keras-with_supers-graph-strict",
        "ours-with_supers-nested-kwargs",
        "keras-alone-subclassed-strict",
        "ours-alone-graph-kwargs",
        "keras-alone-nested-kwargs",
        "ours-alone-nested-kwargs",
        "ours-with_some_of_supers-subclassed-kwargs",
        "ours-with_some_of_supers-graph-strict",
        "keras-with_some_of_supers-nested-strict",
    )
}
CLASSES = {
    name: keras.saving.register_keras_serializable("own_configs", name)(
        users_class(PARENTS[parent], *case)
    )
    for name, (parent, *case) in CASES.items()
}
OURS = [name for name in CASES if name.startswith("ours")]
QUICK = ["ours-alone-nested-kwargs"]


def made(case):
    model = CLASSES[case]()
    if "nested" in case:
        inputs = keras.Input((6, 4))
        x = Block(name="first")(inputs)
        model = PARENTS[CASES[case][0]](inputs, layers.Dense(3)(model(x)))
    model(X)
    return model


def assert_same(loaded, model):
    """Assert equal policies, and equal variables and outputs bit for bit."""
    for one, other in zip(flatten_layers(loaded), flatten_layers(model), strict=True):
        assert (type(one).__name__, one.dtype_policy) == (type(other).__name__, other.dtype_policy)
    for one, other in zip(loaded.weights, model.weights, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (one, other)))
    outputs = (keras.ops.cast(each(X), "float32") for each in (loaded, model))
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, outputs))


def saved_and_loaded(model, folder, policy="float32"):
    model.save(folder / "model.keras")
    with mp.policy_scope(policy):
        return keras.models.load_model(folder / "model.keras")


@full_on("jax")
@pytest.mark.parametrize("case", few(CASES, [*QUICK, "keras-alone-subclassed-strict"]))
def test_a_converted_model_comes_back_from_a_file(case, tmp_path):
    model = made(case)
    mp.convert(model, "mixed_bfloat16")
    assert_same(saved_and_loaded(model, tmp_path), model)
    mp.convert(model, "float16", variables="float16", safe_layers=True)
    loaded = saved_and_loaded(model, tmp_path, "mixed_bfloat16")
    assert_same(loaded, model)
    assert "float16" in {v.dtype for v in loaded.weights}
    loaded.compile("sgd", "mse")
    with pytest.raises(mp.errors.PolicyError, match="inference only"):
        loaded.fit(X, np.zeros((2, 3)), verbose=0)
    assert_same(saved_and_loaded(loaded, tmp_path), model)


@pytest.mark.parametrize(
    ("policy", "case"),
    [
        *(("float16", case) for case in QUICK),
        *(full("float16", case) for case in OURS if case not in QUICK),
        *(full(policy, case) for policy in ("mixed_float16", "float32") for case in QUICK),
    ],
)
def test_a_model_made_under_a_policy_comes_back_from_a_file(policy, case, tmp_path):
    with mp.policy_scope(policy):
        model = made(case)
    assert_same(saved_and_loaded(model, tmp_path, "mixed_bfloat16"), model)


@keras.saving.register_keras_serializable("own_configs")
class HoldsSequential(keras.Model):
    """A user-defined model that holds a Sequential without `Input`."""

    def __init__(self):
        super().__init__()
        self.part = keras.Sequential([layers.Dense(4), layers.Dense(3)])

    def call(self, x):
        return self.part(x)

    def get_config(self):
        return {}


@pytest.mark.parametrize("policies", [("float32", "mixed_bfloat16"), ("mixed_bfloat16", "float32")])
def test_an_input_that_keras_gives_a_sequential_rounds_as_before(policies, tmp_path):
    """Keras gives it the dtype of the first layer, when that layer is built."""
    built, loading = policies
    with mp.policy_scope(built):
        model = HoldsSequential()
    model(X)
    mp.convert(model, "mixed_float16")
    loaded = saved_and_loaded(model, tmp_path, loading)
    assert loaded.part.inputs[0].dtype == model.part.inputs[0].dtype
    assert_same(loaded, model)


def test_entries_that_older_files_lack_are_optional():
    model = made("keras-with_supers-subclassed-kwargs")
    mp.convert(model, "float16", variables="float16")
    written = keras.saving.serialize_keras_object(model)
    for key in ("variable_dtypes", "input_policies", "input_dtypes"):
        del written["config"]["kerasmp"][key]
    loaded = keras.saving.deserialize_keras_object(written)
    loaded.set_weights(model.get_weights())
    assert_same(loaded, model)


@pytest.mark.filterwarnings("ignore:Stock Keras models will not follow output")
def test_a_file_without_policies_leaves_the_result_of_from_config_alone():
    """Only from_config of the parent handles older files of models without `output`."""
    written = keras.saving.serialize_keras_object(CLASSES["ours-with_supers-subclassed-strict"]())
    del written["config"]["kerasmp"]
    with mp.policy_scope("compute=bfloat16,variable=float32,output=float32"):
        outputs = keras.saving.deserialize_keras_object(written)(X)
    assert keras.backend.standardize_dtype(outputs.dtype) == "float32"


@keras.saving.register_keras_serializable("own_configs")
class Rounding(keras.DTypePolicy):
    """A user-defined policy with a name that Keras does not know."""

    def __init__(self, name="my rounding"):
        super().__init__("mixed_bfloat16")
        self._name = name


@keras.saving.register_keras_serializable("own_configs")
class OfRounding(mp.Model):
    """A user-defined model whose constructor may set that policy."""

    sets = True

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2, dtype=Rounding() if self.sets else None)
        self.last = layers.Dense(2)

    def call(self, x):
        return self.last(self.dense(x))

    def get_config(self):
        return {}


def test_a_user_defined_policy_comes_from_the_constructor(tmp_path, monkeypatch):
    with mp.policy_scope("mixed_bfloat16"):
        model = OfRounding()
    model(X)
    loaded = saved_and_loaded(model, tmp_path)
    assert_same(loaded, model)
    assert loaded.dense.dtype_policy.name == "my rounding"
    monkeypatch.setattr(OfRounding, "sets", False)
    with pytest.warns(mp.errors.PolicyWarning, match="Expected: 'my rounding', as the text says"):
        keras.models.load_model(tmp_path / "model.keras")


def test_a_conversion_replaces_a_user_defined_policy_and_restores_it():
    own = Rounding()
    alone, kept = layers.Dense(3, dtype=own), mp.layers.WithDtype(layers.Dense(3), own)
    model = keras.Sequential([keras.Input((4,)), alone, kept, layers.Dense(2)])
    before = mp.LayerPolicies.of(model)
    dry = mp.convert(model, "mixed_float16", dry_run=True)
    report = mp.convert(model, "mixed_float16")
    for each in (dry, report):
        pairs = [(row.before, row.after) for row in each.rows if row.layer in (alone, kept)]
        assert pairs == [("my rounding", "mixed_float16"), ("my rounding", "my rounding")]
    assert (alone.compute_dtype, kept.dtype_policy) == ("float16", own)
    with pytest.raises(
        mp.errors.PolicyError, match=r"created from its name.*Expected: 'my rounding'"
    ):
        mp.convert(model, before)
    assert mp.LayerPolicies.of(model) == report.layer_policies
    report.restore()
    assert alone.dtype_policy is own
    assert [row.after for row in mp.convert(model, before).rows] == [x.policy for x in before]


def test_a_user_defined_global_policy_is_followed_as_in_stock_keras(tmp_path):
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2)])
    keras.config.set_dtype_policy(Rounding())
    model = mp.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2)])
    (found,) = mp.lint(plain)
    assert found.reason.startswith("The global policy computes in bfloat16, but no layer does")
    mp.convert(model, "mixed_float16")
    loaded = saved_and_loaded(model, tmp_path)
    assert [x.compute_dtype for x in loaded.layers] == ["float16", "float32"]


def test_a_model_without_call_that_is_never_built(tmp_path):
    with mp.policy_scope("mixed_float16"):
        model = Pair(8)
    assert not model.built
    with pytest.warns(UserWarning, match="not yet been built"):
        model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [x.compute_dtype for x in flatten_layers(loaded)] == [
        x.compute_dtype for x in flatten_layers(model)
    ]


@keras.saving.register_keras_serializable("own_configs")
class Pair(mp.Model):
    """A generator and a discriminator."""

    def __init__(self, units):
        super().__init__()
        self.units = units
        self.generator = keras.Sequential([keras.Input((4,)), layers.Dense(units)])
        self.discriminator = keras.Sequential([keras.Input((units,)), layers.Dense(1)])

    def get_config(self):
        return {"units": self.units}


def test_a_model_inside_that_was_converted_before(tmp_path):
    model = made("keras-alone-nested-kwargs")
    outer = Holding(3)
    outer(X)
    mp.convert(outer.inner, "mixed_bfloat16")
    mp.convert(outer.other, "mixed_bfloat16")
    mp.convert(outer, "float16", variables="float16")
    assert_same(pickle.loads(pickle.dumps(outer)), outer)
    loaded = saved_and_loaded(outer, tmp_path)
    assert_same(loaded, outer)
    loaded.inner.compile("sgd", "mse")
    with pytest.raises(mp.errors.PolicyError, match="inference only"):
        loaded.inner.fit(X, np.zeros((2, 3)), verbose=0)
    mp.convert(next(x for x in model.layers if isinstance(x, keras.Model)))
    assert_same(
        saved_and_loaded(model, tmp_path), model
    )  # its parent is a stock model, which saves the config


def test_a_part_that_a_stock_model_rebuilds_in_its_old_dtype_is_reported(tmp_path):
    outer = Holding(3)
    outer(X)
    mp.convert(outer.inner)
    outer.save_weights(tmp_path / "model.weights.h5")
    with pytest.warns(mp.errors.PolicyWarning, match="not contain the layer policies of .strict"):
        outer.save(tmp_path / "model.keras")
    mp.convert(outer, mp.LayerPolicies.of(outer))
    assert_same(saved_and_loaded(outer, tmp_path), outer)


@keras.saving.register_keras_serializable("own_configs")
class Holding(keras.Model):
    """A user-defined model that makes others."""

    def __init__(self, units):
        super().__init__()
        self.units = units
        self.inner = CLASSES["keras-alone-subclassed-strict"](units)
        self.other = keras.Sequential([layers.Dense(4)])

    def call(self, x):
        return self.inner(self.other(x))

    def get_config(self):
        return {"units": self.units}


def test_layers_that_differ_from_those_of_the_file_are_reported(tmp_path):
    with mp.policy_scope("mixed_float16"):
        model = Changing()
    model(X[:, 0])
    Changing.parts = 2
    try:
        model.save(tmp_path / "model.keras")
        with pytest.warns(mp.errors.PolicyWarning, match="cannot be restored.*no further layer"):
            keras.models.load_model(tmp_path / "model.keras")
        with mp.policy_scope("mixed_float16"):
            keras.models.load_model(tmp_path / "model.keras")  # where it makes no difference
        mp.convert(model, "mixed_bfloat16")
        model.save(tmp_path / "model.keras")
        with pytest.raises(mp.errors.PolicyError, match="layers differ"):
            keras.models.load_model(tmp_path / "model.keras")
    finally:
        Changing.parts = 1


@keras.saving.register_keras_serializable("own_configs")
class Changing(mp.Model):
    """A user-defined model whose class now makes more layers."""

    parts = 1

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)
        self.more = [layers.ReLU() for _ in range(self.parts - 1)]

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {}


@keras.saving.register_keras_serializable("own_configs")
class Backbone(keras.Model):
    """A model written like KerasHub's backbones."""

    def __init__(self, units=4, dtype=None, **more):
        inputs = keras.Input((6, 4))
        x = layers.Softmax(dtype=dtype)(layers.Dense(units, dtype=dtype)(inputs))
        super().__init__(inputs, x, **more)
        if dtype is not None:
            self.dtype_policy = keras.dtype_policies.get(dtype)
        self.units = units

    def get_config(self):
        dtype = keras.dtype_policies.serialize(self.dtype_policy)
        config = {"name": self.name, "trainable": self.trainable, "dtype": dtype}
        return {**config, "units": self.units}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "dtype": keras.dtype_policies.get(config["dtype"])})


@keras.saving.register_keras_serializable("own_configs")
class Task(keras.Model):
    """A model written like KerasHub's tasks, which compile themselves."""

    def __init__(self, backbone, **more):
        dtype = backbone.dtype_policy
        x = layers.Dense(3, dtype=dtype)(layers.Flatten(dtype=dtype)(backbone(backbone.input)))
        super().__init__(backbone.input, x, **more)
        self.backbone = backbone
        self.compile()

    def compile(self, optimizer="auto", loss="mse", **more):
        super().compile("adam" if optimizer == "auto" else optimizer, loss, **more)

    def get_config(self):
        return {"backbone": keras.layers.serialize(self.backbone), "name": self.name}

    @classmethod
    def from_config(cls, config):
        config["backbone"] = keras.layers.deserialize(config["backbone"])
        return cls(**config)


@pytest.mark.filterwarnings("ignore:`compile..` was not called as part of model loading")
@pytest.mark.filterwarnings("ignore:The saved state of .* is not loaded")
def test_a_task_that_compiles_itself_warns_that_its_optimizer_differs(tmp_path):
    model = Task(Backbone())
    mp.convert(model.backbone, "mixed_bfloat16")
    mp.convert(model)
    model.compile("sgd")
    model.optimizer.build(model.trainable_variables)
    model.optimizer.loss_scale = 32.0
    said = "it was SGD, and the class made Adam.*load_weights"
    with pytest.warns(mp.errors.LossScaleWarning, match=said):
        loaded = saved_and_loaded(model, tmp_path)
    assert_same(loaded, model)
    loaded.compile("sgd")
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(tmp_path / "model.keras")
    assert loaded.optimizer.loss_scale == 32.0
    model.compile()
    model.optimizer.build(model.trainable_variables)
    model.optimizer.loss_scale = 16.0
    assert saved_and_loaded(model, tmp_path).optimizer.loss_scale == 16.0  # as the class has it
    mp.convert(model, "float16", variables="float16")
    assert_same(saved_and_loaded(model, tmp_path), model)


@keras.saving.register_keras_serializable("own_configs")
class Compiling(mp.Sequential):
    """A user-defined model that compiles itself and builds everything."""

    settings: ClassVar = {}

    def __init__(self):
        super().__init__([keras.Input((4,)), layers.Dense(1, dtype="mixed_float16")])
        self.compile()
        self.optimizer.build(self.trainable_variables)

    def compile(self, optimizer=None, loss="mse"):
        inner = optimizer or keras.optimizers.Adam(**self.settings)
        super().compile(mp.LossScaleOptimizer(inner, loss_scale="fixed"), loss)

    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, _config):
        return cls()


@pytest.mark.filterwarnings("ignore:`compile..` was not called as part of model loading")
@pytest.mark.filterwarnings("ignore:The saved state of .* is not loaded")
def test_restoring_the_state_keeps_the_same_optimizer(tmp_path, monkeypatch):
    model = Compiling()
    model.optimizer.apply([keras.ops.ones(v.shape) for v in model.trainable_variables])
    model.optimizer.learning_rate = 0.25
    model.optimizer.loss_scale = 64.0
    loaded = saved_and_loaded(model, tmp_path)
    assert (float(loaded.optimizer.learning_rate), loaded.optimizer.loss_scale) == (0.25, 64.0)
    for one, other in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (one, other)))
    monkeypatch.setattr(Compiling, "settings", {"beta_1": 0.5})
    said = "it was Adam with beta_1=0.9, and the class made Adam with beta_1=0.5"
    with pytest.warns(mp.errors.LossScaleWarning, match=said):
        keras.models.load_model(tmp_path / "model.keras")
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    monkeypatch.setattr(Compiling, "settings", {"learning_rate": decay})
    said = "Adam with learning_rate=0.25, .* Adam with learning_rate=ExponentialDecay"
    with pytest.warns(mp.errors.LossScaleWarning, match=said):
        keras.models.load_model(tmp_path / "model.keras")
