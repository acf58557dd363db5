"""The eager steps that are kept compiled on JAX: the last few."""

import pytest

from kerasmp.optimizer.step_cache import StepCache

pytestmark = pytest.mark.unit


def asked(steps, *keys):
    """Return which of these steps were compiled."""
    made = []
    for key in keys:
        assert steps.get(key, lambda key=key: made.append(key) or f"step {key}") == f"step {key}"
    return made


def test_a_step_is_compiled_once():
    assert asked(StepCache(), 1, 2, 1, 2) == [1, 2]


def test_ever_changing_settings_do_not_fill_the_memory():
    steps = StepCache()
    asked(steps, *range(16))
    assert asked(steps, 0, 16) == [16]  # the least recently used one is gone
    assert asked(steps, *range(2, 17), 0) == []
    assert asked(steps, 1) == [1]
