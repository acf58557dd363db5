"""Saves a converted model for stock Keras, if it computes the same there."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
import zipfile
from typing import Any

import keras

from kerasmp.backend.keras_graph import graph_of
from kerasmp.errors import ArgumentError, PolicyError, check_model
from kerasmp.model.serialization import KEY
from kerasmp.policy import LayerPolicies, policy_scope
from kerasmp.policy.locations import locations
from kerasmp.policy.safe import is_kerasmp_layer

# The stock class of each kerasmp model class, as Keras writes it: module, class, registered name.
_STOCK = {
    "kerasmp>FunctionalModel": ("keras.src.models.functional", "Functional", "Functional"),
    "kerasmp>Sequential": ("keras", "Sequential", None),
}
_CONFIG = "config.json"  # in a `.keras` file
_ADOPTED = "kerasmp>Turned"
_FIX = "To load the model where kerasmp is imported, save it with model.save(path)."


def save_for_stock_keras(model: Any, path: str | os.PathLike[str]) -> None:
    """Save a model to a `.keras` file that loads without kerasmp, if it computes the same there.

    The file is first loaded in memory as stock Keras would load it, and compared layer by layer. It
    contains neither the arguments of `compile` nor an optimizer.

    Args:
        model: A built model: converted, adopted by `Model.from_keras`, or stock.
        path: The file, ending in ".keras".

    Raises:
        PolicyError: If a layer is a kerasmp layer or uses something of kerasmp, such as an
            activation; if the policy has an `output`; or if Keras would load a layer with another
            policy, as it does the parts of attention under the rules "safe". The error names the
            layer. No file is written.
        ArgumentTypeError: If `model` is not a Keras model.
        ArgumentError: If `path` does not end in ".keras".

    Example:

    >>> import pathlib, tempfile
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="mixed_float16")])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_for_stock_keras(model, pathlib.Path(folder, "model.keras"))
    ...     type(keras.models.load_model(pathlib.Path(folder, "model.keras"))).__name__
    'Sequential'
    """
    check_model(model, "be saved", keras.Model, fix="Pass the model first, then the path.")
    if not isinstance(path, str | os.PathLike) or pathlib.Path(path).suffix != ".keras":
        raise ArgumentError(
            "Only the .keras format contains the policies of layers.",
            received=f"the path {path!r}",
            expected='a path that ends in ".keras"',
            fix="To run the model without Keras, call model.export(path).",
        )
    _refuse_kerasmp_layers(model)
    config = _stock_config(model)
    _refuse_kerasmp_objects(config, model.name)
    text = json.dumps(config)
    own_copy = json.loads(text)  # since Keras changes what it reads
    # Keras starts with "float32", whatever the global policy is here.
    with policy_scope("float32"):
        stock = keras.saving.deserialize_keras_object(own_copy)
    _refuse_other_policies(model, stock)
    _save(model, text, path)


def _save(model: Any, config: str, path: str | os.PathLike[str]) -> None:
    """Save the model itself, with all that its layers store, and replace the config in the file."""
    with tempfile.TemporaryDirectory() as folder:
        saved = pathlib.Path(folder, "saved.keras")
        optimizer = getattr(model, "optimizer", None)
        try:
            if optimizer is not None:
                model.optimizer = None
            model.save(saved)
        finally:
            if optimizer is not None:
                model.optimizer = optimizer
        with zipfile.ZipFile(saved) as before, zipfile.ZipFile(path, "w") as after:
            for item in before.infolist():
                is_config = item.filename == _CONFIG
                after.writestr(item, config if is_config else before.read(item))


def _refuse_kerasmp_layers(model: Any) -> None:
    output_dtype = getattr(model, "_output_dtype", None)
    if output_dtype is not None:
        raise PolicyError(
            "Stock Keras does not cast a model's outputs.",
            received=f'the model "{model.name}" with output={output_dtype}',
            expected="a policy without output=",
            fix=f'Give the last layer dtype="{output_dtype}" instead. {_FIX}',
        )
    for layer, location in locations(model):
        if layer is not model and is_kerasmp_layer(layer):
            raise PolicyError(
                "The model contains a kerasmp layer, which stock Keras does not have.",
                received=f'"{location.path}", a {type(layer).__name__}',
                expected="stock layers, or your own",
                fix=_FIX,
            )


def _stock_config(model: Any) -> dict[str, Any]:
    """Return the serialized model as if kerasmp had never changed it."""
    config = dict(keras.saving.serialize_keras_object(model))
    config.pop("compile_config", None)
    name = config["registered_name"]
    if name == _ADOPTED:
        return {**config, **config["config"]["stock"]}
    inner = {key: value for key, value in config["config"].items() if key != KEY}
    if name in _STOCK:
        stock = dict(zip(("module", "class_name", "registered_name"), _STOCK[name], strict=True))
        return {**config, **stock, "config": inner}
    if is_kerasmp_layer(model):
        raise PolicyError(
            "The class of the model is derived from kerasmp.Model.",
            received=f'"{model.name}", a {type(model).__name__}',
            expected="a model whose class does not need kerasmp",
            fix=_FIX,
        )
    return config


def _refuse_kerasmp_objects(config: Any, layer: str) -> None:
    """Raise if a config names an activation, an initializer or the like that kerasmp registers.

    Args:
        config: The config, or a part of it.
        layer: The name of the layer that the part belongs to.
    """
    if isinstance(config, dict):
        if isinstance(config.get("config"), dict):
            layer = config["config"].get("name", layer)
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for part in config:
            _refuse_kerasmp_objects(part, layer)
    elif isinstance(config, str) and config.startswith("kerasmp>"):
        raise PolicyError(
            "A layer uses an object of kerasmp, which stock Keras cannot load.",
            received=f'"{layer}" with {config}',
            expected="objects of Keras, or your own",
            fix=_FIX,
        )


def _refuse_other_policies(model: Any, stock: Any) -> None:
    present = [
        (layer, location.path)
        for layer, location in locations(model)
        if not isinstance(layer, keras.layers.InputLayer)
    ]
    policies, stock_policies = LayerPolicies.of(model), LayerPolicies.of(stock)
    if len(policies) != len(stock_policies):
        raise PolicyError(
            "Stock Keras would create some layers only when the model is called, so their policies "
            "cannot be compared.",
            received=f"{len(policies)} layers, of which loading creates {len(stock_policies)}",
            expected="a model that creates all layers in `build` or `build_from_config`",
            fix=_FIX,
        )
    for (layer, path), here, there in zip(present, policies, stock_policies, strict=True):
        # Keras's files do not contain the policy of a container, and it changes no result.
        if here.policy != there.policy and graph_of(layer) is None:
            raise PolicyError(
                "Stock Keras would load a layer with another policy, and compute other results.",
                received=f'"{path}" ({here.class_name}) under "{here.policy}", loaded under '
                f'"{there.policy}"',
                expected="one policy for a layer and the layers that it creates itself",
                fix="Convert with a rule for the class of the layer that holds it, such as "
                'rules={keras.layers.MultiHeadAttention: "float32"}. ' + _FIX,
            )
