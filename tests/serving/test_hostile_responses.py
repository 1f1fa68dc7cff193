"""The client against servers that answer wrongly on purpose."""

import concurrent.futures
import contextlib
import json
import socket
import threading
import time
import zlib

import pytest
import tensorflow as tf
from helpers import bounded_memory

pytest.importorskip("httpx")
pytest.importorskip("grpc")
pytest.importorskip("tensorflow_serving")

import grpc
from keras_bnrnn_client import (
    DeadlineExceeded,
    InvalidRequest,
    InvalidResponse,
    ServingClient,
    ServingError,
    SignatureNotFound,
    Unavailable,
)
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

MAX_BYTES = 100_000


@pytest.fixture(autouse=True)
def seeded():
    """Nothing here is Keras', so that no session needs to be cleared."""


def metadata(outputs):
    def infos(shapes, dtype="DT_FLOAT"):
        return {
            name: {
                "dtype": dtype,
                "tensor_shape": {
                    "dim": [{"size": str(size)} for size in sizes],
                    "unknown_rank": False,
                },
            }
            for name, sizes in shapes.items()
        }

    signatures = {
        "serving_default": {"inputs": infos({"x": [-1]}), "outputs": infos(outputs)},
        "text": {"inputs": infos({"x": [-1]}), "outputs": infos(outputs, "DT_STRING")},
        "count": {"inputs": infos({"x": [-1]}), "outputs": infos(outputs, "DT_INT32")},
    }
    return {
        "model_spec": {"version": "3"},
        "metadata": {"signature_def": {"signature_def": signatures}},
    }


def http(content, status="200 OK", *headers, length=None):
    length = len(content) if length is None else length
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {length}", "Connection: close"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + content


class HttpDouble:
    """Answers GET with `metadata`, and POST with the parts of `answer`."""

    def __init__(self):
        self.metadata = http(json.dumps(metadata({"y": [-1, 2]})).encode())
        self.answer, self.requests = [], []
        self.stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self):
        self.stopping.set()
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(
                    target=self._serve, args=[connection], daemon=True
                ).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection:
            received = b""
            while b"\r\n\r\n" not in received or (
                received.startswith(b"POST") and not received.endswith(b"}")
            ):
                received += connection.recv(2**16)
            self.requests.append(received)
            parts = self.answer if received.startswith(b"POST") else [self.metadata]
            for part in parts:
                connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)  # so that the end of the connection is no reset


@pytest.fixture
def double():
    started = HttpDouble()
    yield started
    started.stop()


@contextlib.contextmanager
def connect(double, **kwargs):
    arguments = {"retries": 0, "timeout": 20, "max_response_bytes": MAX_BYTES, **kwargs}
    with ServingClient("m", rest_url=double.url, **arguments) as client:
        client.metadata()
        yield client


def assert_answers(double):
    """The client understands a right response."""
    double.answer = [http(b'{"outputs": [[1, 2], [3, 4.5]]}')]
    with connect(double) as client:
        assert client.predict({"x": [1]})["y"].tolist() == [[1, 2], [3, 4.5]]


def compressed(size, wbits):
    """Returns `size` spaces in compressed form, without holding them in memory."""
    compressor = zlib.compressobj(wbits=wbits)
    parts = [compressor.compress(b" " * 10**6) for _ in range(size // 10**6)]
    return b"".join([*parts, compressor.flush()])


def outputs(values):
    return http(json.dumps({"outputs": values}).encode())


WRONG = {
    "empty": (http(b""), "is not JSON: b''"),
    "cut": (http(b'{"outputs": [[1'), "is not JSON"),
    "HTML": (http(b"<html>"), "is not JSON: b'<html>'"),
    "not UTF-8": (http(b'{"outputs": "\xff"}'), "is not JSON"),
    "nested deeply": (http(b"[" * 90_000), "is not JSON.*recursion"),
    "list": (http(b"[1]"), "cannot be read: TypeError"),
    "null": (http(b"null"), "cannot be read: TypeError"),
    "no outputs": (http(b"{}"), "cannot be read: KeyError: 'outputs'"),
    "rows": (http(b'{"predictions": [[1, 2]]}'), "cannot be read: KeyError"),
    "another rank": (outputs([1, 2]), r"`y` must have.*\(None, 2\).*\(2,\)"),
    "another size": (outputs([[1, 2, 3]]), r"`y` must have.*\(None, 2\).*\(1, 3\)"),
    "scalar": (outputs(5), r"`y` must have the shape.*\(\)"),
    "ragged": (outputs([[1, 2], [3]]), "cannot be read: ValueError"),
    "text": (outputs([["a", "b"]]), "cannot be read: ValueError.*'a'"),
    "object": (outputs({"y": [[1, 2]]}), "cannot be read: TypeError"),
    "null in it": (outputs([[1, {}]]), "cannot be read: TypeError"),
    "huge integer": (outputs([[1, 10**400]]), "cannot be read: OverflowError"),
    "integer of 5000 digits": (
        http(b'{"outputs": [[1, %s]]}' % (b"9" * 5000)),
        "is not JSON.*digits",
    ),
    "gzip that is none": (http(b"{}", "200 OK", "Content-Encoding: gzip"), "gzip, as"),
    "unknown encoding": (http(b"{}", "200 OK", "Content-Encoding: br"), "'br'"),
    "two encodings": (
        http(b"{}", "200 OK", "Content-Encoding: gzip, gzip"),
        "'gzip, gzip'",
    ),
    "larger than the limit": (http(b" " * (MAX_BYTES + 1)), "at most 100000 bytes"),
    "error larger than the limit": (
        http(b" " * (MAX_BYTES + 1), "500 Internal Server Error"),
        "at most 100000 bytes",
    ),
}


class TestRest:
    @pytest.mark.parametrize("case", WRONG)
    def test_wrong_responses(self, double, case):
        answer, message = WRONG[case]
        double.answer = [answer]
        with (
            connect(double) as client,
            pytest.raises(InvalidResponse, match=message) as info,
        ):
            client.predict({"x": [1]})
        assert not info.value.retriable
        too_large = "larger than" in case
        assert info.value.code == ("RESOURCE_EXHAUSTED" if too_large else "INTERNAL")
        if too_large:
            assert "`max_response_bytes`" in str(info.value)
        assert_answers(double)

    def test_wrong_outputs(self, double):
        both = {"y": [-1], "z": [-1]}
        double.metadata = http(json.dumps(metadata(both)).encode())
        for values, message in [
            ({"y": [1.0]}, r"outputs \['y', 'z'\]. Received: \['y'\]"),
            ({"y": [1.0], "z": [1.0], "../a": [1]}, r"Received: \['../a', 'y', 'z'\]"),
            ([1.0], "must have the outputs.*Received"),
        ]:
            double.answer = [outputs(values)]
            with (
                connect(double) as client,
                pytest.raises(InvalidResponse, match=message),
            ):
                client.predict({"x": [1]})
        double.metadata = http(json.dumps(metadata({"y": [-1]})).encode())
        for signature, value, message in [
            ("text", {"b64": 5}, "TypeError"),
            ("text", {"b64": "=x"}, "cannot be read: Error"),
            ("text", {"b": ""}, "KeyError: 'b64'"),
            ("count", 2**31, "OverflowError"),
            ("count", "a", "ValueError"),
        ]:
            double.answer = [outputs([value])]
            with (
                connect(double) as client,
                pytest.raises(InvalidResponse, match=message),
            ):
                client.predict({"x": [1]}, signature)

    def test_wrong_metadata_and_status(self, double):
        good = metadata({"y": [-1]})
        tensor = good["metadata"]["signature_def"]["signature_def"]["text"]["inputs"]
        for change in [
            lambda: tensor["x"]["tensor_shape"].update(dim=[{"size": "x"}]),
            lambda: tensor["x"].pop("tensor_shape"),
            lambda: good["metadata"].update(signature_def=[]),
            lambda: good.pop("metadata"),
        ]:
            change()
            double.metadata = http(json.dumps(good).encode())
            with (
                ServingClient("m", rest_url=double.url) as client,
                pytest.raises(InvalidResponse, match="cannot be read"),
            ):
                client.metadata()
        for state in ([], [{"version": "1"}], "x", None):
            content = json.dumps({"model_version_status": state}).encode()
            double.metadata = http(content)
            with ServingClient("m", rest_url=double.url) as client:
                if state == []:
                    assert client.status() == []
                    continue
                with pytest.raises(InvalidResponse, match="cannot be read"):
                    client.status()

    def test_response_of_just_the_limit(self, double):
        content = b'{"outputs": [[1, 2]]}'.ljust(MAX_BYTES)
        compressor = zlib.compressobj(wbits=31)
        zipped = compressor.compress(content) + compressor.flush()
        for answer in (
            http(content),
            http(zipped, "200 OK", "Content-Encoding: gzip"),
        ):
            double.answer = [answer]
            with connect(double) as client:
                assert client.predict({"x": [1]})["y"].tolist() == [[1, 2]]
        with (
            connect(double, max_response_bytes=MAX_BYTES - 1) as client,
            pytest.raises(InvalidResponse, match=f"at most {MAX_BYTES - 1} bytes"),
        ):
            client.predict({"x": [1]})

    def test_default_limit(self, double):
        double.answer = [http(b" " * 10**6, length=10**9)] + [b" " * 10**6] * 999
        with (
            ServingClient("m", rest_url=double.url) as client,
            pytest.raises(InvalidResponse, match=f"at most {64 * 1024**2} bytes"),
        ):
            client.predict({"x": [1]})

    def test_gzip_bomb(self, double):
        body = compressed(90_000_000, wbits=31)
        double.answer = [http(body, "200 OK", "Content-Encoding: gzip")]
        # httpx unpacks 64 KiB at once, which may be a thousand times as much.
        with (
            bounded_memory(megabytes=150),
            connect(double) as client,
            pytest.raises(InvalidResponse, match="at most 100000 bytes"),
        ):
            client.predict({"x": [1]})
        double.answer = [
            http(compressed(10**6, 15), "200 OK", "Content-Encoding: deflate")
        ]
        with connect(double) as client, pytest.raises(InvalidResponse, match="deflate"):
            client.predict({"x": [1]})

    @pytest.mark.parametrize("framing", ["chunked", "length", "close"])
    def test_response_that_never_ends(self, double, framing):
        def forever():
            headers = {
                "chunked": "Transfer-Encoding: chunked",
                "length": f"Content-Length: {10**15}",
                "close": "Connection: close",
            }
            yield f"HTTP/1.1 200 OK\r\n{headers[framing]}\r\n\r\n".encode()
            while not double.stopping.is_set():
                yield {"chunked": b"4000\r\n%s\r\n"}.get(framing, b"%s") % bytes(0x4000)

        double.answer = forever()
        start = time.monotonic()
        with (
            bounded_memory(megabytes=40),
            connect(double) as client,
            pytest.raises(InvalidResponse, match="at most 100000 bytes"),
        ):
            client.predict({"x": [1]})
        assert time.monotonic() - start < 10

    def test_headers(self, double):
        for answer in (
            b"HTTP/1.1 200 OK\r\nX: " + b"a" * 500_000,
            b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 100_000 + b"\r\n",
            b"HTTP/1.1 abc\r\n\r\n",
            b"\x00" * 1000,
            b"\x16\x03\x01\x02\x00" * 100,
            b"",
            http(b"{}", "200 OK", "Content-Length: 3"),
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            http(b"{", length=99),
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ):
            double.answer = [answer]
            with connect(double) as client, pytest.raises(Unavailable):
                client.predict({"x": [1]})
        assert_answers(double)

    def test_server_that_never_answers(self, double):
        def silence():
            double.stopping.wait(20)
            yield b""

        double.answer = silence()
        start = time.monotonic()
        with connect(double) as client, pytest.raises(DeadlineExceeded):
            client.predict({"x": [1]}, timeout=0.3)
        assert time.monotonic() - start < 10

    def test_redirects_are_not_followed(self, double):
        other = HttpDouble()
        for status in ("301 Moved", "302 Found", "307 Temporary", "308 Permanent"):
            double.answer = [http(b"{}", status, f"Location: {other.url}/secret")]
            with (
                connect(double) as client,
                pytest.raises(ServingError, match=r"redirects to.*secret.*`rest_url`"),
            ):
                client.predict({"x": [1]})
        assert other.requests == []
        other.stop()

    def test_errors_that_are_no_text(self, double):
        for value in ({"error": {"a": 1}}, {"error": None}, [1], "text", {}):
            content = json.dumps(value).encode()
            double.answer = [http(content, "400 Bad Request")]
            with connect(double) as client, pytest.raises(InvalidRequest):
                client.predict({"x": [1]})
        assert_answers(double)

    def test_new_version_with_another_output(self, double):
        with connect(double) as client:
            # The signature of a new version is asked for after a mismatch.
            double.metadata = http(json.dumps(metadata({"y": [-1, 3]})).encode())
            double.answer = [outputs([[1, 2, 3]])]
            assert client.predict({"x": [1]})["y"].tolist() == [[1, 2, 3]]


class Prediction(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Answers with `response`."""

    def __init__(self):
        self.metadata = get_model_metadata_pb2.GetModelMetadataResponse()
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for name, dtype in [("serving_default", tf.float32), ("text", tf.string)]:
            signature = signatures.signature_def[name]
            signature.inputs["x"].dtype = tf.float32.as_datatype_enum
            signature.inputs["x"].tensor_shape.dim.add(size=-1)
            signature.outputs["y"].dtype = dtype.as_datatype_enum
            signature.outputs["y"].tensor_shape.dim.add(size=-1)
        self.metadata.metadata["signature_def"].Pack(signatures)
        self.response = predict_pb2.PredictResponse()

    def GetModelMetadata(self, request, context):
        return self.metadata

    def Predict(self, request, context):
        return self.response


class Models(model_service_pb2_grpc.ModelServiceServicer):
    pass


@pytest.fixture(scope="module")
def service():
    made = Prediction()
    started = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(made, started)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(Models(), started)
    made.target = f"127.0.0.1:{started.add_insecure_port('127.0.0.1:0')}"
    started.start()
    yield made
    started.stop(None).wait(10)


def respond(service, sizes, values=(1.0,), dtype=tf.float32, name="y", **fields):
    service.response.Clear()
    proto = service.response.outputs[name]
    proto.dtype = dtype.as_datatype_enum
    for size in sizes:
        proto.tensor_shape.dim.add(size=size)
    field = proto.string_val if dtype == tf.string else proto.float_val
    field.extend(values)
    for key, value in fields.items():
        setattr(proto, key, value)


@pytest.fixture
def client(service):
    with ServingClient(
        "m", grpc_target=service.target, retries=0, max_response_bytes=MAX_BYTES
    ) as client:
        yield client


class TestGrpc:
    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"sizes": [2**40]}, "at most 100000 bytes"),
            ({"sizes": [2**31, 2**33]}, "at most 100000 bytes"),
            ({"sizes": [MAX_BYTES // 4 + 1]}, "at most 100000 bytes"),
            ({"sizes": [-1]}, r"sizes from 0 on.*\[-1\]"),
            ({"sizes": [1] * 300}, "sizes from 0 on"),
            ({"sizes": [1, 1]}, r"`y` must have the shape.*\(1, 1\)"),
            ({"sizes": []}, r"`y` must have the shape.*\(\)"),
            ({"sizes": [2], "values": [1.0] * 3}, "cannot be read: ValueError"),
            ({"sizes": [2], "tensor_content": b"abc"}, "cannot be read: ValueError"),
            ({"sizes": [2], "tensor_content": b"abcd"}, "cannot be read: ValueError"),
            ({"sizes": [1], "dtype": tf.float64}, "`y` must be float32.*float64"),
            ({"sizes": [1], "dtype": tf.string, "values": [b""]}, "float32.*string"),
            ({"sizes": [1], "name": "z"}, r"outputs \['y'\]. Received: \['z'\]"),
        ],
    )
    def test_wrong_responses(self, service, client, kwargs, message):
        respond(service, **kwargs)
        with (
            bounded_memory(megabytes=40),
            pytest.raises(InvalidResponse, match=message) as info,
        ):
            client.predict({"x": [1]})
        assert not info.value.retriable
        respond(service, [2], [1.0, 2.5])
        assert client.predict({"x": [1]})["y"].tolist() == [1.0, 2.5]

    def test_strings(self, service, client):
        # One value stands for all.
        respond(service, [MAX_BYTES], [b""], tf.string)
        with (
            bounded_memory(megabytes=40),
            pytest.raises(InvalidResponse, match="at most 100000 bytes"),
        ):
            client.predict({"x": [1]}, "text")
        respond(service, [2], [b"a", b"\xff"], tf.string)
        assert client.predict({"x": [1]}, "text")["y"].tolist() == [b"a", b"\xff"]

    def test_unknown_dtype(self, service, client):
        respond(service, [1], dtype=tf.float32)
        service.response.outputs["y"].dtype = 98
        with pytest.raises(InvalidResponse, match="cannot be read: TypeError"):
            client.predict({"x": [1]})

    def test_message_that_is_too_large(self, service, client):
        for limit in (64 * 1024**2, 10**6):
            # The first is the default.
            kwargs = {"max_response_bytes": limit} if limit == 10**6 else {}
            respond(service, [2], tensor_content=bytes(limit + 1))
            with (
                ServingClient("m", grpc_target=service.target, **kwargs) as limited,
                pytest.raises(InvalidResponse, match=f"at most {limit} bytes") as info,
            ):
                limited.predict({"x": [1]})
            assert info.value.code == "RESOURCE_EXHAUSTED"
            assert "`max_response_bytes`" in str(info.value)
        # Limits beyond those of gRPC are no error.
        respond(service, [1])
        with ServingClient(
            "m", grpc_target=service.target, max_response_bytes=2**40
        ) as unlimited:
            assert unlimited.predict({"x": [1]})["y"].tolist() == [1.0]

    def test_wrong_metadata(self, service):
        good = get_model_metadata_pb2.GetModelMetadataResponse()
        good.CopyFrom(service.metadata)
        for spoil in (
            lambda m: m.metadata.clear(),
            lambda m: setattr(m.metadata["signature_def"], "type_url", "a/b"),
            lambda m: setattr(m.metadata["signature_def"], "value", b"\xff\xff"),
        ):
            service.metadata.CopyFrom(good)
            spoil(service.metadata)
            with (
                ServingClient("m", grpc_target=service.target) as client,
                pytest.raises(InvalidResponse, match="cannot be read"),
            ):
                client.metadata()
        signatures = get_model_metadata_pb2.SignatureDefMap()
        signatures.signature_def["a"].inputs["x"].dtype = 97
        service.metadata.metadata["signature_def"].Pack(signatures)
        with ServingClient("m", grpc_target=service.target) as client:
            with pytest.raises(InvalidResponse, match="cannot be read"):
                client.metadata()
            service.metadata.CopyFrom(good)
            with pytest.raises(SignatureNotFound):
                client.predict({"x": [1]}, "nope")
