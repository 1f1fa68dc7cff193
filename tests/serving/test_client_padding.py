"""The client's option `pad_to`, against the local server and on signatures alone."""

import importlib
import json
import pathlib

import keras
import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("tensorflow_serving")
pytest.importorskip("starlette")

from client_models import (
    F,
    connect,
    oracle,
    protocols,
)
from keras_bnrnn_client import ServingClient, Signature, TensorSpec, padding

import keras_bnrnn
from keras_bnrnn.local_server import ModelServer

SERVING = pathlib.Path(__file__).parents[2] / "serving"


@pytest.fixture(autouse=True)
def seeded():
    """Nothing here is Keras', so that no session needs to be cleared."""


def record(client, monkeypatch):
    """A list that gets the inputs of each request of the client."""
    sent = []
    encode = client._transport.encode

    def recording(target, name, signature, inputs):
        sent.append(inputs)
        return encode(target, name, signature, inputs)

    monkeypatch.setattr(client._transport, "encode", recording)
    return sent


@protocols
class TestClient:
    @pytest.mark.slow(
        but=[
            "0-4-rest",
            "1-4-grpc",
            "4-4-rest",
            "5-10-grpc",
            "10-10-rest",
            "11-20-rest",
            "21-30-rest",
        ]
    )
    @pytest.mark.parametrize(
        "timesteps, sent_timesteps",
        [(0, 4), (1, 4), (4, 4), (5, 10), (10, 10), (11, 20), (21, 30)],
    )
    def test_outputs_are_those_of_the_unpadded_request(
        self, server, protocol, timesteps, sent_timesteps, rng, monkeypatch
    ):
        x = rng.normal(size=(3, timesteps, F)).astype("float32")
        lengths = rng.integers(0, timesteps + 1, 3)
        with (
            connect(server, protocol) as plain,
            connect(server, protocol, pad_to=[4, 10]) as client,
        ):
            sent = record(client, monkeypatch)
            # Without `lengths`, all frames are real.
            for n, more in [(lengths, {"lengths": lengths}), ([timesteps] * 3, {})]:
                outputs = client.predict({"x": x, **more})
                assert list(outputs) == ["logits"]
                assert outputs["logits"].shape == (3, timesteps, 2)
                if timesteps:  # the model itself takes no fewer
                    expected = plain.predict({"x": x, "lengths": n})["logits"]
                    np.testing.assert_allclose(outputs["logits"], expected, atol=1e-6)
                expected, _ = oracle(2, x, n)
                np.testing.assert_allclose(outputs["logits"], expected, atol=1e-5)
                assert sent[-1]["x"].shape == (3, sent_timesteps, F)
                assert sent[-1]["x"].dtype == np.float32
                np.testing.assert_array_equal(sent[-1]["x"][:, :timesteps], x)
                assert not sent[-1]["x"][:, timesteps:].any()
                assert sent[-1]["lengths"].tolist() == list(n)
                assert sent[-1]["lengths"].dtype == np.int32

    def test_session(self, server, protocol, rng, monkeypatch):
        x = rng.normal(size=(2, 9, F)).astype("float32")
        expected, last = oracle(2, x, [8, 5])
        with connect(server, protocol, pad_to=[6]) as client:
            sent = record(client, monkeypatch)
            session = client.session(2)
            found = [session.chunk(x[:, :4])["logits"]]
            found.append(session.step(x[:, 4])["logits"][:, None])
            found.append(session.chunk(x[:, 5:], [3, 0])["logits"])
            np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=1e-5)
            np.testing.assert_allclose(session.states["rnn_h"], last, atol=1e-5)
            assert session.states["t"].tolist() == [8, 5]
        # `initial_state` and `step` have no `lengths`.
        shapes = [inputs["x"].shape for inputs in sent]
        assert shapes == [(2, 1), (2, 6, F), (2, F), (2, 6, F)]

    def test_inputs_that_do_not_fit(self, server, protocol):
        x = np.zeros([1, 2, F])
        with connect(server, protocol, pad_to=[4]) as client:
            for bad, message in [
                ({}, r"`inputs` must have the names \['x'\].*\[\]"),
                ({"x": x, "y": 1}, r"`inputs` must have the names \['x'\].*'y'"),
                ({"x": x[0]}, r"`x` must have the shape.*\(2, 3\)"),
                ({"x": x[..., :2]}, r"`x` must have the shape.*\(1, 2, 2\)"),
                ({"x": x, "lengths": 2}, r"`lengths` must have the shape.*\(\)"),
            ]:
                with pytest.raises(ValueError, match=message):
                    client.predict(bad)

    def test_load_test(self, server, protocol, monkeypatch, capsys):
        monkeypatch.syspath_prepend(SERVING)
        main = importlib.import_module("load_test").main
        where = ["--url", server.url]
        if protocol == "grpc":
            where = ["--grpc", server.grpc_target]
        arguments = ["--model", "rnn", "--lengths", "1-6", "--pad-to", "3,8"]
        assert main([*where, *arguments, "--smoke", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["requests"] > 10


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A server of an exported model, whose backward layer starts at the last frame."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((None, F), name="x"),
            keras.layers.Bidirectional(keras_bnrnn.BNGRU(3, return_sequences=True)),
            keras.layers.Dense(2, name="logits"),
        ]
    )
    for weight in model.weights:
        if weight.dtype == "float32":
            weight.assign(keras.random.uniform(weight.shape, 0.5, 1.5))
    directory = tmp_path_factory.mktemp("exported") / "rnn"
    keras_bnrnn.export_saved_model(model, directory)
    with ModelServer({"rnn": directory}, port=0, grpc_port=0) as started:
        yield started


@protocols
def test_exported_model(exported, protocol, rng):
    x = rng.normal(size=(3, 7, F)).astype("float32")
    lengths = [7, 1, 4]
    with (
        connect(exported, protocol) as plain,
        connect(exported, protocol, pad_to=[16]) as client,
    ):
        expected = plain.predict({"x": x, "lengths": lengths})["logits"]
        found = client.predict({"x": x, "lengths": lengths})["logits"]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        # The frames past the end of a row matter to neither.
        alone = plain.predict({"x": x[2:, :4], "lengths": [4]})["logits"]
        np.testing.assert_allclose(found[2:, :4], alone, atol=1e-6)
        empty = np.zeros([1, 0, F], "float32")
        for either in (plain, client):
            answer = either.predict({"x": empty, "lengths": [0]})["logits"]
            assert answer.shape == (1, 0, 2)


def signature(outputs=None, **inputs):
    specs = {name: TensorSpec(*spec) for name, spec in inputs.items()}
    specs["lengths"] = TensorSpec("int32", (None,))
    outputs = {name: TensorSpec(*spec) for name, spec in (outputs or {}).items()}
    return Signature(specs, outputs)


class TestInputs:
    def test_several_inputs(self):
        several = signature(
            x=("float64", (None, None, 2)),
            tokens=("int64", (None, None)),
            words=("string", (None, None)),
            states=("float32", (None, 3)),
        )
        inputs = {
            "x": np.ones([1, 3, 2]),
            "tokens": [[7, 8, 9]],
            "words": [["a", "b", b"\x00"]],
            "states": np.ones([1, 3], "float32"),
        }
        arrays, timesteps, padded = padding.fit_and_pad(several, inputs, (5,))
        assert (timesteps, padded) == (3, 5)
        assert arrays["x"].shape == (1, 5, 2)
        assert arrays["tokens"].tolist() == [[7, 8, 9, 0, 0]]
        assert arrays["words"].tolist() == [[b"a", b"b", b"\x00", b"", b""]]
        assert arrays["states"].shape == (1, 3)
        assert arrays["lengths"].tolist() == [3]
        assert inputs["x"].shape == (1, 3, 2)
        inputs["tokens"] = [[7, 8]]
        with pytest.raises(ValueError, match=r"one number of timesteps.*'tokens': 2"):
            padding.fit_and_pad(several, inputs, (5,))

    def test_fixed_timesteps(self):
        fixed = signature(x=("float32", (None, 3, 2)))
        inputs = {"x": np.ones([1, 3, 2], "float32"), "lengths": [2]}
        arrays, timesteps, padded = padding.fit_and_pad(fixed, inputs, (5,))
        assert (timesteps, padded) == (0, 0)
        assert arrays["x"].shape == (1, 3, 2)
        with pytest.raises(ValueError, match=r"must have the names.*'lengths'"):
            padding.fit_and_pad(fixed, {"x": inputs["x"]}, (5,))


class TestOutputs:
    def test_cut(self):
        several = signature(
            {
                "frames": ("float32", (None, None, 2)),
                "classes": ("int64", (None, None)),
                "any": ("float32", None),
                "last": ("float32", (None, 5)),
                "scalar": ("float32", None),
                "half": ("float32", (None, None, 2)),
            },
        )
        outputs = {
            "frames": np.arange(20.0).reshape(2, 5, 2),
            "classes": np.arange(10).reshape(2, 5),
            "any": np.zeros([2, 5, 1]),
            # Not one per frame, as their specs or their sizes tell.
            "last": np.zeros([2, 5]),
            "scalar": np.float32(3),
            "half": np.zeros([2, 3, 2]),
        }
        found = padding.cut(several, outputs, 3, 5)
        np.testing.assert_array_equal(found["frames"], outputs["frames"][:, :3])
        np.testing.assert_array_equal(found["classes"], outputs["classes"][:, :3])
        shapes = {name: np.shape(array) for name, array in found.items()}
        assert shapes["any"] == (2, 3, 1)
        assert (shapes["last"], shapes["scalar"]) == ((2, 5), ())
        assert shapes["half"] == (2, 3, 2)
        for name, array in padding.cut(several, outputs, 0, 0).items():
            assert array is outputs[name]

    def test_a_server_that_pads_batches_further(self):
        frames = signature({"frames": ("float32", (None, None, 2))})
        found = padding.cut(frames, {"frames": np.zeros([2, 9, 2])}, 3, 5)
        assert found["frames"].shape == (2, 3, 2)


@pytest.mark.parametrize(
    "pad_to", [[], [0], [-1, 4], [8, 4], [4, 4], [1.5], [True], "16", 16]
)
def test_arguments(pad_to):
    with pytest.raises(
        ValueError, match=r"`pad_to` must be.*Received: pad_to="
    ) as info:
        ServingClient("m", grpc_target="h:1", pad_to=pad_to)
    assert str(info.value).endswith(f"pad_to={pad_to!r}")
