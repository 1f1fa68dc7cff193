import importlib
import pathlib

import pytest

RELEASE = pathlib.Path(__file__).parents[2] / "release"


@pytest.fixture(autouse=True)
def seeded():
    """No Keras session needs to be cleared."""


@pytest.fixture(scope="session")
def release():
    """Function from a name to the module of release/ with that name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RELEASE))
        yield importlib.import_module
