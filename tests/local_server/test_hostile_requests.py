"""Hostile requests to the local server: each is refused, and the server goes on."""

import concurrent.futures
import contextlib
import gzip
import json
import re
import socket
import time
import zlib

import numpy as np
import pytest
import tensorflow as tf
from helpers import bounded_memory

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("tensorflow_serving")
pytest.importorskip("prometheus_client")

import grpc  # noqa: E402
from tensorflow_serving.apis import predict_pb2  # noqa: E402

from keras_bnrnn.local_server import ModelServer, grpc_service  # noqa: E402
from keras_bnrnn.local_server import server as server_module  # noqa: E402

MAX_BYTES = 100_000
MAX_CONNECTIONS, MAX_REQUESTS = 30, 8
BODY_SECONDS, IDLE_SECONDS = 0.5, 1
PATH = b"/v1/models/m:predict"
GOOD = b'{"instances": [[1, 2, 3]]}'
ANSWER = {"predictions": [[2.0, 4.0, 6.0]]}
HTTP = httpx.Client(timeout=30, verify=False)
Code = grpc.StatusCode


@pytest.fixture(autouse=True)
def seeded():
    """Nothing here is Keras', so that no session needs to be cleared."""


class Model(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32, name="x")])
    def double(self, x):
        return {"y": 2.0 * x}

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32, name="x")])
    def any_rank(self, x):
        return {"y": 2.0 * x}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="x")])
    def text(self, x):
        return {"y": x}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, name="x")])
    def slow(self, x):
        count = tf.while_loop(lambda i: i < x[0], lambda i: (i + 1,), [0])[0]
        return {"y": x - x + count}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    model = Model()
    names = ["any_rank", "text", "slow"]
    signatures = {name: getattr(model, name) for name in names}
    signatures["serving_default"] = model.double
    tf.saved_model.save(model, str(directory / "1"), signatures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "_MAX_CONNECTIONS", MAX_CONNECTIONS)
        patch.setattr(server_module, "_BODY_SECONDS", BODY_SECONDS)
        patch.setattr(server_module, "_IDLE_SECONDS", IDLE_SECONDS)
        patch.setattr(grpc_service, "_MAX_REQUESTS", MAX_REQUESTS)
        with ModelServer(
            {"m": directory},
            port=0,
            grpc_port=0,
            max_request_bytes=MAX_BYTES,
            poll_seconds=0,
        ) as started:
            yield started


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.grpc_target) as channel:
        yield channel


@pytest.fixture
def call(channel):
    return channel.unary_unary("/tensorflow.serving.PredictionService/Predict")


def connect(server, port=None):
    return socket.create_connection(("127.0.0.1", port or server.port), timeout=30)


def read_all(connection):
    """Reads until the server closes the connection."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(2**16):
            received += chunk
    return bytes(received)


def exchange(server, content):
    """Sends bytes and returns the bytes of all responses."""
    with connect(server) as connection:
        # The server may refuse and close before it has read everything.
        with contextlib.suppress(ConnectionError):
            connection.sendall(content)
        return read_all(connection)


def statuses(received):
    assert b"Traceback" not in received
    assert b'File "' not in received
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", received)]


def post(path=PATH, body=GOOD, headers=(), length=None, host=b"x", connection=b"close"):
    length = len(body) if length is None else length
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: " + host, *headers]
    lines += [b"Connection: " + connection]
    if length != "none":
        lines += [b"Content-Length: " + str(length).encode()]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(*chunks, headers=(), end=b"0\r\n\r\n", **kwargs):
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    headers = [*headers, b"Transfer-Encoding: chunked"]
    return post(body=body + end, headers=headers, length="none", **kwargs)


def message(sizes=(1, 3), values=(1.0, 2.0, 3.0), signature="", **fields):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "m"
    request.model_spec.signature_name = signature
    proto = request.inputs["x"]
    proto.dtype = fields.pop("dtype", tf.float32.as_datatype_enum)
    for size in sizes:
        proto.tensor_shape.dim.add(size=size)
    proto.float_val.extend(values)
    for name, value in fields.items():
        if isinstance(value, (list, tuple)):
            getattr(proto, name).extend(value)
        else:
            setattr(proto, name, value)
    return request.SerializeToString()


def doubled(content):
    response = predict_pb2.PredictResponse.FromString(content)
    return tf.make_ndarray(response.outputs["y"]).tolist()


def assert_serves(server):
    """The server answers good requests with the right values over both protocols."""
    # One client for all, since making one reads certificates.
    response = HTTP.post(f"{server.url}/v1/models/m:predict", content=GOOD)
    assert (response.status_code, response.json()) == (200, ANSWER)
    with grpc.insecure_channel(server.grpc_target) as channel:
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        assert doubled(call(message(), timeout=30)) == [[2.0, 4.0, 6.0]]


def bomb(size):
    """Returns `size` zeros as gzip, without holding them in memory."""
    compressor = zlib.compressobj(wbits=31)
    parts = [compressor.compress(bytes(10**6)) for _ in range(size // 10**6)]
    return b"".join([*parts, compressor.flush()])


def nested(depth, opening=b"[", closing=b"]"):
    return opening * depth + b"1" + closing * depth


PATHS = {
    "parent": (b"/v1/models/../m:predict", 400),
    "encoded parent": (b"/v1/models/%2e%2e%2fm:predict", 400),
    "parent as version": (b"/v1/models/m/versions/..:predict", 400),
    "encoded slash": (b"/v1/models/m%2fversions%2f1%2f..:predict", 400),
    "parent as label": (b"/v1/models/m/labels/..:predict", 400),
    "absolute file": (b"/v1/models//etc/passwd:predict", 400),
    "backslashes": (b"/v1/models/..\\..\\m:predict", 404),
    "NUL": (b"/v1/models/m%00:predict", 404),
    "end of line": (b"/v1/models/m%0d%0aX-Y:%20z:predict", 400),
    "not UTF-8": (b"/v1/models/%ff%fe:predict", 404),
    "not ASCII": (b"/v1/models/m\xc3\xa9:predict", 400),
    "broken encoding": (b"/v1/models/m%zz%:predict", 404),
    "long name": (b"/v1/models/" + b"a" * 12_000 + b":predict", 404),
    "longer than headers may be": (b"/v1/models/" + b"a" * 500_000, 400),
    "version of 5000 digits": (b"/v1/models/m/versions/" + b"9" * 5000, 400),
    "version with sign": (b"/v1/models/m/versions/-1:predict", 400),
    "version in other digits": (b"/v1/models/m/versions/%D9%A1:predict", 400),
    "address": (b"http://example.org/v1/models/m:predict", 404),
    "star": (b"*", 404),
}

BODIES = {
    "empty": b"",
    "null": b"null",
    "UTF-16": GOOD.decode().encode("utf-16"),
    "not UTF-8": b'{"instances": [[1, 2, "\xff\xfe"]]}',
    "lone surrogate": b'{"instances": [[1, 2, "\\ud800"]]}',
    "surrogate in a name": b'{"signature_name": "\\udfff", "instances": [[1, 2, 3]]}',
    "integer of 50000 digits": b'{"instances": [[1, 2, %s]]}' % (b"9" * 50_000),
    "float beyond float64": b'{"instances": [[1, 2, 1e999]]}',
    "deep list": b'{"instances": %s}' % nested(40_000),
    "deep object": b'{"inputs": %s}' % nested(15_000, b'{"a":', b"}"),
    "never closed": b'{"inputs": ' + b"[" * 90_000,
    "many keys": b'{"inputs": {%s}}'
    % b",".join(b'"%d": 1' % number for number in range(8000)),
    "two documents": GOOD + GOOD,
    "comment": b"/* */" + GOOD,
    "python": b"{'instances': [[1, 2, 3]]}",
    "true as number": b'{"instances": [[1, 2, true]]}',
    "zero by huge": b'{"signature_name": "any_rank", "inputs": [%s]}'
    % b",".join([b"[]"] * 20_000)
    + b"x",
}


class TestRest:
    @pytest.mark.parametrize("case", PATHS)
    def test_paths(self, server, case):
        path, status = PATHS[case]
        received = exchange(server, post(path))
        assert statuses(received) == [status]
        assert b"root:" not in received
        assert_serves(server)

    @pytest.mark.parametrize("case", BODIES)
    def test_bodies(self, server, case):
        body = BODIES[case]
        assert len(body) <= MAX_BYTES  # it is not refused for its size
        received = exchange(server, post(body=body))
        assert statuses(received) == [400]
        head, _, content = received.partition(b"\r\n\r\n")
        assert b"application/json" in head
        # The error is short, whatever it quotes.
        assert 0 < len(json.loads(content)["error"]) < 1100
        assert_serves(server)

    def test_nesting_near_the_limit_of_python(self, server):
        # Reading, checking and quoting use the stack to different depths.
        url = f"{server.url}/v1/models/m:predict"
        with httpx.Client(timeout=30) as client:
            for depth in range(940, 1010, 3):
                for body in (
                    b'{"instances": %s}' % nested(depth),
                    b'{"signature_name": %s, "inputs": 1}' % nested(depth),
                    nested(depth),
                    b'{"inputs": [[1, 2, %s]]}' % nested(depth, b'{"a":', b"}"),
                ):
                    response = client.post(url, content=body)
                    assert response.status_code == 400, response.text
        assert_serves(server)

    def test_tokens_of_javascript_are_numbers(self, server):
        body = b'{"instances": [[NaN, Infinity, -Infinity]]}'
        received = exchange(server, post(body=body))
        assert received.endswith(b'{"predictions":[[NaN,Infinity,-Infinity]]}')

    def test_content_types_and_encodings(self, server):
        # As in TensorFlow Serving, the content decides, not its declared type.
        kinds = [b"Content-Type: image/png; charset=utf-16", b"Content-Encoding: br"]
        assert statuses(exchange(server, post(headers=kinds))) == [200]
        zipped = gzip.compress(GOOD)
        header = [b"Content-Encoding: gzip"]
        for body, status in [
            (zipped, 200),
            (GOOD, 400),
            (zipped[:-5], 400),
            (gzip.compress(zipped), 400),
            (zipped[:-8] + bytes(8), 400),  # wrong checksum
        ]:
            received = exchange(server, post(body=body, headers=header))
            assert statuses(received) == [status]
        assert_serves(server)

    def test_gzip_bomb(self, server):
        body = bomb(90_000_000)
        assert len(body) <= MAX_BYTES
        with bounded_memory(megabytes=40):
            received = exchange(
                server, post(body=body, headers=[b"Content-Encoding: gzip"])
            )
        assert statuses(received) == [413]
        assert_serves(server)

    def test_headers(self, server):
        many = [b"X-%d: a" % number for number in range(50_000)]
        for headers, status in [
            ([b"X: " + b"a" * 500_000], 400),
            (many, 400),
            ([b"X" * 500_000 + b": a"], 400),
            ([b"X: a\x00b"], 400),
            ([b"X : a"], 400),
            ([b" folded"], 200),
            ([b"no colon"], 400),
            ([b"X: \xff\xfe"], 200),
            ([b"Cookie: a=b"] * 100, 200),
        ]:
            received = exchange(server, post(headers=headers))
            assert statuses(received) == [status], headers[0][:20]
        for host in (b"[", b"[::1", b"a:b:c", b"x/../y", b"x@y", b"a" * 5000):
            received = exchange(server, post(b"/v1/models/m:x", host=host))
            # h11 refuses hosts with characters that no host has.
            assert statuses(received) == [400], host
        assert_serves(server)

    def test_two_lengths(self, server):
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD)
        smuggled = post(b"/smuggled")
        both = [b"Transfer-Encoding: chunked"]
        for path in (PATH, b"/v1/models/m", b"/metrics", b"/nowhere"):
            content = post(
                path, body + smuggled, both, length=len(body), connection=b"keep-alive"
            )
            received = exchange(server, content)
            # The bytes after the request are not read as a second request.
            assert statuses(received) == [400]
            assert b"smuggled" not in received
        for headers, length in [
            ([b"Content-Length: 3"], len(GOOD)),
            ([b"Content-Length: 3, 4"], "none"),
            ([b"Transfer-Encoding: gzip, chunked"], "none"),
            ([b"Transfer-Encoding: chunked, chunked"], "none"),
            ([b"Transfer-Encoding: \x0bchunked"], "none"),
            ([], -1),
            ([], "1e1"),
            ([], "0x1a"),
            ([], "9" * 30),
        ]:
            received = exchange(server, post(headers=headers, length=length))
            assert statuses(received) in ([400], [501]), (headers, length)
        assert_serves(server)

    def test_chunks(self, server):
        assert statuses(exchange(server, chunked(GOOD[:9], GOOD[9:]))) == [200]
        for content in [
            chunked(end=b"xyz\r\n" + GOOD),
            chunked(end=b"-5\r\n" + GOOD),
            chunked(end=b"%x;%s\r\n" % (len(GOOD), b"a" * 400_000)),
            chunked(GOOD, end=b"0\r\n" + b"X: y\r\n" * 100_000),
            chunked(end=b"f" * 30 + b"\r\n" + GOOD),
        ]:
            with connect(server) as connection:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(content)
                # Without an answer, the server has closed the connection.
                assert statuses(read_all(connection)) in ([400], [408], [])
        assert_serves(server)

    def test_body_that_never_ends(self, server):
        start = time.monotonic()
        sent = 0
        with bounded_memory(megabytes=40), connect(server) as connection:
            connection.sendall(chunked(end=b""))
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - start < 20:
                    connection.sendall(b"8000\r\n" + bytes(0x8000) + b"\r\n")
                    sent += 0x8000
        assert sent > MAX_BYTES
        assert time.monotonic() - start < 20
        assert_serves(server)

    def test_slow_and_missing_bodies(self, server):
        with connect(server) as silent, connect(server) as slow:
            silent.sendall(post(length=len(GOOD) + 1))
            # More bytes than one by one arrive in time, however fast the machine is.
            slow.sendall(post(length=MAX_BYTES, body=b"", connection=b"keep-alive"))
            start = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - start < BODY_SECONDS + 1:
                    slow.sendall(b" ")
                    assert_serves(server)
            for connection in (silent, slow):
                received = read_all(connection)
                # The end of the connection may overtake the response.
                assert statuses(received) == [408]
                assert f"within {BODY_SECONDS} seconds" in received.decode()
        assert_serves(server)

    def test_length_that_is_too_small(self, server):
        # The rest of the body is no request, whether or not it ends like a header.
        for end, expected in ((b"\r\n\r\n", [400, 400]), (b"", [400])):
            content = post(body=GOOD + end, length=5, connection=b"keep-alive")
            assert statuses(exchange(server, content)) == expected
        assert_serves(server)

    def test_slow_headers_do_not_delay_others(self, server):
        with contextlib.ExitStack() as stack:
            held = [
                stack.enter_context(connect(server)) for _ in range(MAX_CONNECTIONS - 5)
            ]
            for connection in held:
                connection.sendall(b"POST " + PATH + b" HTTP/1.1\r\nX-")
            for _ in range(3):
                for connection in held:
                    connection.sendall(b"a")
                assert_serves(server)
        assert_serves(server)

    def test_many_connections(self, server):
        url = f"{server.url}/v1/models/m:predict"
        with contextlib.ExitStack() as stack:
            for _ in range(MAX_CONNECTIONS + 10):
                stack.enter_context(connect(server))
            time.sleep(0.1)
            response = HTTP.post(url, content=GOOD)
            assert response.status_code == 503
            assert response.headers["connection"] == "close"
        # The server notices within a moment that the others have left.
        end = time.monotonic() + 30
        while HTTP.post(url, content=GOOD).status_code == 503:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert_serves(server)

    def test_pipelined_requests(self, server):
        first = post(connection=b"keep-alive")
        received = exchange(server, first * 20 + post(b"/nowhere"))
        assert statuses(received) == [200] * 20 + [404]
        assert received.count(json.dumps(ANSWER, separators=(",", ":")).encode()) == 20
        assert_serves(server)

    def test_clients_that_leave(self, server):
        for content in (b"", b"POST", post(), post(length=99), chunked(end=b"5\r\n{")):
            with connect(server) as connection:
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
                assert statuses(read_all(connection)) in ([], [200], [400])
            with connect(server) as connection:
                connection.sendall(content)
                # Resets the connection.
                linger = np.array([1, 0], "int32").tobytes()
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        assert_serves(server)

    def test_other_protocols(self, server):
        for content in [
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # TLS
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /v1/models/m\r\n\r\n",
            b"\r\n" * 100_000,
            b"\x00" * 100_000,
        ]:
            found = statuses(exchange(server, content))
            assert found and set(found) <= {400, 404}, content[:20]
        upgrade = [b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"]
        upgrade += [b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
        received = exchange(server, post(headers=upgrade, connection=b"upgrade, close"))
        assert statuses(received) == [200]  # answered as HTTP
        assert_serves(server)

    def test_methods(self, server):
        for method in (b"TRACE", b"CONNECT", b"DELETE", b"x" * 5000, b"get"):
            content = post().replace(b"POST", method, 1)
            assert statuses(exchange(server, content)) == [400], method[:9]
        assert_serves(server)


BAD_TENSORS = {
    "content too short": message(values=(), tensor_content=bytes(11)),
    "content too long": message(values=(), tensor_content=bytes(13)),
    "no values for strings": message(
        (3,), (), "text", dtype=tf.string.as_datatype_enum, tensor_content=b"\x01"
    ),
    "strings for floats": message((1, 3), dtype=tf.string.as_datatype_enum),
    "resource": message((1, 3), dtype=tf.resource.as_datatype_enum),
    "variant": message((1, 3), dtype=tf.variant.as_datatype_enum),
    "reference": message((1, 3), dtype=tf.float32.as_datatype_enum + 100),
    "product beyond int64": message((2**32, 2**32), (1.0,), "any_rank"),
    "product that wraps to 0": message((2**33, 2**31, 3), (1.0,), "any_rank"),
    "zero by huge": message((0, 2**62, 2**62), (1.0,), "any_rank"),
    "negative": message((-3, -1), signature="any_rank"),
    "smallest": message((-(2**63), 1), signature="any_rank"),
    "rank 255": message((1,) * 255, (1.0,), "any_rank"),
    "rank 20000": message((2**62,) * 7_000, (1.0,), "any_rank"),
    "rank 254": message((1,) * 254, (1.0,), "any_rank"),
    "nested deeply": b"\x12\xff\xff\x03" * 20_000,
    "endless varint": b"\xff" * 50_000,
    "name that is not UTF-8": b"\x0a\x03\x0a\x01\xff",
}


class TestGrpc:
    @pytest.mark.parametrize("case", BAD_TENSORS)
    def test_tensors(self, server, call, case):
        content = BAD_TENSORS[case]
        assert len(content) <= MAX_BYTES
        with (
            bounded_memory(megabytes=40),
            pytest.raises(grpc.RpcError) as info,
        ):
            call(content, timeout=30)
        refused = {Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED}
        assert info.value.code() in refused, info.value
        assert "Traceback" not in info.value.details()
        assert len(info.value.details()) < 1100
        assert_serves(server)

    def test_tensors_that_tensorflow_accepts(self, server, call):
        # The last value fills the tensor, and further values are ignored.
        for content in [
            message((1, 3), (1.0, 2.0)),
            message((1, 3), (1.0, 2.0, 2.0, 9.0)),
            message((1, 3), (1.0, 2.0), version_number=99),
        ]:
            assert doubled(call(content, timeout=30)) == [[2.0, 4.0, 4.0]]
        assert_serves(server)

    def test_messages_that_are_too_large(self, server, call):
        # Compressed, the last two are smaller than the limit.
        for content, compression in [
            (bytes(MAX_BYTES + 1), None),
            (bytes(9 * 10**6), grpc.Compression.Gzip),
            (bytes(9 * 10**6), grpc.Compression.Deflate),
        ]:
            with pytest.raises(grpc.RpcError) as info:
                call(content, timeout=30, compression=compression)
            assert info.value.code() == Code.RESOURCE_EXHAUSTED
            assert "larger than max" in info.value.details()
        assert_serves(server)

    def test_metadata(self, server, call):
        for metadata in [
            [(f"x-{number}", "a" * 100) for number in range(1000)],
            [("x", "a" * 100_000)],
        ]:
            with pytest.raises(grpc.RpcError) as info:
                call(message(), timeout=30, metadata=metadata)
            assert info.value.code() == Code.RESOURCE_EXHAUSTED
        assert doubled(call(message(), timeout=30, metadata=[("x-bin", b"\xff\x00")]))
        assert_serves(server)

    def test_names(self, server, channel, call):
        request = predict_pb2.PredictRequest()
        for name, spec, code in [
            ("../m", {}, Code.NOT_FOUND),
            ("/etc/passwd", {}, Code.NOT_FOUND),
            ("m\0", {}, Code.NOT_FOUND),
            ("n" * 90_000, {}, Code.NOT_FOUND),
            ("", {}, Code.INVALID_ARGUMENT),
            ("m", {"signature_name": "s" * 90_000}, Code.FAILED_PRECONDITION),
            ("m", {"version_label": "l" * 90_000}, Code.INVALID_ARGUMENT),
        ]:
            request.model_spec.Clear()
            request.model_spec.name = name
            for field, value in spec.items():
                setattr(request.model_spec, field, value)
            with pytest.raises(grpc.RpcError) as info:
                call(request.SerializeToString(), timeout=30)
            assert info.value.code() == code, name[:9]
            assert len(info.value.details()) < 1100
        for method in ("/tensorflow.serving.PredictionService/None", "/a/../b", "/"):
            with pytest.raises(grpc.RpcError) as info:
                channel.unary_unary(method)(b"", timeout=30)
            assert info.value.code() == Code.UNIMPLEMENTED
        assert_serves(server)

    def test_cancelled_calls_and_deadlines(self, server, call):
        slow = message(
            (1,), (), "slow", dtype=tf.int32.as_datatype_enum, int_val=[20_000]
        )
        for _ in range(10):
            futures = [call.future(slow, timeout=30) for _ in range(3)]
            for future in futures:
                future.cancel()
            with pytest.raises(grpc.RpcError) as info:
                call(slow, timeout=1e-3)
            # Cancelled requests still run, and count until they end.
            assert info.value.code() in (
                Code.DEADLINE_EXCEEDED,
                Code.RESOURCE_EXHAUSTED,
            )
        wait_until_serving(server)

    def test_more_requests_than_the_limit(self, server, call):
        slow = message(
            (1,), (), "slow", dtype=tf.int32.as_datatype_enum, int_val=[20_000]
        )
        futures = [call.future(slow, timeout=60) for _ in range(5 * MAX_REQUESTS)]
        codes = [future.code() for future in futures]
        assert set(codes) == {Code.OK, Code.RESOURCE_EXHAUSTED}
        wait_until_serving(server)

    def test_streams_of_a_unary_method(self, server, channel):
        path = "/tensorflow.serving.PredictionService/Predict"
        stream = channel.stream_stream(path)
        # Only the first request counts.
        requests = iter([message(), *[b"\xff"] * 50])
        (answer,) = stream(requests, timeout=30)
        assert doubled(answer) == [[2.0, 4.0, 6.0]]
        with pytest.raises(grpc.RpcError) as info:
            list(stream(iter([]), timeout=30))
        assert info.value.code() in (Code.INTERNAL, Code.UNIMPLEMENTED, Code.CANCELLED)
        assert_serves(server)

    def test_bytes_that_are_no_grpc(self, server):
        port = server.grpc_port
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        settings = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
        for content in [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\x00" * 50_000,
            b"\xff" * 50_000,
            preface + b"\xff" * 1000,
            preface + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",  # a frame of 16 MB
            preface + settings * 20_000,
            # HEADERS that never end.
            preface + settings + b"\x00\x00\x01\x01\x00\x00\x00\x00\x01\x82" * 10_000,
        ]:
            with (
                contextlib.suppress(ConnectionError),
                connect(server, port) as connection,
            ):
                connection.sendall(content)
        with contextlib.ExitStack() as stack:
            for _ in range(50):
                held = stack.enter_context(connect(server, port))
                held.sendall(preface[:9])
            assert_serves(server)
        assert_serves(server)


def wait_until_serving(server):
    """Waits until requests of cancelled calls have ended, and asks again."""
    end = time.monotonic() + 30
    while True:
        try:
            return assert_serves(server)
        except grpc.RpcError as error:
            assert error.code() == Code.RESOURCE_EXHAUSTED
            assert time.monotonic() < end
            time.sleep(0.05)


def test_attacks_at_the_same_time(server):
    """Good requests are answered rightly while others are hostile."""
    attacks = [
        post(body=BODIES["deep list"]),
        post(body=bomb(20_000_000), headers=[b"Content-Encoding: gzip"]),
        post(PATHS["version of 5000 digits"][0]),
        post(length=99),
        b"\xff" * 1000 + b"\r\n\r\n",
        chunked(end=b"zz"),
    ]

    def attack(content):
        for _ in range(3):
            exchange(server, content)

    with concurrent.futures.ThreadPoolExecutor(len(attacks)) as pool:
        running = [pool.submit(attack, content) for content in attacks]
        while not all(future.done() for future in running):
            assert_serves(server)
        for future in running:
            future.result()
