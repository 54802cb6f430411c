"""What the tests share: optional packages."""

import importlib.util
import os

import pytest


def needs(package):
    """Skip a test that needs an optional package which is not here; fail it where nothing may be missing."""
    if importlib.util.find_spec(package):
        return
    if os.environ.get("NOTHING_IS_MISSING"):
        pytest.fail(f"{package} is missing")
    pytest.skip(f"needs {package}")
