"""The client against the local server, and against servers that fail on purpose."""

import concurrent.futures
import contextlib
import http.server
import importlib
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

pytest.importorskip("grpc")
pytest.importorskip("tensorflow_serving")
pytest.importorskip("starlette")

import grpc
import keras_bnrnn_client
from client_models import F, K, U, connect, oracle, protocols
from keras_bnrnn_client import ServingClient, grpc_transport
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from keras_bnrnn.local_server import ModelServer

SERVING = pathlib.Path(__file__).parents[2] / "serving"


@pytest.fixture(autouse=True)
def seeded():
    """Nothing here is Keras', so that no session needs to be cleared."""


@protocols
class TestPredict:
    @pytest.mark.parametrize("which", [{}, {"version": 1}, {"label": "stable"}])
    def test_answers_those_of_the_oracle(self, server, protocol, which, rng):
        x = rng.normal(size=(3, 5, F))
        with connect(server, protocol, **which) as client:
            outputs = client.predict({"x": x, "lengths": [5, 0, 2]})
        expected, _ = oracle(1 if which else 2, x, [5, 0, 2])
        assert list(outputs) == ["logits"]
        assert outputs["logits"].dtype == np.float32
        np.testing.assert_allclose(outputs["logits"], expected, atol=1e-5)

    def test_dtypes(self, server, protocol):
        inputs = {
            "text": ["é", "", '"'],
            "flag": [True, False, True],
            "long": np.array([2**62 + 1, -3, 0]),
            "byte": [0, 7, 254],
            "double": [[0.1, 1], [np.inf, -np.inf], [np.nan, 5e-324]],
        }
        with connect(server, protocol, "types") as client:
            outputs = client.predict(inputs, "kinds")
        text = [b"\xc3\xa9", b"", b'"']
        assert outputs["text"].tolist() == text
        assert outputs["raw_bytes"].tolist() == [t + b"\xff" for t in text]
        assert outputs["flag"].tolist() == [False, True, False]
        assert outputs["long"].tolist() == [2**62, -4, -1]
        assert outputs["byte"].tolist() == [1, 8, 255]
        np.testing.assert_array_equal(outputs["double"], inputs["double"])
        dtypes = {name: str(array.dtype) for name, array in outputs.items()}
        assert dtypes == {
            "text": "object",
            "raw_bytes": "object",
            "flag": "bool",
            "long": "int64",
            "byte": "uint8",
            "double": "float64",
        }

    def test_bytes(self, server, protocol):
        # Over gRPC alone: TensorFlow Serving's JSON has no such output.
        inputs = {"flag": [True], "long": [1], "byte": [1], "double": [[0.0, 0.0]]}
        with connect(server, protocol, "types") as client:
            if protocol == "grpc":
                outputs = client.predict({"text": [b"\xfe\x00"], **inputs}, "kinds")
                assert outputs["text"].tolist() == [b"\xfe\x00"]
            else:
                with pytest.raises(keras_bnrnn_client.InvalidRequest, match="UTF-8"):
                    client.predict({"text": [b"\xfe\x00"], **inputs}, "kinds")

    def test_single_empty_and_nan(self, server, protocol):
        with connect(server, protocol, "types") as client:
            empty = client.predict({"x": []}, "single")["y"]
            outputs = client.predict({"x": [4, -1]}, "single")["y"]
        assert (empty.shape, empty.dtype) == ((0, 2), np.float32)
        np.testing.assert_array_equal(outputs, [[2, 2], [np.nan, np.nan]])

    def test_half(self, server, protocol):
        with connect(server, protocol, "types") as client:
            if protocol == "grpc":
                assert client.predict({"x": [1.5]}, "half")["y"].tolist() == [3.0]
            else:
                with pytest.raises(keras_bnrnn_client.ServingError) as info:
                    client.predict({"x": [1.5]}, "half")
                assert info.value.code == "UNIMPLEMENTED"

    def test_inputs_that_do_not_fit(self, server, protocol):
        x = np.zeros([1, 2, F])
        good = {"x": x, "lengths": [2]}
        with connect(server, protocol) as client:
            for bad, message in [
                ({"x": x}, r"`inputs` must have the names \['lengths', 'x'\].*\['x'\]"),
                ({**good, "y": 1}, r"`inputs` must have.*\['lengths', 'x', 'y'\]"),
                ({**good, "lengths": [2.0]}, r"`lengths` must be int32.*float64.*2\."),
                (
                    {**good, "lengths": [2**31]},
                    "`lengths` must be within int32.*2147483648",
                ),
                ({**good, "lengths": [True]}, "`lengths` must be int32.*bool.*True"),
                ({**good, "lengths": 2}, r"`lengths` must have the shape.*shape \(\)"),
                ({**good, "x": x[..., :2]}, r"`x` must have the shape.*\(1, 2, 2\)"),
                ({**good, "x": [[[1]], [[1, 2]]]}, "`x` must not be ragged.*1, 2"),
                ({**good, "x": "ab"}, "`x` must be float32.*ab"),
            ]:
                with pytest.raises(ValueError, match=message):
                    client.predict(bad)
        with (
            connect(server, protocol, "types") as client,
            pytest.raises(ValueError, match=r"`text` must be strings or bytes.*5"),
        ):
            client.predict(
                {"text": [5], "flag": [], "long": [], "byte": [], "double": []}, "kinds"
            )

    def test_a_wrong_number_of_lengths(self, server, protocol):
        x = np.zeros([2, 4, F])
        states = {"rnn_h": np.zeros([2, U]), "t": [0, 0]}
        with connect(server, protocol) as client:
            for signature, others in (("serving_default", {}), ("chunk", states)):
                for lengths in ([4], [4, 3, 2], []):
                    with pytest.raises(keras_bnrnn_client.InvalidRequest) as info:
                        client.predict(
                            {"x": x, "lengths": lengths, **others}, signature
                        )
                    assert info.value.args[0] == (
                        "`lengths` must have one number for each of the 2 rows of "
                        f"`x`. Received: lengths={lengths}"
                    )
                    assert info.value.code == "INVALID_ARGUMENT"
                    assert info.value.http_status is None  # no server was asked

    def test_errors(self, server, protocol):
        inputs = {"x": np.zeros([1, 1, F]), "lengths": [1]}
        cases = [
            ({"model": "nowhere"}, "ModelNotFound", "NOT_FOUND", 404),
            ({"version": 9}, "ModelNotFound", "NOT_FOUND", 404),
            ({"label": "none"}, "InvalidRequest", "INVALID_ARGUMENT", 400),
        ]
        for which, kind, code, http_status in cases:
            with (
                connect(server, protocol, **which) as client,
                pytest.raises(getattr(keras_bnrnn_client, kind)) as info,
            ):
                client.predict(inputs)
            assert type(info.value).__name__ == kind
            assert info.value.code == code
            assert info.value.http_status == (
                http_status if protocol == "rest" else None
            )
            assert f"[{code}" in str(info.value)
        with (
            connect(server, protocol) as client,
            pytest.raises(
                keras_bnrnn_client.SignatureNotFound,
                match=r"Version 2 of model 'rnn' has no signature 'text'.*'chunk'",
            ),
        ):
            client.predict(inputs, "text")
        # Each row of states is of one row of frames: the server refuses to stretch.
        with (
            connect(server, protocol) as client,
            pytest.raises(keras_bnrnn_client.ServingError) as info,
        ):
            client.predict(
                {"x": np.zeros([3, F]), "rnn_h": np.zeros([2, U]), "t": [0, 0]}, "step"
            )
        assert not info.value.retriable


@protocols
class TestModel:
    def test_metadata(self, server, protocol):
        with connect(server, protocol, label="stable") as client:
            metadata = client.metadata()
        assert metadata.version == 1
        assert sorted(metadata.signatures) == [
            "chunk",
            "initial_state",
            "serving_default",
            "step",
        ]
        step = metadata.signatures["step"]
        spec = keras_bnrnn_client.TensorSpec
        assert dict(step.inputs) == {
            "x": spec("float32", (None, F)),
            "rnn_h": spec("float32", (None, U)),
            "t": spec("int32", (None,)),
        }
        assert step.outputs["logits"] == spec("float32", (None, K))
        initial = metadata.signatures["initial_state"]
        assert initial.inputs["x"] == spec("float32", None)

    def test_status(self, server, protocol):
        status = keras_bnrnn_client.VersionStatus
        with connect(server, protocol) as client:
            assert client.status() == [status(2, "AVAILABLE"), status(1, "AVAILABLE")]
        with connect(server, protocol, version=1) as client:
            assert client.status() == [status(1, "AVAILABLE")]

    def test_failed_version(self, models, protocol, tmp_path):
        shutil.copytree(models["types"] / "1", tmp_path / "types" / "1")
        with ModelServer(
            {"types": tmp_path / "types"}, port=0, grpc_port=0, poll_seconds=0
        ) as server:
            (tmp_path / "types" / "5").mkdir()
            (tmp_path / "types" / "5" / "saved_model.pb").write_bytes(b"nothing")
            server.poll()
            with connect(server, protocol, "types", version=5) as client:
                (status,) = client.status()
                assert (status.version, status.state) == (5, "END")
                assert status.error_code != "OK"
                assert status.error_message
                with pytest.raises(
                    keras_bnrnn_client.DeadlineExceeded,
                    match=r"'types' version 5 was not available within 0.3 s.*END",
                ):
                    client.wait_until_available(0.3)

    def test_waits_for_a_server(self, models, protocol):
        port = free_port()
        where = {"rest_url": f"http://127.0.0.1:{port}"}
        ports = {"port": port, "grpc_port": None}
        if protocol == "grpc":
            where = {"grpc_target": f"127.0.0.1:{port}"}
            ports = {"port": 0, "grpc_port": port}
        client = ServingClient("rnn", **where, label="stable")
        server = ModelServer(
            models, **ports, versions="all", version_labels={"rnn": {"stable": 1}}
        )
        timer = threading.Timer(0.5, server.start)
        with client:
            with pytest.raises(
                keras_bnrnn_client.DeadlineExceeded,
                match=f"label 'stable' was not available within 0.2 s.*{port}",
            ):
                client.wait_until_available(0.2)
            timer.start()
            try:
                start = time.monotonic()
                client.wait_until_available(30)
                assert time.monotonic() - start < 10
            finally:
                timer.join()
                server.stop()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@protocols
class TestSession:
    def test_steps(self, server, protocol, rng):
        x = rng.normal(size=(2, 6, F)).astype("float32")
        expected, last = oracle(2, x, [6, 6])
        with connect(server, protocol) as client:
            session = client.session(2)
            assert session.version == 2
            assert session.states["t"].tolist() == [0, 0]
            for t in range(6):
                outputs = session.step(x[:, t])
                assert list(outputs) == ["logits"]
                np.testing.assert_allclose(outputs["logits"], expected[:, t], atol=1e-5)
            assert session.states["t"].tolist() == [6, 6]
            np.testing.assert_allclose(session.states["rnn_h"], last, atol=1e-5)
            session.reset()
            again = session.step({"x": x[:, 0]})["logits"]
            np.testing.assert_allclose(again, expected[:, 0], atol=1e-5)

    def test_chunks_and_steps_by_turns(self, server, protocol, rng):
        x = rng.normal(size=(2, 9, F)).astype("float32")
        expected, last = oracle(1, x, [8, 5])
        with connect(server, protocol, label="stable") as client:
            session = client.session(2)
            first = session.chunk(x[:, :4])
            second = session.step(x[:, 4])
            third = session.chunk(x[:, 5:], [3, 0])
            assert [list(o) for o in (first, second, third)] == [["logits"]] * 3
            found = np.concatenate(
                [first["logits"], second["logits"][:, None], third["logits"]], 1
            )
            np.testing.assert_allclose(found, expected, atol=1e-5)
            np.testing.assert_allclose(session.states["rnn_h"], last, atol=1e-5)
            assert session.states["t"].tolist() == [8, 5]

    def test_stays_with_its_version(self, server, protocol, rng, monkeypatch):
        x = rng.normal(size=(1, 4, F)).astype("float32")
        expected, _ = oracle(1, x, [4])
        with connect(server, protocol, label="stable") as client:
            session = client.session()
            session.step(x[:, 0])
            monkeypatch.setitem(server.version_labels["rnn"], "stable", 2)
            assert client.metadata().version == 2
            outputs = session.chunk(x[:, 1:])
        np.testing.assert_allclose(outputs["logits"], expected[:, 1:], atol=1e-5)

    def test_ends_with_its_version(self, models, protocol, tmp_path, rng):
        shutil.copytree(models["rnn"] / "1", tmp_path / "rnn" / "1")
        x = rng.normal(size=(1, 2, F)).astype("float32")
        with (
            ModelServer(
                {"rnn": tmp_path / "rnn"}, port=0, grpc_port=0, poll_seconds=0
            ) as server,
            connect(server, protocol) as client,
        ):
            session = client.session()
            session.step(x[:, 0])
            states = dict(session.states)
            shutil.copytree(models["rnn"] / "2", tmp_path / "rnn" / "2")
            server.poll()
            with pytest.raises(
                keras_bnrnn_client.SessionExpired,
                match=r"Version 1 of model 'rnn'.*no longer served",
            ):
                session.step(x[:, 1])
            assert session.states["t"] is states["t"]
            expected, _ = oracle(2, x, [2])
            session = client.session()
            np.testing.assert_allclose(session.chunk(x)["logits"], expected, atol=1e-5)

    def test_arguments(self, server, protocol):
        with connect(server, protocol) as client:
            for value in (0, True, 1.5):
                with pytest.raises(
                    ValueError, match=f"`batch_size`.*batch_size={value}"
                ):
                    client.session(value)
            session = client.session(2)
            for value, message in [
                (np.zeros([1, F]), r"`frame` must have batch_size=2.*\(1, 3\)"),
                (np.float32(1), r"`frame` must have batch_size=2.*\(\)"),
                ({"y": np.zeros([2, F])}, r"`frame` must have the names \['x'\].*'y'"),
            ]:
                with pytest.raises(ValueError, match=message):
                    session.step(value)
            with pytest.raises(ValueError, match=r"`lengths`.*\(2,\).*\(3,\)"):
                session.chunk(np.zeros([2, 4, F]), [1, 2, 3])
            assert session.states["t"].tolist() == [0, 0]

    def test_no_such_signatures(self, server, protocol):
        with (
            connect(server, protocol, "types") as client,
            pytest.raises(
                keras_bnrnn_client.SignatureNotFound,
                match=r"no signature 'initial_state'.*causal",
            ),
        ):
            client.session()


# TensorFlow Serving's answer to each request of a batch of unequal shapes.
MIXED = (
    "Tensors with name 'x:0' from different tasks have different shapes and padding is "
    "turned off. Set pad_variable_length_inputs to true, or ensure that all tensors "
    "with the same name have equal dimensions starting with the first dim."
)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        signature = {
            "inputs": {"x": info("DT_FLOAT", [-1])},
            "outputs": {"y": info("DT_FLOAT", [-1])},
        }
        if self.server.changed:
            signature["inputs"]["z"] = info("DT_FLOAT", [-1])
        self.answer(
            200,
            {
                "model_spec": {"name": "m", "version": "3"},
                "metadata": {
                    "signature_def": {"signature_def": {"serving_default": signature}}
                },
            },
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        action = self.server.actions.pop(0) if self.server.actions else "answer"
        if action == "close":
            self.close_connection = True
        elif action == "hang":
            self.server.hanging.wait(30)
            self.close_connection = True
        elif action == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(b" ")
                    if self.server.hanging.wait(0.05):
                        break
            self.close_connection = True
        elif action == "text":
            self.answer(502, "<html>Bad gateway</html>")
        elif action == "answer":
            self.answer(200, {"outputs": body["inputs"]["x"]})
        elif action == "mixed":
            self.answer(400, {"error": MIXED})
        else:
            self.answer(action, {"error": f"error {action}"})

    def answer(self, status, value):
        content = value if isinstance(value, str) else json.dumps(value)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args):
        pass


def info(dtype, sizes):
    dims = [{"size": str(size), "name": ""} for size in sizes]
    shape = {"dim": dims, "unknown_rank": False}
    return {"dtype": dtype, "tensor_shape": shape, "name": "n:0"}


class Prediction(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Answers as `Handler` does, over gRPC."""

    def __init__(self):
        self.actions, self.bodies, self.hanging = [], [], threading.Event()

    def GetModelMetadata(self, request, context):
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.version.value = 3
        signatures = get_model_metadata_pb2.SignatureDefMap()
        signature = signatures.signature_def["serving_default"]
        for tensor in (signature.inputs["x"], signature.outputs["y"]):
            tensor.dtype = tf.float32.as_datatype_enum
            tensor.tensor_shape.dim.add(size=-1)
        response.metadata["signature_def"].Pack(signatures)
        return response

    def Predict(self, request, context):
        self.bodies.append(request)
        action = self.actions.pop(0) if self.actions else "answer"
        if action == "hang":
            self.hanging.wait(30)
        elif action != "answer":
            code, _, details = action.partition(": ")
            context.abort(getattr(grpc.StatusCode, code), details or f"error {action}")
        response = predict_pb2.PredictResponse()
        response.outputs["y"].CopyFrom(request.inputs["x"])
        return response


class Models(model_service_pb2_grpc.ModelServiceServicer):
    def GetModelStatus(self, request, context):
        response = get_model_status_pb2.GetModelStatusResponse()
        response.model_version_status.add(version=3, state=20)
        return response


@pytest.fixture
def rest_double():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.actions, server.bodies, server.hanging = [], [], threading.Event()
    server.changed = False
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.hanging.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def grpc_double():
    service = Prediction()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(service, server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(Models(), server)
    service.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield service
    service.hanging.set()
    server.stop(None).wait(10)


class TestRetries:
    def test_rest(self, rest_double):
        rest_double.actions = [503, "close", 429]
        with ServingClient("m", rest_url=rest_double.url) as client:
            assert client.predict({"x": [1, 2.5]})["y"].tolist() == [1, 2.5]
        assert len(rest_double.bodies) == 4
        assert rest_double.bodies[0] == {
            "signature_name": "serving_default",
            "inputs": {"x": [1.0, 2.5]},
        }
        assert rest_double.bodies[3] == rest_double.bodies[0]

    def test_grpc(self, grpc_double):
        grpc_double.actions = ["UNAVAILABLE"] * 3
        with ServingClient("m", grpc_target=grpc_double.target) as client:
            assert client.predict({"x": [1, 2.5]})["y"].tolist() == [1, 2.5]
            assert client.status()[0].state == "LOADING"
        assert len(grpc_double.bodies) == 4

    @pytest.mark.parametrize(
        "action, kind, code",
        [
            (400, "InvalidRequest", "INVALID_ARGUMENT"),
            (404, "ModelNotFound", "NOT_FOUND"),
            (413, "ServingError", "RESOURCE_EXHAUSTED"),
            (500, "ServingError", "INTERNAL"),
            (504, "DeadlineExceeded", "DEADLINE_EXCEEDED"),
            ("text", "Unavailable", "UNAVAILABLE"),
        ],
    )
    def test_rest_errors_that_stay(self, rest_double, action, kind, code):
        rest_double.actions = [action]
        with (
            ServingClient("m", rest_url=rest_double.url) as client,
            pytest.raises(keras_bnrnn_client.ServingError) as info,
        ):
            client.predict({"x": [1]})
        assert type(info.value).__name__ == kind
        assert info.value.code == code
        assert info.value.http_status == (502 if action == "text" else action)
        message = "Bad gateway" if action == "text" else f"error {action}"
        assert message in str(info.value)
        assert len(rest_double.bodies) == 1

    @protocols
    def test_batch_of_unequal_shapes(self, rest_double, grpc_double, protocol):
        double, where = rest_double, {"rest_url": rest_double.url}
        if protocol == "grpc":
            double, where = grpc_double, {"grpc_target": grpc_double.target}
        mixed = "mixed" if protocol == "rest" else f"FAILED_PRECONDITION: {MIXED}"
        double.actions = [mixed] * 2
        with ServingClient("m", **where) as client:
            assert client.predict({"x": [1, 2.5]})["y"].tolist() == [1, 2.5]
        assert len(double.bodies) == 3

    @pytest.mark.parametrize(
        "details",
        [
            # What TensorFlow Serving answers beyond --grpc_max_threads.
            "Server Threadpool Exhausted",
            "OOM when allocating tensor",
        ],
    )
    def test_grpc_resource_exhausted(self, grpc_double, details):
        grpc_double.actions = [f"RESOURCE_EXHAUSTED: {details}"] * 2
        with ServingClient("m", grpc_target=grpc_double.target) as client:
            assert client.predict({"x": [1, 2.5]})["y"].tolist() == [1, 2.5]
        assert len(grpc_double.bodies) == 3
        grpc_double.actions = [f"RESOURCE_EXHAUSTED: {details}"] * 9
        with (
            ServingClient("m", grpc_target=grpc_double.target, retries=1) as client,
            pytest.raises(keras_bnrnn_client.ServingError, match=details) as info,
        ):
            client.predict({"x": [1]})
        assert info.value.code == "RESOURCE_EXHAUSTED"
        assert len(grpc_double.bodies) == 5

    def test_grpc_message_that_is_too_large(self, models, monkeypatch):
        calls = []
        call = grpc_transport.GrpcTransport._call

        def count(self, method, request, seconds):
            calls.append(request)
            return call(self, method, request, seconds)

        monkeypatch.setattr(grpc_transport.GrpcTransport, "_call", count)
        inputs = {"x": np.zeros([1, 10_000, F]), "lengths": [1]}
        with (
            ModelServer(
                models, port=0, grpc_port=0, max_request_bytes=100_000
            ) as server,
            connect(server, "grpc") as client,
        ):
            client.metadata()
            calls.clear()
            with pytest.raises(
                keras_bnrnn_client.ServingError, match="message larger than max"
            ) as info:
                client.predict(inputs)
        assert info.value.code == "RESOURCE_EXHAUSTED"
        assert not info.value.retriable
        assert len(calls) == 1

    @pytest.mark.parametrize(
        "action, kind",
        [
            ("INVALID_ARGUMENT", "InvalidRequest"),
            (
                "RESOURCE_EXHAUSTED: Received message larger than max (9 vs. 4)",
                "ServingError",
            ),
            (
                "RESOURCE_EXHAUSTED: received metadata size exceeds hard limit",
                "ServingError",
            ),
            (
                "RESOURCE_EXHAUSTED: `x` must take at most 9 bytes. Received: [99]",
                "ServingError",
            ),
            ("INTERNAL", "ServingError"),
        ],
    )
    def test_grpc_errors_that_stay(self, grpc_double, action, kind):
        grpc_double.actions = [action]
        with (
            ServingClient("m", grpc_target=grpc_double.target) as client,
            pytest.raises(keras_bnrnn_client.ServingError) as info,
        ):
            client.predict({"x": [1]})
        assert type(info.value).__name__ == kind
        code = action.partition(":")[0]
        assert (info.value.code, info.value.http_status) == (code, None)
        assert len(grpc_double.bodies) == 1

    def test_number_of_retries(self, rest_double):
        for retries in (0, 2):
            rest_double.actions, rest_double.bodies = [503] * 10, []
            with (
                ServingClient("m", rest_url=rest_double.url, retries=retries) as client,
                pytest.raises(keras_bnrnn_client.Unavailable, match="error 503"),
            ):
                client.predict({"x": [1]})
            assert len(rest_double.bodies) == retries + 1

    @pytest.mark.parametrize("action", ["hang", "drip", 503])
    def test_deadline_rest(self, rest_double, action):
        rest_double.actions = [action] * 100
        with ServingClient("m", rest_url=rest_double.url, retries=50) as client:
            client.metadata()
            start = time.monotonic()
            with pytest.raises(
                keras_bnrnn_client.DeadlineExceeded, match=r"no answer within 0\.\d+ s"
            ) as info:
                client.predict({"x": [1]}, timeout=0.5)
        assert 0.2 < time.monotonic() - start < 2
        if action == 503:
            assert "error 503" in str(info.value)
            assert len(rest_double.bodies) > 2

    def test_deadline_grpc(self, grpc_double):
        grpc_double.actions = ["hang"]
        with ServingClient("m", grpc_target=grpc_double.target, timeout=0.5) as client:
            client.metadata()
            start = time.monotonic()
            with pytest.raises(keras_bnrnn_client.DeadlineExceeded):
                client.predict({"x": [1]})
        assert 0.2 < time.monotonic() - start < 2

    @protocols
    def test_nothing_listens(self, protocol):
        where = {"rest_url": f"http://127.0.0.1:{free_port()}"}
        if protocol == "grpc":
            where = {"grpc_target": where["rest_url"].removeprefix("http://")}
        with (
            ServingClient("m", **where, retries=1) as client,
            pytest.raises(keras_bnrnn_client.Unavailable) as info,
        ):
            client.predict({"x": [1]})
        assert info.value.code == "UNAVAILABLE"
        assert info.value.http_status is None

    def test_signature_that_changed(self, rest_double):
        with ServingClient("m", rest_url=rest_double.url) as client:
            client.predict({"x": [1]})
            rest_double.changed = True
            outputs = client.predict({"x": [2], "z": [3]})
            assert outputs["y"].tolist() == [2]
            assert rest_double.bodies[-1]["inputs"] == {"x": [2.0], "z": [3.0]}
            with pytest.raises(ValueError, match=r"names \['x', 'z'\].*\['x'\]"):
                client.predict({"x": [1]})

    def test_not_json(self, rest_double, monkeypatch):
        monkeypatch.setattr(
            Handler, "do_GET", lambda handler: handler.answer(200, "<html>")
        )
        with (
            ServingClient("m", rest_url=rest_double.url) as client,
            pytest.raises(keras_bnrnn_client.ServingError, match=r"not JSON.*<html>"),
        ):
            client.metadata()


def test_arguments():
    url = {"rest_url": "http://127.0.0.1:1"}
    for kwargs, message in [
        ({**url, "model": ""}, "`model` must be.*model=''"),
        ({**url, "model": "a/b"}, "`model` must be.*model='a/b'"),
        ({}, "`rest_url` or `grpc_target`.*rest_url=None"),
        ({**url, "grpc_target": "h:1"}, "`rest_url` or `grpc_target`.*'h:1'"),
        ({"rest_url": "h:1"}, "`rest_url` must start.*rest_url='h:1'"),
        ({**url, "version": -1}, "`version` must be.*version=-1"),
        ({**url, "label": ""}, "`label` must be.*label=''"),
        ({**url, "version": 1, "label": "a"}, "not both.*version=1, label='a'"),
        ({**url, "timeout": 0}, "`timeout` must be.*timeout=0"),
        ({**url, "timeout": float("inf")}, "`timeout` must be.*timeout=inf"),
        ({**url, "retries": -1}, "`retries` must be.*retries=-1"),
        ({**url, "retries": True}, "`retries` must be.*retries=True"),
        ({**url, "max_response_bytes": 0}, "`max_response_bytes`.*response_bytes=0"),
        ({**url, "max_response_bytes": 1e6}, "`max_response_bytes`.*=1000000.0"),
        ({**url, "grpc_credentials": "c"}, "`grpc_credentials`.*grpc_credentials='c'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ServingClient(**{"model": "m", **kwargs})


def test_missing_package_is_named_with_the_cure(monkeypatch):
    for name in list(sys.modules):
        if name.startswith("keras_bnrnn_client.") and name.endswith("_transport"):
            monkeypatch.delitem(sys.modules, name)
    for module, where, cure in [
        ("httpx", {"rest_url": "http://h"}, "REST.*httpx.*pip install httpx"),
        ("grpc", {"grpc_target": "h:1"}, "gRPC.*grpc.*pip install.*serving-api"),
    ]:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=cure):
            ServingClient("m", **where)


def test_rest_needs_neither_keras_nor_tensorflow(server):
    code = f"""
import sys
sys.path.insert(0, {str(SERVING / "client")!r})
from keras_bnrnn_client import ServingClient
with ServingClient("rnn", rest_url={server.url!r}) as client:
    session = client.session()
    print(session.step([[0.0] * {F}])["logits"].shape)
loaded = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(loaded & {{"keras", "keras_bnrnn", "tensorflow", "grpc"}}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.splitlines() == [f"(1, {K})", "[]"], result.stderr


class TestLoadTest:
    @pytest.fixture
    def main(self):
        if str(SERVING) not in sys.path:
            sys.path.insert(0, str(SERVING))
        return importlib.import_module("load_test").main

    @pytest.mark.parametrize("signature", ["serving_default", "step", "chunk"])
    @protocols
    def test_no_errors(self, main, server, protocol, signature, capsys):
        where = ["--url", server.url]
        if protocol == "grpc":
            where = ["--grpc", server.grpc_target]
        arguments = ["--model", "rnn", "--signature", signature, "--lengths", "1-6"]
        assert main([*where, *arguments, "--smoke", "--batch", "3", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["requests"] > 10
        assert report["errors"] == {}
        assert 0.5 <= report["seconds"] < 5
        rate = report["requests"] / report["seconds"]
        assert report["requests_per_second"] == pytest.approx(rate, rel=0.01)
        assert report["rows_per_second"] == pytest.approx(3 * rate, rel=0.01)
        p50, p90, p99, largest = report["milliseconds"].values()
        assert 0 < p50 <= p90 <= p99 <= largest < 5000

    def test_text(self, main, server, capsys):
        arguments = ["--url", server.url, "--model", "types", "--signature", "kinds"]
        fixed = ["--input", 'text=["a"]', "--lengths", "1"]
        assert main([*arguments, *fixed, "--smoke"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"types version 1 at {server.url}, kinds: 4 clients")
        assert [line.split()[0] for line in lines[1:]] == [
            "requests",
            "throughput",
            "latency",
            "errors",
        ]
        assert lines[-1].split()[1] == "none"

    def test_errors_are_counted(self, main, rest_double, monkeypatch, capsys):
        count = importlib.import_module("load_test")._REQUESTS
        state = {"status": {"error_code": "OK", "error_message": ""}}
        state |= {"version": "3", "state": "AVAILABLE"}
        metadata = Handler.do_GET

        def do_get(handler):
            if handler.path.endswith("/metadata"):
                return metadata(handler)
            return handler.answer(200, {"model_version_status": [state]})

        answer = Handler.answer

        def wrong(handler, status, value):
            if "outputs" in value and len(rest_double.bodies) > count + 20:
                value = {"outputs": [v + 1 for v in value["outputs"]]}
            answer(handler, status, value)

        monkeypatch.setattr(Handler, "do_GET", do_get)
        monkeypatch.setattr(Handler, "answer", wrong)
        rest_double.actions = ["answer"] * count + [503, 500, 404]
        arguments = ["--url", rest_double.url, "--model", "m", "--smoke", "--json"]
        assert main(arguments) == 1
        errors = json.loads(capsys.readouterr().out)["errors"]
        assert errors.pop("wrong answer") > 0
        assert errors == {"UNAVAILABLE": 1, "INTERNAL": 1, "NOT_FOUND": 1}

    def test_unknown_signature(self, main, server, capsys):
        arguments = ["--url", server.url, "--model", "rnn", "--signature", "text"]
        assert main([*arguments, "--smoke"]) == 1
        assert "no signature 'text'" in capsys.readouterr().err

    def test_arguments(self, main, capsys):
        for arguments, message in [
            (["--model", "m"], "--url --grpc is required"),
            (["--url", "u", "--grpc", "g", "--model", "m"], "not allowed with"),
            (["--url", "u", "--model", "m", "--lengths", "5-2"], "Received: 5-2"),
            (["--url", "u", "--model", "m", "--lengths", "0"], "Received: 0"),
            (["--url", "u", "--model", "m", "--clients", "0"], "Received: 0"),
            (["--url", "u", "--model", "m", "--seconds", "-1"], "Received: -1"),
            (["--url", "u", "--model", "m", "--input", "a=b"], "Received: a=b"),
            (["--url", "u", "--model", "m", "--pad-to", "8,4"], "Received: 8,4"),
            (["--url", "u", "--model", "m", "--pad-to", "8,x"], "Received: 8,x"),
        ]:
            with pytest.raises(SystemExit) as info:
                main(arguments)
            assert info.value.code == 2
            assert message in capsys.readouterr().err
