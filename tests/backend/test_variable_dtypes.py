"""A variable's dtype changes in place; fails if Keras moves a private name used for it."""

import gc
import weakref

import keras
import numpy as np
import pytest

from kerasmp.backend.variable_dtypes import set_variable_dtype

layers = keras.layers
HALVES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
# Subnormal in float16, halfway between two neighbours, larger than float16 has. NaN has many bits.
HARD = [1e-6, 6e-8, 2.0**-25, 1 + 2.0**-11, 0.1, -0.0, 65519.0, 65520.0, np.inf]
X = np.linspace(-1, 1, 12, dtype="float32").reshape(3, 4)


def numbers(variable):
    return np.array(keras.ops.convert_to_numpy(variable.value))


def bits(array):
    return np.ascontiguousarray(array).view("uint8")


def dense():
    layer = layers.Dense(3, kernel_regularizer="l2", kernel_constraint="non_neg", name="dense")
    layer.build((None, 4))
    return layer


@HALVES
def test_the_value_is_rounded_as_numpy_rounds(dtype):
    variable = keras.Variable(np.array(HARD, "float32"))
    set_variable_dtype(variable, dtype)
    with np.errstate(over="ignore"):
        expected = np.array(HARD, "float32").astype(numbers(variable).dtype)
    assert variable.dtype == keras.backend.standardize_dtype(variable.value.dtype) == dtype
    np.testing.assert_array_equal(bits(numbers(variable)), bits(expected))


@HALVES
def test_undo_restores_the_very_value(dtype):
    variable = keras.Variable(np.array(HARD, "float32"))
    value, before = variable.value, numbers(variable)
    undo = set_variable_dtype(variable, dtype)
    undo()
    assert variable.value is value
    assert variable.dtype == keras.backend.standardize_dtype(value.dtype) == "float32"
    np.testing.assert_array_equal(bits(numbers(variable)), bits(before))


def test_the_variable_stays_the_same_object_and_can_be_assigned():
    layer = dense()
    kernel = layer.kernel
    names = ("name", "path", "trainable", "regularizer", "constraint", "shape", "aggregation")
    before = {name: getattr(kernel, name) for name in names}
    set_variable_dtype(kernel, "float16")
    assert layer.kernel is kernel
    assert {name: getattr(kernel, name) for name in names} == before
    assert kernel._autocast
    kernel.assign(np.full((4, 3), 0.1, "float32"))
    assert kernel.numpy().dtype == "float16"
    np.testing.assert_array_equal(kernel.numpy(), np.float16(0.1))
    kernel.assign_add(np.ones((4, 3), "float16"))
    np.testing.assert_array_equal(kernel.numpy(), np.float16(0.1) + np.float16(1))


def test_wider_is_exact():
    variable = keras.Variable(np.float16([0.1, 3]), dtype="float16")
    set_variable_dtype(variable, "float32")
    np.testing.assert_array_equal(variable.numpy(), np.float32(np.float16([0.1, 3])))


def test_only_the_undo_keeps_the_old_value_alive():
    layer = dense()
    before = layer.kernel.value
    if keras.backend.backend() == "torch":
        before = before.untyped_storage()  # the parameter stays, with other numbers in it
    kept = weakref.ref(before)
    undo = set_variable_dtype(layer.kernel, "float16")
    del before
    gc.collect()
    assert kept() is not None
    del undo
    gc.collect()
    assert kept() is None


@pytest.mark.backend("torch")
def test_torch_modules_hold_the_same_parameters():
    model = keras.Sequential([keras.Input((4,)), dense()])
    model.torch_params  # noqa: B018 - reading it makes it
    parameters = dict(model.named_parameters())
    loss = model(X).sum()
    loss.backward()
    kernel = model.layers[0].kernel
    gradient = kernel.value.grad
    undos = [set_variable_dtype(v, "float16") for v in model.variables]
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float16"}
    assert {str(t.dtype) for t in model.state_dict().values()} == {"torch.float16"}
    assert kernel.value.grad is None
    assert kernel.value.requires_grad
    for undo in undos:
        undo()
    assert {str(t.dtype) for t in model.state_dict().values()} == {"torch.float32"}
    assert kernel.value.grad is gradient


@pytest.mark.backend("tensorflow")
def test_tensorflow_variables_are_alike():
    layer = dense()
    before = layer.kernel.value
    set_variable_dtype(layer.kernel, "float16")
    after = layer.kernel.value
    for name in ("name", "trainable", "shape", "device", "synchronization", "aggregation"):
        assert getattr(after, name) == getattr(before, name)


@pytest.mark.backend("tensorflow")
def test_tensorflow_checkpoints_hold_the_new_variable(tmp_path):
    import tensorflow as tf

    def narrow():
        model = keras.Sequential([keras.Input((4,)), dense()])
        for variable in model.variables:
            set_variable_dtype(variable, "float16")
        return model

    saved, other = narrow(), narrow()
    path = tf.train.Checkpoint(model=saved).save(tmp_path / "checkpoint")
    reader = tf.train.load_checkpoint(path)
    kinds = {n: d.name for n, d in reader.get_variable_to_dtype_map().items() if "model" in n}
    assert {d for n, d in kinds.items() if n.endswith("VARIABLE_VALUE")} == {"half"} or {
        d for n, d in kinds.items() if n.endswith("VARIABLE_VALUE")
    } == {"float16"}
    other.layers[0].kernel.assign(np.zeros((4, 3)))
    tf.train.Checkpoint(model=other).restore(path).assert_existing_objects_matched()
    np.testing.assert_array_equal(other.get_weights()[0], saved.get_weights()[0])


@pytest.mark.backend("tensorflow")
def test_mirrored_variables_stay_mirrored():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["/cpu:0"])
    with strategy.scope():
        layer = dense()
    before = layer.kernel.value
    undo = set_variable_dtype(layer.kernel, "float16")
    assert type(layer.kernel.value) is type(before)
    assert layer.kernel.dtype == layer.kernel.value.dtype.name == "float16"
    undo()
    assert layer.kernel.value is before


@pytest.mark.backend("jax")
def test_the_layout_and_the_sharding_stay_on_jax():
    import jax

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    variable = keras.Variable(np.ones((4, 2), "float32"), layout=layout)
    sharding = variable.value.sharding
    set_variable_dtype(variable, "float16")
    assert variable._layout is layout
    assert variable.value.sharding == sharding
