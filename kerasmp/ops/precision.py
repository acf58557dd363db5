"""Compute in float32 between tensors of low precision: what all functions here are built on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import keras
from keras import ops

from kerasmp.errors import ArgumentTypeError

F = TypeVar("F", bound=Callable[..., Any])

# Model files refer to functions and classes by these names.
registered = keras.saving.register_keras_serializable(package="kerasmp")


def is_low_precision(dtype: Any) -> bool:
    """Return whether `dtype` is a float dtype with fewer bits than float32.

    Args:
        dtype: A dtype of the running backend, or its name.

    Example:

    >>> [is_low_precision(dtype) for dtype in ("bfloat16", "float32", "int8")]
    [True, False, False]
    """
    name = keras.backend.standardize_dtype(dtype)
    return keras.backend.is_float_dtype(name) and name not in ("float32", "float64")


def as_tensors(x: Any) -> Any:
    """Convert anything but tensors and structures of tensors, which are returned, to one tensor.

    Raises:
        ArgumentTypeError: If `x` cannot be converted.

    Example:

    >>> len(as_tensors([1.0, 2.0, 3.0]).shape)
    1
    """
    leaves = _leaves(x)
    if leaves and all(map(_is_tensor, leaves)):
        return x
    try:
        tensor = ops.convert_to_tensor(x)
        if "string" not in keras.backend.standardize_dtype(tensor.dtype):  # only on TensorFlow
            return tensor
        error = None
    except Exception as raised:  # noqa: BLE001 - each framework raises errors of its own
        error = raised
    raise ArgumentTypeError(
        "The argument cannot be converted to a tensor.",
        received=f"{x!r:.100} of type {type(x).__name__}",
        expected="a tensor, an array, a number or a list of numbers",
        fix="A structure of inputs must contain only tensors.",
    ) from error


def upcast(tensors: Any) -> Any:
    """Cast float tensors of lower precision than float32 to float32, and return the others as is.

    Args:
        tensors: A tensor or a structure of tensors.

    Example:

    >>> x, y = upcast([keras.ops.ones(2, "float16"), keras.ops.ones(2, "int32")])
    >>> keras.backend.standardize_dtype(x.dtype), keras.backend.standardize_dtype(y.dtype)
    ('float32', 'int32')
    """
    if isinstance(tensors, list | tuple):
        return type(tensors)([upcast(each) for each in tensors])
    if isinstance(tensors, dict):
        return {key: upcast(each) for key, each in tensors.items()}
    return ops.cast(tensors, "float32") if is_low_precision(tensors.dtype) else tensors


def upcast_dtype(dtype: Any) -> str:
    """Return the dtype to compute in: float64 for float64, and float32 for every other dtype.

    Example:

    >>> upcast_dtype("float16"), upcast_dtype("float64")
    ('float32', 'float64')
    """
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


@registered
class OneNode(keras.Operation):
    """Makes a function a single node of a functional model, which runs it on each call.

    Otherwise a function that depends on dtypes would see them only once, when the model is built,
    and would not follow when the model is converted to another policy.

    Args:
        function: A function from tensors to tensors.
        original: The user's function, if `function` is that function wrapped by `in_float32`.
        **kwargs: Arguments of `keras.Operation`: `name`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        original: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.function = function
        self.original = original

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Return the symbolic output."""
        args, kwargs = keras.tree.map_structure(_dense, (args, kwargs))
        return super().compute_output_spec(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Return the name and the function, unwrapped if only the original can be serialized."""
        wrap = self.original is not None and not _is_registered(self.function)
        function = keras.saving.serialize_keras_object(self.original if wrap else self.function)
        return {"name": self.name, "function": function, "in_float32": wrap}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OneNode:
        """Create the operation from its config."""
        function = keras.saving.deserialize_keras_object(config["function"])
        if config["in_float32"]:
            return cls(in_float32(function), function, name=config["name"])
        return cls(function, name=config["name"])


def as_one_node(function: F, original: Callable[..., Any] | None = None) -> F:
    """Make a function a single node of the model when it is called with symbolic tensors.

    Args:
        function: A function from tensors to tensors.
        original: See `OneNode`.
    """

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, keras.KerasTensor) for x in _leaves([args, kwargs])):
            return OneNode(called, original)(*args, **kwargs)
        return function(*args, **kwargs)

    return called  # type: ignore[return-value] # its arguments are those of `function`


def in_float32(function: F) -> F:
    """Make a function compute in float32 and return the dtype of its first argument.

    The gradient is computed in float32 too, because the casts are part of the function. Float64
    tensors and tensors that are not floats are not cast. A result beyond the range of the original
    dtype becomes inf.

    Args:
        function: A function whose first argument is a tensor or a structure of tensors, and which
            returns a tensor. Its other arguments are not cast.

    Returns:
        A function with the same arguments, which returns tensors of the same shapes.

    Raises:
        ArgumentTypeError: If `function` is not callable.

    References:
        [Micikevicius et al., 2018](https://arxiv.org/abs/1710.03740), section 3.3: tensors are
        float16 in memory, and reductions are computed in float32.

    Example:

    >>> variance = in_float32(lambda x: keras.ops.mean(keras.ops.square(x)))
    >>> x = keras.ops.array([300.0, 0.0, 0.0, 0.0], "float16")  # 300² is inf in float16
    >>> float(variance(x))
    22496.0
    """
    if not callable(function):
        raise ArgumentTypeError(
            "Only a function can be wrapped to compute in float32.",
            received=f"{function!r} of type {type(function).__name__}",
            expected="a function of tensors",
            fix="Pass the function first, and call the result: in_float32(function)(x).",
        )

    @functools.wraps(function)
    def computed_in_float32(*args: Any, **kwargs: Any) -> Any:
        if not args and _first_parameter(function) not in kwargs:
            return function(**kwargs)  # raises Python's error for the missing argument
        x, *others = args or (kwargs.pop(_first_parameter(function)),)
        x = as_tensors(x)
        dtype = _leaves(x)[0].dtype
        outputs = function(upcast(x), *others, **kwargs)
        return ops.cast(outputs, dtype) if is_low_precision(dtype) else outputs

    return as_one_node(computed_in_float32, function)  # type: ignore[return-value]


def _first_parameter(function: Callable[..., Any]) -> str:
    return next(iter(inspect.signature(function).parameters), "")


def _leaves(x: Any) -> list[Any]:
    # Not keras.tree.flatten, which torch.compile cannot trace.
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return [leaf for each in x for leaf in _leaves(each)]
    return [x]


def _is_registered(function: Callable[..., Any]) -> bool:
    name = keras.saving.get_registered_name(function)
    return keras.saving.get_registered_object(name) is function


def _dense(x: Any) -> Any:
    # Keras 3.15 marks `x * 0.5` as sparse, and then cannot trace the operations after it.
    return keras.KerasTensor(x.shape, x.dtype) if isinstance(x, keras.KerasTensor) else x


def _is_tensor(x: Any) -> bool:
    return isinstance(x, keras.KerasTensor) or ops.is_tensor(x)
