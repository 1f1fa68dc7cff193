"""The server under load and under fire: many clients, bad requests, new versions."""

import concurrent.futures
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf

pytest.importorskip("tensorflow_serving")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from serving_backends import copy_version, embedded_only, is_embedded, served, wait_for
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

CLIENTS = 64
LOAD_SECONDS = 3
MALFORMED = 200
F = 4
MAX_BYTES = 300_000
KERNEL = np.random.default_rng(3).normal(size=(F, 2)).astype("float32")
Code = grpc.StatusCode
REFUSED = {
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.FAILED_PRECONDITION,
    Code.RESOURCE_EXHAUSTED,
    Code.OUT_OF_RANGE,
}


@pytest.fixture(autouse=True)
def seeded():
    """Nothing here is Keras', so that no session needs to be cleared."""


class Running(tf.Module):
    """Running sums over the valid frames, times the version: every step matters."""

    def __init__(self, version):
        super().__init__()
        self.kernel = tf.Variable(KERNEL * version)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, F], tf.float32, name="features"),
            tf.TensorSpec([None], tf.int32, name="lengths"),
        ]
    )
    def serve(self, features, lengths):
        batch = tf.debugging.assert_equal(tf.shape(lengths)[0], tf.shape(features)[0])
        with tf.control_dependencies([batch]):
            mask = tf.sequence_mask(lengths, tf.shape(features)[1], tf.float32)
        projected = tf.einsum("btf,fu->btu", features, self.kernel)
        return {"sums": tf.cumsum(projected * mask[..., None], axis=1)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, name="steps")])
    def slow(self, steps):
        count = tf.while_loop(lambda i: i < steps[0], lambda i: (i + 1,), [0])[0]
        return {"count": steps - steps + count}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A directory that no server reads, with versions 1 to 4."""
    root = tmp_path_factory.mktemp("exported")
    for version in range(1, 5):
        module = Running(version)
        signatures = {"serving_default": module.serve, "slow": module.slow}
        tf.saved_model.save(module, str(root / str(version)), signatures)
    return root


@pytest.fixture
def base(exported, tmp_path):
    directory = tmp_path / "frames"
    directory.mkdir()
    copy_version(exported / "1", directory)
    return directory


def random_inputs(rng):
    batch, timesteps = rng.integers(1, 5), rng.integers(1, 60)
    return {
        "features": rng.normal(size=(batch, timesteps, F)).astype("float32"),
        "lengths": rng.integers(0, timesteps + 1, batch).astype("int32"),
    }


def expected_sums(inputs, version=1):
    features, lengths = inputs["features"].astype("float64"), inputs["lengths"]
    mask = np.arange(features.shape[1]) < lengths[:, None]
    projected = (features @ (KERNEL * version).astype("float64")) * mask[..., None]
    return np.cumsum(projected, axis=1)


def predict_request(inputs, model="frames", signature="", version=None):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    if version is not None:
        request.model_spec.version.value = version
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return request


class RestClient:
    def __init__(self, backend):
        # Without TLS there is nothing to verify, and reading certificates is slow.
        self._client = httpx.Client(base_url=backend.rest_url, timeout=60, verify=False)

    def sums(self, inputs):
        body = {"inputs": {name: value.tolist() for name, value in inputs.items()}}
        # NaN goes out as the token that TensorFlow Serving reads.
        content = json.dumps(body)
        response = self._client.post("/v1/models/frames:predict", content=content)
        assert response.status_code == 200, response.text
        return np.array(response.json()["outputs"]), None

    def close(self):
        self._client.close()


class GrpcClient:
    def __init__(self, backend):
        # A connection of its own, as another process would have.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(backend.grpc_target, options)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)

    def sums(self, inputs):
        response = self._stub.Predict(predict_request(inputs), timeout=60)
        sums = tf.make_ndarray(response.outputs["sums"])
        return sums, response.model_spec.version.value

    def close(self):
        self._channel.close()


def ask_until(stop, backend, client_class, seed):
    """Asks and checks until `stop`; returns the number of answers and the versions."""
    rng = np.random.default_rng(seed)
    count, versions = 0, []
    with contextlib.closing(client_class(backend)) as client:
        while not stop.is_set():
            inputs = random_inputs(rng)
            sums, version = client.sums(inputs)
            if version is None:
                # REST does not say: the numbers must be those of one of them.
                expected = expected_sums(inputs)
                scale = np.sum(sums * expected) / max(np.sum(expected**2), 1e-12)
                version = max(round(scale), 1)
            expected = expected_sums(inputs, version)
            np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-3)
            if inputs["lengths"].any():
                versions.append(version)
            count += 1
    return count, versions


@contextlib.contextmanager
def load(backend, clients):
    """Clients that ask as long as the body runs; a list gets what they return."""
    stop, results = threading.Event(), []
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        futures = [
            pool.submit(
                ask_until, stop, backend, (RestClient, GrpcClient)[seed % 2], seed
            )
            for seed in range(clients)
        ]
        try:
            yield results
        finally:
            stop.set()
        results += [future.result(timeout=60) for future in futures]


@pytest.mark.parametrize(
    "seconds", [LOAD_SECONDS, pytest.param(20, marks=pytest.mark.slow)]
)
def test_many_clients_get_their_own_right_answers(base, seconds):
    with served({"frames": base}) as backend:
        with load(backend, CLIENTS) as results:
            time.sleep(seconds)
        counts = [count for count, _ in results]
        assert len(counts) == CLIENTS
        assert min(counts) > 0
        if backend.server is not None:
            text = httpx.get(f"{backend.rest_url}/metrics").text
            for protocol in ("rest", "grpc"):
                line = f'requests_in_flight{{protocol="{protocol}"}} 0.0'
                assert line in text
        print(f"{sum(counts)} answers in {seconds} s, {CLIENTS} clients")


def test_version_replaced_under_load_loses_no_request(base, exported):
    with served({"frames": base}) as backend:
        directory = backend.models["frames"]
        with load(backend, 8) as results:
            for version in (2, 3, 4):
                copy_version(exported / str(version), directory)
                with contextlib.closing(GrpcClient(backend)) as client:
                    inputs = random_inputs(np.random.default_rng(version))
                    wait_for(lambda: client.sums(inputs)[1] == version)  # noqa: B023
                shutil.rmtree(directory / str(version - 1))
            time.sleep(0.3)
        seen = set()
        for count, versions in results:
            assert count > 0
            # Nobody is sent back to an old version.
            assert versions == sorted(versions)
            assert versions[-1] == 4
            seen |= set(versions)
        assert seen == {1, 2, 3, 4}


def rest_cases(rng):
    """Yields kind, path, body and whether TensorFlow Serving refuses it, too."""
    path = "/v1/models/frames:predict"
    inputs = {name: value.tolist() for name, value in random_inputs(rng).items()}
    features, lengths = inputs["features"], inputs["lengths"]
    dumped = json.dumps({"inputs": inputs}).encode()
    good = {"features": features[0], "lengths": lengths[0]}

    def columns(**changes):
        return json.dumps({"inputs": inputs | changes}).encode()

    yield "string for float", path, columns(features=[[["x"] * F]]), True
    yield "float for int", path, columns(lengths=[1.5] * len(lengths)), True
    yield "too large for int", path, columns(lengths=[2**40] * len(lengths)), True
    yield "rank", path, columns(features=features[0]), False
    yield "wrong size", path, columns(features=[[[1.0] * (F + 1)]]), True
    yield "ragged", path, columns(features=[[[1.0] * F], [[1.0]]]), True
    yield "unequal rows", path, columns(lengths=lengths + [1, 1]), True
    rows = [good, {**good, "features": good["features"] + [[1.0] * F]}]
    yield "ragged rows", path, json.dumps({"instances": rows}).encode(), True
    yield "missing input", path, json.dumps({"inputs": features}).encode(), True
    yield "null", path, columns(lengths=[None]), True
    yield "no form", path, b"{}", True
    cut = dumped[: int(rng.integers(1, len(dumped)))]
    yield "truncated JSON", path, cut, True
    yield "not JSON", path, rng.bytes(int(rng.integers(1, 200))), True
    yield "deep", path, b'{"inputs": ' + b"[" * 100_000, True
    yield "huge", path, dumped.ljust(MAX_BYTES + 1), False
    signature = f"s{rng.integers(1000)}"
    body = json.dumps({"signature_name": signature, "inputs": inputs}).encode()
    yield "unknown signature", path, body, True
    yield "unknown model", f"/v1/models/m{rng.integers(1000)}:predict", dumped, True
    version = f"/v1/models/frames/versions/{rng.integers(2, 2**60)}:predict"
    yield "unknown version", version, dumped, True
    yield "version beyond int64", path.replace(":", f"/versions/{2**70}:"), dumped, True
    yield "unknown label", path.replace(":", "/labels/x:"), dumped, True
    yield "unknown path", f"/v1/{rng.integers(1000)}", dumped, True


def grpc_cases(rng):
    """Yields kind, bytes of a request and whether TensorFlow Serving refuses it."""

    def changed(**changes):
        return predict_request(random_inputs(rng) | changes)

    def spoiled(spoil):
        request = predict_request(random_inputs(rng))
        spoil(request, request.inputs["features"])
        return request

    def claim(size):
        def spoil(request, features):
            features.ClearField("tensor_content")
            features.float_val.append(1.0)
            features.tensor_shape.dim[1].size = size

        return spoil

    def truncate(request, features):
        cut = int(rng.integers(1, len(features.tensor_content)))
        features.tensor_content = features.tensor_content[:cut]

    def drop(request, features):
        del request.inputs["lengths"]

    def set_dtype(number):
        def spoil(request, features):
            features.dtype = number

        return spoil

    def resize(size):
        def spoil(request, features):
            features.tensor_shape.dim[2].size = size

        return spoil

    ones = np.ones((1, 3, F))
    for kind, request, everywhere in [
        ("float64 for float32", changed(features=ones), True),
        ("int64 for int32", changed(lengths=np.ones(1, "int64")), True),
        ("string", changed(features=np.array([["a"]], object)), True),
        ("rank", changed(features=ones[0].astype("float32")), True),
        ("wrong size", changed(features=ones[..., 1:].astype("float32")), True),
        ("unequal rows", changed(lengths=np.ones(9, "int32")), True),
        ("extra input", changed(speed=np.float32(1)), True),
        ("missing input", spoiled(drop), True),
        ("dtype 0", spoiled(set_dtype(0)), True),
        ("dtype 99", spoiled(set_dtype(99)), True),
        ("truncated tensor", spoiled(truncate), True),
        ("negative size", spoiled(resize(-1)), True),
        ("another size", spoiled(resize(F + 1)), True),
        ("claims much", spoiled(claim(2**40)), True),
        ("claims 4 GB", spoiled(claim(2**28)), False),
        ("claims beyond int64", spoiled(claim(2**62)), True),
        ("huge", changed(features=np.zeros((1, MAX_BYTES, F), "float32")), False),
        ("unknown model", predict_request({}, f"m{rng.integers(1000)}"), True),
        ("no model", predict_pb2.PredictRequest(), True),
        ("unknown signature", predict_request({}, signature="nope"), True),
        ("init op", predict_request({}, signature="__saved_model_init_op"), False),
        ("unknown version", predict_request({}, version=2**40), True),
        ("negative version", predict_request({}, version=-1), True),
    ]:
        yield kind, request.SerializeToString(), everywhere
    content = predict_request(random_inputs(rng)).SerializeToString()
    yield "truncated protobuf", content[: int(rng.integers(1, len(content)))], True
    yield "no protobuf", b"\xff" + rng.bytes(int(rng.integers(1, 200))), True


def test_malformed_requests_are_refused_and_the_server_goes_on(base):
    rng = np.random.default_rng(99)
    refused = {"rest": 0, "grpc": 0}
    with served({"frames": base}, max_request_bytes=MAX_BYTES) as backend:
        clients = [RestClient(backend), GrpcClient(backend)]
        http = httpx.Client(base_url=backend.rest_url, timeout=30, verify=False)
        channel = grpc.insecure_channel(backend.grpc_target)
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        with http, channel:
            while sum(refused.values()) < MALFORMED:
                for kind, path, body, everywhere in rest_cases(rng):
                    if everywhere or is_embedded:
                        response = http.post(path, content=body)
                        assert 400 <= response.status_code < 500, (kind, response.text)
                        if kind != "version beyond int64":  # has an empty body
                            assert response.json()["error"], kind
                        refused["rest"] += 1
                for kind, content, everywhere in grpc_cases(rng):
                    if everywhere or is_embedded:
                        with pytest.raises(grpc.RpcError) as error_info:
                            call(content, timeout=30)
                        # TensorFlow Serving calls bytes that are no protobuf internal.
                        allowed = REFUSED | (set() if is_embedded else {Code.INTERNAL})
                        assert error_info.value.code() in allowed, (
                            kind,
                            error_info.value,
                        )
                        assert error_info.value.details(), kind
                        refused["grpc"] += 1
                for client in clients:
                    inputs = random_inputs(rng)
                    sums, _ = client.sums(inputs)
                    np.testing.assert_allclose(sums, expected_sums(inputs), atol=1e-3)
        for client in clients:
            client.close()
    assert min(refused.values()) >= MALFORMED // 3


def test_nan_is_answered(base):
    inputs = random_inputs(np.random.default_rng(5))
    inputs["features"][0, 0, 0] = np.nan
    inputs["lengths"][:] = inputs["features"].shape[1]
    with served({"frames": base}) as backend:
        for client_class in (RestClient, GrpcClient):
            with contextlib.closing(client_class(backend)) as client:
                sums, _ = client.sums(inputs)
            assert np.isnan(sums[0]).all()
            np.testing.assert_allclose(sums[1:], expected_sums(inputs)[1:], atol=1e-3)


@embedded_only
def test_bytes_that_are_no_http_and_clients_that_leave(base):
    with served({"frames": base}) as backend:
        address = ("127.0.0.1", backend.server.port)
        for content, answered in [
            (b"\x00\xff\x16\x03\x01 garbage\r\n\r\n", True),
            (
                b"POST /v1/models/frames:predict HTTP/1.1\r\nContent-Length: x\r\n\r\n",
                1,
            ),
            # Promises more than it sends, and leaves.
            (
                b"POST /v1/models/frames:predict HTTP/1.1\r\nHost: x\r\n"
                b"Content-Length: 99\r\n\r\n{",
                False,
            ),
        ]:
            with socket.create_connection(address, timeout=30) as connection:
                connection.sendall(content)
                if answered:
                    assert b" 400 " in connection.recv(100)
        inputs = random_inputs(np.random.default_rng(6))
        with contextlib.closing(RestClient(backend)) as client:
            sums, _ = client.sums(inputs)
        np.testing.assert_allclose(sums, expected_sums(inputs), atol=1e-3)


@embedded_only
def test_sigterm_waits_for_requests_in_flight(base):
    command = [sys.executable, "-m", "keras_bnrnn.local_server", f"frames={base}"]
    command += ["--port", "0", "--grpc-port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    steps = 250_000
    try:
        lines = [process.stdout.readline().split() for _ in range(3)]
        assert lines[0][:4] == ["serving", "frames", "version", "1"]
        url, target = lines[0][-1], lines[1][-1]
        metrics = lines[2][-1]
        body = {"signature_name": "slow", "instances": [steps]}
        request = predict_request({"steps": np.int32([steps])}, signature="slow")

        def in_flight(protocol):
            line = f'requests_in_flight{{protocol="{protocol}"}} 1.0'
            return line in httpx.get(metrics).text

        with (
            grpc.insecure_channel(target) as channel,
            concurrent.futures.ThreadPoolExecutor() as pool,
        ):
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            over_rest = pool.submit(httpx.post, f"{url}:predict", json=body, timeout=60)
            over_grpc = pool.submit(stub.Predict, request, timeout=60)
            wait_for(lambda: in_flight("rest") and in_flight("grpc"))
            process.send_signal(signal.SIGTERM)
            refused = []

            def is_refused():
                with contextlib.suppress(httpx.TransportError):
                    httpx.get(url)
                    return False
                refused.append(over_rest.done() or over_grpc.done())
                return True

            wait_for(is_refused)
            assert over_rest.result(60).json() == {"predictions": [steps]}
            counted = over_grpc.result(60).outputs["count"]
            assert tf.make_ndarray(counted).tolist() == [steps]
        # New ones were refused while those in flight were still computed.
        assert refused == [False]
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
