"""`slow_tests.py`, in runs of pytest of their own without TensorFlow."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

TESTS = pathlib.Path(__file__).parent
# Each test takes a minute of a clock that stands still otherwise.
CONFTEST = """
import types
import pytest
import slow_tests

now = [0.0]
slow_tests.time = types.SimpleNamespace(monotonic=lambda: now[0])

@pytest.fixture(autouse=True)
def minute():
    now[0] += 60
"""
CASES = """
import pytest

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.slow(but=["1", "3"])
@pytest.mark.parametrize("n", range(6))
def test_some(n): pass

def test_fast(): pass

@pytest.mark.slow
class TestAll:
    def test_in_a_class(self): pass
"""
FAST = ["test_some[1]", "test_some[3]", "test_fast"]
SLOW = ["test_slow", *(f"test_some[{n}]" for n in (0, 2, 4, 5)), "test_in_a_class"]


@pytest.fixture(autouse=True)
def seeded():
    """No Keras session needs to be cleared."""


@pytest.fixture
def run(tmp_path):
    """Function from options of pytest to the tests that passed, the others, and text.

    Tests are lists of names in the order in which they ran.
    """

    def run(*options, cases=CASES):
        (tmp_path / "conftest.py").write_text(CONFTEST)
        (tmp_path / "test_cases.py").write_text(textwrap.dedent(cases))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-p", "slow_tests", "-v", "-rs"),
                *("-p", "no:cacheprovider", "-o", "markers=slow", *options),
            ],
            cwd=tmp_path,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "PYTHONPATH": str(TESTS),
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        lines = re.findall(r"::(test_\S+) ([A-Z]+)", done.stdout)
        passed = [name for name, outcome in lines if outcome == "PASSED"]
        others = [name for name, outcome in lines if outcome != "PASSED"]
        return passed, others, done.stdout

    return run


def test_a_test_is_slow_but_for_the_variants_that_the_mark_names(run):
    assert run("-m", "not slow")[:2] == (FAST, [])
    _, _, text = run(cases=CASES.replace('"3"]', '"7"]'))
    message = r"`but` must list ids.*Received: \['7'\] for `test_some`, which has \['0'"
    assert re.search(message, text)


def test_slow_tests_of_a_seed_come_last_in_an_order_of_their_own(run):
    orders = [run("--slow-seed", seed)[0] for seed in ("1", "1", "2")]
    for order in orders:
        assert order[:3] == FAST
        assert sorted(order[3:]) == sorted(SLOW)
    assert orders[0] == orders[1] != orders[2]
    assert SLOW not in (orders[0][3:], orders[2][3:])


def test_slow_tests_that_would_start_too_late_are_skipped(run):
    # Slow tests start at 0, 1, 3, 5, 6 and 8 minutes.
    passed, skipped, text = run("--slow-minutes", "5.5")
    assert sorted(passed) == sorted([*FAST, *SLOW[:4]])
    assert skipped == SLOW[4:]
    assert "slow tests start within 5.5 minutes" in text
    # A skipped test takes no time. With a seed, all fast tests come before.
    passed, skipped, _ = run("--slow-minutes", "4", "--slow-seed", "1")
    assert passed[:3] == FAST and len(passed) == 5
    assert sorted([*passed[3:], *skipped]) == sorted(SLOW)
