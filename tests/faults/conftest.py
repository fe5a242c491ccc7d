"""The run that nothing happened to."""

import pytest
import victim


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """Its folder, for reading only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    victim.run(folder)
    return folder
