"""What the files of our models hold beside Keras's config, and what becomes of it."""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import TYPE_CHECKING, Any

import keras

from kerasmp.backend.by_identity import ByIdentity
from kerasmp.backend.keras_graph import (
    policy_of,
    refresh_symbolic_dtypes,
    set_input_dtype,
    set_policy,
)
from kerasmp.backend.keras_internals import flatten_layers, own_variables
from kerasmp.backend.variable_dtypes import set_variable_dtype, takes_dtype
from kerasmp.errors import KerasMPWarning, PolicyError, PolicyWarning
from kerasmp.layers.from_stock import turn_to_safe
from kerasmp.policy.apply import apply
from kerasmp.policy.follow import build_with
from kerasmp.policy.layer_policies import LayerPolicies, read
from kerasmp.policy.spec import HALVES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from kerasmp.policy.assign import Assignment

# One key for all: a user's class need not know what is in it.
KEY = "kerasmp"
# What a file says of layers.
_OF_LAYERS = (
    "layer_policies",
    "input_policies",
    "input_dtypes",
    "variable_dtypes",
    "built",
    "layers_may_differ",
)
# Files have all that their layers are made of; others are made by a constructor.
_REBUILT = ("keras", __name__.partition(".")[0])
# Of models, whether a config tells of them that was asked for since they were last saved.
_TOLD: ByIdentity[bool] = ByIdentity()


def adding_extras(get_config: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Return a model's `get_config`, a user's too, with what Keras would lose added.

    A user's need not call that of the parent.

    Args:
        get_config: The method.
    """

    @functools.wraps(get_config)
    def with_them(self: Any) -> dict[str, Any]:
        return with_extras(get_config(self), self)

    return with_them


def taking_up_extras(from_config: Any) -> Any:
    """Return a class method `from_config`, a user's too, that takes up what `adding_extras` added.

    Args:
        from_config: The method, as the class has it.
    """
    of_class = getattr(from_config, "__func__", None) or (
        lambda _, *args, **kwargs: from_config(*args, **kwargs)
    )

    @functools.wraps(of_class)
    def without_them(cls: Any, config: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        rest, extras = without_extras(config)
        model = of_class(cls, rest, *args, **kwargs)
        if KEY in config and _is_ours(model):
            take_up(model, extras)
        return model

    return classmethod(without_them)


def taking_up_layers(build_from_config: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Return a `build_from_config`, after which layers that come only now follow the file.

    Args:
        build_from_config: The method.
    """

    @functools.wraps(build_from_config)
    def and_follow(self: Any, config: Any) -> None:
        build_from_config(self, config)
        self._take_up_layers()

    return and_follow


def with_extras(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return a model's config with what Keras would lose.

    Args:
        config: Keras's config.
        model: The model of ours.
    """
    extras: dict[str, Any] = {}
    if model._output_dtype is not None:  # noqa: SLF001 - its own package
        extras["output_dtype"] = model._output_dtype  # noqa: SLF001
    if model._for_inference:  # noqa: SLF001
        extras["for_inference"] = True
    waiting = getattr(model._rules, "waiting", None)  # noqa: SLF001 - loaded, and not yet built
    if waiting:
        extras |= waiting
    elif model._keeps_layer_policies or _has_users_layers(model):  # noqa: SLF001
        extras |= _of_layers(model)
    for each in flatten_layers(model) if "layer_policies" in extras else [model]:
        if _is_ours(each):
            _TOLD[each] = True
    return {**config, KEY: extras} if extras else dict(config)


def without_extras(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return Keras's config, and what `with_extras` added.

    Args:
        config: What `with_extras` returned.
    """
    rest = dict(config)
    return rest, rest.pop(KEY, {})


def take_up(model: Any, extras: Mapping[str, Any]) -> None:
    """Let a model that was made from a config follow what came with it.

    Args:
        model: The model of ours.
        extras: What `without_extras` returned.
    """
    model._output_dtype = extras.get("output_dtype")  # noqa: SLF001 - not that of the global policy
    model._for_inference = extras.get("for_inference", False)  # noqa: SLF001
    if "layer_policies" not in extras:
        return
    model._keeps_layer_policies = not extras.get("layers_may_differ")  # noqa: SLF001
    model._rules = LayersToFollow(extras)  # noqa: SLF001
    if model.built or not extras.get("built", True):
        model._rules.follow_now(model)  # noqa: SLF001


class LayersToFollow:
    """The policies and variables of one model's layers when it was saved; to be followed once.

    Args:
        extras: What `without_extras` returned.
    """

    def __init__(self, extras: Mapping[str, Any]) -> None:
        self.waiting = {name: extras[name] for name in _OF_LAYERS if name in extras}

    def follow(self, model: Any, *inputs: Any) -> None:
        """Give the layers what they had, if the model is built.

        Args:
            model: The model.
            *inputs: What it is about to be called with; builds the model where it is not built.
        """
        if not self.waiting:
            return
        build_with(model, *inputs)
        # Keras says that it has built the model of a file only afterwards.
        if model.built or all(part.built for part in flatten_layers(model) if part is not model):
            self.follow_now(model)

    def follow_now(self, model: Any) -> None:
        """Give the layers what they had.

        Args:
            model: The model.

        Raises:
            PolicyError: If its layers are not those that were saved, and it was converted.

        Warns:
            PolicyWarning: If they are not, and it was not.
        """
        text = self.waiting["layer_policies"]
        try:
            rows = _assigned(model, read(text, allow_unknown=True))
        except PolicyError as error:
            if not self.waiting.get("layers_may_differ"):
                raise
            _warn_of_others(model, text, error)
        else:
            # Older files have none, and variables follow in those of models for inference alone.
            written = self.waiting.get("variable_dtypes")
            follow = written is not None or model._for_inference  # noqa: SLF001 - ours
            had = [policy_of(row.layer).variable_dtype for row in rows]
            apply(model, rows, variables_follow=follow)
            _inputs_follow(model, self.waiting.get("input_dtypes", ()))
            if follow:
                _variables_follow(rows, had, written)
            for layer, policy in zip(
                _inputs(model), self.waiting.get("input_policies", ()), strict=False
            ):
                with contextlib.suppress(TypeError, ValueError):  # a user's own, and no matter
                    set_policy(layer, keras.dtype_policies.get(policy))
            _refuse_training_inside(model)
        self.waiting = {}


def _assigned(model: Any, policies: LayerPolicies) -> list[Assignment]:
    """Return what layers are assigned, once what the class has made of stock ones is ours again."""
    ours = policies.ours_in(model)
    turn_to_safe(model, [], only=ours)
    for part in flatten_layers(model):
        if id(part) in ours and isinstance(part, keras.Model):
            type(model).from_keras(part)
    return policies.assign(model, allow_new_names=True)


def _warn_of_others(model: Any, text: str, error: PolicyError) -> None:
    """Warn that a model's layers are not those of the file, unless it makes no difference."""
    written = {line.rpartition(": ")[2] for line in text.splitlines()}
    if len(written | {row.policy for row in LayerPolicies.of(model)}) > 1:
        warnings.warn(
            f'The policies of the layers of "{model.name}" cannot be restored: its class makes '
            f"other layers now than the file tells of. Received: {error.received}. Expected: "
            f"{error.expected}. Layers keep the policies that the constructor gives them. Make all "
            "of them in the constructor or in `build`; or load the file under the policy that the "
            "model was made under, with kerasmp.policy_scope(policy).",
            PolicyWarning,
            stacklevel=2,
        )


def warn_if_untold(model: Any) -> None:
    """Warn if a model is being saved inside another one whose config tells nothing of it.

    Args:
        model: The model of ours that is inside.

    Warns:
        PolicyWarning: If it was converted, or follows rules.
    """
    if _TOLD.get(model):
        _TOLD[model] = False
    elif model._keeps_layer_policies:  # noqa: SLF001 - its own package
        warnings.warn(
            f'The file tells nothing of the policies of "{model.name}": it is inside a model whose '
            "class makes it again when it is loaded, as its constructor does. Convert the model "
            "that is saved, kerasmp.convert(model, kerasmp.LayerPolicies.of(model)), or convert "
            "the part again after loading.",
            PolicyWarning,
            stacklevel=2,
        )


def warn_of_no_variables(model: Any, state_tree: Mapping[str, Any]) -> None:
    """Warn of values that no variable of a model has taken: Keras goes by paths, and says nothing.

    A Sequential's paths are others once it is loaded, and Keras numbers automatic names anew.

    Args:
        model: The model.
        state_tree: What its `set_state_tree` was given.

    Warns:
        KerasMPWarning: If there are any.
    """
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *model.metrics_variables, *getattr(optimizer, "variables", ())]
    known = {variable.path for variable in variables}
    lost = [path for tree in state_tree.values() for path in _paths(tree) if path not in known]
    if lost:
        warnings.warn(
            f'"{model.name}" has no variables for {len(lost)} values of its saved state, which are '
            f"left out: {lost[0]} is the first. Keras goes by the paths of variables here, which "
            "are others now. Save the model as `.keras`, which goes by its structure.",
            KerasMPWarning,
            stacklevel=3,
        )


def _paths(tree: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{above}{name}/")
        else:
            yield f"{above}{name}"


def _is_ours(layer: Any) -> bool:
    return hasattr(layer, "_keeps_layer_policies")


def _has_users_layers(model: Any) -> bool:
    return any(
        type(layer).__module__.partition(".")[0] not in _REBUILT for layer in flatten_layers(model)
    )


def _of_layers(model: Any) -> dict[str, Any]:
    policies = LayerPolicies.of(model)
    found: dict[str, Any] = {
        "layer_policies": str(policies),
        "input_policies": [policy_of(layer).name for layer in _inputs(model)],
        "input_dtypes": [layer.dtype for layer in _inputs(model)],
        "variable_dtypes": {
            str(number): dtypes
            for number, row in enumerate(policies.assign(model))
            if (dtypes := [v.dtype for v in own_variables(row.layer)])
            and set(dtypes) != {policy_of(row.layer).variable_dtype}
        },
    }
    if not model.built:
        found["built"] = False
    if not model._keeps_layer_policies:  # noqa: SLF001 - ours
        found["layers_may_differ"] = True  # files of such classes always loaded: only warn
    return found


def _inputs(model: Any) -> list[Any]:
    """Return what `LayerPolicies` has not: whatever their policy, inputs have the data's dtype."""
    return [x for x in flatten_layers(model) if isinstance(x, keras.layers.InputLayer)]


def _inputs_follow(model: Any, dtypes: Iterable[str]) -> None:
    """Give inputs the dtypes of the file: a Sequential without `Input` takes that of its layers.

    Args:
        model: The model.
        dtypes: One for each input; none in an older file.
    """
    pairs = zip(_inputs(model), dtypes, strict=False)
    others = [(layer, dtype) for layer, dtype in pairs if layer.dtype != dtype]
    for layer, dtype in others:
        set_input_dtype(layer, dtype)
    if others:
        refresh_symbolic_dtypes(model)


def _variables_follow(
    rows: Iterable[Assignment], had: Iterable[str], written: Mapping[str, list[str]] | None
) -> None:
    """Give variables the dtypes of the file; their values come from it later.

    Args:
        rows: What layers have been assigned.
        had: The dtypes of variables of their policies before.
        written: The dtypes that are not the policy's; None in an older file.
    """
    for number, (row, have) in enumerate(zip(rows, had, strict=True)):
        want = policy_of(row.layer).variable_dtype
        if written is None and not {have, want} & set(HALVES):
            continue
        variables = own_variables(row.layer)
        dtypes = (written or {}).get(str(number), [want] * len(variables))
        for variable, dtype in zip(variables, dtypes, strict=False):
            if takes_dtype(variable, dtype):
                set_variable_dtype(variable, dtype)


def _refuse_training_inside(model: Any) -> None:
    """Let models of ours inside refuse, too, as after the conversion."""
    for part in flatten_layers(model):
        if model._for_inference and _is_ours(part) and part is not model:  # noqa: SLF001 - ours
            part._for_inference = any(v.dtype in HALVES for v in part.variables)  # noqa: SLF001
