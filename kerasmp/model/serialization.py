"""What a model's config contains beside Keras's, and warnings about what files cannot keep."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

from kerasmp.backend.by_identity import ByIdentity
from kerasmp.backend.keras_internals import flatten_layers
from kerasmp.errors import KerasMPWarning, PolicyWarning
from kerasmp.model.saved_layers import SavedLayers, is_kerasmp_model, layer_extras

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# The one key for all of it: a user's class need not know what is in it.
KEY = "kerasmp"
# Files describe these layers in full. Other layers are created by a user's constructor.
_DESCRIBED = ("keras", __name__.partition(".")[0])
# Whether a config with the policies of a model was requested since the model was last saved.
_POLICIES_IN_CONFIG: ByIdentity[bool] = ByIdentity()


def add_extras(get_config: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Return a model's `get_config` with the settings added that Keras would lose.

    Args:
        get_config: The method. A user's need not call that of its parent.
    """

    @functools.wraps(get_config)
    def with_extras(self: Any) -> dict[str, Any]:
        config = dict(get_config(self))
        extras = _extras(self)
        return {**config, KEY: extras} if extras else config

    return with_extras


def read_extras(from_config: Any) -> Any:
    """Return a class method `from_config` that applies the settings that `add_extras` added.

    Args:
        from_config: The method, Keras's or a user's, as the class has it.
    """
    function = getattr(from_config, "__func__", None) or (
        lambda _, *args, **kwargs: from_config(*args, **kwargs)
    )

    @functools.wraps(function)
    def without_extras(cls: Any, config: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        rest = {name: value for name, value in config.items() if name != KEY}
        model = function(cls, rest, *args, **kwargs)
        if KEY in config and is_kerasmp_model(model):
            apply_extras(model, config[KEY])
        return model

    return classmethod(without_extras)


def restore_late_layers(
    build_from_config: Callable[[Any, Any], None],
) -> Callable[[Any, Any], None]:
    """Return a `build_from_config` that also restores the policies of layers that it creates."""

    @functools.wraps(build_from_config)
    def with_policies(self: Any, config: Any) -> None:
        build_from_config(self, config)
        self._apply_rules()

    return with_policies


def apply_extras(model: Any, extras: Mapping[str, Any]) -> None:
    """Give a model that was made from a config the settings that `add_extras` added to it.

    Args:
        model: A kerasmp model.
        extras: The settings.
    """
    model._output_dtype = extras.get("output_dtype")  # noqa: SLF001 - its own package
    model._for_inference = extras.get("for_inference", False)  # noqa: SLF001
    if "layer_policies" not in extras:
        return
    model._saves_layer_policies = not extras.get("layers_may_differ")  # noqa: SLF001
    model._rules = SavedLayers(extras)  # noqa: SLF001
    if model.built or not extras.get("built", True):
        model._rules.apply(model)  # noqa: SLF001


def _extras(model: Any) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if model._output_dtype is not None:  # noqa: SLF001
        extras["output_dtype"] = model._output_dtype  # noqa: SLF001
    if model._for_inference:  # noqa: SLF001
        extras["for_inference"] = True
    pending = getattr(model._rules, "pending", None)  # noqa: SLF001 - of a file, and not built yet
    if pending:
        extras |= pending
    elif model._saves_layer_policies or _has_user_layers(model):  # noqa: SLF001
        extras |= layer_extras(model)
    for each in flatten_layers(model) if "layer_policies" in extras else [model]:
        if is_kerasmp_model(each):
            _POLICIES_IN_CONFIG[each] = True
    return extras


def _has_user_layers(model: Any) -> bool:
    return any(
        type(layer).__module__.partition(".")[0] not in _DESCRIBED
        for layer in flatten_layers(model)
    )


def warn_of_unsaved_policies(model: Any) -> None:
    """Warn if a model is saved as part of another one whose config lacks the policies of its parts.

    Args:
        model: The kerasmp model that is the part.

    Warns:
        PolicyWarning: If it was converted, or follows rules.
    """
    if _POLICIES_IN_CONFIG.get(model):
        _POLICIES_IN_CONFIG[model] = False
    elif model._saves_layer_policies:  # noqa: SLF001
        warnings.warn(
            f'The file does not contain the layer policies of "{model.name}", which is part of a '
            "model whose class creates it anew when it is loaded. Convert the model that is saved, "
            "kerasmp.convert(model, kerasmp.LayerPolicies.of(model)), or convert the part again "
            "after loading.",
            PolicyWarning,
            stacklevel=2,
        )


def warn_of_lost_values(model: Any, state_tree: Mapping[str, Any]) -> None:
    """Warn about saved values for which a model has no variable; Keras ignores them silently.

    Keras looks variables up by path. A Sequential has other paths once it is loaded, and Keras
    numbers automatic names anew.

    Args:
        model: The model.
        state_tree: What `set_state_tree` received.

    Warns:
        KerasMPWarning: If there are any.
    """
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *model.metrics_variables, *getattr(optimizer, "variables", ())]
    known = {variable.path for variable in variables}
    lost = [path for tree in state_tree.values() for path in _paths(tree) if path not in known]
    if lost:
        warnings.warn(
            f'"{model.name}" has no variables for {len(lost)} values of its saved state, and left '
            f"them out, {lost[0]} for example. Keras finds variables by path here, and paths have "
            "changed. Save the model as `.keras` instead, where variables are found by structure.",
            KerasMPWarning,
            stacklevel=3,
        )


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):  # to Keras too, lists and other containers are values
            yield from _paths(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}"
