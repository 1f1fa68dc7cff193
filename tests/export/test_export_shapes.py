"""Every input of every signature refuses other shapes, as TensorFlow Serving runs it.

TensorFlow Serving compares no request with the shapes of a signature, nor does the C
program. Python does before it runs the graph. So here the placeholders of a copy lose
their shapes first.
"""

import pathlib
import re
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import randomize_model
from tensorflow.core.protobuf import saved_model_pb2

import keras_bnrnn
from keras_bnrnn import export_saved_model
from keras_bnrnn.export.shapes import require_shapes

layers = keras.layers

ROWS = 3


def tracker(rng, batch_size=None):
    """Two inputs, and states of several widths."""
    x = keras.Input((None, 3), batch_size=batch_size, name="x")
    speaker = keras.Input((2,), batch_size=batch_size, name="speaker")
    y = keras_bnrnn.BNLSTM(4, return_sequences=True, name="lower")(x)
    y = keras_bnrnn.BNGRU(5, return_sequences=True, name="upper")(y)
    last = keras_bnrnn.BNSimpleRNN(3, name="top")(y)
    label = layers.Dense(2, name="label")(layers.Concatenate()([last, speaker]))
    model = keras.Model([x, speaker], [layers.Dense(2, name="y")(y), label])
    randomize_model(model, rng)
    return model


def of_one_size(rng):
    """Every size is fixed: an optimizer might take them for facts."""
    model = keras.Sequential(
        [keras.Input(batch_shape=(ROWS, 5, 3), name="x"), keras_bnrnn.BNLSTM(4)]
    )
    randomize_model(model, rng)
    return model


def writer(rng):
    """A language model, and its tokenizer."""
    words = layers.TextVectorization(
        vocabulary=["<s>", "</s>", "a", "b"], standardize=None, ragged=True
    )
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="ids"),
            layers.Embedding(words.vocabulary_size(), 4),
            keras_bnrnn.BNGRU(5, return_sequences=True, statistics="frame", name="rnn"),
            layers.Dense(words.vocabulary_size(), name="logits"),
        ]
    )
    randomize_model(model, rng)
    return model, words


def export(kind, rng, directory):
    """Path of a version, and a good request for each of its signatures."""
    x = rng.normal(size=(ROWS, 5, 3)).astype("float32")
    lengths = np.array([5, 2, 4], "int32")
    if kind == "text":
        model, words = writer(rng)
        path = export_saved_model(model, directory, text_front_end=words)
        texts = np.array([b"a b", b"b", b"a"], object)
        ones = np.ones([ROWS], "int32")
        generate = {
            "prompt": texts,
            "max_tokens": ones,
            "temperature": ones.astype("float32"),
            "seed": ones,
        }
        ids = np.ones((ROWS, 5), "int32")
        return path, {
            "text": {"text": texts},
            "generate": generate,
            "serving_default": {"ids": ids, "lengths": lengths},
        }
    if kind == "one size":
        path = export_saved_model(of_one_size(rng), directory, lengths=True)
        return path, {"serving_default": {"x": x, "lengths": lengths}}
    model = tracker(rng, ROWS if kind == "fixed batch" else None)
    if kind == "xla":
        options = {"streaming": False, "xla_buckets": [(4, 8)]}
    else:
        options = {"streaming": True}
    path = export_saved_model(model, directory, **options)
    speaker = rng.normal(size=(ROWS, 2)).astype("float32")
    sizes = {"lower_h": 4, "lower_c": 4, "upper_h": 5, "top_h": 3}
    states = {
        name: rng.normal(size=(ROWS, n)).astype("float32") for name, n in sizes.items()
    }
    states["t"] = np.array([0, 7, 1], "int32")
    whole = {"x": x, "speaker": speaker, "lengths": lengths}
    if kind == "xla":
        return path, {"serve_xla": whole}
    return path, {
        "serving_default": whole,
        "serve": whole,
        "step": {"x": x[:, 0], "speaker": speaker, **states},
        "chunk": {**whole, **states},
        "initial_state": {"x": x},
    }


def wrong_shapes(shape, fixed_axes, alone):
    """Shapes that must be refused in place of a shape.

    Args:
        shape: The right one.
        fixed_axes: The axes whose size the signature fixes.
        alone: Whether the input is the only one: any number of rows is right.
    """
    yield ()
    yield shape[:-1]
    yield (*shape, 1)
    yield (1, *shape)
    if not alone or 0 in fixed_axes:
        for rows in (1, shape[0] + 1, 0):
            yield (rows, *shape[1:])
    for axis in fixed_axes:
        for size in (1, shape[axis] + 1, 0):
            yield (*shape[:axis], size, *shape[axis + 1 :])


def wrong_requests(path, good):
    """List of `(signature, name, inputs)` in which the input `name` is wrong."""
    proto = saved_model_pb2.SavedModel.FromString(
        (path / "saved_model.pb").read_bytes()
    )
    signatures = proto.meta_graphs[0].signature_def
    wrong = []
    for signature, inputs in good.items():
        assert set(inputs) == set(signatures[signature].inputs)
        for rows in (ROWS, 1):
            if rows == 1 and "one_row" not in OPTIONS[path.parent.name]:
                continue
            right = {name: x[:rows] for name, x in inputs.items()}
            for name, x in right.items():
                shape = signatures[signature].inputs[name].tensor_shape
                sizes = [d.size for d in shape.dim]
                fixed = [axis for axis, size in enumerate(sizes) if size >= 0]
                if shape.unknown_rank:  # (B, ...): only a scalar is wrong
                    shapes = [()]
                else:
                    shapes = wrong_shapes(x.shape, fixed, len(inputs) == 1)
                for other in {s for s in shapes if s != x.shape}:
                    value = np.resize(x, other).astype(x.dtype)
                    wrong.append((signature, name, {**right, name: value}))
    return wrong


OPTIONS = {
    "free": ["one_row"],
    "xla": ["one_row"],
    "fixed batch": [],
    "one size": [],
    "text": ["one_row"],
}


@pytest.fixture(scope="module", params=list(OPTIONS))
def version(request, tmp_path_factory):
    """A version and good and wrong requests."""
    directory = tmp_path_factory.mktemp("models") / request.param
    path, good = export(request.param, np.random.default_rng(7), directory)
    return path, good, wrong_requests(path, good)


def assert_refuses(wrong, answers):
    assert len(wrong) == len(answers) > 10
    for (signature, name, inputs), answer in zip(wrong, answers, strict=True):
        where = f"{signature}: {name} of shape {inputs[name].shape}"
        assert isinstance(answer, tf.errors.OpError), where
        assert answer.error_code == tf.errors.INVALID_ARGUMENT, where
        # The first tensor defines B. Where it has too many rows, the next one differs.
        named = re.search(r"`(\w+)` must have the shape \(([^)]*)\)", answer.message)
        assert named, f"{where}: {answer.message}"
        owner = re.search(r"with the [BT and]* of `(\w+)`", answer.message)
        assert name in (named[1], owner and owner[1]), f"{where}: {answer.message}"
        received = " ".join(map(str, inputs[name].shape))
        assert f"[`{name}`] [{received}]" in answer.message, f"{where}: {answer}"


@pytest.mark.slow
def test_the_graph_refuses_wrong_shapes(version, tmp_path):
    path, good, wrong = version
    copy = shutil.copytree(path, tmp_path / "1")
    file = copy / "saved_model.pb"
    proto = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    (meta_graph,) = proto.meta_graphs
    for node in meta_graph.graph_def.node:
        if node.op == "Placeholder":
            node.attr["shape"].shape.unknown_rank = True
            node.attr["shape"].shape.ClearField("dim")
            node.attr["_output_shapes"].list.shape[0].CopyFrom(node.attr["shape"].shape)
    file.write_bytes(proto.SerializeToString())
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        tf.compat.v1.saved_model.load(session, ["serve"], str(copy))

        def answer(signature, inputs):
            infos = meta_graph.signature_def[signature]
            feed = {infos.inputs[name].name: x for name, x in inputs.items()}
            outputs = {name: info.name for name, info in infos.outputs.items()}
            try:
                return session.run(outputs, feed)
            except tf.errors.OpError as error:
                return error

        for signature, inputs in good.items():
            assert isinstance(answer(signature, inputs), dict)
        answers = [answer(signature, inputs) for signature, _, inputs in wrong]
    assert_refuses(wrong, answers)


@pytest.mark.slow
def test_a_session_in_c_refuses_wrong_shapes(version, serve_in_c):
    """Of the version as it is: what a signature says of shapes, no optimizer trusts."""
    path, good, wrong = version
    numbers = [
        (signature, inputs)
        for signature, inputs in good.items()
        if signature not in ("text", "generate")  # the program reads no strings
    ]
    answers = serve_in_c(path, numbers)
    assert all(isinstance(answer, dict) for answer in answers)
    answers = serve_in_c(path, [(signature, inputs) for signature, _, inputs in wrong])
    assert_refuses(wrong, answers)


@pytest.mark.slow(but=["one size"])
def test_an_eager_call_refuses_wrong_shapes(version):
    """So does the local server, which calls the loaded signatures."""
    path, good, wrong = version
    loaded = tf.saved_model.load(path)
    for signature, inputs in good.items():
        loaded.signatures[signature](**{k: tf.constant(x) for k, x in inputs.items()})
    answers = []
    for signature, _, inputs in wrong:
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            loaded.signatures[signature](
                **{k: tf.constant(x) for k, x in inputs.items()}
            )
        answers.append(caught.value)
    assert_refuses(wrong, answers)


def test_free_sizes_and_further_axes():
    shapes = {"x": ["B", "T", 3], "y": ["B", "y_1"], "z": [4, "T", ...]}
    specs = [tf.TensorSpec(None)] * 3

    @tf.function(input_signature=specs)
    def checked(x, y, z):
        return require_shapes({"x": x, "y": y, "z": z}, shapes)

    def refusal(*sizes):
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            checked(*(tf.zeros(size) for size in sizes))
        return re.search(r"\[(`.*?) Received", caught.value.message)[1]

    checked(tf.zeros((2, 5, 3)), tf.zeros((2, 9)), tf.zeros((4, 5, 7)))
    checked(tf.zeros((0, 0, 3)), tf.zeros((0, 1)), tf.zeros((4, 0)))
    x = "`x` must have the shape (B, T, 3)."
    y = "`y` must have the shape (B, y_1), with the B of `x`."
    z = "`z` must have the shape (4, T, ...), with the T of `x`."
    # A rank that is too low by as much as the next one's is too high.
    assert refusal((2,), (2, 9, 3), (4, 5)) == x
    assert refusal((2, 5), (3, 2, 9), (4, 5)) == x
    assert refusal((), (), ()) == x
    assert refusal((2, 5, 3), (2,), (9, 4, 5)) == y
    assert refusal((2, 5, 3), (1, 9), (4, 5)) == y
    assert refusal((2, 5, 3), (2, 9), (4,)) == z
    assert refusal((2, 5, 3), (2, 9), (4, 1, 5)) == z
    assert refusal((2, 5, 3), (2, 9), (3, 5)) == z


@pytest.mark.slow
def test_a_wrong_shape_fails_warmup(rng, tmp_path):
    request = {"x": np.zeros((2, 5, 3)), "speaker": np.zeros((2, 2)), "lengths": [5]}
    message = r"`lengths` must have the shape \(B,\), with the B of `x`"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        export_saved_model(
            tracker(rng), tmp_path / "m", streaming=False, warmup=[request]
        )
    assert not list(pathlib.Path(tmp_path / "m").iterdir())
