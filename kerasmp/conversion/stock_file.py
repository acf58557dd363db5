"""A file of a converted model that stock Keras can load, where it would compute the same."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
import zipfile
from typing import Any

import keras

from kerasmp.backend.keras_graph import graph_of
from kerasmp.errors import ArgumentError, ArgumentTypeError, PolicyError
from kerasmp.model.serialization import KEY
from kerasmp.policy import LayerPolicies, policy_scope
from kerasmp.policy.locations import locations
from kerasmp.policy.safe import is_kerasmp_layer

# What our classes of models are without us, as Keras writes them: only one has a public name.
_STOCK = {
    "kerasmp>FunctionalModel": ("keras.src.models.functional", "Functional", "Functional"),
    "kerasmp>Sequential": ("keras", "Sequential", None),
}
_CONFIG = "config.json"  # in a `.keras` file
_TURNED = "kerasmp>Turned"
_FIX = "Save the whole with model.save(path), and import kerasmp where it is loaded."


def save_for_stock_keras(model: Any, path: str | os.PathLike[str]) -> None:
    """Save a model in a `.keras` file that needs no kerasmp, if it computes the same there.

    What Keras makes of the file is made here first and compared, layer by layer. The file holds
    neither what `compile` was given nor an optimizer.

    Args:
        model: A built model: converted, turned or stock.
        path: The file, ending in ".keras".

    Raises:
        PolicyError: If a layer is one of kerasmp's or has something of its, such as an activation;
            if the policy has an `output`; or if Keras would load a layer with another policy, as it
            does the parts of attention under the rules "safe". The error names the layer. No file
            is written.
        ArgumentTypeError: If `model` is no Keras model.
        ArgumentError: If `path` does not end in ".keras".

    Example:

    >>> import pathlib, tempfile
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="mixed_float16")])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_for_stock_keras(model, pathlib.Path(folder, "model.keras"))
    ...     type(keras.models.load_model(pathlib.Path(folder, "model.keras"))).__name__
    'Sequential'
    """
    if not isinstance(model, keras.Model):
        raise ArgumentTypeError(
            "Only a Keras model can be saved.",
            received=f"{model!r}, a {type(model).__name__}",
            expected="a keras.Model",
            fix="Pass the model, and the path after it.",
        )
    if not isinstance(path, str | os.PathLike) or pathlib.Path(path).suffix != ".keras":
        raise ArgumentError(
            "Only one format keeps the policies of layers.",
            received=f"the path {path!r}",
            expected='a path that ends in ".keras"',
            fix="model.export(path) is for places without Keras.",
        )
    _refuse_ours(model)
    config = _stock_config(model)
    _refuse_parts_of_ours(config, model.name)
    text = json.dumps(config)
    # Whatever the global policy there is: "float32" is what Keras starts with.
    with policy_scope("float32"):
        stock = keras.saving.deserialize_keras_object(json.loads(text))  # which takes it apart
    _refuse_other_policies(model, stock)
    _save(model, text, path)


def _save(model: Any, config: str, path: str | os.PathLike[str]) -> None:
    """Save the model as it is, for all that layers keep beside weights, with another config."""
    with tempfile.TemporaryDirectory() as folder:
        ours = pathlib.Path(folder, "ours.keras")
        optimizer = getattr(model, "optimizer", None)
        try:
            if optimizer is not None:
                model.optimizer = None
            model.save(ours)
        finally:
            if optimizer is not None:
                model.optimizer = optimizer
        with zipfile.ZipFile(ours) as before, zipfile.ZipFile(path, "w") as after:
            for item in before.infolist():
                is_config = item.filename == _CONFIG
                after.writestr(item, config if is_config else before.read(item))


def _refuse_ours(model: Any) -> None:
    if getattr(model, "_output_dtype", None) is not None:
        raise PolicyError(
            "Stock Keras does not cast a model's outputs.",
            received=f'the model "{model.name}" with output={model._output_dtype}',  # noqa: SLF001 - ours
            expected="a policy without output=",
            fix=f'Give the last layer dtype="{model._output_dtype}" instead. {_FIX}',  # noqa: SLF001
        )
    for layer, location in locations(model):
        if layer is not model and is_kerasmp_layer(layer):
            raise PolicyError(
                "A layer is one of kerasmp's, and stock Keras would compute something else.",
                received=f'"{location.path}", a {type(layer).__name__}',
                expected="stock layers, or your own",
                fix=_FIX,
            )


def _stock_config(model: Any) -> dict[str, Any]:
    """Return the model's serialised config as if kerasmp had never met it."""
    config = dict(keras.saving.serialize_keras_object(model))
    config.pop("compile_config", None)
    name = config["registered_name"]
    if name == _TURNED:
        return {**config, **config["config"]["stock"]}
    inner = {key: value for key, value in config["config"].items() if key != KEY}
    if name in _STOCK:
        stock = dict(zip(("module", "class_name", "registered_name"), _STOCK[name], strict=True))
        return {**config, **stock, "config": inner}
    if is_kerasmp_layer(model):
        raise PolicyError(
            "The model's class is derived from kerasmp.Model.",
            received=f'"{model.name}", a {type(model).__name__}',
            expected="a model of a class that needs no kerasmp",
            fix=_FIX,
        )
    return config


def _refuse_parts_of_ours(config: Any, layer: str) -> None:
    """Raise where a config names an activation, initializer or the like that is registered by us.

    Args:
        config: The config, or a part of it.
        layer: The name of the layer that the part is of.
    """
    if isinstance(config, dict):
        if isinstance(config.get("config"), dict):
            layer = config["config"].get("name", layer)
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for part in config:
            _refuse_parts_of_ours(part, layer)
    elif isinstance(config, str) and config.startswith("kerasmp>"):
        raise PolicyError(
            "A layer has something of kerasmp's, which stock Keras cannot load.",
            received=f'"{layer}" with {config}',
            expected="what Keras has, or you",
            fix=_FIX,
        )


def _refuse_other_policies(model: Any, stock: Any) -> None:
    present = [
        (layer, location.path)
        for layer, location in locations(model)
        if not isinstance(layer, keras.layers.InputLayer)
    ]
    here, there = LayerPolicies.of(model), LayerPolicies.of(stock)
    if len(here) != len(there):
        raise PolicyError(
            "Keras would not make all layers before the model is called, and cannot be compared.",
            received=f"{len(here)} layers, and {len(there)} of them when loaded",
            expected="a model that says how it is built, by `build` or `build_from_config`",
            fix=_FIX,
        )
    for (layer, path), ours, theirs in zip(present, here, there, strict=True):
        # A container's own policy is in no file of Keras's, and changes no result.
        if ours.policy != theirs.policy and graph_of(layer) is None:
            raise PolicyError(
                "Stock Keras would load a layer with another policy, and compute something else.",
                received=f'"{path}" ({ours.class_name}) under "{ours.policy}", loaded under '
                f'"{theirs.policy}"',
                expected="one policy for a layer and all that it makes itself",
                fix="Convert with a rule for the class of the layer that holds it, such as "
                'rules={keras.layers.MultiHeadAttention: "float32"}. ' + _FIX,
            )
