"""LiteRT and ONNX files: what they answer in their own runtimes, what is refused."""

import collections
import doctest
import importlib
import os
import pathlib
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import KINDS, gap, randomize_model

import keras_bnrnn
from keras_bnrnn.export import ExportMismatchError
from keras_bnrnn.export.formats import conversion, export_litert, export_onnx

layers = keras.layers

RUNTIMES = {
    "litert": ["ai_edge_litert"],
    "onnx": ["tf2onnx", "onnx", "onnxruntime"],
}
EXPORTS = {"litert": export_litert, "onnx": export_onnx}
SUFFIXES = {"litert": ".tflite", "onnx": ".onnx"}

# float32 on both sides, in other orders of sums and with other sigmoids.
TOLERANCE = 1e-5


def need(kind):
    for module in RUNTIMES[kind]:
        pytest.importorskip(module)


@pytest.fixture(params=["litert", "onnx"])
def kind(request):
    need(request.param)
    return request.param


@pytest.fixture
def litert():
    need("litert")


@pytest.fixture
def onnx():
    need("onnx")


def export(kind, model, folder, **kwargs):
    return EXPORTS[kind](model, folder / f"model{SUFFIXES[kind]}", **kwargs)


def runtime(path):
    """What a file answers, as a function of arrays by name."""
    if path.suffix == ".tflite":
        from ai_edge_litert.interpreter import Interpreter

        run = Interpreter(str(path)).get_signature_runner()
        return lambda **inputs: run(**inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return lambda **inputs: dict(zip(names, session.run(None, inputs), strict=True))


def operations(path):
    """How often each operation is in a file, loop bodies left out."""
    if path.suffix == ".onnx":
        import onnx

        return collections.Counter(n.op_type for n in onnx.load(path).graph.node)
    from ai_edge_litert import schema_py_generated as schema

    names = {code: name for name, code in vars(schema.BuiltinOperator).items()}
    content = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    return collections.Counter(
        names[content.operatorCodes[operator.opcodeIndex].builtinCode]
        for operator in content.subgraphs[0].operators
    )


def sequences(rng, batch_size, timesteps, features=5):
    return rng.normal(size=(batch_size, timesteps, features)).astype("float32")


def sequential(rng, *parts):
    model = keras.Sequential([keras.Input((None, 5), name="x"), *parts])
    randomize_model(model, rng)
    return model


def assert_answers(kind, model, path, rng, batch_size=1, output=None):
    """Each of several T, one of them twice, and for ONNX several B."""
    run = runtime(path)
    batches = [batch_size] * 4 if kind == "litert" else [1, 2, 5, 1]
    for batch, timesteps in zip(batches, [7, 1, 12, 7], strict=True):
        x = sequences(rng, batch, timesteps)
        (name, found), *others = run(x=x).items()
        assert name == (output or model.layers[-1].name) and not others
        expected = model(x, training=False)
        assert found.shape == expected.shape and found.dtype == np.float32
        assert gap(found, expected) < TOLERANCE


def test_docstring_examples(kind, tmp_path):
    (test,) = doctest.DocTestFinder().find(EXPORTS[kind])
    test.globs |= {"keras": keras, "np": np, "tmp": tmp_path}
    test.globs["BNLSTM"] = keras_bnrnn.BNLSTM
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.slow(but=["litert-simple_rnn", "litert-gru", "onnx-lstm"])
@pytest.mark.parametrize("layer", KINDS)
def test_each_layer(kind, layer, rng, tmp_path):
    model = sequential(rng, KINDS[layer][0](4, return_sequences=True, name="states"))
    path = export(kind, model, tmp_path)
    assert path == tmp_path / f"model{SUFFIXES[kind]}"
    assert os.listdir(tmp_path) == [path.name]
    assert_answers(kind, model, path, rng)
    found = operations(path)
    if kind == "litert":
        assert found["UNIDIRECTIONAL_SEQUENCE_LSTM"] == (layer == "lstm")
        assert found["WHILE"] == (layer != "lstm")
    else:
        assert found["LSTM"] == (layer == "lstm")


@pytest.mark.slow(but=["None-BNSimpleRNN", "7-BNLSTM"])
@pytest.mark.parametrize("layer", ["BNLSTM", "BNGRU", "BNSimpleRNN"])
@pytest.mark.parametrize("timesteps", [None, 7])
def test_onnx_by_keras_itself(onnx, timesteps, layer, rng, tmp_path):
    """Normalised layers, by `keras.Model.export`: one row, and a batch in slices.

    The weights are the initial ones. With larger ones, 128 units multiply rounding
    errors from timestep to timestep.
    """
    normalised = getattr(keras_bnrnn, layer)(128, return_sequences=True)
    model = keras.Sequential([keras.Input((timesteps, 5), name="x"), normalised])
    model(sequences(rng, 20, 7), training=True)  # moves the statistics
    path = tmp_path / "model.onnx"
    model.export(path, format="onnx", verbose=False)
    run = runtime(path)
    for rows in (1, 33):
        for length in [timesteps] if timesteps else [1, 4, 9]:
            x = sequences(rng, rows, length)
            (found,) = run(x=x).values()
            assert gap(found, model(x, training=False)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["lstm", "gru"])
def test_bidirectional(kind, layer, rng, tmp_path):
    forward = KINDS[layer][0](4, return_sequences=True)
    model = sequential(rng, layers.Bidirectional(forward, name="both"))
    path = export(kind, model, tmp_path)
    assert_answers(kind, model, path, rng)
    if kind == "litert" and layer == "lstm":
        assert operations(path)["UNIDIRECTIONAL_SEQUENCE_LSTM"] == 2


@pytest.mark.slow
def test_stacked(kind, rng, tmp_path):
    model = sequential(
        rng,
        keras_bnrnn.BNLSTM(4, return_sequences=True),
        keras_bnrnn.SequenceBatchNorm(),
        keras_bnrnn.BNGRU(3, return_sequences=True, reset_after=False),
        layers.TimeDistributed(layers.Dense(6, "tanh")),
        keras_bnrnn.BNLSTM(5, normalize="joint"),
        layers.Dense(2, name="logits"),
    )
    path = export(kind, model, tmp_path)
    assert_answers(kind, model, path, rng)
    if kind == "litert":
        assert operations(path)["UNIDIRECTIONAL_SEQUENCE_LSTM"] == 2


@pytest.mark.slow(but=["litert"])
def test_stock_layers_without_bias(kind, rng, tmp_path):
    model = sequential(
        rng,
        layers.LSTM(4, use_bias=False, return_sequences=True, go_backwards=True),
        layers.LSTM(3, activation="relu", return_sequences=True),
        layers.LSTM(3, name="last"),
    )
    path = export(kind, model, tmp_path)
    assert_answers(kind, model, path, rng)
    if kind == "litert":
        assert operations(path)["UNIDIRECTIONAL_SEQUENCE_LSTM"] == 2


@pytest.mark.slow(but=["litert"])
def test_masks_by_value(kind, rng, tmp_path):
    model = sequential(
        rng,
        layers.Masking(),
        keras_bnrnn.BNLSTM(4, return_sequences=True),
        layers.TimeDistributed(layers.Dense(3)),
        keras_bnrnn.BNGRU(3, name="last"),
    )
    options = {"batch_size": 3} if kind == "litert" else {}
    path = export(kind, model, tmp_path, **options)
    x = sequences(rng, 3, 7)
    x[1, 2:], x[2, 5:] = 0.0, 0.0
    (found,) = runtime(path)(x=x).values()
    assert gap(found, model(x, training=False)) < TOLERANCE
    assert gap(found[1:2], model(x[1:2, :2], training=False)) < TOLERANCE


@pytest.mark.slow(but=["litert"])
def test_several_inputs_and_outputs(kind, rng, tmp_path):
    ids = keras.Input((None,), dtype="int32", name="ids")
    frames = keras.Input((None, 5), name="frames")
    speaker = keras.Input((2,), name="speaker")
    x = layers.Concatenate()([layers.Embedding(7, 3)(ids), frames])
    start = layers.Dense(4)(speaker)
    lstm = keras_bnrnn.BNLSTM(4, return_sequences=True, return_state=True, name="lstm")
    y, h, c = lstm(x, initial_state=[start, start])
    model = keras.Model(
        {"ids": ids, "frames": frames, "speaker": speaker},
        {"y": keras_bnrnn.BNLSTM(3)(y), "h": h, "c": c},
    )
    randomize_model(model, rng)
    path = export(kind, model, tmp_path)
    inputs = {
        "ids": rng.integers(0, 7, (1, 6)).astype("int32"),
        "frames": sequences(rng, 1, 6),
        "speaker": rng.normal(size=(1, 2)).astype("float32"),
    }
    found, expected = runtime(path)(**inputs), model(inputs, training=False)
    assert set(found) == set(expected)
    for name, y in expected.items():
        assert gap(found[name], y) < TOLERANCE
    if kind == "litert":  # the first LSTM has a start and gives its states
        assert operations(path)["UNIDIRECTIONAL_SEQUENCE_LSTM"] == 1


@pytest.mark.slow
def test_fixed_sizes(kind, rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(2, 6, 5), name="x"),
            keras_bnrnn.BNLSTM(4, return_sequences=True, unroll=True),
            keras_bnrnn.BNGRU(3, unroll=True),
        ]
    )
    randomize_model(model, rng)
    path = export(kind, model, tmp_path)
    x = sequences(rng, 2, 6)
    (found,) = runtime(path)(x=x).values()
    assert gap(found, model(x, training=False)) < TOLERANCE


def test_onnx_names_free_sizes(onnx, rng, tmp_path):
    import onnxruntime

    model = sequential(
        rng, keras_bnrnn.BNGRU(4, return_sequences=True), layers.Dense(2, name="y")
    )
    session = onnxruntime.InferenceSession(export("onnx", model, tmp_path))
    (x,), (y,) = session.get_inputs(), session.get_outputs()
    assert (x.name, x.shape) == ("x", ["batch", "timesteps", 5])
    assert (y.name, y.shape) == ("y", ["batch", "timesteps", 2])


def test_onnx_operations_of_a_version(onnx, rng, tmp_path):
    import onnx

    model = sequential(rng, keras_bnrnn.BNLSTM(4))
    path = export("onnx", model, tmp_path, opset_version=17)
    versions = {x.domain: x.version for x in onnx.load(path).opset_import}
    assert versions[""] == 17


@pytest.mark.parametrize("fused_lstm", [True, False])
def test_litert_batches(litert, fused_lstm, rng, tmp_path):
    model = sequential(rng, keras_bnrnn.BNLSTM(4, return_sequences=True))
    path = export("litert", model, tmp_path, batch_size=3, fused_lstm=fused_lstm)
    assert_answers("litert", model, path, rng, batch_size=3)
    assert operations(path)["UNIDIRECTIONAL_SEQUENCE_LSTM"] == fused_lstm


def test_fused_lstm_forgets_what_came_before(litert, rng, tmp_path):
    model = sequential(rng, keras_bnrnn.BNLSTM(4), layers.Dense(2))
    run = runtime(export("litert", model, tmp_path, batch_size=2))
    x = sequences(rng, 2, 6)
    expected = model(x, training=False)
    for value in (100.0, np.nan, np.inf, -1e30):
        poisoned = sequences(rng, 2, 6)
        poisoned[1, 2, 3] = value
        (answer,) = run(x=poisoned).values()
        assert gap(answer[:1], model(poisoned[:1], training=False)) < TOLERANCE
        assert np.isfinite(answer[1]).all() == (value == 100.0)
        (found,) = run(x=x).values()
        assert gap(found, expected) < TOLERANCE


def test_fused_lstm_does_not_clip_its_cells(litert, rng, tmp_path):
    """Cells climb to 16 in 16 frames, then lose half of their value in each."""
    model = sequential(rng, layers.LSTM(2, return_sequences=True))
    kernel = np.zeros((5, 8), "float32")
    kernel[0] = np.repeat([20.0, 40.0, 40.0, 0.0], 2)  # i, f, c, o
    model.set_weights([kernel, np.zeros((2, 8), "float32"), np.zeros(8, "float32")])
    x = np.zeros((1, 24, 5), "float32")
    x[:, :16, 0] = 1.0
    (found,) = runtime(export("litert", model, tmp_path))(x=x).values()
    # At last i = f = o = 0.5 and the candidate is 0: c = 16 / 2**8.
    assert gap(found[0, -1], 0.5 * np.tanh(16 / 2**8)) < TOLERANCE
    assert gap(found, model(x, training=False)) < TOLERANCE


def test_float16_weights(litert, rng, tmp_path):
    model = sequential(
        rng, keras_bnrnn.BNLSTM(64, return_sequences=True), keras_bnrnn.BNSimpleRNN(32)
    )
    for weight in model.weights:  # as in a trained model: sums of order 1
        if len(weight.shape) > 1:
            weight.assign(weight / np.sqrt(weight.shape[0]))
    whole = export("litert", model, tmp_path)
    path = export_litert(model, tmp_path / "half.tflite", quantize="float16")
    assert path.stat().st_size < 0.65 * whole.stat().st_size
    x = sequences(rng, 1, 9)
    (found,) = runtime(path)(x=x).values()
    # float16 keeps 11 bits: 5e-4 of a weight, and sums average that out.
    assert 1e-6 < gap(found, model(x, training=False)) < 5e-3


@pytest.mark.slow
def test_no_warnings_but_those_about_the_model(kind, tmp_path):
    """In a process of its own: libraries warn once, of their first use."""
    script = textwrap.dedent(
        """
        import sys, warnings
        import keras, keras_bnrnn, keras_bnrnn.export.formats as formats
        kind, path = sys.argv[1:]
        model = keras.Sequential(
            [
                keras.Input((None, 5), name="x"),
                keras.layers.Masking(),
                keras_bnrnn.BNLSTM(4, return_sequences=True),
                keras.layers.TimeDistributed(keras.layers.Dense(3)),
                keras_bnrnn.BNGRU(3),
            ]
        )
        warnings.simplefilter("error")
        getattr(formats, f"export_{kind}")(model, path)
        """
    )
    path = tmp_path / f"model{SUFFIXES[kind]}"
    done = subprocess.run(
        [sys.executable, "-c", script, kind, str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert path.exists()


@pytest.mark.slow(but=["onnx"])
def test_a_peephole_layer_is_kept(kind, rng, tmp_path):
    model = sequential(rng, keras_bnrnn.BNLSTM(4, peephole=True))
    with pytest.warns(UserWarning, match="peepholes"):
        path = export(kind, model, tmp_path)
    assert_answers(kind, model, path, rng)
    # One loop of whole batches, though TensorFlow would run large ones in slices.
    assert "If" not in operations(path) and "IF" not in operations(path)


@pytest.mark.slow(but=["litert"])
def test_wrong_numbers_are_not_published(kind, rng, tmp_path, monkeypatch):
    # Both converters get the loop of Keras' TimeDistributed over a free T wrong.
    monkeypatch.setattr(conversion, "_run_on_all_frames", lambda layer: None)
    model = sequential(
        rng,
        keras_bnrnn.BNGRU(4, return_sequences=True),
        layers.TimeDistributed(layers.Dense(3), name="scores"),
    )
    old = tmp_path / f"model{SUFFIXES[kind]}"
    old.write_bytes(b"the one before")
    with pytest.raises(ExportMismatchError, match=r"to 0\.0001\. .*'scores', which"):
        export(kind, model, tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == [old.name]
    assert old.read_bytes() == b"the one before"


def test_tolerance(onnx, rng, tmp_path):
    model = sequential(rng, keras_bnrnn.BNGRU(9, name="state"))
    with pytest.raises(ValueError, match=r"to 1e-12\. Received: output 'state'"):
        export("onnx", model, tmp_path, tolerance=1e-12)
    assert os.listdir(tmp_path) == []


def test_what_a_format_cannot_hold(kind, rng, tmp_path):
    class SingularValues(layers.Layer):
        def call(self, x):
            return tf.linalg.svd(x, compute_uv=False)

    states = keras_bnrnn.BNLSTM(4, return_sequences=True)
    model = sequential(rng, states, SingularValues())
    name = {"litert": "LiteRT", "onnx": "ONNX"}[kind]
    message = rf"that {name} has no operation for.* Received: .*Svd"
    with pytest.raises(ValueError, match=message):
        export(kind, model, tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_existing_file(kind, rng, tmp_path):
    model = sequential(rng, keras_bnrnn.BNLSTM(4))
    path = tmp_path / f"model{SUFFIXES[kind]}"
    path.write_bytes(b"the one before")
    with pytest.raises(FileExistsError, match=f"`path` is there.*path='{path}'"):
        export(kind, model, tmp_path)
    assert path.read_bytes() == b"the one before"
    assert export(kind, model, tmp_path, overwrite=True) == path
    assert os.listdir(tmp_path) == [path.name]
    assert_answers(kind, model, path, rng)


@pytest.mark.parametrize(
    ("kind", "module"), [(k, m) for k, modules in RUNTIMES.items() for m in modules]
)
def test_a_missing_extra(kind, module, rng, tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name == module or name.startswith(f"{module}."):
            monkeypatch.delitem(sys.modules, name)
    find = importlib.import_module

    def import_module(name):
        if name.partition(".")[0] == module:
            raise ImportError(f"No module named {module!r}")
        if name.partition(".")[0] in RUNTIMES[kind]:
            return None
        return find(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    model = sequential(rng, keras_bnrnn.BNLSTM(4))
    with pytest.raises(ImportError) as caught:
        export(kind, model, tmp_path)
    assert str(caught.value) == (
        f"`export_{kind}` needs `{module}`, and its import failed: No module named "
        f"'{module}'. Install it with `pip install 'keras-bnrnn[{kind}]'`."
    )
    assert os.listdir(tmp_path) == []


def test_bad_paths(kind, rng, tmp_path):
    model = sequential(rng, keras_bnrnn.BNLSTM(4))
    suffix = SUFFIXES[kind]
    with pytest.raises(ValueError, match=f"end in '{suffix}'. .*path='a.keras'"):
        EXPORTS[kind](model, "a.keras")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(ValueError, match=r"`path` must be that of a file.*folder"):
        EXPORTS[kind](model, tmp_path / f"folder{suffix}", overwrite=True)
    with pytest.raises(ValueError, match=r"`path` must be in a dir.*'gs:/bucket/m"):
        EXPORTS[kind](model, pathlib.Path(f"gs://bucket/m{suffix}"))


def test_bad_models(kind, rng, tmp_path):
    with pytest.raises(ValueError, match="`model` must be built"):
        export(kind, keras.Sequential([keras_bnrnn.BNLSTM(4)]), tmp_path)
    stateful = keras.Sequential(
        [
            keras.Input(batch_shape=(2, None, 5)),
            keras_bnrnn.BNLSTM(4, stateful=True, name="carrier"),
        ]
    )
    with pytest.raises(ValueError, match="layer 'carrier' with stateful=True"):
        export(kind, stateful, tmp_path)
    half = sequential(rng, keras_bnrnn.BNLSTM(4, dtype="mixed_float16", name="half"))
    with pytest.raises(ValueError, match="'half' with compute_dtype='float16'"):
        export(kind, half, tmp_path)
    no_time = keras.Sequential([keras.Input((5,), name="x"), layers.Dense(2)])
    with pytest.raises(ValueError, match=r"\(batch, timesteps, \.\.\.\).*'x'"):
        export(kind, no_time, tmp_path)
    assert os.listdir(tmp_path) == []


def test_bad_options(kind, rng, tmp_path):
    model = sequential(rng, keras_bnrnn.BNLSTM(4))

    def refused(message, **kwargs):
        with pytest.raises(ValueError, match=message):
            export(kind, model, tmp_path, **kwargs)

    for value in (0, -1e-3, "1e-4", True, float("nan")):
        refused(f"`tolerance` must be .*tolerance={value!r}", tolerance=value)
    if kind == "onnx":
        refused("`opset_version` must be .*opset_version='17'", opset_version="17")
        return
    for value in (0, -2, 1.0, True, "1"):
        refused(f"`batch_size` must be .*batch_size={value!r}", batch_size=value)
    refused("`quantize` must be .*quantize='int8'", quantize="int8")
    model = keras.Sequential([keras.Input(batch_shape=(2, None, 5)), layers.GRU(4)])
    refused("`batch_size` must be 2.*batch_size=3", batch_size=3)
    assert os.listdir(tmp_path) == []
