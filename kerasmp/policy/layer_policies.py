"""The policy of each layer of a model, as text that can be read, stored and applied again."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import keras

from kerasmp.backend.keras_graph import policy_of
from kerasmp.errors import ArgumentTypeError, PolicyError, check_model, with_type
from kerasmp.policy.assign import Assignment
from kerasmp.policy.locations import Location, locations
from kerasmp.policy.safe import is_kerasmp_layer

_INDENT = "  "
_PREFIX = "kerasmp>"  # of the names under which Keras registers kerasmp's classes
_ADOPTED = "kerasmp>Turned"  # any user-defined model class that kerasmp has subclassed
_LINE = re.compile(r"((?:  )*)(\S.*) \(([^()]+)\): (\S.*)")
_FORMAT = '"name (Class): policy" in each line, indented by two spaces below its holder'
_SHOW = "print(report.layer_policies) shows a valid text."


class LayerPolicy(NamedTuple):
    """One layer and its policy.

    Args:
        depth: The number of layers and models that contain it; 0 for the model.
        name: Its name.
        class_name: The name under which Keras knows its class.
        policy: The name of its Keras policy.
    """

    depth: int
    name: str
    class_name: str
    policy: str

    def __str__(self) -> str:
        return f"{_INDENT * self.depth}{self.name} ({self.class_name}): {self.policy}"


class LayerPolicies(tuple[LayerPolicy, ...]):
    """The policy of each layer of a model: the model first, and a holder before its parts.

    `str()` gives one line for each layer, and `LayerPolicies.parse` reads this text. When the
    policies are applied to a model, layers are matched by their position, since Keras numbers
    automatic names anew and gives some inner layers no path. Class and name must match too, except
    for a number at the end of the name.

    Example:

    >>> inputs = keras.Input((4,))
    >>> outputs = keras.layers.Dense(2, name="out", dtype="float32")(inputs)
    >>> model = keras.Model(inputs, outputs, name="net")
    >>> print(LayerPolicies.of(model))
    net (Functional): float32
      out (Dense): float32
    >>> LayerPolicies.parse(str(LayerPolicies.of(model))) == LayerPolicies.of(model)
    True
    """

    __slots__ = ()

    def __new__(cls, policies: Iterable[LayerPolicy] = ()) -> Self:  # noqa: D102 - see the class
        rows = tuple(policies) if isinstance(policies, Iterable) else (policies,)
        for row in rows:
            if not isinstance(row, LayerPolicy):
                raise ArgumentTypeError(
                    "LayerPolicies consist of LayerPolicy rows.",
                    received=with_type(row),
                    expected="LayerPolicy rows",
                    fix="Use LayerPolicies.parse(text) for a text, LayerPolicies.of(model) for a "
                    "model.",
                )
        return super().__new__(cls, rows)

    @classmethod
    def of(cls, model: Any) -> LayerPolicies:
        """Return the present policies of a model's layers.

        Args:
            model: A built model.

        Raises:
            ArgumentTypeError: If `model` is not a Keras model or layer.
        """
        return policies_at(_locations(model))

    @classmethod
    def parse(cls, text: str) -> LayerPolicies:
        """Read the text that `str()` returned.

        Args:
            text: The text. Empty lines and lines that start with "#" are skipped.

        Raises:
            ArgumentTypeError: If `text` is not a string.
            PolicyError: If a line has another format, or a policy does not exist.
        """
        if not isinstance(text, str):
            raise ArgumentTypeError(
                "LayerPolicies.parse takes a text.",
                received=with_type(text),
                expected="a string",
                fix="Path(file).read_text() returns one.",
            )
        return cls(read(text))

    def assign(self, model: Any, *, allow_new_names: bool = False) -> list[Assignment]:
        """Return what `kerasmp.policy.assign.assign` returns, but for these policies.

        Args:
            model: A built model.
            allow_new_names: Whether a layer may have another name if no layer has the name in the
                text. The `get_config` of a user-defined layer need not save the name.

        Returns:
            One row for the model and for each layer in it.

        Raises:
            PolicyError: If the model has other layers than these, or a layer would get a
                user-defined policy that it does not have now.
            ArgumentTypeError: If `model` is not a Keras model or layer.
        """
        located = _locations(model)
        names = {_without_number(layer.name) for layer, _ in located}
        rows = []
        for wanted, found in itertools.zip_longest(self, located):
            if wanted is None or found is None:
                raise _mismatch(wanted, found)
            layer, location = found
            name = _without_number(wanted.name)
            same_name = _without_number(layer.name) == name or (
                allow_new_names and name not in names
            )
            same_class = location.depth == wanted.depth and _is_a(layer, wanted.class_name)
            # The model itself may have any name, and be stock or kerasmp's.
            if location.depth and not (same_name and same_class):
                raise _mismatch(wanted, found)
            row = Assignment(layer, location.path, policy_of(layer), wanted.policy, "the text")
            _ = row.policy_after  # raises an error if there is no such policy
            rows.append(row)
        return rows

    def ours_in(self, model: Any) -> set[int]:
        """Return the `id`s of the layers that are kerasmp's in this text and stock in a model.

        Args:
            model: A built model.
        """
        return {
            id(layer)
            for wanted, (layer, location) in zip(self, _locations(model), strict=False)
            if location.depth
            and wanted.class_name.startswith(_PREFIX)
            and not is_kerasmp_layer(layer)
        }

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def policies_at(located: Iterable[tuple[Any, Location]]) -> LayerPolicies:
    """Return the present policies of layers.

    Args:
        located: What `kerasmp.policy.locations.locations` returns for a model.
    """
    return LayerPolicies(
        LayerPolicy(location.depth, layer.name, _class_name(layer), str(policy_of(layer).name))
        for layer, location in located
        if not isinstance(layer, keras.layers.InputLayer)
    )


def read(text: str, *, allow_unknown: bool = False) -> LayerPolicies:
    """Read the text that `str()` of `LayerPolicies` returned.

    Args:
        text: The text.
        allow_unknown: Whether Keras need not know the policies, as with the name of a user-defined
            policy.

    Raises:
        PolicyError: If a line has another format, or a policy does not exist and must.
    """
    rows = [
        _read_line(number, line, allow_unknown=allow_unknown)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and line[0] != "#"
    ]
    if not rows:
        raise PolicyError(
            "The text contains no layer policies.",
            received=repr(text),
            expected=_FORMAT,
            fix=_SHOW,
        )
    return LayerPolicies(rows)


def _read_line(number: int, line: str, *, allow_unknown: bool) -> LayerPolicy:
    match = _LINE.fullmatch(line.rstrip())
    if match is None:
        raise PolicyError(
            f"Line {number} is not a layer with its policy.",
            received=repr(line),
            expected=_FORMAT,
            fix=_SHOW,
        )
    indent, name, class_name, policy = match.groups()
    try:
        keras.dtype_policies.get(policy)
    except (TypeError, ValueError) as error:
        if not allow_unknown:
            raise PolicyError(
                f"Keras does not know the policy in line {number}.",
                received=repr(policy),
                expected='a name such as "mixed_float16"',
                fix="Set a user-defined policy in the constructor of its layer, not by a text. "
                f"Keras says: {error}",
            ) from error
    return LayerPolicy(len(indent) // len(_INDENT), name, class_name, policy)


def _locations(model: Any) -> list[tuple[Any, Location]]:
    check_model(model, "have layer policies", fix="Pass the model itself.")
    is_input = keras.layers.InputLayer
    return [
        (layer, location) for layer, location in locations(model) if not isinstance(layer, is_input)
    ]


def _class_name(layer: Any) -> str:
    return str(keras.saving.get_registered_name(type(layer)))


def _is_a(layer: Any, class_name: str) -> bool:
    """Return whether a layer has a class, or a model has its stock or kerasmp counterpart."""
    found = _class_name(layer)
    if found == class_name or not isinstance(layer, keras.Model):
        return found == class_name
    return _ADOPTED in {found, class_name} or _stock(found) == _stock(class_name)


def _stock(class_name: str) -> str:
    return class_name.removeprefix(_PREFIX).replace("FunctionalModel", "Functional")


def _without_number(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _mismatch(wanted: LayerPolicy | None, found: tuple[Any, Location] | None) -> PolicyError:
    present = "no further layer"
    if found is not None:
        layer, location = found
        present = f'"{location.path}" ({_class_name(layer)})'
    expected = "no further layer" if wanted is None else str(wanted).strip()
    return PolicyError(
        "These policies belong to another model: the layers differ.",
        received=f"a model with {present}",
        expected=f"{expected}, at this position",
        fix="Convert by rules, and store the new report.layer_policies.",
    )
