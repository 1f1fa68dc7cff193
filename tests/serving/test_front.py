"""The checking front, before the local server and before a server that counts calls."""

import concurrent.futures
import re
import signal
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
from client_models import (
    F,
    oracle,
)
from keras_bnrnn_client import ServingClient, front
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

Code = grpc.StatusCode
MAX_BYTES = 100_000


@pytest.fixture(autouse=True)
def seeded():
    """Nothing here is Keras', so that no session needs to be cleared."""


class Behind(prediction_service_pb2_grpc.PredictionServiceServicer):
    """A TensorFlow Serving that keeps the requests that reach it."""

    def __init__(self):
        self.predicted, self.asked, self.seconds = [], [], []
        self.rank, self.version, self.error = 3, 4, None
        self.hanging = threading.Event()
        self.hanging.set()

    def GetModelMetadata(self, request, context):
        self.asked.append(request)
        if request.model_spec.name != "m":
            context.abort(Code.NOT_FOUND, "Servable not found for request: Latest(x)")
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for name in ("serving_default", "initial_state"):
            inputs = signatures.signature_def[name].inputs
            inputs["x"].dtype = tf.float32.as_datatype_enum
            if name == "initial_state":
                inputs["x"].tensor_shape.unknown_rank = True
                continue
            for size in [-1, -1, F, 2][: self.rank]:
                inputs["x"].tensor_shape.dim.add(size=size)
            inputs["lengths"].dtype = tf.int32.as_datatype_enum
            inputs["lengths"].tensor_shape.dim.add(size=-1)
            inputs["words"].dtype = tf.string.as_datatype_enum
            inputs["words"].tensor_shape.dim.add(size=-1)
            inputs["rate"].dtype = tf.float64.as_datatype_enum
            inputs["rate"].tensor_shape.SetInParent()
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.version.value = self.version
        response.metadata["signature_def"].Pack(signatures)
        return response

    def Predict(self, request, context):
        self.predicted.append(request)
        self.seconds.append(context.time_remaining())
        self.hanging.wait(30)
        if self.error is not None:
            context.abort(*self.error)
        response = predict_pb2.PredictResponse()
        response.model_spec.version.value = self.version
        response.outputs["x"].CopyFrom(request.inputs["x"])
        return response


class Status(model_service_pb2_grpc.ModelServiceServicer):
    def GetModelStatus(self, request, context):
        response = get_model_status_pb2.GetModelStatusResponse()
        response.model_version_status.add(version=4, state=30)
        return response

    def HandleReloadConfigRequest(self, request, context):
        raise AssertionError("it must not be reached")


@pytest.fixture
def behind():
    service = Behind()
    started = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        service, started
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(Status(), started)
    service.target = f"127.0.0.1:{started.add_insecure_port('127.0.0.1:0')}"
    started.start()
    yield service
    started.stop(None).wait(10)


def start(target, **kwargs):
    made, port = front.make_front(target, "127.0.0.1:0", threads=8, **kwargs)
    made.start()
    return made, f"127.0.0.1:{port}"


@pytest.fixture
def channel(behind):
    made, target = start(behind.target, max_request_bytes=MAX_BYTES)
    with grpc.insecure_channel(target) as channel:
        yield channel
    made.stop(None).wait(10)


@pytest.fixture
def service(channel):
    return prediction_service_pb2_grpc.PredictionServiceStub(channel)


GOOD = {
    "x": np.arange(12, dtype="float32").reshape(2, 2, F),
    "lengths": np.int32([2, 1]),
    "words": np.array([b"a", b"\xff"], object),
    "rate": np.float64(0.5),
}


def make_request(inputs=GOOD, signature="", **spec):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = spec.pop("name", "m")
    request.model_spec.signature_name = signature
    if "version" in spec:
        request.model_spec.version.value = spec["version"]
    if "label" in spec:
        request.model_spec.version_label = spec["label"]
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return request


def spoiled(name, spoil):
    request = make_request()
    spoil(request.inputs[name])
    return request


def claim(proto):
    proto.ClearField("tensor_content")
    proto.float_val.append(1.0)
    proto.tensor_shape.dim[1].size = 2**40


def truncate(proto):
    proto.tensor_content = proto.tensor_content[:-4]


def many_strings():
    """One string stands for 10,000, and each row has no frames."""
    request = make_request(
        {
            **x(10_000, 0, F),
            "lengths": np.zeros(10_000, "int32"),
            "words": GOOD["words"],
        }
    )
    words = request.inputs["words"]
    words.tensor_shape.dim[0].size = 10_000
    del words.string_val[1:]
    return request


def x(*shape, dtype="float32"):
    return {**GOOD, "x": np.ones(shape, dtype)}


BAD = {
    "no signature": (make_request(signature="y"), "`signature_name`.*Received: 'y'"),
    "missing": (make_request({"x": GOOD["x"]}), r"names \['lengths'.*: \['x'\]"),
    "extra": (make_request({**GOOD, "y": 1}), r"must have the names.*'x', 'y'\]"),
    "dtype": (
        make_request(x(2, 2, F, dtype="float64")),
        "`x` must be float32.*float64",
    ),
    "no dtype": (
        spoiled("x", lambda proto: setattr(proto, "dtype", 0)),
        "`x` must be float32. Received: invalid",
    ),
    "unknown dtype": (spoiled("x", lambda proto: setattr(proto, "dtype", 99)), "99"),
    "rank": (make_request(x(2, F)), r"`x` must have the shape.*\(2, 3\)"),
    "scalar": (make_request(x()), r"`x` must have the shape.*\(\)"),
    "features": (make_request(x(2, 2, 7)), r"`x` must have the shape.*\(2, 2, 7\)"),
    "rows": (make_request(x(3, 2, F)), "one batch size.*'x': 3"),
    "no rows": (
        make_request(
            {**x(0, 2, F), "lengths": np.int32([]), "words": np.array([], object)}
        ),
        "one batch size, 1 or more.*'x': 0",
    ),
    "rank of a scalar": (
        make_request({**GOOD, "rate": np.float64([0.5, 0.5])}),
        r"`rate` must have the shape \(\).*\(2,\)",
    ),
    "unknown rank": (
        spoiled("x", lambda p: setattr(p.tensor_shape, "unknown_rank", True)),
        "`x` must have a known shape",
    ),
    "negative": (
        spoiled("x", lambda p: setattr(p.tensor_shape.dim[1], "size", -2)),
        r"`x` must have a known shape.*\[2, -2, 3\]",
    ),
    "claims much": (spoiled("x", claim), f"at most {MAX_BYTES} bytes.*1099511627776"),
    "many strings": (many_strings(), f"`words`.*at most {MAX_BYTES} bytes.*10000"),
    "rank 300": (
        spoiled("x", lambda p: [p.tensor_shape.dim.add(size=1) for _ in range(300)]),
        ".",
    ),
    "beyond int64": (
        spoiled("x", lambda p: [setattr(d, "size", 2**62) for d in p.tensor_shape.dim]),
        f"at most {MAX_BYTES} bytes",
    ),
    "truncated": (spoiled("x", truncate), "."),
    "rank of any input": (
        make_request({"x": np.ones((2, 2, F), "float32")}, "initial_state"),
        r"`x` must have rank 2. Received: shape \[2, 2, 3\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_do_not_reach_the_server(behind, service, case):
    request, message = BAD[case]
    with pytest.raises(grpc.RpcError) as info:
        service.Predict(request, timeout=30)
    assert info.value.code() == Code.INVALID_ARGUMENT
    assert re.search(message, info.value.details()), info.value.details()
    assert behind.predicted == []
    # The front goes on.
    service.Predict(make_request(), timeout=30)
    assert behind.predicted == [make_request()]


def test_bytes_that_are_no_request_and_too_many(behind, channel):
    call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    for content, code in [
        (b"\xff\xff\xff", Code.INVALID_ARGUMENT),
        (b" " * (MAX_BYTES + 1), Code.RESOURCE_EXHAUSTED),
    ]:
        with pytest.raises(grpc.RpcError) as info:
            call(content, timeout=30)
        assert info.value.code() == code
    assert behind.predicted == []


def test_floods(behind, channel, service):
    call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    content = make_request().SerializeToString()
    zipped = grpc.Compression.Gzip
    for kwargs in (
        {"request": bytes(10**7), "compression": zipped},
        {"request": content, "metadata": [("x", "a" * 100_000)]},
        {"request": content, "metadata": [(f"x-{n}", "a") for n in range(5000)]},
    ):
        with pytest.raises(grpc.RpcError) as info:
            call(timeout=30, **kwargs)
        assert info.value.code() == Code.RESOURCE_EXHAUSTED
    for name in ("../m", "m\0", "n" * 90_000):
        with pytest.raises(grpc.RpcError) as info:
            service.Predict(make_request(name=name), timeout=30)
        assert info.value.code() == Code.NOT_FOUND
    assert behind.predicted == []
    service.Predict(make_request(), timeout=30)
    assert behind.predicted == [make_request()]


def test_more_requests_than_run_and_wait(behind, service):
    service.Predict(make_request(), timeout=30)
    behind.hanging.clear()
    futures = [service.Predict.future(make_request(), timeout=30) for _ in range(40)]
    # Of 8 threads: 8 requests run, 8 wait, and the others are refused at once.
    end = time.monotonic() + 20
    while sum(future.done() for future in futures) < 24 and time.monotonic() < end:
        time.sleep(0.01)
    behind.hanging.set()
    codes = [future.code() for future in futures]
    assert codes.count(Code.OK) == 16
    assert codes.count(Code.RESOURCE_EXHAUSTED) == 24
    service.Predict(make_request(), timeout=30)


@pytest.mark.parametrize("which", [{}, {"version": 4}, {"label": "stable"}])
def test_good_requests_and_answers_are_unchanged(behind, channel, service, which):
    request = make_request(**which)
    # As bytes: a field that the front does not know would be kept, too.
    call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    content = call(request.SerializeToString() + b"\xf8\x07\x01", timeout=30)
    (received,) = behind.predicted
    assert received.SerializeToString().endswith(b"\xf8\x07\x01")
    received.DiscardUnknownFields()
    assert received == request
    response = predict_pb2.PredictResponse.FromString(content)
    assert response.model_spec.version.value == 4
    np.testing.assert_array_equal(tf.make_ndarray(response.outputs["x"]), GOOD["x"])
    initial = make_request({"x": np.zeros((2, 1), "float32")}, "initial_state")
    assert service.Predict(initial, timeout=30).outputs["x"] == initial.inputs["x"]


def test_errors_of_the_server_are_unchanged(behind, service):
    behind.error = Code.UNAVAILABLE, "The batch scheduling queue is full"
    with pytest.raises(grpc.RpcError) as info:
        service.Predict(make_request(), timeout=30)
    assert (info.value.code(), info.value.details()) == behind.error
    assert len(behind.predicted) == 1
    with pytest.raises(grpc.RpcError) as info:
        service.Predict(make_request(name="nope"), timeout=30)
    assert info.value.code() == Code.NOT_FOUND
    assert "Servable not found" in info.value.details()
    assert len(behind.predicted) == 1


def test_metadata_is_kept_by_version(behind, service, monkeypatch):
    monkeypatch.setattr(front, "_LATEST_SECONDS", 0.2)
    for _ in range(3):
        service.Predict(make_request(version=4), timeout=30)
    assert len(behind.asked) == 1
    assert behind.asked[0].model_spec.version.value == 4
    service.Predict(make_request(version=5), timeout=30)
    assert [asked.model_spec.version.value for asked in behind.asked] == [4, 5]
    # The latest version may be another one a moment later.
    for _ in range(2):
        service.Predict(make_request(label="stable"), timeout=30)
    assert len(behind.asked) == 3
    time.sleep(0.3)
    service.Predict(make_request(label="stable"), timeout=30)
    service.Predict(make_request(version=4), timeout=30)
    assert len(behind.asked) == 4


def test_a_version_with_another_signature_takes_over(behind, service, monkeypatch):
    monkeypatch.setattr(front, "_LATEST_SECONDS", 3600)
    service.Predict(make_request(), timeout=30)
    behind.rank = 4
    new = make_request(x(2, 2, F, 2))
    service.Predict(new, timeout=30)
    assert behind.predicted == [make_request(), new]
    with pytest.raises(grpc.RpcError, match="must have the shape"):
        service.Predict(make_request(), timeout=30)
    assert len(behind.predicted) == 2


def test_other_methods(behind, channel, service):
    request = get_model_status_pb2.GetModelStatusRequest()
    status = model_service_pb2_grpc.ModelServiceStub(channel)
    (state,) = status.GetModelStatus(request, timeout=30).model_version_status
    assert (state.version, state.state) == (4, 30)
    request = get_model_metadata_pb2.GetModelMetadataRequest()
    request.model_spec.name = "m"
    answer = service.GetModelMetadata(request, timeout=30)
    assert answer.model_spec.version.value == 4
    for call, request in [
        (service.Classify, classification_pb2.ClassificationRequest()),
        (
            status.HandleReloadConfigRequest,
            model_management_pb2.ReloadConfigRequest(),
        ),
    ]:
        with pytest.raises(grpc.RpcError) as info:
            call(request, timeout=30)
        assert info.value.code() == Code.UNIMPLEMENTED


def test_deadline_of_the_client(behind, service):
    service.Predict(make_request(), timeout=20)
    (seconds,) = behind.seconds
    # gRPC rounds a deadline up, to at most 100 ms more, on its way over the wire; the
    # rest is for the clocks, which are read at different moments.
    assert 10 < seconds <= 20.1 + 0.01


def test_client_and_session_before_the_local_server(server, rng):
    frames = rng.normal(size=(2, 6, F)).astype("float32")
    expected, _ = oracle(2, frames, [6, 6])
    made, target = start(server.grpc_target)
    with ServingClient("rnn", grpc_target=target) as client:
        client.wait_until_available(30)
        outputs = client.predict({"x": frames, "lengths": [6, 6]})
        np.testing.assert_allclose(outputs["logits"], expected, atol=1e-5)
        session = client.session(2)
        found = [session.step(frames[:, 0])["logits"][:, None]]
        found.append(session.chunk(frames[:, 1:])["logits"])
        np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=1e-5)
    made.stop(None).wait(10)


def test_command(server):
    command = [sys.executable, "-m", "keras_bnrnn_client.front"]
    command += ["--target", server.grpc_target, "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        port = re.fullmatch(
            rf"checking requests on port (\d+) for {server.grpc_target}\n", line
        )[1]
        with ServingClient("rnn", grpc_target=f"127.0.0.1:{port}") as client:
            inputs = {"x": np.zeros([1, 2, F]), "lengths": [2]}
            assert client.predict(inputs)["logits"].shape == (1, 2, 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def test_arguments(capsys):
    for kwargs in ({"threads": 0}, {"max_request_bytes": True}):
        ((name, value),) = kwargs.items()
        with pytest.raises(ValueError, match=f"`{name}` must be.*{name}={value}"):
            front.make_front("h:1", "127.0.0.1:0", **kwargs)
    assert front.main(["--target", "h:1", "--listen", "nowhere:x"]) == 1
    assert "nowhere:x" in capsys.readouterr().err
    with pytest.raises(SystemExit) as info:
        front.main([])
    assert info.value.code == 2
    assert "--target" in capsys.readouterr().err
