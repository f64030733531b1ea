"""What every test runs under: a cache folder of its own, so that none reads or leaves speeds.

Set before test modules are imported, since some of them copy the environment for the
processes that they start.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

FOLDER = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOLDER] = Path(tempfile.mkdtemp(prefix="bitnet-rs-tests-"))
    os.environ["XDG_CACHE_HOME"] = str(config.stash[FOLDER])


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[FOLDER], ignore_errors=True)
