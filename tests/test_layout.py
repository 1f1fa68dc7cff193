"""How the package imports itself, and what importing it loads."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "keras_bnrnn"
# From the bottom up. A module imports only what stands before it.
FLOORS = [
    "types",
    "extras",
    "checks",
    "config",
    "statistics",
    "backend",
    "traversal",
    "replacement",
    "population",
    "frames",
    "sequence_batch_norm",
    "projection",
    "recurrence",
    "layers",
    "targets",
    "calibration",
    "monitoring",
    "callbacks",
    "plots",
    "folding",
    "normalizing",
    "torch_weights",
    "export",
    "local_server",
]
BACKENDS = ("tensorflow", "jax", "torch")


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, path.relative_to(PACKAGE).with_suffix("").parts


def imported(path):
    """Names of the modules that a file imports, wherever in it."""
    return imported_in(ast.parse(path.read_text()))


def imported_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_run_downwards():
    for path, (floor, *_) in modules():
        if floor == "__init__":
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "keras_bnrnn" and len(parts) > 1 and parts[1] in FLOORS:
                below = FLOORS[: FLOORS.index(floor) + 1]
                assert parts[1] in below, f"{path} imports {name}"


def test_every_module_has_a_floor():
    assert {parts[0] for _, parts in modules()} == {*FLOORS, "__init__"}


def test_only_the_backend_the_export_and_the_server_import_a_backend():
    for path, (floor, *_) in modules():
        if floor in ("backend", "export", "local_server"):
            continue
        for name in imported(path):
            assert name.split(".")[0] not in BACKENDS, f"{path} imports {name}"


def test_the_core_uses_the_public_api_of_keras():
    for path, _ in modules():
        assert not any(name.startswith("keras.src") for name in imported(path)), path


def test_the_forward_and_the_backward_loop_do_not_know_each_other():
    for one, other in (("forward", "backward"), ("backward", "forward")):
        names = set(imported(PACKAGE / "recurrence" / f"{one}.py"))
        assert not any(other in name.split(".") for name in names)


def test_the_package_imports_the_export_only_when_it_is_asked_for():
    """All modules of `recalibrate` and the layers are below the export."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert "keras_bnrnn.export" in imported_in(tree)
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if lazy:
            node.body = []
    names = set(imported_in(tree))
    assert "keras_bnrnn.layers" in names
    assert not names & {"keras_bnrnn.export", "keras_bnrnn.local_server"}


@pytest.mark.slow
def test_importing_the_package_loads_neither_the_export_nor_the_server():
    code = "import keras_bnrnn, sys; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "keras_bnrnn.layers" in loaded
    assert not loaded & {"keras_bnrnn.export", "keras_bnrnn.local_server"}


def test_the_export_is_loaded_when_it_is_asked_for():
    import keras_bnrnn
    import keras_bnrnn.export

    assert keras_bnrnn.export_saved_model is keras_bnrnn.export.export_saved_model
    assert "export_saved_model" in dir(keras_bnrnn)
    with pytest.raises(AttributeError, match=r"keras_bnrnn.*'nothing'"):
        _ = keras_bnrnn.nothing
