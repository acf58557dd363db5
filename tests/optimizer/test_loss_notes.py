"""The losses that are noted for a step: each is returned once, where it was noted."""

import copy

import numpy as np
import pytest
from keras import ops

from kerasmp.optimizer.pending import LossNotes, Pending
from kerasmp.optimizer.step import all_finite

pytestmark = pytest.mark.unit


def test_notes_of_replicas_are_separate_and_copies_are_empty():
    pending = Pending()
    notes = pending.losses
    notes.add(0, None, 1.0)
    notes.add(1, None, 2.0)
    notes.add(0, None, 3.0)
    assert copy.deepcopy(pending).losses.pop(0, None) == []
    assert notes.pop(1, None) == [2.0]
    assert notes.pop(0, None) == [1.0, 3.0]
    assert notes.pop(0, None) == []


def test_a_copy_has_no_compiled_steps():
    pending = Pending()
    pending.compiled.get("key", lambda: "one")
    assert copy.deepcopy(pending).compiled.get("key", lambda: "other") == "other"


def test_a_note_of_another_trace_is_ignored():
    notes = LossNotes()
    notes.add(0, "one", 1.0)
    assert notes.pop(0, "other") == []
    notes.add(0, "one", 1.0)
    notes.add(0, "other", 2.0)
    assert notes.pop(0, "other") == [2.0]


@pytest.mark.parametrize(("one", "finite"), [(1.0, True), (np.nan, False)])
def test_many_losses_without_a_step_are_merged(one, finite):
    notes = LossNotes()
    for loss in (one, *[1.0] * 99):
        notes.add(0, None, ops.convert_to_tensor(loss, dtype="float32"))
    held = notes.pop(0, None)
    assert len(held) < 20
    assert bool(all_finite(held)) == finite
