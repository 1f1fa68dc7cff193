"""Measures how many mutants of statistics, recurrence and folding the tests kill.

A mutant is a module with one change: another operator, comparison, constant or
condition, an exchanged pair of arguments, or a statement left out. A mutant is killed
if a test of the module fails. The script draws mutants at random from all that there
are, writes each result to a file at once, and goes on from this file when it is started
again. A change of the module discards its results; after a change of the tests, remove
the file.

The tools for mutation tests start a new process for each mutant, which would import
TensorFlow for 8 seconds. This script imports TensorFlow once and forks: each child
compiles the mutant, puts its code in place of the module's, and runs the tests.
"""

import argparse
import ast
import copy
import hashlib
import importlib.abc
import importlib.util
import json
import os
import pathlib
import random
import re
import resource
import signal
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent.parent
PACKAGE = ROOT / "keras_bnrnn"

# The fast tests of each module, as arguments for pytest: first its own tests, which
# kill most mutants in a second, then properties of the layers. The properties cover the
# loops in eager mode, in graphs, in slices, as blocks and by XLA.


def properties(*names):
    return [f"tests/test_properties.py::test_{name}" for name in names]


ORACLE = properties("inference_equals_the_oracle", "training_equals_the_oracle")
MOMENTS = [
    *ORACLE,
    *properties("normalisation_equals_numpy", "padding_changes_nothing"),
]
LOOP = [
    "tests/recurrence/test_time_loop.py",
    "tests/recurrence/test_block.py",
    "tests/recurrence/test_gradients.py::test_blocks_of_the_loops",
    "tests/recurrence/test_gradients.py::test_a_sparse_gradient_from_above",
    "tests/recurrence/test_slices.py::test_gate_by_gate",
    "tests/recurrence/test_slices.py::test_gate_by_gate_at_inference",
    "tests/recurrence/test_slices.py::test_when_loops_run_by_gate",
    *ORACLE,
    *properties(
        "slices_are_equal_to_one_loop",
        "slices_of_a_block_are_equal_to_one_loop",
        "eager_graph_and_xla_are_equal",
    ),
]
TESTS = {
    "statistics.py": ["tests/test_statistics.py", *MOMENTS],
    "population.py": [
        "tests/test_population.py",
        "tests/test_population_guards.py",
        *MOMENTS,
    ],
    "projection.py": ["tests/test_projection.py", *MOMENTS],
    "folding.py": [
        "tests/test_errors.py::test_wrong_arguments[fold.model]",
        "tests/test_errors.py::test_wrong_arguments[fold.return_report]",
        "tests/test_folding.py",
        "tests/test_edges.py::test_a_folded_model_has_no_slots_until_it_trains",
        "tests/test_population_guards.py::"
        "test_recalibrate_fold_and_export_mention_the_counter",
        *properties("fold_equals_inference"),
    ],
    "recurrence/derivative.py": LOOP,
    "recurrence/backward.py": LOOP,
    "recurrence/block.py": ["tests/recurrence/test_block.py", *LOOP],
    "recurrence/forward.py": LOOP,
    "recurrence/kept.py": LOOP,
    "recurrence/schedule.py": LOOP,
    "recurrence/time_loop.py": LOOP,
    "recurrence/weights.py": LOOP,
    "backend/block_lstm.py": ["tests/backend/test_block_lstm.py", *LOOP],
    "backend/loops.py": [
        "tests/backend/test_backend.py",
        "tests/backend/test_block_lstm.py",
        *LOOP,
    ],
}

# `--survivors` runs these as well. They take some minutes, most of them in graphs.
LOOPS = ["tests/recurrence/test_slices.py", "tests/recurrence/test_gradients.py"]
MORE_TESTS = {
    "statistics.py": ["tests/layers/test_layers_math.py"],
    "population.py": ["tests/layers/test_layers_math.py", "tests/test_calibration.py"],
    "projection.py": ["tests/layers/test_layers_math.py", *LOOPS],
    "folding.py": ["tests/test_edges.py"],
}

# Mutants that no test can kill, or that change speed alone: the module, a part of the
# line, the change (`None`: any), and the reason. They do not run.
EXPLAINED = [
    (
        "statistics.py",
        "stop_gradient",
        "stop_gradient left out",
        "the gradients in the shift cancel",
    ),
    (
        "statistics.py",
        "squares / ops.maximum(count, 1.0)",
        "1.0 to 2.0",
        "one frame has squares of 0",
    ),
    (
        "projection.py",
        "maximum(count, 1.0)",
        "1.0 to 2.0",
        "one frame has a centred projection of 0",
    ),
    (
        "projection.py",
        "kernel.shape[-1]",
        "USub left out",
        "a kernel has two axes",
    ),
    (
        "projection.py",
        "LARGEST_CANCELLATION",
        "1000.0 to 1001.0",
        "a threshold between two ways to the same variance",
    ),
    (
        "projection.py",
        "transposed_times(x, x)",
        "arguments exchanged",
        "both are x",
    ),
    (
        "projection.py",
        "scale_and_shift(0.0",
        "0.0 to 1.0",
        "the scale does not depend on the mean",
    ),
    (
        "population.py",
        "ops.stop_gradient",
        "stop_gradient left out",
        "no gradient passes the assignment of a variable",
    ),
    (
        "population.py",
        "isfinite(mean)",
        "all to any",
        "the variance is not finite where the mean is not",
    ),
    (
        "population.py",
        "replica_count() > 1",
        "Gt to GtE",
        "pooling one replica changes no bit",
    ),
    ("population.py", "stacklevel=2", "2 to 3", "the line that a warning shows"),
    (
        "recurrence/time_loop.py",
        "states[0].shape[-1]",
        "USub left out",
        "a state has two axes",
    ),
    (
        "recurrence/forward.py",
        "prepare is None and gates > 1",
        "Gt to GtE",
        "the projection of one gate is the whole projection",
    ),
    (
        "recurrence/forward.py",
        "kernel.shape[-1]",
        "USub left out",
        "a kernel has two axes",
    ),
    (
        "backend/loops.py",
        "parallel_iterations",
        "32 to 33",
        "changes speed alone",
    ),
    (
        "backend/block_lstm.py",
        "use_peephole=False",
        "False to True",
        "the peepholes are 0",
    ),
    *[
        ("recurrence/schedule.py", constant, None, "changes speed alone")
        for constant in re.findall(
            "^[A-Z_]+ = ", (PACKAGE / "recurrence/schedule.py").read_text(), re.M
        )
    ],
    (
        "recurrence/schedule.py",
        "kernel.shape[-1]",
        "USub left out",
        "a kernel has two axes",
    ),
    (
        "recurrence/kept.py",
        "backend.compiled_by_xla()",
        "condition negated",
        "changes speed and memory alone",
    ),
    (
        "recurrence/backward.py",
        "kept.joined > 1",
        "Gt to GtE",
        "a tensor of one part is that part",
    ),
    (
        "recurrence/time_loop.py",
        "batch >= least",
        "GtE to Gt",
        "changes speed alone",
    ),
    (
        "recurrence/time_loop.py",
        "alone = ",
        None,
        "changes speed alone",
    ),
    (
        "recurrence/time_loop.py",
        "has_company and not is_block",
        "Not left out",
        "slices change speed alone",
    ),
    (
        "recurrence/time_loop.py",
        "derivative.products > 1",
        "1 to 2",
        "an LSTM has 4 products, any other cell 1",
    ),
    (
        "recurrence/forward.py",
        "prepare is not None and gates > 1",
        "Gt to GtE",
        "changes speed and memory alone",
    ),
    (
        "recurrence/backward.py",
        "in_parts = ",
        "And to Or",
        "changes speed alone",
    ),
    (
        "recurrence/kept.py",
        "for count in range(1",
        "1 to 2",
        "changes memory alone, as the sum is compared below",
    ),
    (
        "backend/block_lstm.py",
        "max_num_elements=-1",
        "1 to 2",
        "any number below 0 means no limit",
    ),
    (
        "backend/loops.py",
        "    differentiable=False,",
        "False to True",
        "a loop that TensorFlow can differentiate has the same results",
    ),
    ("backend/loops.py", "swap_memory=True", "True to False", "concerns GPUs"),
    (
        "backend/loops.py",
        "max((end - start) * step, 0)",
        "0 to 1",
        "adds a loop that ends at once",
    ),
    (
        "recurrence/time_loop.py",
        "count = 4 if",
        "4 to 5",
        "the number of slices changes speed alone",
    ),
    (
        "recurrence/time_loop.py",
        "not isinstance(batch, int) and not loop.schedule.keeps",
        "condition negated",
        "slices change speed alone",
    ),
    ("recurrence/schedule.py", "weights *= 2", "2 to 3", "changes speed alone"),
    (
        "recurrence/kept.py",
        "joined: int = 0",
        "0 to 1",
        "a default that no caller uses",
    ),
    (
        "backend/loops.py",
        "_reader(sequence, length, False)",
        "False to True",
        "a sequence that TensorFlow can differentiate has the same elements",
    ),
    (
        "backend/loops.py",
        "def turns_back(",
        "1 to 2",
        "the number of timesteps of a turn changes speed alone",
    ),
    (
        "backend/block_lstm.py",
        "states[0])",
        "0 to 1",
        "all states have the same shape",
    ),
    (
        "backend/block_lstm.py",
        "gate_i.shape[-1]",
        "USub left out",
        "a gate has two axes",
    ),
    (
        "recurrence/schedule.py",
        "has_company=False",
        "False to True",
        "changes speed alone",
    ),
    (
        "recurrence/time_loop.py",
        "least = most_rows_by_gate",
        "Add to Sub",
        "changes speed alone",
    ),
    ("recurrence/kept.py", "return 0", "0 to 1", "changes memory alone"),
    (
        "backend/block_lstm.py",
        "((states[0].shape[0]",
        "0 to 1",
        "all states have the same shape",
    ),
    (
        "backend/loops.py",
        "if not differentiable",
        "Not left out",
        "a sequence that TensorFlow can differentiate has the same elements",
    ),
    (
        "recurrence/forward.py",
        "prepare is not None and gates > 1",
        "1 to 2",
        "a loop by gate has 3 or 4 gates",
    ),
    (
        "recurrence/forward.py",
        "valid_t = elements[-1]",
        "USub left out",
        "with one sequence before it, it is the second element, too",
    ),
    ("backend/loops.py", "BLOCKS_AT_ONCE = ", None, "changes speed and memory alone"),
    (
        "backend/loops.py",
        "plain and turn_length > 1",
        "1 to 2",
        "turns of 2 timesteps or of 1 have the same result",
    ),
    (
        "backend/loops.py",
        "    turn_length=1,",
        "1 to 2",
        "the number of timesteps of a turn changes speed alone",
    ),
    (
        "projection.py",
        "keepdims=True",
        "True to False",
        "the axis of size 1 broadcasts",
    ),
]

# A mutant that loops forever counts as killed after this CPU time, one that waits after
# this time. All tests of a module take about a minute of CPU time.
CPU_SECONDS = 240
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
    names = ["maximum", "minimum", "max", "min", "equal", "logical_and", "logical_or"]
    return name in names


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


def is_overload(node):
    """Whether a function is `@typing.overload`, which only type checkers read."""
    return isinstance(node, ast.FunctionDef) and any(
        getattr(decorator, "attr", None) == "overload"
        for decorator in node.decorator_list
    )


def mutants_of(module):
    """Lists the mutants of a module: (line, description, position, number)."""
    tree = ast.parse((PACKAGE / module).read_text())
    not_run, strict = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "strict":
            strict.add(id(node.value))
        if isinstance(node, (ast.Raise, ast.JoinedStr)) or is_overload(node):
            not_run |= {id(part) for part in ast.walk(node)}
    found = []
    for position, node in enumerate(ast.walk(tree)):
        if id(node) in not_run:
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
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
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
    parser.add_argument(
        "--jobs", type=int, default=1, help="mutants at a time (default: 1)"
    )
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

    # Ends the running tests, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
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
    digests = {module: digest_of(module) for module in TESTS}
    results = {}
    if arguments.results.exists():
        for text in arguments.results.read_text().splitlines():
            *mutant, digest, result = json.loads(text)
            if digest == digests[mutant[0]]:
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
    waiting = [m for m in sample if m not in results and why_not(m) is None]
    if arguments.survivors:
        tests = {module: MORE_TESTS.get(module, LOOPS) for module in TESTS}
        waiting = [m for m in sample if results.get(m) == "survived"]
    running = {}  # from the process to the mutant and the time of its end
    try:
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
                        record = [*mutant, digests[module], result]
                        file.write(json.dumps(record) + "\n")
            time.sleep(0.05)
    finally:
        for child in running:
            os.killpg(child, signal.SIGKILL)

    explained = {m: why for m in sample if (why := why_not(m)) is not None}
    results = {m: results[m] for m in sample if m in results and m not in explained}
    survivors = [m for m in results if results[m] == "survived"]
    print(
        f"{len(results) - len(survivors)} of {len(results)} mutants killed, "
        f"{len(explained)} explained; {len(sample)} in the sample"
    )
    for module, line, what, *_ in survivors:
        print(f"survived: {module}:{line}: {what}")
    for (module, line, what, *_), why in explained.items():
        print(f"explained: {module}:{line}: {what}: {why}")
    return 0


def digest_of(module):
    return hashlib.sha256((PACKAGE / module).read_bytes()).hexdigest()[:16]


def why_not(mutant):
    """Returns the reason in `EXPLAINED` why a mutant would survive, or `None`."""
    module, line, what, *_ = mutant
    text = (PACKAGE / module).read_text().splitlines()[line - 1]
    for explained, part, change, why in EXPLAINED:
        if explained == module and part in text and change in (None, what):
            return why
    return None


if __name__ == "__main__":
    sys.exit(main())
