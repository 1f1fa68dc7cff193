import collections
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import c_program
import keras
import numpy as np
import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--data-dir",
        help="folder with Penn Treebank in ptb/ and the Free Spoken Digit Dataset in "
        "fsdd/: tests of the published data run too",
    )


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(20151005)
    keras.backend.clear_session()


@pytest.fixture
def rng():
    return np.random.default_rng(20151005)


@pytest.fixture(scope="module")
def serve_in_c(tmp_path_factory):
    """What `c_program.build` returns."""
    return c_program.build(tmp_path_factory.mktemp("c"))


@pytest.fixture
def float64():
    """Keras computes in float64 during the test."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


# Files of many alike tests that take minutes together. `make test` runs every n-th of
# each, from the first; `make test-all` runs all.
SAMPLED = {
    "test_client.py": 4,
    "test_deployment.py": 3,
    "test_export_checks.py": 8,
    "test_export_streaming.py": 6,
    "test_export_text.py": 16,
    "test_formats.py": 12,
    "test_gradients.py": 7,
    "test_serving_grpc.py": 3,
    "test_serving_versions.py": 3,
}
# Files of which it runs every test, but of its variants every n-th.
VARIANTS = {
    "test_calibration.py": 2,
    "test_cancellation.py": 2,
    "test_client_padding.py": 2,
    "test_edges.py": 2,
    "test_export.py": 3,
    "test_export_lengths.py": 2,
    "test_export_shapes.py": 4,
    "test_folding.py": 4,
    "test_fused.py": 4,
    "test_layers_keras.py": 5,
    "test_layers_math.py": 5,
    "test_population_guards.py": 5,
    "test_serving.py": 3,
    "test_speech_frames.py": 6,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    seen = collections.Counter()
    for item in items:
        name = item.path.name
        alike = (name, item.originalname) if name in VARIANTS else name
        if seen[alike] % (SAMPLED | VARIANTS).get(name, 1):
            item.add_marker(pytest.mark.slow)
        seen[alike] += 1
