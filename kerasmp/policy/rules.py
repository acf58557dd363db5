"""Exceptions to a policy: which layers, by path pattern or by class, follow another one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import keras

from kerasmp.errors import ArgumentTypeError, PolicyError, did_you_mean

if TYPE_CHECKING:
    from kerasmp.policy.policy import Policy

SAFE = "safe"
"""The name of the built-in rule set. It is reserved: the set has no content yet."""

Key: TypeAlias = str | type
Rules: TypeAlias = tuple[tuple[Key, "Policy"], ...]

_EXPECTED = "a dict from layer path patterns or layer classes to policies"


def normalise(rules: object, make_policy: Callable[[Any], Policy]) -> Rules:
    """Check rules and bring them into one order, so that equal rules compare equal.

    Args:
        rules: What the user gave: None, a mapping, or the name of a built-in rule set.
        make_policy: Turns a value of the mapping into a policy (the class `Policy`, which this
            module cannot import because that one imports this).

    Returns:
        Pairs of a pattern or class and its policy, patterns first.

    Raises:
        ArgumentTypeError: If `rules` is not a mapping, or a key is neither text nor a layer class.
        PolicyError: If the rule set is unknown or not available yet, a pattern is no regular
            expression, or a rule's policy has an output or rules of its own.

    Example:
    >>> from kerasmp.policy import Policy
    >>> normalise({"head/.*": "float32"}, Policy)
    (('head/.*', Policy('float32')),)
    """
    if rules is None:
        return ()
    if isinstance(rules, str):
        raise _no_rule_set(rules)
    if not isinstance(rules, Mapping):
        raise ArgumentTypeError(
            "rules is not a mapping.",
            received=repr(rules),
            expected=_EXPECTED,
            fix='For example rules={"head/.*": "float32"}.',
        )
    pairs = ((_key(key), _value(key, make_policy(value))) for key, value in rules.items())
    return tuple(sorted(pairs, key=_order))


def patterns(rules: Rules) -> dict[str, Policy]:
    """Return the rules that Keras can express: those with a layer path pattern."""
    return {key: policy for key, policy in rules if isinstance(key, str)}


def classes(rules: Rules) -> dict[type, Policy]:
    """Return the rules that Keras cannot express: those with a layer class."""
    return {key: policy for key, policy in rules if isinstance(key, type)}


def to_config(rules: Rules) -> list[dict[str, str]]:
    """Write rules as plain data.

    Args:
        rules: Normalised rules.

    Returns:
        One dict for each rule: "path" or "layer", and "policy".

    Raises:
        PolicyError: If a class is neither one of Keras's layers nor registered with Keras: the
            file could not be read back.
    """
    return [
        {"path": key, "policy": str(policy)}
        if isinstance(key, str)
        else {"layer": _class_name(key), "policy": str(policy)}
        for key, policy in rules
    ]


def from_config(config: Iterable[Mapping[str, str]]) -> dict[Key, str]:
    """Read what `to_config` wrote.

    Args:
        config: One mapping for each rule.

    Returns:
        Rules as a user would give them.

    Raises:
        PolicyError: If a layer class is not known in this process.
    """
    return {
        rule["path"] if "path" in rule else _find_class(rule["layer"]): rule["policy"]
        for rule in config
    }


def _no_rule_set(name: str) -> PolicyError:
    if name == SAFE:
        return PolicyError(
            'The built-in rule set "safe" is not available yet: only its name is reserved.',
            expected=_EXPECTED,
            fix="Until then, name the layers that must stay in float32 yourself.",
        )
    return PolicyError(
        "Unknown rule set.",
        received=repr(name),
        expected=f'{_EXPECTED}, or the name of the built-in rule set, "{SAFE}"',
        fix=did_you_mean(name, [SAFE]),
    )


def _key(key: object) -> Key:
    if isinstance(key, type) and issubclass(key, keras.Layer):
        return key
    if not isinstance(key, str):
        raise ArgumentTypeError(
            "The key of a rule is neither a layer path pattern nor a layer class.",
            received=repr(key),
            expected=_EXPECTED,
            fix='For example "head/.*" or keras.layers.Softmax.',
        )
    try:
        re.compile(key)
    except re.error as error:
        raise PolicyError(
            "The layer path pattern of a rule is not a regular expression.",
            received=repr(key),
            expected="a pattern for re.fullmatch on the layer's path",
            fix=f"Python says: {error}.",
        ) from error
    return key


def _value(key: object, policy: Policy) -> Policy:
    if policy.output_dtype is not None or policy.rules:
        raise PolicyError(
            "The policy of a rule cannot have an output or rules of its own.",
            received=f"{key!r}: {policy!r}",
            expected="variable and compute dtypes only",
            fix="Give output and rules to the policy of the whole model.",
        )
    return policy


def _order(rule: tuple[Key, Policy]) -> tuple[bool, str]:
    key, _ = rule
    if isinstance(key, str):
        return False, key
    return True, f"{key.__module__}.{key.__qualname__}"


def _class_name(cls: type) -> str:
    name = str(keras.saving.get_registered_name(cls))
    if _lookup(name) is not cls:
        raise PolicyError(
            "A layer class in the rules cannot be found again by its name.",
            received=repr(cls),
            expected="a layer of keras.layers, or a registered class",
            fix="Put @keras.saving.register_keras_serializable() above the class.",
        )
    return name


def _find_class(name: str) -> type:
    found = _lookup(name)
    if not isinstance(found, type):
        raise PolicyError(
            "A layer class in the rules is not known in this process.",
            received=repr(name),
            expected="a layer of keras.layers, or a registered class",
            fix="Import the module that registers the class before loading.",
        )
    return found


def _lookup(name: str) -> Any:
    # Never by importing a module that a file names: that would run a stranger's code.
    return keras.saving.get_registered_object(name) or getattr(keras.layers, name, None)
