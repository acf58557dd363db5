"""The text of a policy: read it, check that Keras can express it, write it back."""

from __future__ import annotations

from typing import NamedTuple

import keras

from kerasmp.errors import PolicyError, did_you_mean

AUTO = "auto"
DTYPES = ("float16", "bfloat16", "float32", "float64")
HALVES = ("float16", "bfloat16")
MIXED = {f"mixed_{half}": half for half in HALVES}
NAMES = (*MIXED, *DTYPES)
PARTS = ("variable", "compute", "output")

_EXPECTED = (
    f"one of {', '.join((*NAMES, AUTO))}, a quantised name such as int8_from_float32, "
    'or "variable=float32,compute=float16,output=float32"'
)
_USUAL = 'The usual one is "mixed_float16".'


class Spec(NamedTuple):
    """What the text of a policy says, checked.

    Args:
        name: The name under which Keras knows the pair of variable and compute dtype.
        variable: Dtype of the variables.
        compute: Dtype of the computations.
        output: Dtype of the model's final outputs; None leaves them as they are.
    """

    name: str
    variable: str
    compute: str
    output: str | None = None

    def __str__(self) -> str:
        if self.output is None:
            return self.name
        return f"variable={self.variable},compute={self.compute},output={self.output}"


def parse(text: str) -> Spec:
    """Read the text of a policy, except "auto", which needs a device.

    Args:
        text: A Keras policy name, or parts such as "compute=float16,output=float32".

    Returns:
        What it says.

    Raises:
        PolicyError: If a name is unknown, a part is unknown, empty or given twice, or Keras cannot
            express the combination.

    Example:
    >>> parse("compute=float16")
    Spec(name='mixed_float16', variable='float32', compute='float16', output=None)
    """
    text = text.strip()
    if "=" in text or "," in text:
        return _from_parts(_split(text))
    if "_from_" in text:
        return _quantised(text)
    if text in MIXED:
        return Spec(text, "float32", MIXED[text])
    if text in DTYPES:
        return Spec(text, text, text)
    raise PolicyError(
        "Unknown policy name.",
        received=repr(text),
        expected=_EXPECTED,
        fix=did_you_mean(text, (*NAMES, AUTO)) or _USUAL,
    )


def from_keras(policy: keras.DTypePolicy) -> Spec:
    """Read a Keras policy that is not a map.

    Args:
        policy: The Keras policy.

    Returns:
        What it says.

    Raises:
        PolicyError: If its name does not say all of it, as with a subclass, an
            `amax_history_length` that is not the default, or a name that Keras has erased.
    """
    name = policy.name
    try:
        is_told = isinstance(name, str) and keras.dtype_policies.get(name) == policy
    except (TypeError, ValueError):  # a user's own may have any name
        is_told = False
    if not is_told:
        raise PolicyError(
            "This Keras policy cannot be told by its name alone.",
            received=f"{name!r}, a {type(policy).__name__}",
            expected=_EXPECTED,
            fix="Give it to the layers themselves, through their dtype argument.",
        )
    return parse(name)


def _split(text: str) -> dict[str, str]:
    parts: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = (word.strip() for word in item.partition("="))
        if not equals or key not in PARTS:
            raise PolicyError(
                "Unknown part of a policy.",
                received=f"{item.strip()!r} in {text!r}",
                expected=" or ".join(f"{part}=DTYPE" for part in PARTS),
                fix=did_you_mean(key, PARTS) or _USUAL,
            )
        if key in parts:
            raise PolicyError(
                f"{key} is given twice.",
                received=repr(text),
                expected=f"at most one {key}=DTYPE",
                fix="Leave one of them out.",
            )
        parts[key] = _dtype(value, item.strip())
    return parts


def _dtype(value: str, item: str) -> str:
    if value not in DTYPES:
        raise PolicyError(
            "Unknown dtype in a policy.",
            received=repr(item),
            expected=f"one of {', '.join(DTYPES)}",
            fix=did_you_mean(value, DTYPES) or _USUAL,
        )
    return value


def _from_parts(parts: dict[str, str]) -> Spec:
    variable, compute = parts.get("variable"), parts.get("compute")
    if variable is None:
        # Half precision variables lose small updates: nobody gets them without asking.
        variable = "float64" if compute == "float64" else "float32"
    compute = compute or variable
    return Spec(_keras_name(variable, compute), variable, compute, parts.get("output"))


def _keras_name(variable: str, compute: str) -> str:
    if variable == compute:
        return compute
    if variable == "float32" and compute in HALVES:
        return f"mixed_{compute}"
    raise PolicyError(
        "Keras cannot express this combination of variable and compute dtypes.",
        received=f"variable={variable},compute={compute}",
        expected="the same dtype twice, or variable=float32 with compute=float16 or bfloat16",
        fix=f'"{compute}" does both in {compute}.',
    )


def _quantised(text: str) -> Spec:
    try:
        policy = keras.dtype_policies.get(text)
    except (TypeError, ValueError) as error:
        raise PolicyError(
            "Keras refuses this quantised policy name.",
            received=repr(text),
            expected="a name such as int8_from_float32 or float8_from_mixed_bfloat16",
            fix=f"Keras says: {error}",
        ) from error
    if policy.compute_dtype not in DTYPES:
        raise PolicyError(
            "A quantised policy needs a floating point policy after _from_.",
            received=repr(text),
            expected=f"one of {', '.join(NAMES)} after _from_",
            fix="Name the policy that the layers had before quantisation.",
        )
    return Spec(policy.name, policy.variable_dtype, policy.compute_dtype)
