"""The mark `slow`: for some variants of a test, within a limit of time, in any order.

It needs neither Keras nor TensorFlow.
"""

import random
import time

import pytest

START = pytest.StashKey[float]()


def pytest_addoption(parser):
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
