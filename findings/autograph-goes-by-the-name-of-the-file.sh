#!/usr/bin/env bash
# TensorFlow 2.21.0: whether AutoGraph turns `if tensor:` into graph code depends on the name of the
# file that holds the function. A list inside TensorFlow names packages whose functions are called as
# they are: keras, numpy and pandas, but also `mock`. So a function that is called in a `tf.function`
# works from my_steps.py, and the same text in mock.py raises OperatorNotAllowedInGraphError. A
# library that is not on the list is rewritten function by function when it is first traced, whatever
# its size, unless it asks for `tf.autograph.experimental.do_not_convert`.
#
# Prints what it saw; fails if that has changed.
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
