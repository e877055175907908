"Fixtures that several tests use."
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared():
    "Real files and golden numbers beside the checkout; tests that need them skip where they are missing."
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is missing: real files and golden numbers are not part of the project")
    return SHARED
