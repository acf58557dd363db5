"""What runs in a process of its own: `module:function`, called with JSON, returns JSON.

Arguments: seconds to live, `module:function`, its keyword arguments, the file for its result. With
no arguments, lines of standard input have them, as JSON, one call after the other.
"""

import faulthandler
import importlib
import json
import sys
from pathlib import Path


def main(seconds, name, arguments, result):
    # Ends the process even where it waits for ever outside of Python, and even without a parent.
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    module, function = name.split(":")
    returned = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    # Whoever waits for the file finds all of it.
    unfinished = Path(f"{result}.part")
    unfinished.write_text(json.dumps(returned), encoding="utf-8")
    unfinished.replace(result)
    faulthandler.cancel_dump_traceback_later()


def serve():
    import keras

    policy = keras.config.dtype_policy()
    for line in sys.stdin:  # which ends with the parent
        main(*json.loads(line))
        keras.config.set_dtype_policy(policy)
        keras.backend.clear_session(free_memory=False)


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else serve()
