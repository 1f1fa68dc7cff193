"""The notebooks of the examples: they run, and what is kept of them is whole."""

import importlib
import pathlib
import re
import tomllib
import wave

import nbclient
import nbformat
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PATHS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.ipynb"))}
SMOKE = {
    "quick_start": {"EPOCHS": 1, "UNITS": 8, "IMAGES": 160},
    "choosing_statistics": {"EPOCHS": 1, "SEQUENCES": 64},
    "reproduce_a_figure": {"EPOCHS": 2, "SMOKE": True},
    "export_and_serve": {"EPOCHS": 1, "UNITS": 4, "SEQUENCES": 32, "CALLS": 2},
    "streaming_inference": {"EPOCHS": 1, "UNITS": 4, "SEQUENCES": 32},
}
# What a notebook measures: names in it, and how large they may be. All are sums of a
# few float32 rounding errors of outputs and logits of order 1.
GAPS = {
    "quick_start": ["fold_gap", "load_gap", "padding_gap"],
    "choosing_statistics": [
        *("leaks['frame', True]", "leaks['sequence', False]", "still"),
        *("padding_gaps['sequence']", "padding_gaps['frame']"),
    ],
    "reproduce_a_figure": [],
    "export_and_serve": ["rest_gap", "ragged_gap"],
    "streaming_inference": ["step_gap", "chunk_gap", "server_gap", "batch_gap"],
}


@pytest.fixture(scope="module")
def notebooks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module("notebooks")


@pytest.fixture
def recordings(tmp_path, rng):
    """Sounds by two speakers, named as those of the Free Spoken Digit Dataset."""
    for digit in range(10):
        for speaker in ("ann", "bob"):
            for index in (0, 1, 7, 8):
                path = tmp_path / f"{digit}_{speaker}_{index}.wav"
                with wave.open(str(path), "wb") as file:
                    file.setnchannels(1)
                    file.setsampwidth(2)
                    file.setframerate(8_000)
                    sound = rng.normal(scale=3_000, size=1_600)
                    file.writeframes(sound.astype("<i2").tobytes())
    return tmp_path


def test_there_are_five():
    assert set(PATHS) == set(SMOKE) == set(GAPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE)
def test_it_runs_from_top_to_bottom(name, notebooks, recordings, tmp_path):
    parameters = dict(SMOKE[name])
    if name == "reproduce_a_figure":
        parameters["DATA_DIR"] = str(recordings)
    # What it measured, by one more cell.
    copy = ROOT / "examples" / PATHS[name].name
    notebook = nbformat.read(copy, as_version=4)
    asked = "print(repr([" + ", ".join(GAPS[name]) + "]))"
    notebook.cells.append(nbformat.v4.new_code_cell(asked))
    path = tmp_path / copy.name
    nbformat.write(notebook, path)
    executed = notebooks.execute(path, parameters)
    assert len(executed.cells) == len(notebook.cells)
    gaps = [float(gap) for gap in re.findall(r"[\d.e+-]+", said(executed.cells[-1]))]
    assert len(gaps) == len(GAPS[name])
    assert np.all(np.array(gaps) < 1e-4)
    images = [o for o in outputs(executed) if "image/png" in o.get("data", {})]
    assert images
    if name == "choosing_statistics":
        text = "".join(said(cell) for cell in executed.cells)
        (leak,) = re.findall(r"sequence,  training: .* by ([\d.]+)", text)
        assert float(leak) > 0.1
    if name == "export_and_serve":
        text = "".join(said(cell) for cell in executed.cells)
        assert "HTTP 200" in text and "Stock TensorFlow Serving has every" in text


def said(cell):
    return "".join(o.get("text", "") for o in cell.get("outputs", ()))


def outputs(notebook):
    return [o for cell in notebook.cells for o in cell.get("outputs", ())]


@pytest.mark.parametrize("name", PATHS)
def test_what_is_kept_is_a_whole_run(name):
    notebook = nbformat.read(PATHS[name], as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for output in outputs(notebook)}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name") != "stderr" for output in outputs(notebook))
    for cell in code:
        if "print(" in cell.source:
            assert said(cell).strip()
    assert any("image/png" in o.get("data", {}) for o in outputs(notebook))
    text = PATHS[name].read_text(encoding="utf-8")
    assert not re.search(r"/(tmp|home|root|work|Users)/", text)
    assert len(text) < 500_000


@pytest.mark.parametrize("name", PATHS)
def test_it_is_ready_for_colab(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    notebook = nbformat.read(PATHS[name], as_version=4)
    first, install = notebook.cells[:2]
    badge = (
        "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    )
    assert first.cell_type == "markdown" and first.source.startswith(badge)
    assert '%pip install --quiet "./source[examples]"' in install.source
    assert "examples" in project["optional-dependencies"]
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    assert len(tagged) == 1


def write(path, *sources):
    notebook = nbformat.v4.new_notebook()
    for source in sources:
        notebook.cells.append(nbformat.v4.new_code_cell(source))
    notebook.cells[0].metadata.tags = ["parameters"]
    nbformat.write(notebook, path)
    return path


def test_parameters_are_not_kept(notebooks, tmp_path):
    import_sys = "import sys\nprint('lost', file=sys.stderr)"
    path = write(tmp_path / "a.ipynb", "N = 1\nM = 2", import_sys, "print(N, M)", "N")
    executed = notebooks.execute(path, {"N": 5})
    assert [cell.execution_count for cell in executed.cells] == [1, 2, 3, 4]
    assert executed.cells[0].source == "N = 1\nM = 2" and not executed.cells[1].outputs
    assert said(executed.cells[2]) == "5 2\n"
    (result,) = executed.cells[3].outputs
    assert result.execution_count == 4 and result.data["text/plain"] == "5"


def test_a_parameter_that_it_has_not_is_refused(notebooks, tmp_path):
    path = write(tmp_path / "a.ipynb", "N = 1", "N")
    with pytest.raises(ValueError, match=r"a.ipynb has the parameters N. Received: M"):
        notebooks.execute(path, {"M": 5})


def test_a_cell_that_fails_is_shown(notebooks, tmp_path):
    path = write(tmp_path / "a.ipynb", "N = 1", "N / 0")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivision"):
        notebooks.execute(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "names must be of choosing_statistics, .* Received: nothing"),
        (["--set", "N"], "--set: must be NAME=VALUE. Received: N"),
        (["--set", "1N=2"], "--set: must be NAME=VALUE. Received: 1N=2"),
    ],
)
def test_arguments_are_refused_by_name(arguments, message, notebooks, capsys):
    with pytest.raises(SystemExit):
        notebooks.parse_arguments(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_values_are_literals_or_else_strings(notebooks):
    parsed = notebooks.parse_arguments(
        ["quick_start", "--check", "--set", "A=3", "B=x/y", "C=None", "D='z'"]
    )
    assert parsed.set == {"A": 3, "B": "x/y", "C": None, "D": "z"}
    assert [path.stem for path in parsed.paths] == ["quick_start"]
