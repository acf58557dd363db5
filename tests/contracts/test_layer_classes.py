"""The layer classes: each has a case, and each of kerasmp subclasses the stock one of its name."""

import inspect

import keras
import pytest
from helpers.layer_cases import CASES, OURS, STOCK

import kerasmp as mp

pytestmark = pytest.mark.unit

WITHOUT_A_TWIN = {"DenseHead", "WithDtype"}


def test_every_layer_has_a_case():
    assert not [name for name in [*STOCK, *OURS] if name not in CASES]


def test_each_kerasmp_layer_is_a_subclass_of_the_stock_layer_of_its_name():
    for name in set(mp.layers.__all__) - WITHOUT_A_TWIN:
        stock, ours = (getattr(package, name) for package in (keras.layers, mp.layers))
        assert issubclass(ours, stock), name
        assert ours is not stock, name
    assert not [name for name in WITHOUT_A_TWIN if hasattr(keras.layers, name)]


def missing(own, stock):
    """Return the parameters of a method of a stock layer that the kerasmp layer lacks."""
    taken, wanted = (inspect.signature(method).parameters for method in (own, stock))
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return []
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in wanted.items() if name not in taken and p.kind not in several]


def test_each_method_has_the_arguments_of_the_stock_layers():
    for name in set(mp.layers.__all__) - WITHOUT_A_TWIN:
        stock, ours = (getattr(package, name) for package in (keras.layers, mp.layers))
        for method in {
            x for base in ours.__mro__ if "kerasmp" in base.__module__ for x in vars(base)
        }:
            pair = [getattr(cls, method, None) for cls in (ours, stock)]
            if all(map(inspect.isfunction, pair)):
                assert not missing(*pair), f"{name}.{method}"
