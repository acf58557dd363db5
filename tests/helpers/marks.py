"""Marks that depend on the backend: what JAX compiles for seconds is in its full set alone."""

import keras
import pytest

FULL_ON_JAX = [pytest.mark.full] if keras.backend.backend() == "jax" else []


def full_on_jax(test):
    """Return a test that belongs to the full set on JAX: elsewhere it asks the same, quickly."""
    for mark in FULL_ON_JAX:
        test = mark(test)
    return test
