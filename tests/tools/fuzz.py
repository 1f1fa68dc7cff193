"""Draws new examples of `tests/test_properties.py` for some minutes.

The rounds run in one process, each with a new seed. The first failure ends the run:
hypothesis prints a minimal example and `@reproduce_failure`, and this script prints the
command that runs the round again.
"""

import argparse
import os
import pathlib
import random
import sys
import time

os.environ["HYPOTHESIS_PROFILE"] = "fuzz"
import pytest

TESTS = pathlib.Path(__file__).parent.parent


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="CPU time to use (default: 10)"
    )
    parser.add_argument(
        "--seed", type=int, help="run one round of this seed (default: random seeds)"
    )
    parser.add_argument("--only", default="", help="expression for `pytest -k`")
    arguments = parser.parse_args()

    rounds = 0
    while True:
        seed = random.SystemRandom().randrange(2**32)
        if arguments.seed is not None:
            seed = arguments.seed
        print(f"round {rounds + 1}, seed {seed}", flush=True)
        options = ["-q", "-x", "-m", "", "--no-header", "-W", "ignore"]
        options += ["-k", arguments.only]
        path = str(TESTS / "test_properties.py")
        code = pytest.main([path, *options, f"--hypothesis-seed={seed}"])
        rounds += 1
        if code != 0:
            print(f"Failed. To run the round again: {sys.argv[0]} --seed {seed}")
            return int(code)
        seconds = time.process_time()
        if arguments.seed is not None or seconds > 60 * arguments.minutes:
            print(f"No failure in {rounds} rounds, {seconds / 60:.1f} minutes of CPU")
            return 0


if __name__ == "__main__":
    sys.exit(main())
