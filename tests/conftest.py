"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real tissue; the test is skipped where it is absent."""
    folder = Path(os.environ.get("EOSIN_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "README.md").is_file():
        pytest.skip("real tissue is absent: set EOSIN_REAL_DATA to its folder")
    return folder
