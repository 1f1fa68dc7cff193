import importlib
import pathlib

import pytest

PAPER = pathlib.Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture(scope="module")
def paper():
    """Function from a name to the module of examples/paper with that name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PAPER))
        yield importlib.import_module
