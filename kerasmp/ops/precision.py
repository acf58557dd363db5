"""Narrow tensors outside, float32 inside: the one rule that all of this package stands on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import keras
from keras import ops

from kerasmp.errors import ArgumentTypeError

F = TypeVar("F", bound=Callable[..., Any])


# By name in the files of models.
registered = keras.saving.register_keras_serializable(package="kerasmp")


def is_narrow(dtype: Any) -> bool:
    """Return whether `dtype` is a float that holds less than float32.

    Args:
        dtype: A dtype of the running backend, or its name.

    Example:

    >>> is_narrow("bfloat16"), is_narrow("float32"), is_narrow("int8")
    (True, False, False)
    """
    name = keras.backend.standardize_dtype(dtype)
    return keras.backend.is_float_dtype(name) and name not in ("float32", "float64")


def as_tensors(x: Any) -> Any:
    """Return tensors and structures of tensors as they are, and one tensor for anything else.

    Example:

    >>> len(as_tensors([1.0, 2.0, 3.0]).shape)
    1
    """
    leaves = _leaves(x)
    return x if leaves and all(map(_is_tensor, leaves)) else _tensor_of(x)


def _tensor_of(x: Any) -> Any:
    """Return a tensor of numbers, or tell that there are none."""
    try:
        tensor = ops.convert_to_tensor(x)
        if "string" not in keras.backend.standardize_dtype(tensor.dtype):  # only TensorFlow's
            return tensor
        error = None
    except Exception as raised:  # noqa: BLE001 - each framework has errors of its own for it
        error = raised
    raise ArgumentTypeError(
        "No tensor can be made of this.",
        received=f"{x!r:.100} of type {type(x).__name__}",
        expected="a tensor, an array, a number or a list of numbers",
        fix="A structure may hold tensors alone.",
    ) from error


def widen(tensors: Any) -> Any:
    """Cast tensors that are narrower than float32 to float32, and leave the others.

    Args:
        tensors: A tensor or a structure of tensors.

    Example:

    >>> half, whole = widen([keras.ops.ones(2, "float16"), keras.ops.ones(2, "int32")])
    >>> keras.backend.standardize_dtype(half.dtype), keras.backend.standardize_dtype(whole.dtype)
    ('float32', 'int32')
    """
    if isinstance(tensors, list | tuple):
        return type(tensors)([widen(each) for each in tensors])
    if isinstance(tensors, dict):
        return {key: widen(each) for key, each in tensors.items()}
    return ops.cast(tensors, "float32") if is_narrow(tensors.dtype) else tensors


def accumulation_dtype(dtype: Any) -> str:
    """Return the dtype to compute in: float64 for float64, else float32.

    Example:

    >>> accumulation_dtype("float16"), accumulation_dtype("float64")
    ('float32', 'float64')
    """
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


@registered
class OneNode(keras.Operation):
    """A function as one node of a functional model, which sees the dtypes of each run.

    A function that asks for dtypes would else be asked once, when the model is built, and keep the
    answer when the model is converted to another policy.

    Args:
        function: Takes and returns tensors.
        narrow: The user's function that `function` is in float32; None for any other.
        **kwargs: As for `keras.Operation`: `name`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        narrow: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.function = function
        self.narrow = narrow

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Return the symbolic result."""
        args, kwargs = keras.tree.map_structure(_dense, (args, kwargs))
        return super().compute_output_spec(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Return the name, and the function, or what it is in float32, as Keras knows it."""
        widens = self.narrow is not None and not _is_registered(self.function)
        function = keras.saving.serialize_keras_object(self.narrow if widens else self.function)
        return {"name": self.name, "function": function, "in_float32": widens}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OneNode:
        """Return the node with the function that the configuration names."""
        function = keras.saving.deserialize_keras_object(config["function"])
        if config["in_float32"]:
            return cls(in_float32(function), function, name=config["name"])
        return cls(function, name=config["name"])


def as_one_node(function: F, narrow: Callable[..., Any] | None = None) -> F:
    """Let a function of tensors take symbolic ones too, and be one node of their model.

    Args:
        function: Takes and returns tensors.
        narrow: The user's function that it is in float32; default None, for any other.
    """

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, keras.KerasTensor) for x in _leaves([args, kwargs])):
            return OneNode(called, narrow)(*args, **kwargs)
        return function(*args, **kwargs)

    return called  # type: ignore[return-value] # the same arguments, which no type can say here


def in_float32(function: F) -> F:
    """Make a function compute in float32 and give back the dtype of its first argument.

    The gradient is computed in float32 too, since the casts are part of the function. What is
    wider than float32 stays so, and what is no float is passed on as it is. A result beyond the
    range of the dtype that was given is inf there, as it must be.

    Args:
        function: Takes a tensor, or a structure of tensors, as its first argument, and returns a
            tensor. The other arguments are not cast.

    Returns:
        The function with the same arguments, whose results have the shapes they had.

    Raises:
        ArgumentTypeError: If it is no function.

    References:
        [Micikevicius et al., 2018](https://arxiv.org/abs/1710.03740), section 3.3: tensors are
        float16 in memory, and what sums them computes in float32.

    Example:

    >>> variance = in_float32(lambda x: keras.ops.mean(keras.ops.square(x)))
    >>> x = keras.ops.array([300.0, 0.0, 0.0, 0.0], "float16")  # 300² is inf in float16
    >>> float(variance(x))
    22496.0
    """
    if not callable(function):
        raise ArgumentTypeError(
            "Only a function can be made to compute in float32.",
            received=f"{function!r} of type {type(function).__name__}",
            expected="a function of tensors",
            fix="in_float32(function)(x) calls it.",
        )

    @functools.wraps(function)
    def wide(*args: Any, **kwargs: Any) -> Any:
        if not args and _first_parameter(function) not in kwargs:
            return function(**kwargs)  # and Python says what is missing
        x, *others = args or (kwargs.pop(_first_parameter(function)),)
        x = as_tensors(x)
        dtype = _leaves(x)[0].dtype
        outputs = function(widen(x), *others, **kwargs)
        return ops.cast(outputs, dtype) if is_narrow(dtype) else outputs

    return as_one_node(wide, function)  # type: ignore[return-value] # as in as_one_node


def _first_parameter(function: Callable[..., Any]) -> str:
    return next(iter(inspect.signature(function).parameters), "")


def _leaves(x: Any) -> list[Any]:
    # Not keras.tree.flatten, which torch.compile cannot look into.
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return [leaf for each in x for leaf in _leaves(each)]
    return [x]


def _is_registered(function: Callable[..., Any]) -> bool:
    name = keras.saving.get_registered_name(function)
    return keras.saving.get_registered_object(name) is function


def _dense(x: Any) -> Any:
    # Keras 3.15 says of `x * 0.5` that it is sparse, and then cannot trace what comes after it.
    return keras.KerasTensor(x.shape, x.dtype) if isinstance(x, keras.KerasTensor) else x


def _is_tensor(x: Any) -> bool:
    return isinstance(x, keras.KerasTensor) or ops.is_tensor(x)
