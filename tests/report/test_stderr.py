"""Framework logs are held back; everything else comes out, and all of it after an accident."""

import os

import pytest

from kerasmp.errors import DatasetError
from kerasmp.report.stderr import stderr_held_back, without_notes

NOTE = "I0000 00:00:1795473535.05 2158 port.cc:153] oneDNN custom operations are on.\n"


def write():
    os.write(2, NOTE.encode())
    os.write(2, b"a real warning\n")


def write_and_raise(error):
    write()
    raise error


def test_notes_disappear_and_the_rest_comes_afterwards(capfd):
    with stderr_held_back():
        write()
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "a real warning\n"


def test_all_is_shown_after_an_accident(capfd):
    with pytest.raises(ZeroDivisionError), stderr_held_back():
        write_and_raise(ZeroDivisionError())
    assert capfd.readouterr().err == NOTE + "a real warning\n"


def test_an_error_of_ours_is_no_accident(capfd):
    with pytest.raises(DatasetError), stderr_held_back():
        write_and_raise(DatasetError("not here"))
    assert capfd.readouterr().err == "a real warning\n"


def test_stderr_works_again_afterwards(capfd):
    with stderr_held_back():
        pass
    os.write(2, b"still there\n")
    assert capfd.readouterr().err == "still there\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (NOTE, ""),
        ("WARNING: All log messages before absl::InitializeLog() is called\n", ""),
        ("2026-01-01 Imagine\n", "2026-01-01 Imagine\n"),
        ("Error: a\n" + NOTE + "b", "Error: a\nb"),
    ],
)
def test_which_lines_are_notes(text, kept):
    assert without_notes(text) == kept
