"""Marks that depend on the backend: what JAX compiles for seconds is in its full set alone."""

import keras
import pytest


def full_on(backend):
    """Return a mark for a test that is quick, and asks the same, on the other backends."""
    here = keras.backend.backend() == backend
    return pytest.mark.full if here else lambda function: function


full_on_jax = full_on("jax")
# The same for a whole file or a parameter.
FULL_ON_JAX = [pytest.mark.full] if keras.backend.backend() == "jax" else []
