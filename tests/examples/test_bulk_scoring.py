"""The example of bulk scoring. Most tests need Apache Beam."""

import importlib
import os
import pathlib
import re
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from pages import blocks, run_python

import keras_bnrnn

GUIDE = "docs/bulk_scoring.md"
EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
# The example, which kills itself before it renames the third file.
CRASHING = """
import os, signal, sys
import bulk_scoring

rename = os.replace

def replace(source, target):
    if os.path.basename(target) == "part-2.parquet":
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.replace = replace
sys.exit(bulk_scoring.main())
"""


@pytest.fixture(scope="module")
def example():
    needed = "apache_beam, see examples/requirements-bulk-scoring.txt"
    pytest.importorskip("apache_beam", reason=f"needs {needed}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("bulk_scoring")


@pytest.fixture
def network():
    """A model with two inputs and two outputs, one of them for each frame."""
    features = keras.Input((None, 3), name="features")
    speaker = keras.Input((2,), name="speaker")
    h = keras_bnrnn.BNGRU(5, return_sequences=True)(features)
    frames = keras.layers.Dense(2, name="frames")(h)
    last = keras_bnrnn.BNLSTM(4)(h)
    score = keras.layers.Dense(1, name="score")(
        keras.layers.Concatenate()([last, speaker])
    )
    model = keras.Model([features, speaker], {"frames": frames, "score": score})
    rng = np.random.default_rng(5)
    for weight in model.weights:
        if "update_count" not in weight.path:
            weight.assign(rng.uniform(0.2, 0.9, weight.shape))
    return model


def make_rows(rng, count):
    return [
        {
            "id": f"row {number}",
            "features": rng.normal(size=(length, 3)).tolist(),
            "speaker": rng.normal(size=2).tolist(),
        }
        for number, length in enumerate(rng.integers(1, 20, count))
    ]


def write(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def read(path):
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def check(results, rows, network, bad=()):
    """Compares results with predictions of the Keras model, one row at a time."""
    assert [r["id"] for r in results] == [r["id"] for r in rows]
    assert [i for i, r in enumerate(results) if r["error"] is not None] == sorted(bad)
    for number, (result, row) in enumerate(zip(results, rows, strict=True)):
        assert set(result) == {"id", "frames", "score", "error"}
        if number in bad:
            assert result["frames"] is None and result["score"] is None
            continue
        inputs = [
            np.asarray([row[name]], "float32") for name in ("features", "speaker")
        ]
        expected = network(inputs, training=False)
        for name in ("frames", "score"):
            # The exported model is folded and runs padded batches: float32, 1e-5.
            np.testing.assert_allclose(
                result[name], expected[name][0], rtol=1e-5, atol=1e-5
            )


@pytest.mark.slow
def test_results_are_those_of_the_model(
    example, network, tmp_path, rng, monkeypatch, capsys
):
    keras_bnrnn.export_saved_model(network, tmp_path / "model")
    parts = [make_rows(rng, count) for count in (30, 7, 1)]
    parts[0][3]["features"] = None
    parts[0][4]["features"] = [[1.0, 2.0, 3.0], [1.0, 2.0]]
    parts[0][5]["features"] = [[1.0, 2.0]]
    parts[0][29]["features"][0][1] = float("nan")
    parts[1][0]["features"] = []
    parts[1][6]["speaker"] = [1.0, 2.0, 3.0]
    bad = [
        {3: "features: is missing", 4: "features: ", 5: "features: must have the shape"}
        | {29: "features: must be finite"},
        {0: "features: ", 6: "speaker: must have the shape (2,)"},
        {},
    ]
    for number, rows in enumerate(parts):
        write(tmp_path / f"in/part-{number}.parquet", rows)
    (tmp_path / "in/part-3.parquet").write_bytes(b"no table")
    (tmp_path / "in/part-4.parquet").write_bytes(
        (tmp_path / "in/part-0.parquet").read_bytes()[:-200]
    )
    write(tmp_path / "in/part-5.parquet", [{"id": "no column of the inputs"}])
    write(tmp_path / "in/part-6.parquet", parts[0][:1])
    empty = example.pa.Table.from_pylist(parts[0][:1]).slice(0, 0)
    example.pq.write_table(empty, tmp_path / "in/part-7.parquet")
    monkeypatch.chdir(tmp_path)
    arguments = ["--input-dir", "in", "--model", "model", "--output-dir", "out"]
    arguments += ["--batch-size", "8"]

    assert example.main([*arguments, "--files-at-once", "3"]) == 1
    for number, rows in enumerate(parts):
        results = read(tmp_path / f"out/part-{number}.parquet")
        check(results, rows, network, bad[number])
        for row, message in bad[number].items():
            assert message in results[row]["error"]
    assert read(tmp_path / "out/part-7.parquet") == []
    captured = capsys.readouterr()
    assert "8 files, 0 of them complete" in captured.out
    assert "3 of 8 files, 38 rows" in captured.out
    assert "\n39 rows in out, 6 of them with an error" in captured.out
    for number in (3, 4, 5):
        assert f"error: part-{number}.parquet: " in captured.err
    assert "part-5.parquet: has no column features, speaker" in captured.err

    # What was unreadable is read again. What is complete is not scored again.
    before = (tmp_path / "out/part-0.parquet").stat()
    for number in (3, 4, 5):
        write(tmp_path / f"in/part-{number}.parquet", parts[2])
    assert example.main(arguments) == 0
    assert "8 files, 5 of them complete" in capsys.readouterr().out
    after = (tmp_path / "out/part-0.parquet").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    check(read(tmp_path / "out/part-4.parquet"), parts[2], network)
    assert not [p for p in (tmp_path / "out").iterdir() if p.suffix == ".unreadable"]

    # Another version of the model does not mix with the first one.
    keras_bnrnn.export_saved_model(network, tmp_path / "model")
    with pytest.raises(SystemExit, match=r"has results of .*model/1.*model/2"):
        example.main(arguments)
    with pytest.raises(SystemExit, match="must not be --input-dir"):
        example.main([*arguments, "--output-dir", "in"])


@pytest.mark.slow
def test_it_continues_after_a_kill(example, network, tmp_path, rng):
    keras_bnrnn.export_saved_model(network, tmp_path / "model")
    parts = [make_rows(rng, 5) for _ in range(4)]
    for number, rows in enumerate(parts):
        write(tmp_path / f"in/part-{number}.parquet", rows)
    (tmp_path / "crashing.py").write_text(CRASHING)
    arguments = ["--input-dir", "in", "--model", "model", "--output-dir", "out"]
    arguments += ["--files-at-once", "1"]

    def run(program):
        paths = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent), *sys.path])
        return subprocess.run(
            [sys.executable, str(program), *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=600,
        )

    killed = run("crashing.py")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    names = sorted(p.name for p in (tmp_path / "out").glob("*.parquet"))
    assert names == ["part-0.parquet", "part-1.parquet"]
    assert len(list((tmp_path / "out").glob("part-2.parquet.*.tmp"))) == 1
    times = [(tmp_path / "out" / name).stat().st_mtime_ns for name in names]

    done = run(EXAMPLES / "bulk_scoring.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 files, 2 of them complete" in done.stdout
    assert "2 of 2 files, 10 rows" in done.stdout
    assert "20 rows in out, 0 of them with an error" in done.stdout
    assert times == [(tmp_path / "out" / name).stat().st_mtime_ns for name in names]
    assert not list((tmp_path / "out").glob("*.tmp"))
    for number, rows in enumerate(parts):
        check(read(tmp_path / f"out/part-{number}.parquet"), rows, network)


@pytest.mark.slow
def test_the_guide(example, tmp_path, monkeypatch, capsys):
    """Its trial, and its program with the model of the trial."""
    monkeypatch.chdir(tmp_path)
    sh = [block for language, block in blocks(GUIDE) if language == "sh"]
    trial, own = (block.split()[1:] for block in sh[1:])
    assert trial[0] == own[0] == "examples/bulk_scoring.py"
    assert example.main(trial[1:]) == 0
    printed = capsys.readouterr().out
    shown = next(block for language, block in blocks(GUIDE) if language == "")
    assert re.sub(r"\d+ rows/s", "", printed) == re.sub(r"\d+ rows/s", "", shown)

    pathlib.Path("data").mkdir()
    monkeypatch.chdir("data")
    (program,) = [block for language, block in blocks(GUIDE) if language == "python"]
    run_python(program, GUIDE, {})
    monkeypatch.chdir(tmp_path)
    pathlib.Path("models").mkdir()
    pathlib.Path("models/speech").symlink_to(tmp_path / "runs/scores/trial/model")
    assert example.main(own[1:]) == 0
    (results, *others) = (read(path) for path in pathlib.Path("scores").glob("*.p*"))
    assert not others and [row["id"] for row in results] == ["a", "b", "c"]
    assert [row["error"] for row in results] == [None] * 3
    assert [len(row["logits"]) for row in results] == [2] * 3


class Served:
    """A model that fails if a batch has a 7, and whose outputs are sums."""

    def __init__(self, lengths):
        self.signatures, self.lengths, self.shapes = {"serve": self.serve}, lengths, []

    def serve(self, x, **more):
        assert ("lengths" in more) == self.lengths
        self.shapes.append(tuple(x.shape))
        if np.any(x.numpy() == 7):
            raise tf.errors.InvalidArgumentError(None, None, "a 7")
        return {"sums": tf.cumsum(x, axis=1)}


@pytest.mark.parametrize("lengths", [True, False])
def test_batches(lengths, example):
    """Padding needs `lengths`. A failure is that of one row."""
    x = {"dtype": "float32", "shape": [None, None]}
    inputs = {"x": x, **({"lengths": {}} if lengths else {})}
    signature = {"name": "serve", "inputs": inputs, "outputs": {"sums": x}}
    handler = example.SavedModelHandler("model", signature, 8)
    rows = [[1.0], [2.0, 3.0], [4.0], [5.0, 7.0], [6.0, 8.0]]
    served = Served(lengths)
    results = handler.run_inference([{"x": np.float32(row)} for row in rows], served)
    assert "a 7" in results.pop(3)
    sums = [result["sums"].tolist() for result in results]
    assert sums == [[1.0], [2.0, 5.0], [4.0], [6.0, 14.0]]
    if lengths:
        assert served.shapes[0] == (5, 2)
    else:
        assert served.shapes[:2] == [(2, 1), (3, 2)]


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "bulk_scoring", raising=False)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(
        SystemExit, match=r"^error: .*apache_beam.*bulk-scoring.txt`\)$"
    ):
        importlib.import_module("bulk_scoring")
