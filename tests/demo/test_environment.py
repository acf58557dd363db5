"""Versions and hardware are those of the running process."""

import os
import platform

import keras
import numpy as np
import pytest

from kerasmp.demo.environment import environment, version
from kerasmp.policy import recommend_policy


def test_versions_and_hardware():
    found = environment()
    assert found.versions["python"] == platform.python_version()
    assert found.versions["numpy"] == np.__version__
    assert found.backend == keras.backend.backend()
    assert any(found.backend in name for name in found.versions)
    assert found.devices
    assert 1 <= found.cores <= os.cpu_count()
    assert found.recommended == str(recommend_policy().policy)


@pytest.mark.unit
def test_a_package_that_is_not_installed_has_no_version():
    assert version("no-such-package-anywhere") == ""
