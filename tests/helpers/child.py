"""What runs in a process of its own: `module:function`, called with JSON, returns JSON.

Arguments: seconds to live, `module:function`, its keyword arguments, the file for its result.
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
    Path(result).write_text(json.dumps(returned), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
