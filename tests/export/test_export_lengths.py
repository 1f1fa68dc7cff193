"""Which signatures take `lengths`, and what counts where there are none."""

import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import gap, randomize_model

import keras_bnrnn
from keras_bnrnn import export_saved_model, fold
from keras_bnrnn.export import inspection

layers = keras.layers

# Both sides are float32 with the same weights; only the order of sums differs.
TOLERANCE = 1e-5


def serving(path):
    loaded = tf.saved_model.load(path)
    signature = loaded.signatures["serving_default"]
    signature.keep = loaded  # a signature does not keep its variables alive
    return signature


def inputs_of(signature):
    return set(signature.structured_input_signature[1])


def model_of(kind, rng):
    """A model with T fixed to 6, or free, and maybe a layer that creates a mask."""
    timesteps = None if kind == "free" else 6
    if kind == "ids" or kind == "ids with mask":
        x = keras.Input((timesteps,), dtype="int32", name="x")
        y = layers.Embedding(9, 3, mask_zero=kind == "ids with mask")(x)
    else:
        x = keras.Input((timesteps, 3), name="x")
        y = x
        if kind == "masking":
            y = layers.Masking()(y)
        elif kind == "masking inside":
            inner = keras.Input((timesteps, 3))
            y = keras.Model(inner, layers.Masking()(inner))(y)
    # The cell of the fewest operations: what each cell does is in test_export.py.
    both = layers.Bidirectional(keras_bnrnn.BNSimpleRNN(4, return_sequences=True))(y)
    model = keras.Model(x, keras_bnrnn.BNSimpleRNN(3, name="y")(both))
    randomize_model(model, rng)
    return model


def example(model, rng, rows=4, timesteps=6):
    if len(model.inputs[0].shape) == 2:
        return rng.integers(1, 9, (rows, timesteps)).astype("int32")
    return rng.normal(size=(rows, timesteps, 3)).astype("float32")


@pytest.mark.slow(but=["fixed-False", "masking-True"])
@pytest.mark.parametrize(
    ("kind", "automatic"),
    [
        ("fixed", False),
        ("ids", False),
        ("masking", True),
        ("masking inside", True),
        ("ids with mask", True),
        ("free", True),
    ],
)
def test_automatic(kind, automatic, rng, tmp_path):
    model = model_of(kind, rng)
    path = export_saved_model(model, tmp_path / "m")
    serve = serving(path)
    assert inputs_of(serve) == ({"x", "lengths"} if automatic else {"x"})
    x = example(model, rng)
    if kind.startswith("masking"):
        x[1, 2:5] = 0.0
    elif kind == "ids with mask":
        x[1, 2:5] = 0
    lengths = {"lengths": tf.fill([4], 6)} if automatic else {}
    expected = fold(model)(x)
    assert gap(serve(x=tf.constant(x), **lengths)["y"], expected) <= TOLERANCE
    manifest = json.loads((path / "keras_bnrnn.json").read_text())
    assert manifest["lengths"] is automatic
    assert manifest["checks"]["warmup_requests"] == 1


@pytest.mark.slow(but=["free"])
@pytest.mark.parametrize("kind", ["fixed", "masking", "free"])
def test_lengths_by_choice(kind, rng, tmp_path):
    """Without `lengths`, what counts is what counts in Keras."""
    model = model_of(kind, rng)
    x = example(model, rng)
    x[1, 4:] = 0.0  # what `Masking` masks
    folded = fold(model)
    # No warm-up, which calls the version as the test does itself.
    export = functools.partial(export_saved_model, model, tmp_path / "m", warmup=None)
    serve = serving(export(lengths=False))
    assert inputs_of(serve) == {"x"}
    y = serve(x=tf.constant(x))["y"]
    assert gap(y, folded(x)) <= TOLERANCE
    masked = folded(x, mask=np.arange(6) < np.array([[6], [4], [6], [6]]))
    assert (gap(y, masked) <= TOLERANCE) == (kind == "masking")

    serve = serving(export(lengths=True))
    assert inputs_of(serve) == {"x", "lengths"}
    x[1, 4:] = np.nan
    y = serve(x=tf.constant(x), lengths=tf.constant([6, 4, 6, 6]))["y"]
    assert gap(y, masked) <= TOLERANCE


def test_a_stream_and_chunks_without_lengths_of_whole_sequences(rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, 3), name="x"),
            keras_bnrnn.BNSimpleRNN(4, return_sequences=True, name="y"),
        ]
    )
    randomize_model(model, rng)
    path = export_saved_model(
        model,
        tmp_path / "m",
        lengths=False,
        streaming=True,
        xla_buckets=[(2, 8)],
        warmup=None,
    )
    loaded = tf.saved_model.load(path)
    signatures = loaded.signatures
    states = {"y_h", "t"}
    assert {name: inputs_of(s) for name, s in signatures.items()} == {
        "serving_default": {"x"},
        "serve": {"x"},
        "step": {"x", *states},
        "chunk": {"x", "lengths", *states},
        "initial_state": {"x"},
        "serve_xla": {"x", "lengths"},
    }
    x = tf.constant(rng.normal(size=(1, 5, 3)), tf.float32)
    compiled = signatures["serve_xla"](x=x, lengths=tf.constant([5]))["y"]
    assert gap(compiled, fold(model)(x)) <= TOLERANCE


def two_ended(rng, first, second):
    a, b = keras.Input((first, 3), name="a"), keras.Input((second, 3), name="b")
    last = [keras_bnrnn.BNSimpleRNN(4)(a), keras_bnrnn.BNSimpleRNN(4)(b)]
    model = keras.Model([a, b], layers.Add(name="y")(last))
    randomize_model(model, rng)
    return model


@pytest.mark.slow(but=["free", "automatic"])
@pytest.mark.parametrize(
    ("timesteps", "lengths"),
    [((None, None), False), ((4, 7), None), ((4, 7), False)],
    ids=["free", "automatic", "fixed"],
)
def test_sequences_of_unequal_timesteps(timesteps, lengths, rng, tmp_path):
    model = two_ended(rng, *timesteps)
    path = export_saved_model(model, tmp_path / "m", lengths=lengths, warmup=None)
    serve = serving(path)
    assert inputs_of(serve) == {"a", "b"}
    a, b = (rng.normal(size=(3, n, 3)).astype("float32") for n in (4, 7))
    y = serve(a=tf.constant(a), b=tf.constant(b))["y"]
    assert gap(y, fold(model)([a, b])) <= TOLERANCE
    message = r"`b` must have the shape \(B, .*, 3\), with the B of `a`"
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        serve(a=tf.constant(a), b=tf.constant(b[:1]))


def test_bad_lengths(rng, tmp_path):
    model = two_ended(rng, 4, 7)
    message = r"`lengths=True` needs .*lengths=True with the T \{'a': 4, 'b': 7\}"
    with pytest.raises(ValueError, match=message):
        export_saved_model(model, tmp_path / "m", lengths=True)
    for bad in ("auto", 1, [3]):
        with pytest.raises(ValueError) as caught:
            export_saved_model(model, tmp_path / "m", lengths=bad)
        assert str(caught.value) == (
            f"`lengths` must be True, False or None. Received: lengths={bad!r}"
        )
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_client_and_inspection_follow_the_signature(rng, tmp_path, capsys):
    client = pytest.importorskip("keras_bnrnn_client")
    pytest.importorskip("starlette")
    from keras_bnrnn.local_server import ModelServer

    model = model_of("fixed", rng)
    export_saved_model(model, tmp_path / "m")
    assert inspection.main([str(tmp_path / "m")]) == 0
    assert "no lengths: every frame of a request counts" in capsys.readouterr().out
    x = example(model, rng)
    with (
        ModelServer({"m": tmp_path / "m"}) as server,
        client.ServingClient("m", rest_url=server.url) as session,
    ):
        assert gap(session.predict({"x": x})["y"], fold(model)(x)) <= TOLERANCE
        message = r"`inputs` must have the names \['x'\].*\['lengths', 'x'\]"
        with pytest.raises(ValueError, match=message):
            session.predict({"x": x, "lengths": [6] * 4})

    export_saved_model(model, tmp_path / "m", lengths=True)
    assert inspection.main([str(tmp_path / "m")]) == 0
    assert "no lengths" not in capsys.readouterr().out
