import gc
import os
import random
import time

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
    parser.addoption(
        "--slow-minutes",
        type=float,
        help="skip slow tests that would start later than this many minutes after the "
        "run started (default: run all)",
    )
    parser.addoption(
        "--slow-seed",
        type=int,
        help="run the slow tests in a random order of this seed, so that another day "
        "another part of them runs within --slow-minutes",
    )


def pytest_configure(config):
    config.stash[START] = time.monotonic()


START = pytest.StashKey[float]()


def is_slow(item):
    return item.get_closest_marker("slow") is not None


def pytest_collection_modifyitems(config, items):
    seed = config.getoption("--slow-seed")
    if seed is not None:
        slow = [item for item in items if is_slow(item)]
        random.Random(seed).shuffle(slow)
        items[:] = [item for item in items if not is_slow(item)] + slow


def pytest_runtest_setup(item):
    minutes = item.config.getoption("--slow-minutes")
    seconds = time.monotonic() - item.config.stash[START]
    if minutes is not None and is_slow(item) and seconds > 60 * minutes:
        pytest.skip(f"slow tests start within {minutes:g} minutes")


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(20151005)
    keras.backend.clear_session()


@pytest.fixture
def rng():
    return np.random.default_rng(20151005)


@pytest.fixture(scope="session")
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


def pytest_collection_finish():
    # `clear_session` collects garbage before each test. Modules are none: looking
    # through those of TensorFlow would take half a second each time.
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem():
    """Resolves `@pytest.mark.slow(but=[...])` on a parametrized test.

    `but` lists variants by the id that pytest prints in brackets. The mark then counts
    for all variants but these.

    Raises:
        ValueError: If the test has no variant of such an id.
    """
    made = yield
    items = made if isinstance(made, list) else []  # a list: of one test's variants
    ids = [item.name.removeprefix(item.originalname)[1:-1] for item in items]
    for item, variant in zip(items, ids, strict=True):
        for mark in [m for m in item.own_markers if m.name == "slow"]:
            but = mark.kwargs.get("but", [])
            if unknown := sorted(set(but) - set(ids)):
                raise ValueError(
                    "`but` must list ids of variants of the test. Received: "
                    f"{unknown} for `{item.originalname}`, which has {ids}"
                )
            if variant in but:
                item.own_markers.remove(mark)
    return made
