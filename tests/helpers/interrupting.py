"""Interrupts kerasmp where one of its functions is entered: any of them, by a number."""

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
    """As a user's: nothing but what puts things back may catch it."""


class _Interrupting:
    def __init__(self, number):
        self.left = number

    def __call__(self, frame, event, _):
        # A generator is entered to be closed as well, where Python ignores what it raises.
        if event != "call" or frame.f_code.co_flags & inspect.CO_GENERATOR:
            return
        if frame.f_globals.get("__name__", "").startswith(WATCHED):
            self.left -= 1
            if self.left == -1:
                raise Interrupt  # after which Python watches no more


def interrupted(call, number):
    """Call a function, and raise `Interrupt` in a call of kerasmp's inside of it.

    Args:
        call: The function, without arguments.
        number: In which call, from 0.

    Returns:
        Whether there were so many; otherwise the function has done its work.
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
