"""Interrupts kerasmp at the start of any of its function calls, chosen by a number."""

import inspect
import sys

# The modules of the backend that change models. The others only read, thousands of times.
BACKEND = (
    "keras_graph",
    "keras_internals",
    "optimizer_internals",
    "side_effects",
    "variable_dtypes",
)
WATCHED = (
    *("kerasmp.conversion", "kerasmp.policy", "kerasmp.layers", "kerasmp.model"),
    *(f"kerasmp.backend.{name}" for name in BACKEND),
)


class Interrupt(BaseException):
    """Like a KeyboardInterrupt: only code that restores the old state may catch it."""


class _Interrupting:
    def __init__(self, number):
        self.left = number

    def __call__(self, frame, event, _):
        # A generator is also entered when it is closed, and Python ignores errors there.
        if event != "call" or frame.f_code.co_flags & inspect.CO_GENERATOR:
            return
        if frame.f_globals.get("__name__", "").startswith(WATCHED):
            self.left -= 1
            if self.left == -1:
                raise Interrupt  # which also ends the profiling


def interrupted(call, number):
    """Call a function, and raise `Interrupt` in one of the kerasmp calls that it makes.

    Args:
        call: The function, without arguments.
        number: The number of that call, from 0.

    Returns:
        Whether there was such a call. Otherwise the function has finished.
    """
    before = sys.getprofile()
    sys.setprofile(_Interrupting(number))
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.setprofile(before)
    return False
