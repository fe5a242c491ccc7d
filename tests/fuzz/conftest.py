"""Users have no type checker at run time: here the library meets wrong types as it does in their hands."""

import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def without_type_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
