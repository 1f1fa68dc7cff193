import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

# Fixtures import Keras themselves: the process that hands the tests to the workers of
# pytest-xdist does without, and starts them many seconds earlier.
pytest_plugins = ["slow_tests"]


def pytest_addoption(parser):
    parser.addoption(
        "--data-dir",
        help="folder with Penn Treebank in ptb/ and the Free Spoken Digit Dataset in "
        "fsdd/: tests of the published data run too",
    )


@pytest.fixture(autouse=True)
def seeded():
    import keras

    keras.utils.set_random_seed(20151005)
    keras.backend.clear_session()
    # `clear_session` collects garbage. It looks for garbage only among the objects of
    # the last test: to look through imported modules, and through traced graphs, which
    # TensorFlow keeps, would take as long as many a test.
    gc.freeze()


@pytest.fixture
def rng():
    return np.random.default_rng(20151005)


@pytest.fixture(scope="session")
def serve_in_c(tmp_path_factory):
    """What `c_program.build` returns."""
    import c_program

    return c_program.build(tmp_path_factory.mktemp("c"))


@pytest.fixture
def float64():
    """Keras computes in float64 during the test."""
    import keras

    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def pytest_collection_finish():
    # `clear_session` collects garbage before each test. Modules are none: looking
    # through those of TensorFlow would take half a second each time.
    gc.freeze()
