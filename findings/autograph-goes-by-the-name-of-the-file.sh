#!/usr/bin/env bash
# TensorFlow 2.21.0: whether AutoGraph converts `if tensor:` to graph code depends on the name of the
# file that contains the function. TensorFlow has a list of packages whose functions are called
# without conversion: keras, numpy and pandas, but also `mock`. So a function that is called in a
# `tf.function` works in my_steps.py, while the same code in mock.py raises
# OperatorNotAllowedInGraphError. A library that is not on the list is converted function by function
# when it is first traced, whatever its size, unless it uses
# `tf.autograph.experimental.do_not_convert`.
#
# Prints the results, and fails if they have changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q tensorflow-cpu==2.21.0
cat >"$folder/my_steps.py" <<'PYTHON'
def positive(x):
    if x > 0:
        return x
    return -x
PYTHON
cp "$folder/my_steps.py" "$folder/mock.py"
cd "$folder"
cat >"$folder/main.py" <<'PYTHON'
import mock
import my_steps
import tensorflow as tf


@tf.function
def step(x):
    return my_steps.positive(x)


@tf.function
def the_same_step(x):
    return mock.positive(x)


assert step(tf.constant(-2.0)) == 2.0
print("my_steps.py: positive(-2.0) is", float(step(tf.constant(-2.0))))
try:
    the_same_step(tf.constant(-2.0))
except tf.errors.OperatorNotAllowedInGraphError as error:
    print("mock.py:", type(error).__name__)
else:
    raise SystemExit("A file called mock.py is converted now.")
PYTHON
CUDA_VISIBLE_DEVICES=-1 TF_CPP_MIN_LOG_LEVEL=3 "$folder/env/bin/python" "$folder/main.py"
