"""The policy of each layer of a model, as text: to read, to keep with a project, to apply again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import keras

from kerasmp.backend.keras_graph import policy_of
from kerasmp.errors import ArgumentTypeError, PolicyError
from kerasmp.policy.assign import Assignment
from kerasmp.policy.locations import Location, locations
from kerasmp.policy.safe import is_kerasmp_layer

_INDENT = "  "
_OURS = "kerasmp>"  # before the names under which Keras knows our classes
_TURNED = "kerasmp>Turned"  # any user's class of models that was turned into one of ours
_LINE = re.compile(r"((?:  )*)(\S.*) \(([^()]+)\): (\S.*)")
_EXPECTED = '"name (Class): policy" in each line, two blanks further in for what a layer holds'


class LayerPolicy(NamedTuple):
    """One layer and its policy.

    Args:
        depth: How many layers and models hold it; 0 for the model.
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
    """The policy of each layer of a model, the model's own first, holders before what they hold.

    `str()` is one line for each, which `LayerPolicies.parse` reads back. Layers are found by where
    they stand: Keras numbers automatic names anew, and gives some inner layers no path. The class
    must be the same, and the name too but for a number at its end.

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

    def __new__(cls, policies: Iterable[LayerPolicy] = ()) -> Self:  # noqa: D102 - the class says it
        rows = tuple(policies) if isinstance(policies, Iterable) else (policies,)
        wrong = [row for row in rows if not isinstance(row, LayerPolicy)]
        if wrong:
            raise ArgumentTypeError(
                "Layer policies are made of rows.",
                received=f"{wrong[0]!r}, a {type(wrong[0]).__name__}",
                expected="LayerPolicy rows",
                fix="LayerPolicies.parse(text) reads a text, and LayerPolicies.of(model) a model.",
            )
        return super().__new__(cls, rows)

    @classmethod
    def of(cls, model: Any) -> LayerPolicies:
        """Return the policies that a model's layers have now.

        Args:
            model: A built model.

        Raises:
            ArgumentTypeError: If `model` is no Keras model or layer.
        """
        return policies_at(_places(model))

    @classmethod
    def parse(cls, text: str) -> LayerPolicies:
        """Read what `str()` wrote. Empty lines and lines that begin with "#" are passed over.

        Args:
            text: The text.

        Raises:
            ArgumentTypeError: If `text` is no string.
            PolicyError: If a line is not of that form, or a policy does not exist.
        """
        if not isinstance(text, str):
            raise ArgumentTypeError(
                "Layer policies are read from text.",
                received=f"{text!r}, a {type(text).__name__}",
                expected="a string",
                fix="Path(file).read_text() is one.",
            )
        return cls(read(text))

    def assign(self, model: Any, *, allow_new_names: bool = False) -> list[Assignment]:
        """Decide as `kerasmp.policy.assign.assign` does, from these policies.

        Args:
            model: A built model.
            allow_new_names: Whether a layer may have another name where no layer has that of the
                text: a user's `get_config` need not write it into files.

        Returns:
            One row for the model and for each layer in it.

        Raises:
            PolicyError: If the model's layers are not those that the policies are of, or a layer is
                to follow one of the user's own that it does not follow now.
            ArgumentTypeError: If `model` is no Keras model or layer.
        """
        present = _places(model)
        names = {_plain(layer.name) for layer, _ in present}
        for wanted, (layer, location) in zip(self, present, strict=False):
            same = _plain(layer.name) == _plain(wanted.name) or (
                allow_new_names and _plain(wanted.name) not in names
            )
            # What the model itself is called, and whether it is one of ours, is the same to us.
            same = same and location.depth == wanted.depth and _is_a(layer, wanted.class_name)
            if location.depth and not same:
                raise _misfit(str(wanted).strip(), f'"{location.path}" ({_class_name(layer)})')
        if len(present) > len(self):
            layer, location = present[len(self)]
            raise _misfit("no further layer", f'"{location.path}" ({_class_name(layer)})')
        if len(present) < len(self):
            raise _misfit(str(self[len(present)]).strip(), "no further layer")
        rows = [
            Assignment(layer, location.path, policy_of(layer), wanted.policy, "the text")
            for wanted, (layer, location) in zip(self, present, strict=True)
        ]
        for row in rows:
            _ = row.policy_after  # raises where there is no such policy
        return rows

    def ours_in(self, model: Any) -> set[int]:
        """Return the `id`s of the layers that were kerasmp's and are stock here.

        Args:
            model: A built model.
        """
        return {
            id(layer)
            for wanted, (layer, location) in zip(self, _places(model), strict=False)
            if location.depth
            and wanted.class_name.startswith(_OURS)
            and not is_kerasmp_layer(layer)
        }

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def policies_at(found: Iterable[tuple[Any, Location]]) -> LayerPolicies:
    """Return the policies that layers have now.

    Args:
        found: What `kerasmp.policy.locations.locations` yields of a model.
    """
    return LayerPolicies(
        LayerPolicy(location.depth, layer.name, _class_name(layer), str(policy_of(layer).name))
        for layer, location in found
        if not isinstance(layer, keras.layers.InputLayer)
    )


def read(text: str, *, allow_unknown: bool = False) -> LayerPolicies:
    """Read what `str()` of `LayerPolicies` wrote.

    Args:
        text: The text.
        allow_unknown: Whether Keras need not know the policies: one of the user's own has a name
            that says nothing to it.

    Raises:
        PolicyError: If a line is not of that form, or a policy does not exist and must.
    """
    lines = enumerate(text.splitlines(), 1)
    rows = [
        _read(number, line, allow_unknown)
        for number, line in lines
        if line.strip() and line[0] != "#"
    ]
    if not rows:
        raise PolicyError(
            "There is no line in the text.",
            received=repr(text),
            expected=_EXPECTED,
            fix="print(report.layer_policies) shows such a text.",
        )
    return LayerPolicies(rows)


def _places(model: Any) -> list[tuple[Any, Location]]:
    if not isinstance(model, keras.Layer):
        raise ArgumentTypeError(
            "Only the layers of a Keras model have policies.",
            received=f"{model!r}, a {type(model).__name__}",
            expected="a keras.Model",
            fix="Pass the model itself.",
        )
    is_input = keras.layers.InputLayer
    return [
        (layer, location) for layer, location in locations(model) if not isinstance(layer, is_input)
    ]


def _class_name(layer: Any) -> str:
    return str(keras.saving.get_registered_name(type(layer)))


def _is_a(layer: Any, class_name: str) -> bool:
    """Return whether a layer is of a class, or a model of what it is without us or with us."""
    found = _class_name(layer)
    if found == class_name or not isinstance(layer, keras.Model):
        return found == class_name
    return _TURNED in {found, class_name} or _stock(found) == _stock(class_name)


def _stock(class_name: str) -> str:
    return class_name.removeprefix(_OURS).replace("FunctionalModel", "Functional")


def _plain(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _read(number: int, line: str, allow_unknown: bool) -> LayerPolicy:  # noqa: FBT001 - one caller
    match = _LINE.fullmatch(line.rstrip())
    if match is None:
        raise PolicyError(
            f"Line {number} names no layer and policy.",
            received=repr(line),
            expected=_EXPECTED,
            fix="print(report.layer_policies) shows such a text.",
        )
    blanks, name, class_name, policy = match.groups()
    try:
        keras.dtype_policies.get(policy)
    except (TypeError, ValueError) as error:
        if not allow_unknown:
            raise PolicyError(
                f"Keras does not know the policy in line {number}.",
                received=repr(policy),
                expected='a name such as "mixed_float16"',
                fix="One of your own is set by the constructor of its layer, and not by a text. "
                f"Keras says: {error}",
            ) from error
    return LayerPolicy(len(blanks) // len(_INDENT), name, class_name, policy)


def _misfit(wanted: str, found: str) -> PolicyError:
    return PolicyError(
        "The policies are not those of this model: layers differ.",
        received=f"a model with {found}",
        expected=f"{wanted}, at this place",
        fix="Convert by rules, and write down report.layer_policies anew.",
    )
