"""Measures how many mutants of statistics, recurrence and folding the tests kill.

A mutant is a module with one change: another operator, comparison, constant or
condition, an exchanged pair of arguments, or a statement left out. A mutant is killed
if a test of the module fails. The script draws mutants at random from all that there
are, writes each result to a file at once, and goes on from this file when it is started
again.

The tools for mutation tests start a new process for each mutant, which would import
TensorFlow for 8 seconds. This script imports TensorFlow once and forks: each child
compiles the mutant, puts its code in place of the module's, and runs the tests.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import pathlib
import random
import signal
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent.parent
PACKAGE = ROOT / "keras_bnrnn"

# The fast tests of each module, as arguments for pytest. The properties cover the loops
# in eager mode, in graphs, in slices, as blocks and by XLA.
PROPERTIES = ["tests/test_properties.py", "-k"]
MOMENTS = [*PROPERTIES, "oracle or numpy or padding or slices"]
POPULATION = f"{MOMENTS[-1]} or population"
LOOP = [*PROPERTIES, "oracle or slices or xla"]
BLOCKS = "tests/recurrence/test_gradients.py::test_blocks_of_the_backward_loop"
TESTS = {
    "statistics.py": MOMENTS,
    "population.py": ["tests/test_population_guards.py", *MOMENTS[:-1], POPULATION],
    "projection.py": MOMENTS,
    "folding.py": [*PROPERTIES, "fold"],
    "recurrence/derivative.py": LOOP,
    "recurrence/backward.py": [BLOCKS, *PROPERTIES, f"{LOOP[-1]} or blocks"],
    "recurrence/block.py": LOOP,
    "recurrence/forward.py": LOOP,
    "recurrence/kept.py": LOOP,
    "recurrence/schedule.py": LOOP,
    "recurrence/time_loop.py": LOOP,
    "recurrence/weights.py": LOOP,
    "backend/block_lstm.py": [
        "tests/backend/test_block_lstm.py",
        *PROPERTIES,
        f"{LOOP[-1]} or keras",
    ],
}

# `--survivors` runs these as well. They take some minutes, most of them in graphs.
LOOPS = ["tests/recurrence/test_slices.py", "tests/recurrence/test_gradients.py"]
MORE_TESTS = {
    "statistics.py": ["tests/layers/test_layers_math.py"],
    "population.py": ["tests/layers/test_layers_math.py", "tests/test_calibration.py"],
    "projection.py": ["tests/layers/test_layers_math.py", *LOOPS],
    "folding.py": ["tests/test_folding.py", "tests/test_edges.py"],
}

# A mutant that loops forever counts as killed.
SECONDS = 600

BINARY = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARE = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
PAIRS = {"minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any"}


def commutes(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    return name in ("maximum", "minimum", "max", "min", "logical_and", "logical_or")


def changes_of(node):
    """Yields pairs of a description and a function that changes a copy of the node."""
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        new = BINARY[type(node.op)]

        def change(node, new=new):
            node.op = new()

        yield f"{type(node.op).__name__} to {new.__name__}", change
    if isinstance(node, ast.AugAssign) and type(node.op) in BINARY:
        new = BINARY[type(node.op)]

        def change(node, new=new):
            node.op = new()

        yield f"{type(node.op).__name__} to {new.__name__}", change
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        new = COMPARE[type(node.ops[0])]

        def change(node, new=new):
            node.ops[0] = new()

        yield f"{type(node.ops[0]).__name__} to {new.__name__}", change
    if isinstance(node, ast.BoolOp):
        new = ast.Or if isinstance(node.op, ast.And) else ast.And

        def change(node, new=new):
            node.op = new()

        yield f"{type(node.op).__name__} to {new.__name__}", change
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        # `+x` is x; `not not x` has the truth value of x.
        if isinstance(node.op, ast.USub):

            def change(node):
                node.op = ast.UAdd()

        else:

            def change(node):
                node.operand = ast.UnaryOp(ast.Not(), node.operand)

        yield f"{type(node.op).__name__} left out", change
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):

            def change(node):
                node.value = not node.value

            yield f"{node.value} to {not node.value}", change
        elif isinstance(node.value, (int, float)):

            def change(node):
                node.value = node.value + 1

            yield f"{node.value} to {node.value + 1}", change
    if isinstance(node, ast.IfExp):

        def change(node):
            node.body, node.orelse = node.orelse, node.body

        yield "branches exchanged", change
    if isinstance(node, ast.If):

        def change(node):
            node.test = ast.UnaryOp(ast.Not(), node.test)

        yield "condition negated", change
    if isinstance(node, ast.Attribute) and node.attr in PAIRS:

        def change(node):
            node.attr = PAIRS[node.attr]

        yield f"{node.attr} to {PAIRS[node.attr]}", change
    if isinstance(node, ast.Call) and len(node.args) == 2 and not commutes(node):

        def change(node):
            node.args.reverse()

        yield "arguments exchanged", change
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):

        def change(node):
            node.value = ast.Constant(None)

        yield "statement left out", change
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "stop_gradient"
    ):

        def change(node):
            node.func = ast.parse("lambda x: x", mode="eval").body

        yield "stop_gradient left out", change


def mutants_of(module):
    """Lists the mutants of a module: (line, description, position, number)."""
    tree = ast.parse((PACKAGE / module).read_text())
    docs_and_messages, strict = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "strict":
            strict.add(id(node.value))
        if isinstance(node, (ast.Raise, ast.JoinedStr)):
            docs_and_messages |= {id(part) for part in ast.walk(node)}
    found = []
    for position, node in enumerate(ast.walk(tree)):
        if id(node) in docs_and_messages:
            continue
        for number, (what, _) in enumerate(changes_of(node)):
            what = f"strict: {what}" if id(node) in strict else what
            found.append((node.lineno, what, position, number))
    return found


def mutated_code(module, position, number):
    path = PACKAGE / module
    tree = ast.parse(path.read_text())
    node = list(ast.walk(tree))[position]
    list(changes_of(copy.copy(node)))[number][1](node)
    return compile(ast.fix_missing_locations(tree), str(path), "exec")


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from given code."""

    def __init__(self, name, code):
        self.name, self.code = name, code

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            return importlib.util.spec_from_loader(name, self)
        return None

    def exec_module(self, module):
        exec(self.code, vars(module))


def start_child(module, position, number, tests):
    """Starts the tests with a mutant, or without if `position` is `None`."""
    child = os.fork()
    if child == 0:
        os.setsid()
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        code = 1
        try:
            if position is not None:
                name = "keras_bnrnn." + module.removesuffix(".py").replace("/", ".")
                mutated = mutated_code(module, position, number)
                sys.meta_path.insert(0, Mutated(name, mutated))
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
            code = int(pytest.main([*options, *tests]))
        finally:
            os._exit(code)
    return child


def result_of(child, end):
    """Returns "killed", "survived" or "timeout", or `None` while the tests run."""
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        return "survived" if status == 0 else "killed"
    if time.monotonic() < end:
        return None
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="mutants (default: 100)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the sample (default: 0)"
    )
    parser.add_argument(
        "--minutes", type=float, help="stop after this time (default: when all ran)"
    )
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        default=ROOT / "runs" / "mutants.jsonl",
        help="file of the results (default: runs/mutants.jsonl)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time")
    parser.add_argument(
        "--survivors",
        action="store_true",
        help="run more tests with the mutants of the sample that survived",
    )
    parser.add_argument(
        "--check", action="store_true", help="run the tests without a mutant"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the sample and run nothing"
    )
    arguments = parser.parse_args()
    os.chdir(ROOT)

    everything = [(m, *mutant) for m in TESTS for mutant in mutants_of(m)]
    sample = random.Random(arguments.seed).sample(everything, len(everything))
    # `zip(..., strict=False)` of equal lengths is equivalent.
    sample = [mutant for mutant in sample if not mutant[2].startswith("strict")]
    sample = sample[: arguments.count]
    if arguments.list:
        for module, line, what, *_ in sample:
            print(f"{module}:{line}: {what}")
        print(f"{len(sample)} of {len(everything)} mutants")
        return 0

    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    if arguments.results.exists():
        for text in arguments.results.read_text().splitlines():
            *mutant, result = json.loads(text)
            results[tuple(mutant)] = result
    # Loaded once, in the parent. The package itself is loaded by the children.
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "serving" / "client")]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["HYPOTHESIS_PROFILE"] = "mutants"
    for name in ("hypothesis", "tensorflow", "keras", "pytest"):
        importlib.import_module(name)

    if arguments.check:
        sample = [(module, 0, "unchanged", None, 0) for module in TESTS]
    tests = dict(TESTS)
    start = time.monotonic()
    waiting = [mutant for mutant in sample if mutant not in results]
    if arguments.survivors:
        tests = {module: MORE_TESTS.get(module, LOOPS) for module in TESTS}
        waiting = [m for m in sample if results.get(m) == "survived"]
    running = {}  # from the process to the mutant and the time of its end
    while waiting or running:
        minutes = (time.monotonic() - start) / 60
        if arguments.minutes is not None and minutes > arguments.minutes:
            waiting = []
        while waiting and len(running) < arguments.jobs:
            module, line, what, position, number = mutant = waiting.pop(0)
            child = start_child(module, position, number, tests[module])
            running[child] = mutant, time.monotonic() + SECONDS
        for child, (mutant, end) in list(running.items()):
            result = result_of(child, end)
            if result is None:
                continue
            del running[child]
            results[mutant] = result
            module, line, what, *_ = mutant
            print(f"{result}: {module}:{line}: {what}", flush=True)
            if not arguments.check:
                with arguments.results.open("a") as file:
                    file.write(json.dumps([*mutant, result]) + "\n")
        time.sleep(0.05)

    results = {m: results[m] for m in sample if m in results}
    killed = sum(result != "survived" for result in results.values())
    print(f"{killed} of {len(results)} mutants killed; {len(sample)} in the sample")
    for (module, line, what, *_), result in results.items():
        if result == "survived":
            print(f"survived: {module}:{line}: {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
