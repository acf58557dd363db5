"""Changes are undone in reverse order, whatever happens meanwhile."""

import pytest

from kerasmp.policy.apply import take_back

pytestmark = pytest.mark.unit


def raising(error, done):
    def function():
        done.append(type(error).__name__)
        raise error

    return function


def test_a_failing_undo_does_not_stop_the_others():
    done = []
    undo = [
        lambda: done.append("first"),
        raising(KeyError(), done),
        raising(ValueError("the one that is told"), done),
        lambda: done.append("last"),
    ]
    with pytest.raises(ValueError, match="the one that is told"):
        take_back(undo)
    assert done == ["last", "ValueError", "KeyError", "first"]
    assert not undo


def test_undoing_continues_after_an_interrupt():
    done = []
    interrupts = [KeyboardInterrupt()]

    def interrupted():
        if interrupts:
            raise interrupts.pop()
        done.append("again")

    undo = [lambda: done.append("first"), interrupted, lambda: done.append("last")]
    with pytest.raises(KeyboardInterrupt):
        take_back(undo)
    assert done == ["last", "again", "first"]
    assert not undo
