import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(20151005)
    keras.backend.clear_session()


@pytest.fixture
def rng():
    return np.random.default_rng(20151005)


@pytest.fixture
def float64():
    """Keras computes in float64 during the test."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
