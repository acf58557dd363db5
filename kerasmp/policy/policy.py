"""The policy: one frozen value that says which dtypes a model uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import keras

from kerasmp.errors import ArgumentTypeError, PolicyError, with_type
from kerasmp.policy import hardware
from kerasmp.policy import rules as rules_
from kerasmp.policy import spec as spec_

if TYPE_CHECKING:
    from collections.abc import Sequence

PolicyLike: TypeAlias = "Policy | keras.DTypePolicy | str"
RuleSetLike: TypeAlias = "Mapping[str | type, PolicyLike] | str | None"
RulesLike: TypeAlias = "RuleSetLike | Sequence[RulesLike] | rules_.Rules"


@keras.saving.register_keras_serializable(package="kerasmp")
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Policy:
    """The dtypes in which a model stores variables, computes, and returns its outputs.

    A policy is a frozen value. It compares and hashes by content, and can be pickled, copied and
    serialized. All checks run when it is created, so every policy that exists can be used.

    Args:
        spec: One of

            - a Keras policy name: "mixed_float16", "mixed_bfloat16", "float32", "float16",
              "bfloat16", "float64", or a quantized one such as "int8_from_float32";
            - "variable=float32,compute=float16,output=float32" in any order, with spaces where you
              like. Without `variable`, variables are float32 (float64 for `compute=float64`).
              Without `compute`, the compute dtype is the variable dtype. Without `output`, the
              outputs keep the dtype in which the last layer computes;
            - "auto": what `recommend_policy` says for this device. It is asked once, when the
              policy is created;
            - a `keras.DTypePolicy` or `DTypePolicyMap` (the members of a map become rules), or
              another policy.
        rules: Exceptions, as a mapping from layer path patterns (regular expressions that must
            match a layer's whole path, as in `keras.dtype_policies.DTypePolicyMap`) or layer
            classes to anything that `spec` accepts, without `output` and without rules; or "safe",
            the built-in set of stock layers that compute in float32 under a half precision policy;
            or a list of both, in which the mapping takes precedence. They replace the rules of
            `spec`; None keeps those.

    Raises:
        PolicyError: If a name or dtype is unknown, Keras cannot express the pair of variable and
            compute dtype, a rule is invalid, or "safe" is combined with half precision variables.
        ArgumentTypeError: If `spec` or `rules` has the wrong type.

    Example:
    >>> policy = Policy("compute=float16, output=float32", rules={"head/.*": "float32"})
    >>> policy.name, policy.variable_dtype, policy.output_dtype
    ('mixed_float16', 'float32', 'float32')
    >>> str(policy)
    'variable=float32,compute=float16,output=float32'
    """

    _spec: spec_.Spec
    _rules: rules_.Rules

    def __init__(self, spec: PolicyLike, *, rules: RulesLike = None) -> None:
        dtypes, own_rules = _read(spec)
        rules = own_rules if rules is None else rules
        object.__setattr__(self, "_spec", dtypes)
        object.__setattr__(self, "_rules", rules_.normalise(rules, _read))
        if self.safe and self.variable_dtype in spec_.HALVES:
            raise PolicyError(
                'The rule set "safe" lets layers compute in float32, and needs float32 variables.',
                received=f"{str(self)!r}, whose variables are {self.variable_dtype}",
                expected="a policy with float32 variables",
                fix=f'Use "mixed_{self.variable_dtype}". For inference only, call '
                f'convert(...) with variables="{self.variable_dtype}".',
            )

    @property
    def name(self) -> str:
        """The name that Keras gives to the variable and compute dtypes."""
        return self._spec.name

    @property
    def variable_dtype(self) -> str:
        """The dtype in which layers store their variables."""
        return self._spec.variable

    @property
    def compute_dtype(self) -> str:
        """The dtype in which layers compute."""
        return self._spec.compute

    @property
    def output_dtype(self) -> str | None:
        """The dtype of the model's final outputs; None leaves them as the last layer makes them."""
        return self._spec.output

    @property
    def rules(self) -> Mapping[str | type, Policy]:
        """Exceptions: layer path patterns, then layer classes, each with its policy. Read-only."""
        return MappingProxyType({key: Policy(str(spec)) for key, spec in self._rules.exceptions})

    @property
    def safe(self) -> bool:
        """Whether the built-in rule set "safe" applies where no exception does."""
        return self._rules.safe

    @property
    def beyond_keras(self) -> tuple[str, ...]:
        """What stock Keras models will not follow, in words; empty if they follow everything.

        Example:
        >>> Policy("mixed_float16", rules={keras.layers.Softmax: "float32"}).beyond_keras
        ('the rule for the class Softmax',)
        """
        output = () if self.output_dtype is None else (f"output={self.output_dtype}",)
        safe = (f'the rule set "{rules_.SAFE}"',) if self.safe else ()
        classes = [key.__name__ for key, _ in self._rules.exceptions if isinstance(key, type)]
        return (*output, *safe, *(f"the rule for the class {name}" for name in classes))

    def to_keras(self) -> keras.DTypePolicy:
        """Return a new Keras policy with all that Keras can express.

        Returns:
            A `keras.DTypePolicy`, or a `keras.dtype_policies.DTypePolicyMap` if there are rules
            with layer path patterns. `beyond_keras` lists what is left out.

        Example:
        >>> Policy("mixed_bfloat16").to_keras()
        <DTypePolicy "mixed_bfloat16">
        """
        default = keras.dtype_policies.get(self.name)
        members = {
            key: keras.dtype_policies.get(spec.name)
            for key, spec in self._rules.exceptions
            if isinstance(key, str)
        }
        if not members:
            return default
        # Without a default, the map's get_config would erase the names of its members.
        return keras.dtype_policies.DTypePolicyMap(default, members)

    def get_config(self) -> dict[str, Any]:
        """Return plain data from which `from_config` creates an equal policy.

        Returns:
            A dict with "spec" and, if there are rules, "rules".

        Raises:
            PolicyError: If a class in the rules is neither Keras's nor registered with Keras.
        """
        config: dict[str, Any] = {"spec": str(self)}
        if self._rules:
            config["rules"] = rules_.to_config(self._rules)
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Policy:
        """Create a policy from what `get_config` returned.

        Args:
            config: The plain data.

        Returns:
            An equal policy.

        Raises:
            PolicyError: If `config` is not such a dict, or a class in its rules is not known in
                this process.
        """
        known = isinstance(config, Mapping) and "spec" in config and {*config} <= {"spec", "rules"}
        if not known:
            raise PolicyError(
                "A policy cannot be created from this configuration.",
                received=repr(config),
                expected='a dict with "spec", and with "rules" if there are any',
                fix="Policy.get_config() returns one.",
            )
        return cls(config["spec"], rules=rules_.from_config(config.get("rules", ())))

    def __str__(self) -> str:
        return str(self._spec)

    def __repr__(self) -> str:
        rules = [*([rules_.SAFE] if self.safe else []), *([dict(self.rules)] if self.rules else [])]
        if not rules:
            return f"Policy({str(self)!r})"
        return f"Policy({str(self)!r}, rules={rules if len(rules) > 1 else rules[0]!r})"


def _read(spec: object) -> tuple[spec_.Spec, RulesLike]:
    """Return the dtypes that a spec stands for, and the rules that come with it."""
    if isinstance(spec, Policy):
        return spec._spec, spec._rules  # noqa: SLF001 (its own class)
    if isinstance(spec, keras.dtype_policies.DTypePolicyMap):
        return spec_.from_keras(spec.default_policy), dict(spec.items())
    if isinstance(spec, keras.DTypePolicy):
        return spec_.from_keras(spec), None
    if not isinstance(spec, str):
        raise ArgumentTypeError(
            "A policy cannot be created from this value.",
            received=with_type(spec),
            expected="a policy name or spec as text, a Policy, or a keras.DTypePolicy",
            fix='For example Policy("mixed_float16").',
        )
    if spec.strip() == spec_.AUTO:
        name, _, _ = hardware.recommend()
        return spec_.parse(name), None
    return spec_.parse(spec), None
