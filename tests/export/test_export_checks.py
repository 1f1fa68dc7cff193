"""What a version must pass to be published, and what comes with it."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import gap, randomize_model
from tensorflow_serving.apis import prediction_log_pb2

import keras_bnrnn
from keras_bnrnn import export_saved_model, fold
from keras_bnrnn.export import ExportMismatchError, inspection, operations
from keras_bnrnn.export.directory import unfinished_name
from keras_bnrnn.export.masks import destroys_masks
from keras_bnrnn.export.saved_model import exporter, functions
from keras_bnrnn.export.warmup import WARMUP_FILE

layers = keras.layers

# Both sides are float32 with the same weights; only the order of sums differs.
TOLERANCE = 1e-5


def tagger(rng, units=4):
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="ids"),
            layers.Embedding(9, 8, name="table"),
            keras_bnrnn.BNLSTM(units, return_sequences=True, name="lower"),
            keras_bnrnn.BNGRU(units, return_sequences=True, name="upper"),
            layers.Dense(3, name="tags"),
        ],
        name="tagger",
    )
    randomize_model(model, rng)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tagger that trained for a step, and the path of its version."""
    rng = np.random.default_rng(20151005)
    model = tagger(rng)
    model.compile(keras.optimizers.Adam(0.25), "mse", run_eagerly=True)
    model.fit(rng.integers(0, 9, (4, 5)), rng.normal(size=(4, 5, 3)), verbose=0)
    directory = tmp_path_factory.mktemp("tagger")
    return model, export_saved_model(model, directory, provenance={"commit": "abc"})


def records(path):
    logs = tf.data.TFRecordDataset(str(path / WARMUP_FILE)).as_numpy_iterator()
    requests = [
        prediction_log_pb2.PredictionLog.FromString(log).predict_log.request
        for log in logs
    ]
    return [
        (
            request.model_spec.signature_name,
            {name: tf.make_ndarray(x) for name, x in request.inputs.items()},
        )
        for request in requests
    ]


def test_warmup_has_a_request_for_each_signature(exported):
    _, path = exported
    found = records(path)
    assert [name for name, _ in found] == [
        "serving_default",
        "step",
        "chunk",
        "initial_state",
    ]
    signatures = tf.saved_model.load(path).signatures
    for name, inputs in found:
        specs = signatures[name].structured_input_signature[1]
        assert {k: x.dtype for k, x in inputs.items()} == {
            k: spec.dtype.as_numpy_dtype for k, spec in specs.items()
        }
        for key, x in inputs.items():
            assert specs[key].shape.is_compatible_with(x.shape)


@pytest.mark.slow
def test_warmup_of_ones_own(rng, tmp_path):
    model = tagger(rng)
    request = {"ids": [[1, 2, 8]], "lengths": [3]}
    path = export_saved_model(model, tmp_path / "m", warmup=[request])
    ((name, inputs),) = records(path)
    assert name == "serving_default"
    np.testing.assert_array_equal(inputs["ids"], [[1, 2, 8]])
    assert inputs["ids"].dtype == np.int32

    state = {"ids": [[[3]]]}
    path = export_saved_model(model, tmp_path / "m", warmup={"initial_state": [state]})
    assert [name for name, _ in records(path)] == ["initial_state"]

    path = export_saved_model(model, tmp_path / "m", warmup=None)
    assert not (path / WARMUP_FILE).exists()


@pytest.mark.slow(but=["names", "shape", "count"])
@pytest.mark.parametrize(
    ("warmup", "message"),
    [
        ([{"ids": [[1]]}], r"`warmup` must be a dict of arrays.*\['ids'\]"),
        ([{"ids": [[1.5]], "lengths": [1]}], "`warmup` must hold int32 for 'ids'"),
        ([{"ids": [1], "lengths": [1]}], r"`warmup` must hold the shape.*shape \(1,\)"),
        ({"classify": []}, "`warmup` must name signatures.*'classify'"),
        ({"serve": 3}, r"`warmup` must have a list.*warmup\['serve'\]=3"),
        ([{"ids": [[1]], "lengths": [1]}] * 1001, "at most 1000 requests.*1001"),
        ([7], "`warmup` must be a dict of arrays.*with 7"),
    ],
    ids=["names", "dtype", "shape", "signature", "list", "count", "dict"],
)
def test_bad_warmup(warmup, message, rng, tmp_path):
    with pytest.raises(ValueError, match=message.replace("must be", ".*must be")):
        export_saved_model(tagger(rng), tmp_path / "m", streaming=False, warmup=warmup)
    assert not (tmp_path / "m").exists()


def test_warmup_that_fails_is_not_published(rng, tmp_path):
    request = {"x": np.zeros((1, 2, 3)), "lengths": [2, 2]}  # fits, but for B
    with pytest.raises(tf.errors.InvalidArgumentError, match="`lengths`"):
        export_saved_model(
            recurrent(rng), tmp_path / "m", streaming=False, warmup=[request]
        )
    assert not list((tmp_path / "m").iterdir())


def test_answers_other_than_the_models_are_not_published(rng, tmp_path, monkeypatch):
    model = recurrent(rng)
    broken = exporter.ServedModel

    class Broken(broken):
        def __init__(self, *args):
            super().__init__(*args)
            weights = self.model.get_weights()
            weights[-1] = weights[-1] + np.float32(1e-2)
            self.set_weights(weights)

    monkeypatch.setattr(exporter, "ServedModel", Broken)
    with pytest.raises(ExportMismatchError, match=r"0\.0001.*'y', which differs"):
        export_saved_model(model, tmp_path / "m", streaming=False)
    assert not list((tmp_path / "m").iterdir())


def test_padding_that_counts_is_said(rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, 3), name="x"),
            keras_bnrnn.BNLSTM(4, return_sequences=True),
            layers.Conv1D(2, 3, name="conv"),
            layers.GlobalMaxPooling1D(name="y"),
        ]
    )
    randomize_model(model, rng)
    with pytest.warns(UserWarning, match="Padding counts as frames past 'conv'"):
        path = export_saved_model(model, tmp_path / "m")
    manifest = json.loads((path / "keras_bnrnn.json").read_text())
    assert manifest["checks"]["padding_counts_from"] == "conv"


@keras.saving.register_keras_serializable(package="keras_bnrnn_tests")
class InPython(layers.Layer):
    supports_masking = True

    def call(self, x):
        y = tf.numpy_function(lambda a: a + 1, [x], tf.float32)
        return tf.ensure_shape(y, x.shape)

    def compute_output_shape(self, shape):
        return shape


def test_operations_that_tensorflow_serving_lacks(rng, tmp_path):
    model = keras.Sequential(
        [keras.Input((None, 3), name="x"), keras_bnrnn.BNLSTM(4), InPython()]
    )
    with pytest.raises(ValueError, match=r"TensorFlow Serving has.*PyFunc.*Python"):
        export_saved_model(model, tmp_path / "m", streaming=False)
    assert not list((tmp_path / "m").iterdir())


def test_the_list_of_text_operations_is_that_of_the_package():
    text = pytest.importorskip("tensorflow_text")
    known = set()
    for library in pathlib.Path(text.__file__).parent.rglob("_*.so"):
        module = tf.load_op_library(str(library))
        known |= {n for n in dir(module) if n[:1].isupper()}
    known -= {"Annotated", "Any", "List", "TypeVar"}
    known = {n.replace("TFText_", "TFText>") for n in known if not n.startswith("TV_")}
    assert known == operations.TEXT_OPERATIONS
    assert operations.why_not_served("MatMul") is None
    assert "GPU" in operations.why_not_served("CudnnRNNV3")
    assert "neither" in operations.why_not_served("NobodysOp")


def test_manifest(exported, tmp_path):
    model, path = exported
    manifest = json.loads((path / "keras_bnrnn.json").read_text())
    assert manifest["model"] == "tagger"
    assert manifest["versions"]["tensorflow"] == tf.__version__
    assert manifest["signatures"]["step"]["inputs"] == {
        "ids": {"dtype": "int32", "shape": [None]},
        "lower_h": {"dtype": "float32", "shape": [None, 4]},
        "lower_c": {"dtype": "float32", "shape": [None, 4]},
        "upper_h": {"dtype": "float32", "shape": [None, 4]},
        "t": {"dtype": "int32", "shape": [None]},
    }
    assert [e["folded_into"] for e in manifest["layers"]] == ["LSTM", "GRU"]
    assert manifest["streaming"] == {"causal": True, "because": None}
    assert manifest["training"] == {
        "parameters": model.count_params(),
        "optimizer": "Adam",
        "steps": 1,
        "learning_rate": 0.25,
        "provenance": {"commit": "abc"},
    }
    assert manifest["checks"]["warmup_requests"] == 4
    assert manifest["checks"]["largest_difference"] <= TOLERANCE
    assert manifest["bytes"]["variables"] > 4 * fold(model).count_params()
    for bad in ({"x": object()}, "text"):
        with pytest.raises(ValueError, match=r"`provenance` must be.*provenance="):
            export_saved_model(model, tmp_path / "m", provenance=bad)


@pytest.mark.slow
def test_the_versions_listed_are_of_packages_in_use(rng, tmp_path, capsys):
    keras_hub = pytest.importorskip("keras_hub")
    text = pytest.importorskip("tensorflow_text")
    words = layers.TextVectorization(vocabulary=["a", "b"], ragged=True)
    scripts = layers.TextVectorization(
        vocabulary=["a", "b"],
        ragged=True,
        split=text.UnicodeScriptTokenizer().tokenize,
    )
    pieces = keras_hub.tokenizers.WordPieceTokenizer(["[UNK]", "a", "b"])
    own = {"keras-bnrnn", "tensorflow", "keras"}
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="ids"),
            layers.Embedding(9, 4),
            keras_bnrnn.BNGRU(2, name="y"),
        ]
    )
    for tokenizer, more in (
        (None, set()),
        (words, set()),
        (scripts, {"tensorflow-text"}),
        (pieces, {"tensorflow-text", "keras-hub"}),
    ):
        path = export_saved_model(model, tmp_path / "m", text_front_end=tokenizer)
        versions = json.loads((path / "keras_bnrnn.json").read_text())["versions"]
        assert set(versions) == own | more
        assert inspection.main([str(path)]) == 0
        out = capsys.readouterr().out
        for name in ("tensorflow-text", "keras-hub"):
            assert (f"{name} " in out) == (name in more)


def test_inspect(exported, tmp_path, capsys):
    shutil.copytree(exported[1], tmp_path / "m" / "1")
    path = shutil.copytree(exported[1], tmp_path / "m" / "2")
    assert inspection.main([str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    for text in (str(path), "lower_c", "(?, 4)", "BNLSTM", "BlockLSTMV2", "4 warm-up"):
        assert text in out
    assert "has every operation" in out
    assert inspection.main([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(path)
    assert inspection.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err

    module = tf.Module()
    module.f = tf.function(
        lambda x: tf.numpy_function(np.sin, [x], tf.float32),
        input_signature=[tf.TensorSpec([None])],
    )
    tf.saved_model.save(module, tmp_path / "python", signatures=module.f)
    assert inspection.main([str(tmp_path / "python")]) == 1
    assert "LACKING: it runs Python" in capsys.readouterr().out


@pytest.mark.slow
def test_half_weights(rng, tmp_path):
    model = tagger(rng, units=64)
    # As large as those of a trained model: large ones make chaos of a rounding.
    model.set_weights([w / 4 for w in model.get_weights()])
    weights = model.get_weights()
    whole = export_saved_model(model, tmp_path / "whole")
    path = export_saved_model(model, tmp_path / "half", quantize="float16")
    for a, b in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    halved = json.loads((path / "keras_bnrnn.json").read_text())["quantize"]
    assert "tagger/table/embeddings" in halved["float16"]
    assert all("bias" in name for name in halved["float32"])
    whole_size, half_size = (size_of_weights(p) for p in (whole, path))
    assert half_size < 0.6 * whole_size
    loaded = tf.saved_model.load(path)
    ids = rng.integers(0, 9, (3, 7)).astype("int32")
    expected = fold(model)(ids)
    for name in ("serve", "chunk", "step"):
        inputs = {"ids": tf.constant(ids), "lengths": tf.constant([7, 7, 7])}
        if name != "serve":
            inputs |= loaded.signatures["initial_state"](ids=inputs["ids"])
        if name == "step":
            inputs["ids"] = inputs["ids"][:, 0]
            del inputs["lengths"]
        answer = loaded.signatures[name](**inputs)["tags"]
        reference = expected[:, 0] if name == "step" else expected
        # Eleven bits of mantissa in each weight.
        assert gap(answer, reference) <= 1e-2 * np.abs(expected).max()
    with pytest.raises(ValueError, match=r"`quantize` must be.*quantize='int8'"):
        export_saved_model(model, tmp_path / "half", quantize="int8")


def size_of_weights(path):
    return sum(p.stat().st_size for p in (path / "variables").iterdir())


@pytest.mark.slow
def test_a_weight_that_float16_would_spoil_stays(rng, tmp_path):
    model = tagger(rng)
    weights = model.get_weights()
    weights[0] = weights[0] + 1e5  # beyond float16
    model.set_weights(weights)
    path = export_saved_model(model, tmp_path / "m", quantize="float16")
    halved = json.loads((path / "keras_bnrnn.json").read_text())["quantize"]
    assert "tagger/table/embeddings" in halved["float32"]
    assert "tagger/table/embeddings" not in halved["float16"]


@pytest.mark.slow
def test_xla_buckets(rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, 3), name="x"),
            layers.Bidirectional(keras_bnrnn.BNLSTM(4, return_sequences=True)),
            keras_bnrnn.BNGRU(3, return_sequences=True, name="y"),
        ]
    )
    randomize_model(model, rng)
    path = export_saved_model(
        model, tmp_path / "m", xla_buckets=[(4, 8), (2, 3)], xla_warmup=True
    )
    loaded = tf.saved_model.load(path)
    compiled, plain = (loaded.signatures[name] for name in ("serve_xla", "serve"))
    shapes = [x["x"].shape for name, x in records(path) if name == "serve_xla"]
    assert shapes == [(2, 3, 3), (4, 8, 3)]
    for rows, timesteps in ((1, 2), (2, 3), (3, 3), (4, 8), (1, 7), (5, 2), (1, 9)):
        x = rng.normal(size=(rows, timesteps, 3)).astype("float32")
        lengths = rng.integers(0, timesteps + 1, rows).astype("int32")
        x[np.arange(timesteps) >= lengths[:, None]] = np.nan
        inputs = {"x": tf.constant(x), "lengths": tf.constant(lengths)}
        a, b = compiled(**inputs)["y"], plain(**inputs)["y"]
        assert a.shape == (rows, timesteps, 3)
        assert gap(a, b) <= TOLERANCE
    proto = operations.saved_model_proto(path)
    assert operations.xla_functions(proto)
    for name in ("serve", "step"):
        if name in loaded.signatures:
            library = loaded.signatures[name].graph.as_graph_def().library
            assert not any(f.attr["_XlaMustCompile"].b for f in library.function)


def recurrent(rng):
    model = keras.Sequential(
        [keras.Input((None, 3), name="x"), keras_bnrnn.BNSimpleRNN(4, name="y")]
    )
    randomize_model(model, rng)
    return model


@pytest.mark.slow
def test_warmup_of_serve_xla_is_by_choice(rng, tmp_path):
    """With it, a server without XLA loads nothing: the first request fails."""
    model, buckets = recurrent(rng), [(2, 3), (4, 8)]
    requests = [{"x": np.ones((1, 2, 3)), "lengths": [2]}]

    def warmed(**options):
        path = export_saved_model(model, tmp_path / "m", xla_buckets=buckets, **options)
        checked = json.loads((path / "keras_bnrnn.json").read_text())["checks"]
        found = [name for name, _ in records(path)]
        assert checked["warmup_requests"] == len(found)
        return found

    own = ["serving_default", "step", "chunk", "initial_state"]
    compiled = ["serve_xla", "serve_xla"]
    assert warmed() == own
    assert warmed(xla_warmup=True) == own + compiled
    assert warmed(warmup=requests) == ["serving_default"]
    assert warmed(warmup=requests, xla_warmup=True) == ["serving_default", *compiled]
    assert warmed(warmup={"serve_xla": requests}) == ["serve_xla"]
    assert warmed(warmup=None, xla_warmup=True) == compiled

    with pytest.raises(ValueError, match=r"`xla_warmup=True` needs `xla_buckets`"):
        export_saved_model(model, tmp_path / "n", xla_warmup=True)
    with pytest.raises(ValueError, match=r"`xla_warmup` must be.*xla_warmup='yes'"):
        export_saved_model(model, tmp_path / "n", xla_buckets=buckets, xla_warmup="yes")
    assert not (tmp_path / "n").exists()


@pytest.mark.slow
def test_a_server_without_xla_answers_all_but_serve_xla(rng, tmp_path, serve_in_c):
    model = recurrent(rng)
    path = export_saved_model(model, tmp_path / "m", xla_buckets=[(2, 3)])
    x = rng.normal(size=(2, 3, 3)).astype("float32")
    request = {"x": x, "lengths": np.array([3, 3], "int32")}
    warmup = records(path)
    wanted = [("serve", request), ("serve_xla", request)]
    *warmed, plain, compiled = serve_in_c(path, [*warmup, *wanted], xla=False)
    assert len(warmed) == 4 and all(isinstance(answer, dict) for answer in warmed)
    assert gap(plain["y"], fold(model)(x)) <= TOLERANCE
    assert isinstance(compiled, tf.errors.OpError)
    assert "XLA" in compiled.message
    _, compiled = serve_in_c(path, wanted)
    assert gap(compiled["y"], plain["y"]) <= TOLERANCE


def test_serve_xla_is_tried_before_it_is_published(rng, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        function = make(*args, **kwargs)

        @tf.function(autograph=False, input_signature=function.input_signature)
        def serve_xla(*tensors):
            wrong = tf.raw_ops.Assert(condition=False, data=["broken"])
            with tf.control_dependencies([wrong]):
                return {n: tf.identity(y) for n, y in function(*tensors).items()}

        return serve_xla

    make = functions.xla_function
    monkeypatch.setattr(functions, "xla_function", broken)
    with pytest.raises(tf.errors.InvalidArgumentError, match="broken"):
        export_saved_model(
            recurrent(rng), tmp_path / "m", streaming=False, xla_buckets=[(2, 3)]
        )
    assert not list((tmp_path / "m").iterdir())


@pytest.mark.parametrize("buckets", [[(1,)], [(0, 3)], "4x8", [(2, 3.5)], [8]])
def test_bad_xla_buckets(buckets, rng, tmp_path):
    with pytest.raises(ValueError, match=r"`xla_buckets` must be.*xla_buckets="):
        export_saved_model(tagger(rng), tmp_path / "m", xla_buckets=buckets)


@pytest.mark.slow
def test_killed_in_the_middle_of_an_export(rng, tmp_path):
    model = tagger(rng)
    directory = tmp_path / "m"
    first = export_saved_model(model, directory)
    model.save(tmp_path / "model.keras")
    script = textwrap.dedent(
        """
        import sys, time
        import keras, keras_bnrnn
        from keras_bnrnn.export.saved_model import exporter
        def never_ends(*args, **kwargs):
            print("written", flush=True)
            time.sleep(600)
        exporter.write_manifest = never_ends
        model = keras.saving.load_model(sys.argv[1])
        keras_bnrnn.export_saved_model(model, sys.argv[2])
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "model.keras"), str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    try:
        # All files are there, and the version is not published.
        while (line := process.stdout.readline()) and "written" not in line:
            pass
        assert "written" in line
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        process.stdout.close()
    numbers = [p.name for p in directory.iterdir() if p.name.isdigit()]
    assert numbers == ["1"]
    left = [p for p in directory.iterdir() if p != first]
    assert left and all(p.name.startswith(".") for p in left)

    second = export_saved_model(model, directory)
    assert second.name == "2"
    # What the dead export left is gone.
    assert {p.name for p in directory.iterdir()} == {"1", "2"}
    assert tf.saved_model.load(second).signatures


@pytest.mark.slow
def test_an_export_that_is_still_running_is_left_alone(rng, tmp_path):
    directory = tmp_path / "m"
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE
    ) as p:
        mine = unfinished_name(p.pid)
        (directory / mine).mkdir(parents=True)
        export_saved_model(tagger(rng), directory)
        assert (directory / mine).exists()
        p.communicate(b"\n")
    export_saved_model(tagger(rng), directory)
    assert not (directory / mine).exists()


def test_models_that_take_no_short_sequences(rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, 3), name="x"),
            layers.Conv1D(4, 15),
            layers.MaxPool1D(4),
            keras_bnrnn.BNSimpleRNN(2, name="y"),
        ]
    )
    with pytest.warns(UserWarning, match="Padding counts"):
        path = export_saved_model(model, tmp_path / "m")
    ((_, inputs),) = records(path)
    assert inputs["x"].shape[1] >= 18
    assert destroys_masks(model) == model.layers[0].name
