"""Exported versions: what they answer, where they load, what they refuse."""

import doctest
import functools
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import KERAS, gap, randomize_model

import keras_bnrnn
import keras_bnrnn.local_server.server
from keras_bnrnn import export_saved_model, fold
from keras_bnrnn.export import VersionExistsError
from keras_bnrnn.export.saved_model import exporter

layers = keras.layers

# Both sides are float32 with the same weights; only the order of sums differs.
TOLERANCE = 1e-6


def test_docstring_examples(tmp_path):
    names = {n: getattr(keras_bnrnn, n) for n in keras_bnrnn.__all__}
    names |= {"keras": keras, "tf": tf, "tmp": tmp_path}
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for module in (exporter, keras_bnrnn.local_server.server):
        (test,) = (t for t in finder.find(module) if t.examples)
        test.globs.update(names)
        assert runner.run(test).failed == 0


def per_step_model(rng, **kwargs):
    """Bidirectional, so that padding would be seen if it were not left out."""
    model = keras.Sequential(
        [
            keras.Input((None, 5), name="features"),
            layers.Bidirectional(
                keras_bnrnn.BNLSTM(4, return_sequences=True, **kwargs)
            ),
            keras_bnrnn.SequenceBatchNorm(),
            keras_bnrnn.BNGRU(3, return_sequences=True),
            layers.Dense(2, name="logits"),
        ]
    )
    randomize_model(model, rng)
    return model


def many_ended_model(rng):
    """Several inputs and outputs, one without timesteps, masks by value as well."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    frames = keras.Input((None, 3), name="frames")
    speaker = keras.Input((2,), name="speaker")
    x = layers.Concatenate()(
        [layers.Embedding(9, 4)(ids), layers.Masking(mask_value=2.0)(frames)]
    )
    steps = layers.Bidirectional(
        keras_bnrnn.BNSimpleRNN(4, return_sequences=True), name="steps"
    )(x)
    last = keras_bnrnn.BNLSTM(3, peephole=False)(steps)
    label = layers.Dense(2, name="label")(layers.Concatenate()([last, speaker]))
    average = layers.GlobalAveragePooling1D(name="average")(steps)
    model = keras.Model([ids, frames, speaker], [steps, label, average])
    randomize_model(model, rng)
    return model


def export_quickly(model, directory, version=None, **arguments):
    """Without warm-up, which calls the version as the tests do themselves."""
    return export_saved_model(model, directory, version, warmup=None, **arguments)


def serving(path):
    loaded = tf.saved_model.load(path)
    signature = loaded.signatures["serving_default"]
    signature.keep = loaded  # a signature does not keep its variables alive
    return signature


@pytest.fixture(scope="module")
def per_step(tmp_path_factory):
    """`per_step_model` folded, and what its version serves."""
    model = per_step_model(np.random.default_rng(20151005))
    path = export_quickly(model, tmp_path_factory.mktemp("per_step"))
    return fold(model), serving(path)


@pytest.fixture(scope="module")
def many_ended(tmp_path_factory):
    """`many_ended_model` folded, and what its version serves."""
    model = many_ended_model(np.random.default_rng(20151005))
    path = export_quickly(model, tmp_path_factory.mktemp("many_ended"))
    return fold(model), serving(path)


def test_answers_each_row_as_if_it_were_alone(rng, per_step):
    folded, serve = per_step
    # Traced once for all lengths.
    infer = tf.function(folded, input_signature=[tf.TensorSpec([1, None, 5])])
    for batch, timesteps in ((1, 6), (64, 9), (3, 40)):
        x = rng.normal(size=(batch, timesteps, 5)).astype("float32")
        lengths = rng.integers(1, timesteps + 1, batch).astype("int32")
        logits = serve(features=tf.constant(x), lengths=tf.constant(lengths))["logits"]
        assert logits.shape == (batch, timesteps, 2)
        for row, n in enumerate(lengths):
            alone = infer(x[row : row + 1, :n])[0]
            assert gap(logits[row, :n], alone) <= TOLERANCE
            assert not np.any(logits[row, n:])


def test_reversed_outputs_end_with_the_first_frame(rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, 5), name="x"),
            keras_bnrnn.BNGRU(3, return_sequences=True, go_backwards=True, name="y"),
        ]
    )
    randomize_model(model, rng)
    serve = serving(export_quickly(model, tmp_path / "m"))
    x = rng.normal(size=(2, 6, 5)).astype("float32")
    y = serve(x=tf.constant(x), lengths=tf.constant([4, 6]))["y"]
    assert gap(y[0, 2:], fold(model)(x[:1, :4])[0]) <= TOLERANCE
    assert gap(y[1], fold(model)(x[1:])[0]) <= TOLERANCE


def test_padding_has_no_effect_whatever_it_holds(rng, many_ended):
    folded, serve = many_ended
    ids = rng.integers(0, 9, (5, 8)).astype("int32")
    frames = rng.normal(size=(5, 8, 3)).astype("float32")
    frames[2, 1] = 2.0  # masked by its value, inside the sequence
    speaker = rng.normal(size=(5, 2)).astype("float32")
    lengths = np.array([8, 5, 4, 1, 0], "int32")
    valid = np.arange(8) < lengths[:, None]

    def answer(id_padding, frame_padding):
        return serve(
            ids=tf.constant(np.where(valid, ids, id_padding).astype("int32")),
            frames=tf.constant(
                np.where(valid[..., None], frames, frame_padding).astype("float32")
            ),
            speaker=tf.constant(speaker),
            lengths=tf.constant(lengths),
        )

    first = answer(0, 0.0)
    for id_padding, frame_padding in ((3, 1e4), (8, np.nan), (0, 2.0)):
        again = answer(id_padding, frame_padding)
        for name in ("steps", "label", "average"):
            np.testing.assert_array_equal(first[name], again[name])
    for row, n in enumerate(lengths[:-1]):
        alone = folded([ids[[row], :n], frames[[row], :n], speaker[[row]]])
        steps, label, average = (np.asarray(y)[0] for y in alone)
        assert gap(first["steps"][row, :n], steps) <= TOLERANCE
        assert gap(first["label"][row], label) <= TOLERANCE
        assert gap(first["average"][row], average) <= TOLERANCE
        assert not np.any(first["steps"][row, n:])  # zero past the length
    assert np.all(np.isfinite(first["label"]))


@pytest.mark.slow(but=["True"])
@pytest.mark.parametrize("mask_zero", [False, True])
def test_lengths_pass_through_an_embedding(mask_zero, rng, tmp_path):
    """To rounding: on some CPUs a product with more rows rounds its last bit apart."""
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="ids"),
            layers.Embedding(9, 4, mask_zero=mask_zero),
            layers.Dropout(0.5),
            layers.Bidirectional(keras_bnrnn.BNSimpleRNN(3)),
        ]
    )
    randomize_model(model, rng)
    serve = serving(export_quickly(model, tmp_path / "m"))
    ids = rng.integers(1, 9, (1, 5)).astype("int32")
    ids[0, 1] = 0
    padded = np.concatenate([ids, [[4, 7, 2]]], axis=1).astype("int32")
    (padded_out,) = serve(ids=tf.constant(padded), lengths=tf.constant([5])).values()
    (out,) = serve(ids=tf.constant(ids), lengths=tf.constant([5])).values()
    assert gap(padded_out, out) <= 1e-6
    assert gap(out, fold(model)(ids)) <= TOLERANCE


def test_lengths_are_clamped_and_answers_repeat(rng, per_step):
    _, serve = per_step
    x = tf.constant(rng.normal(size=(2, 6, 5)), tf.float32)

    def logits(*lengths):
        return serve(features=x, lengths=tf.constant(lengths))["logits"].numpy()

    np.testing.assert_array_equal(logits(6, 6), logits(2**31 - 1, 7))
    np.testing.assert_array_equal(logits(0, 3), logits(-5, 3))
    np.testing.assert_array_equal(logits(4, 2), logits(4, 2))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`lengths`.*`features`"):
        logits(3)  # would broadcast to both rows
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`lengths`.*`features`"):
        logits(1, 2, 3)


@pytest.mark.slow
def test_loads_where_keras_is_not_installed(rng, tmp_path):
    model = per_step_model(rng, normalize="joint")
    model.compile("adam", "mse")
    model.fit(
        rng.normal(size=(8, 6, 5)), rng.normal(size=(8, 6, 2)), verbose=0
    )  # the optimizer has variables now
    path = export_saved_model(model, tmp_path / "m")
    cases = []
    for batch, timesteps in ((1, 1), (64, 23)):
        x = rng.normal(size=(batch, timesteps, 5)).astype("float32")
        lengths = rng.integers(1, timesteps + 1, batch).astype("int32")
        mask = np.arange(timesteps) < lengths[:, None]
        expected = np.asarray(fold(model)(x, mask=mask))
        name = tmp_path / f"{batch}.npz"
        np.savez(name, x=x, lengths=lengths, mask=mask, expected=expected)
        cases.append(str(name))
    script = textwrap.dedent(
        """
        import json, sys
        import numpy as np
        for name in ("keras", "keras_bnrnn", "tf_keras"):
            sys.modules[name] = None  # importing it fails
        import tensorflow as tf
        path, *cases = sys.argv[1:]
        loaded = tf.saved_model.load(path)
        serve = loaded.signatures["serving_default"]
        variables = tf.train.list_variables(path + "/variables/variables")
        gaps = []
        for case in cases:
            case = np.load(case)
            y = serve(features=tf.constant(case["x"]),
                      lengths=tf.constant(case["lengths"]))["logits"].numpy()
            gap = np.abs(y - case["expected"])[case["mask"]]
            gaps.append(float(gap.max()))
        print(json.dumps({"gaps": gaps, "variables": variables}))
        """
    )
    result = run_python(script, path, *cases)
    assert max(result["gaps"]) <= TOLERANCE
    weights = {n: shape for n, shape in result["variables"] if n.startswith("weights/")}
    # Each once, though an LSTM has both its kernels in one.
    count = sum(np.prod(shape, dtype=int) for shape in weights.values())
    assert count == fold(model).count_params()
    names = [n for n, _ in result["variables"]]
    assert not [n for n in names if "optimizer" in n or "adam" in n.lower()]


def run_python(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_graph_holds_stock_operations_only(per_step):
    _, serve = per_step
    graph = serve.graph.as_graph_def()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    ops = {node.op for node in nodes}
    assert not ops & {"CudnnRNNV3", "PyFunc", "EagerPyFunc", "AssignVariableOp"}
    assert not any(node.attr["_XlaMustCompile"].b for node in nodes)
    assert not any(
        "_XlaMustCompile" in f.attr and f.attr["_XlaMustCompile"].b
        for f in graph.library.function
    )


def test_names_dtypes_and_shapes_of_the_signature(many_ended):
    _, serve = many_ended
    _, inputs = serve.structured_input_signature
    assert {n: (s.dtype, s.shape.as_list()) for n, s in inputs.items()} == {
        "ids": (tf.int32, [None, None]),
        "frames": (tf.float32, [None, None, 3]),
        "speaker": (tf.float32, [None, 2]),
        "lengths": (tf.int32, [None]),
    }
    assert {n: s.shape.as_list() for n, s in serve.structured_outputs.items()} == {
        "steps": [None, None, 8],
        "label": [None, 2],
        "average": [None, 8],
    }


def test_dicts_name_the_ends(rng, tmp_path):
    b = keras.Input((None, 2), name="b")
    a = keras.Input((4, 3), name="a")
    y = keras_bnrnn.BNSimpleRNN(2, return_sequences=True)(a)
    model = keras.Model({"b": b, "a": a}, {"z": keras_bnrnn.BNGRU(2)(b), "y": y})
    randomize_model(model, rng)
    serve = serving(export_quickly(model, tmp_path / "dicts", streaming=False))
    x = {
        "a": rng.normal(size=(2, 4, 3)).astype("float32"),
        "b": rng.normal(size=(2, 6, 2)).astype("float32"),
    }
    answer = serve(
        **{k: tf.constant(v) for k, v in x.items()}, lengths=tf.constant([6, 6])
    )
    expected = fold(model)(x)
    assert set(answer) == {"y", "z"}
    for name in answer:
        assert gap(answer[name], expected[name]) <= TOLERANCE


@pytest.mark.slow
def test_a_layer_that_gives_several_outputs_has_them_numbered(rng, tmp_path):
    a, b = (keras.Input((None, 3), name=name) for name in "ab")
    encoder = keras_bnrnn.BNLSTM(2, return_state=True, name="enc")
    model = keras.Model([a, b], [*encoder(a), encoder(b)[0]])
    randomize_model(model, rng)
    serve = serving(export_saved_model(model, tmp_path / "m"))
    x = [rng.normal(size=(2, 4, 3)).astype("float32") for _ in range(2)]
    answer = serve(
        a=tf.constant(x[0]), b=tf.constant(x[1]), lengths=tf.constant([4, 4])
    )
    for name, expected in zip(
        ("enc", "enc_1", "enc_2", "enc_3"), fold(model)(x), strict=True
    ):
        assert gap(answer[name], expected) <= TOLERANCE
    message = r"`b` must have the shape \(B, T, 3\), with the B and T of `a`.*\[2 3 3\]"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        serve(
            a=tf.constant(x[0]), b=tf.constant(x[1][:, :3]), lengths=tf.constant([3, 3])
        )

    single = keras.Sequential(
        [keras.Input((None, 3)), keras_bnrnn.BNGRU(2, return_state=True, name="g")]
    )
    serve = serving(export_saved_model(single, tmp_path / "single"))
    assert set(serve.structured_outputs) == {"g", "g_1"}


def test_masks_of_other_inputs_are_left_alone(rng, tmp_path):
    frames = keras.Input((None, 3), name="frames")
    tags = keras.Input((7,), dtype="int32", name="tags")
    embedded = layers.Embedding(9, 4, mask_zero=True)(tags)
    both = layers.Concatenate(name="both")(
        [keras_bnrnn.BNGRU(2)(frames), keras_bnrnn.BNSimpleRNN(2)(embedded)]
    )
    model = keras.Model([frames, tags], both)
    randomize_model(model, rng)
    serve = serving(export_quickly(model, tmp_path / "m", streaming=False))
    x = rng.normal(size=(2, 4, 3)).astype("float32")
    ids = np.array([[1, 2, 0, 3, 4, 5, 6], [8, 7, 6, 0, 0, 0, 0]], "int32")
    answer = serve(
        frames=tf.constant(x), tags=tf.constant(ids), lengths=tf.constant([4, 2])
    )["both"]
    folded = fold(model)
    assert gap(answer[0], folded([x[:1], ids[:1]])[0]) <= TOLERANCE
    assert gap(answer[1], folded([x[1:, :2], ids[1:]])[0]) <= TOLERANCE


def test_front_ends_that_shorten_and_fixed_lengths(rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, 3), name="x"),
            layers.Conv1D(4, 15),
            layers.MaxPool1D(4),
            keras_bnrnn.BNSimpleRNN(2, return_sequences=True, name="y"),
        ]
    )
    randomize_model(model, rng)
    serve = serving(export_quickly(model, tmp_path / "conv", streaming=False))
    x = rng.normal(size=(1, 60, 3)).astype("float32")
    y = serve(x=tf.constant(x), lengths=tf.constant([60]))["y"]
    assert gap(y, fold(model)(x)) <= TOLERANCE

    fixed = keras.Sequential(
        [
            keras.Input((6, 3), name="x"),
            keras_bnrnn.BNSimpleRNN(12),
            layers.Reshape((6, 2), name="y"),
        ]
    )
    randomize_model(fixed, rng)
    serve = serving(export_quickly(fixed, tmp_path / "fixed", lengths=True))
    x = rng.normal(size=(1, 6, 3)).astype("float32")
    y = serve(x=tf.constant(x), lengths=tf.constant([2]))["y"]
    mask = np.arange(6)[None] < 2
    assert gap(y, fold(fixed)(x, mask=mask)) <= TOLERANCE


@pytest.mark.skipif(KERAS < (3, 14), reason="Keras loses the mask where it casts")
@pytest.mark.slow(but=["mixed_float16"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_floats_leave_as_float32(policy, rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, 3), name="x"),
            keras_bnrnn.BNLSTM(2, dtype=policy),
            layers.Dense(2, dtype=policy, name="y"),
        ]
    )
    path = export_quickly(model, tmp_path / "m", streaming=False)
    y = serving(path)(x=tf.ones((2, 4, 3)), lengths=tf.constant([4, 2]))["y"]
    assert y.dtype == tf.float32


@pytest.mark.slow
def test_a_layer_that_cannot_fold_is_exported_as_it_is(rng, tmp_path):
    model = keras.Sequential(
        [keras.Input((None, 3), name="x"), keras_bnrnn.BNLSTM(2, peephole=True)]
    )
    randomize_model(model, rng)
    with pytest.warns(UserWarning, match="peephole"):
        path = export_saved_model(model, tmp_path / "m", streaming=False)
    x = rng.normal(size=(3, 5, 3)).astype("float32")
    (y,) = serving(path)(x=tf.constant(x), lengths=tf.constant([5, 5, 5])).values()
    assert gap(y, model(x)) <= TOLERANCE


def test_versions_count_up_and_are_never_overwritten(tmp_path):
    model = small_model()
    directory = tmp_path / "not" / "there yet"
    # No streams: that saves time.
    export = functools.partial(export_quickly, model, streaming=False)
    assert export(directory) == directory / "1"
    signature = serving(directory / "1").structured_input_signature[1]
    assert set(signature) == {"inputs", "lengths"}  # the input has no name
    assert export(directory, 7) == directory / "7"
    assert export(str(directory)) == directory / "8"
    (directory / "0009").mkdir()  # TensorFlow Serving reads this as version 9
    before = contents(directory)
    for version in (7, 9):
        with pytest.raises(VersionExistsError, match=f"`version`.*version={version} "):
            export(directory, version)
    assert contents(directory) == before
    assert export(directory).name == "10"


def small_model():
    return keras.Sequential([keras.Input((None, 2)), keras_bnrnn.BNSimpleRNN(2)])


def contents(directory):
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None
        for p in pathlib.Path(directory).rglob("*")
    }


@pytest.mark.slow
def test_a_poller_never_sees_half_a_version(tmp_path):
    model = small_model()
    directory = tmp_path / "m"
    stop, seen = threading.Event(), []

    def poll():
        while not stop.is_set():
            for version in directory.glob("[0-9]*"):
                seen.append(
                    (version / "saved_model.pb").exists()
                    and (version / "variables" / "variables.index").exists()
                )

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        for _ in range(3):
            export_saved_model(model, directory)
    finally:
        stop.set()
        poller.join()
    assert seen and all(seen)
    assert sorted(os.listdir(directory)) == ["1", "2", "3"]
    mode = (directory / "1").stat().st_mode
    assert mode & 0o055 or os.umask(os.umask(0)) & 0o055  # others may read it


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    model = small_model()

    def save(obj, path, **kwargs):
        pathlib.Path(path).mkdir()
        (pathlib.Path(path) / "saved_model.pb").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(tf.saved_model, "save", save)
    with pytest.raises(OSError, match="disk full"):
        export_saved_model(model, tmp_path, streaming=False)
    assert contents(tmp_path) == {}


@pytest.mark.slow
def test_further_signatures_keep_their_tables(rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="ids"),
            layers.Embedding(3, 4),
            keras_bnrnn.BNLSTM(2, return_sequences=True, name="states"),
        ]
    )
    randomize_model(model, rng)
    words = tmp_path / "words.txt"
    words.write_text("unknown\nbatch\nnorm\n")

    class Text(tf.Module):
        def __init__(self, predict):
            super().__init__()
            self.predict = predict
            self.table = tf.lookup.StaticHashTable(
                tf.lookup.TextFileInitializer(
                    str(words),
                    tf.string,
                    tf.lookup.TextFileIndex.WHOLE_LINE,
                    tf.int64,
                    tf.lookup.TextFileIndex.LINE_NUMBER,
                ),
                0,
            )

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
        def __call__(self, text):
            words = tf.strings.split(text)
            ids = tf.cast(self.table.lookup(words), tf.int32).to_tensor()
            lengths = tf.cast(words.row_lengths(), tf.int32)
            return self.predict({"ids": ids}, lengths)

    path = export_saved_model(model, tmp_path / "m", signatures={"text": Text})
    words.unlink()  # the version has its own copy
    loaded = tf.saved_model.load(path)
    states = loaded.signatures["text"](text=tf.constant(["norm", "batch norm x"]))
    expected = fold(model)(np.array([[1, 2, 0]]))
    assert gap(states["states"][1], expected[0]) <= TOLERANCE
    assert not np.any(states["states"][0, 1:])
    with pytest.raises(ValueError, match=r"`signatures`.*'serving_default'"):
        export_saved_model(model, tmp_path / "m", signatures={"serving_default": Text})


class Subclassed(keras.Model):
    def call(self, x):
        return x


def stateful_model():
    return keras.Sequential(
        [keras.Input(batch_shape=(2, None, 3)), keras_bnrnn.BNGRU(2, stateful=True)]
    )


def unbuilt_model():
    return keras.Sequential([keras_bnrnn.BNLSTM(2)], name="raw")


def lengths_model():
    x = keras.Input((None, 2), name="lengths")
    return keras.Model(x, keras_bnrnn.BNLSTM(2)(x))


def flat_model():
    return keras.Sequential([keras.Input((3,), name="flat"), layers.Dense(2)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unbuilt_model, "`model` must be built.*'raw'"),
        (lambda: Subclassed(name="own"), "subclassed.*'own'"),
        (stateful_model, "stateful=True"),
        (lengths_model, "'lengths'"),
        (flat_model, r"`model`.*'flat': \(None, 3\)"),
        (lambda: "a model", "`model`.*'a model'"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_saved_model(make(), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_directory_that_is_not_local_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"`directory`.*'gs://bucket/m'"):
        export_saved_model(small_model(), "gs://bucket/m")
    with pytest.raises(ValueError, match=r"`signatures`.*'text', which returned 3"):
        export_saved_model(
            small_model(), "m", streaming=False, signatures={"text": lambda _: 3}
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", [-1, 1.5, "1", True])
def test_a_bad_version_is_refused(version, tmp_path):
    with pytest.raises(ValueError, match=f"`version`.*version={version!r}"):
        export_saved_model(small_model(), tmp_path / "m", version)
    assert not (tmp_path / "m").exists()
