"""The pages of docs/: their programs run and print what the pages show."""

import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from pages import (
    PAGES,
    ROOT,
    blocks,
    commands,
    documented,
    run_python,
    text_of,
)

import keras_bnrnn_cli.arguments
from keras_bnrnn import BNLSTM

# Pages whose programs need more than one process or a stand-in for PyTorch, and the
# guides that test_guides.py reads one after the other.
ELSEWHERE = {
    "docs/bulk_scoring.md": "tests/examples/test_bulk_scoring.py",
    "docs/index.md": "test_the_example_runs_from_end_to_end",
    "docs/migrate.md": "test_the_code_runs",
    "docs/serving.md": "test_the_example_runs_from_end_to_end",
    "docs/several_gpus.md": "test_replicas",
    "docs/several_workers.md": "test_workers",
}
# What the programs of a page need beyond the package.
NEEDS = {
    "docs/export.md": ["onnxruntime", "tf2onnx", "ai_edge_litert"],
    "docs/monitoring.md": ["matplotlib", "tensorboard"],
}
WORKERS = "docs/several_workers.md"
WITH_PROGRAMS = [
    p for p in PAGES if "python" in [language for language, _ in blocks(p)]
]


@pytest.mark.slow(
    but=["docs/comparison.md", "docs/masks.md", "docs/mathematics.md"]
    + ["docs/statistics.md"]
)
@pytest.mark.parametrize("page", [p for p in WITH_PROGRAMS if p not in ELSEWHERE])
def test_programs(page, tmp_path, monkeypatch):
    """A block of text after a program is what the program prints."""
    for module in NEEDS.get(page, []):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    names, printed = {}, None
    for language, block in blocks(page):
        if language == "python":
            printed = run_python(block, page, names)
        elif language == "text":
            assert printed is not None, f"{page}: no program prints: {block}"
            assert printed == block
            printed = None
        elif language == "sh" and page != "README.md":  # its: test_guides.py
            for command in commands(block):
                program, *arguments = command.split()
                assert (program, arguments[0]) == ("keras-bnrnn", "inspect")
                assert keras_bnrnn_cli.main(arguments) == 0
    if page in CLAIMS:
        CLAIMS[page](names)


def check_validation_losses(names):
    """Recalibration helps one model, and not the other."""
    training, before, after = names["losses"]["sequence"]
    assert after < before / 1.5 and after < 1.3 * training
    training, before, after = names["losses"]["frame"]
    assert min(before, after) > 4 * training
    stateful = names["stateful"]
    x = np.random.default_rng(0).normal(size=(1, 5, 3)).astype("float32")
    # Both in float32: 1e-6.
    np.testing.assert_allclose(names["stateless"](x), stateful(x), atol=1e-6)


def check_statelessness(names):
    """`recalibrate` keeps the states of the stateful layer."""
    (layer, *_) = names["model"].layers
    assert layer.stateful
    assert not any(np.any(state) for state in layer.states)


# What a page says about the numbers that its programs print.
CLAIMS = {
    "docs/one_series.md": check_statelessness,
    "docs/troubleshooting.md": check_validation_losses,
}


def run_script(arguments, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return output


@pytest.mark.slow
def test_replicas(tmp_path):
    (_, program), (_, devices), (_, printed) = blocks("docs/several_gpus.md")
    made = "strategy = tf.distribute.MirroredStrategy()\n"
    assert made in program
    # The devices must be split before TensorFlow starts.
    program = devices + program.replace(made, "")
    (tmp_path / "program.py").write_text(program)
    output = finish(run_script(["program.py"], tmp_path))
    assert output.startswith(printed)
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert type(model.layers[0]) is BNLSTM and model.layers[0].synchronized


@pytest.mark.slow
def test_workers(tmp_path):
    pytest.importorskip("sklearn")
    block = next(block for language, block in blocks(WORKERS) if language == "sh")
    program, *arguments = block.split()
    assert program == "python"
    arguments[0] = str(ROOT / arguments[0])
    output = finish(run_script([*arguments, "--smoke"], tmp_path))
    assert "2 replicas; epochs that are done: 0" in output
    model = keras.saving.load_model(tmp_path / "runs/workers/model.keras")
    assert type(model.layers[1]) is BNLSTM and model.layers[1].synchronized


def test_the_page_of_several_workers_shows_the_example():
    example = text_of("examples/multi_worker.py")
    found = [block for language, block in blocks(WORKERS) if language == "python"]
    assert len(found) == 2 and all(block in example for block in found)
    for language, block in blocks(WORKERS):
        for option in re.findall(r" (--[\w-]+)", block if language == "sh" else ""):
            assert f'"{option}"' in example
    (config,) = re.findall("TF_CONFIG='(.*)'", text_of(WORKERS))
    config = json.loads(config)
    assert config["task"]["index"] < len(config["cluster"]["worker"])


def public_names():
    for name in ("", ".layers", ".export", ".local_server", ".plots"):
        yield f"keras_bnrnn{name}"
    yield "keras_bnrnn_client"


@pytest.mark.parametrize("name", list(public_names()))
def test_the_reference_has_every_public_name(name):
    if name.endswith(("local_server", "client")):
        for needed in ("httpx", "starlette", "uvicorn", "prometheus_client"):
            pytest.importorskip(needed)
    module = importlib.import_module(name)
    found = [resolve(n) for page in PAGES for n in documented(text_of(page))]
    for public in module.__all__:
        value = getattr(module, public)
        assert any(value is other for other in found), f"{name}.{public}"
        assert inspect.getdoc(value) or isinstance(value, dict), public


def resolve(dotted):
    """Imports what a dotted name of the reference stands for."""
    module, _, name = dotted.rpartition(".")
    if module.startswith("keras_bnrnn.local_server"):
        pytest.importorskip("starlette")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("command", ["serve", "inspect"])
def test_help_of_the_commands(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        getattr(keras_bnrnn_cli.arguments, command)(["--help"])
    printed = capsys.readouterr().out
    shown = {block for _, block in blocks("docs/api/command_line.md")}
    assert printed.split() in [block.split() for block in shown]


def test_every_command_is_in_the_reference():
    headings = re.findall(
        r"^## keras-bnrnn (\w+)$", text_of("docs/api/command_line.md"), re.M
    )
    assert set(headings) == set(keras_bnrnn_cli._COMMANDS)


@pytest.fixture
def figures():
    """The script of the figures. The experiments have another one of its name."""
    pytest.importorskip("matplotlib")
    path = ROOT / "docs/tools/figures.py"
    spec = importlib.util.spec_from_file_location("figures_of_the_site", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_timesteps_of_the_figures(figures):
    mask = np.array([[1, 0, 1, 1, 0], [0, 0, 1, 1, 1]], bool)
    forwards = [[0, -1, 1, 2, -1], [-1, -1, 0, 1, 2]]
    np.testing.assert_array_equal(figures.timesteps(mask), forwards)
    backwards = [[2, -1, 1, 0, -1], [-1, -1, 2, 1, 0]]
    np.testing.assert_array_equal(figures.timesteps(mask, backwards=True), backwards)


@pytest.mark.slow
def test_figures_are_drawn(figures, tmp_path):
    figures.main(["--output-dir", str(tmp_path)])
    for path in tmp_path.iterdir():
        assert (ROOT / "docs/figures" / path.name).exists()
        assert 1_000 < path.stat().st_size < 200_000
    assert {path.name for path in tmp_path.iterdir()} == set(figures.FIGURES)
