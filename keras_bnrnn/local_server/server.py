"""Defines `ModelServer`: its arguments, HTTP routes, start and stop."""

import asyncio
import logging
import re
import socket
import threading
import time
import zlib
from typing import Any, Literal, Self

try:
    import tensorflow as tf
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response
    from starlette.routing import Route
    from tensorflow_serving.apis import model_pb2

    from keras_bnrnn.local_server import grpc_service, rest
    from keras_bnrnn.local_server.metrics import Metrics
    from keras_bnrnn.local_server.servable import Servable
    from keras_bnrnn.local_server.versions import Models
except ImportError as error:
    raise ImportError(
        "`keras_bnrnn.local_server.ModelServer` needs TensorFlow, starlette, uvicorn, "
        "prometheus_client and tensorflow-serving-api, and an import failed: "
        f"{error}. Install them with `pip install 'keras-bnrnn[serving]'`."
    ) from error

_logger = logging.getLogger(__name__)

# Time for requests in progress to finish after `stop()`.
_GRACE_SECONDS = 30

# Time for the body of a request to arrive.
_BODY_SECONDS = 60

# Time for the next request on a connection to begin.
_IDLE_SECONDS = 5

# With this number of connections or more, uvicorn answers each request with 503. It is
# below 1024, the usual limit of open files of a process.
_MAX_CONNECTIONS = 512

# h11 refuses request lines and headers that are incomplete at this size.
_MAX_HEADER_BYTES = 16 * 1024

# The `wbits` of zlib for the gzip format.
_GZIP = 31

# HTTP status of each TensorFlow error code, as in TensorFlow Serving.
_HTTP_STATUS = {
    tf.errors.CANCELLED: 499,
    tf.errors.UNKNOWN: 500,
    tf.errors.INVALID_ARGUMENT: 400,
    tf.errors.DEADLINE_EXCEEDED: 504,
    tf.errors.NOT_FOUND: 404,
    tf.errors.ALREADY_EXISTS: 409,
    tf.errors.PERMISSION_DENIED: 403,
    tf.errors.RESOURCE_EXHAUSTED: 429,
    tf.errors.FAILED_PRECONDITION: 400,
    tf.errors.ABORTED: 409,
    tf.errors.OUT_OF_RANGE: 400,
    tf.errors.UNIMPLEMENTED: 501,
    tf.errors.INTERNAL: 500,
    tf.errors.UNAVAILABLE: 503,
    tf.errors.DATA_LOSS: 500,
    tf.errors.UNAUTHENTICATED: 401,
}


class ModelServer:
    """Serves SavedModels over TensorFlow Serving's REST and gRPC, for development.

    TensorFlow Serving answers the same requests; use it in production. The server has
    these REST routes. `WHICH` is empty (for the latest version), `/versions/N` or
    `/labels/LABEL`.

    | request | response |
    |---|---|
    | `POST /v1/models/NAME[WHICH]:predict` | `predictions` or `outputs` |
    | `GET /v1/models/NAME[WHICH]` | states of the versions |
    | `GET /v1/models/NAME[WHICH]/metadata` | the signatures |
    | `GET /metrics`, `GET /monitoring/prometheus/metrics` | see `metrics.Metrics` |

    The server has these gRPC methods: `Predict` and `GetModelMetadata` of
    `tensorflow.serving.PredictionService`, and `GetModelStatus` of `ModelService`.

    The constructor loads the models. A started server looks for new and removed
    versions in the base directories. It loads a new version and runs its warm-up
    requests (`assets.extra/tf_serving_warmup_requests`) before it unloads the version
    that the new one replaces, so no request is lost. If a version fails to load, the
    status of the model reports the error with the state `END`, the versions served so
    far stay, and the server tries again when the files of the version change.

    Args:
        models: Dict from model name to base directory, a str or path. A base directory
            has a sub-directory with a SavedModel for each version (`1`, `2`, ...).
            Names must not contain `/` or `:`.
        host: str, the address to listen on. Default: 127.0.0.1, which only this machine
            can reach.
        port: int in [0, 65535], the port of REST and the metrics; 0 picks a free port.
            Default: 8501, as in TensorFlow Serving.
        grpc_port: int in [0, 65535], the port of gRPC; 0 picks a free port; `None`
            disables gRPC. Default: 8500, as in TensorFlow Serving.
        max_request_bytes: Positive int, the size limit of a request in bytes. A larger
            request fails with 413 or RESOURCE_EXHAUSTED. Default: 64 MiB.
        poll_seconds: Non-negative number, the seconds between two searches for
            versions. 0: never search again. Default: 1.0.
        versions: The versions of each model to serve: `"latest"` (default, as in
            TensorFlow Serving), the highest version; a positive int, this number of
            highest versions; `"all"`, all versions.
        version_labels: Dict from model name to a dict from label to version. Requests
            can name a version by its label. The dict may change while the server runs.
            Default: `None`, no labels.

    Attributes:
        host: The argument `host`.
        port: The port. For `port=0`, the picked port after the start.
        url: `http://host:port`.
        grpc_port: The gRPC port. For `grpc_port=0`, the picked port after the start.
        grpc_target: `host:grpc_port`, for `grpc.insecure_channel`.
        servables: Dict from model name to its latest served version, a `Servable`.
        metrics: The `Metrics` of this server.

    Raises:
        ValueError: If an argument is invalid, or no version in a directory can be
            loaded.

    Example:

    >>> import pathlib, tempfile
    >>> import httpx
    >>> import tensorflow as tf
    >>> class Double(tf.Module):
    ...     @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    ...     def __call__(self, x):
    ...         return {"y": 2.0 * x}
    >>> directory = pathlib.Path(tempfile.mkdtemp())
    >>> tf.saved_model.save(Double(), str(directory / "1"))
    >>> with ModelServer({"double": directory}, port=0, grpc_port=0) as server:
    ...     url = f"{server.url}/v1/models/double:predict"
    ...     httpx.post(url, json={"instances": [1.0, 2.5]}).json()
    {'predictions': [2.0, 5.0]}

    Reference: https://www.tensorflow.org/tfx/serving/api_rest. Unlike TensorFlow
    Serving, this server has no classify, regress and multi-inference, no batching, and
    no reloading of its configuration. It also rejects shapes that do not match the
    signature, integers outside the range of the input's dtype, and output strings that
    are not UTF-8; TensorFlow Serving accepts these. `docs/serving.md` lists further
    differences.
    """

    def __init__(
        self,
        models: dict[str, Any],
        host: str = "127.0.0.1",
        port: int = 8501,
        grpc_port: int | None = 8500,
        max_request_bytes: int = 64 * 1024**2,
        poll_seconds: float = 1.0,
        versions: int | Literal["latest", "all"] = "latest",
        version_labels: dict[str, dict[str, int]] | None = None,
    ) -> None:
        _check_models(models)
        for name, value in [("port", port), ("grpc_port", grpc_port)]:
            if name == "grpc_port" and value is None:
                continue
            if not _is_int(value) or not 0 <= value <= 65535:
                raise ValueError(
                    f"`{name}` must be in [0, 65535]. Received: {name}={value!r}"
                )
        if not _is_int(max_request_bytes) or max_request_bytes < 1:
            raise ValueError(
                "`max_request_bytes` must be a positive integer. "
                f"Received: max_request_bytes={max_request_bytes!r}"
            )
        if (
            not (_is_int(poll_seconds) or isinstance(poll_seconds, float))
            or not 0 <= poll_seconds < threading.TIMEOUT_MAX
        ):
            raise ValueError(
                "`poll_seconds` must be a non-negative number. "
                f"Received: poll_seconds={poll_seconds!r}"
            )
        if versions not in ("latest", "all") and (
            not _is_int(versions) or versions < 1
        ):
            raise ValueError(
                "`versions` must be 'latest', 'all' or a positive integer. "
                f"Received: versions={versions!r}"
            )
        _check_labels(version_labels, models)
        self.host = host
        self.port = port
        self.grpc_port = grpc_port
        self.max_request_bytes = max_request_bytes
        self.poll_seconds = poll_seconds
        self.versions = versions
        self.version_labels = {} if version_labels is None else version_labels
        self.metrics = Metrics()
        self._models = Models(models, versions, self.version_labels, self.metrics)
        self._app = self._make_app()
        self._server = None
        self._grpc_server = None
        self._thread = None
        self._poller = None
        self._stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://{self._host_in_url}:{self.port}"

    @property
    def grpc_target(self) -> str:
        return f"{self._host_in_url}:{self.grpc_port}"

    @property
    def servables(self) -> dict[str, Servable]:
        return self._models.latest()

    def poll(self) -> None:
        """Looks for new and removed versions, and returns when new ones are loaded.

        Does not raise if a version fails to load; the status of the model reports it.
        """
        self._models.poll()

    def start(self) -> Self:
        """Starts the server in daemon threads; returns when it accepts requests.

        Returns:
            The server itself.

        Raises:
            RuntimeError: If the server is already started.
            OSError: If the server cannot listen on the host and a port.
        """
        if self._thread is not None:
            raise RuntimeError(f"The server is already started, at {self.url}.")
        # Bound here, because uvicorn exits the process if binding fails.
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.create_server((self.host, self.port), family=family)
        # Saves 40 ms per request. asyncio sets this option only on its own sockets.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.grpc_port is not None:
            try:
                self._grpc_server, self.grpc_port = grpc_service.make_server(
                    self._models,
                    self.metrics,
                    self.grpc_target,
                    self.max_request_bytes,
                )
            except OSError:
                listener.close()
                raise
        self.port = listener.getsockname()[1]
        self._start_rest(listener)
        if self._grpc_server is not None:
            self._grpc_server.start()
        self._stopping.clear()
        if self.poll_seconds:
            self._poller = threading.Thread(
                target=self._poll_often,
                name="keras_bnrnn.local_server.poll",
                daemon=True,
            )
            self._poller.start()
        return self

    def stop(self) -> None:
        """Stops accepting requests, waits for those in progress, and returns.

        Does nothing if the server is not started. A stopped server can be started
        again, on the same ports.
        """
        if self._thread is None:
            return
        self._stopping.set()
        self._server.should_exit = True
        if self._grpc_server is not None:
            self._grpc_server.stop(_GRACE_SECONDS).wait()
            self._grpc_server = None
        # Waits a little longer than uvicorn does. The thread is a daemon, so a model
        # that never returns cannot keep the process alive.
        self._thread.join(_GRACE_SECONDS + 5)
        self._thread = None
        if self._poller is not None:
            # The poller may be loading a version, which cannot be interrupted.
            self._poller.join(_GRACE_SECONDS)
            self._poller = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def _host_in_url(self):
        return f"[{self.host}]" if ":" in self.host else self.host

    def _start_rest(self, listener):
        config = uvicorn.Config(
            self._app,
            lifespan="off",
            log_config=None,
            access_log=False,
            # Named, because another installed package would change them: httptools
            # has no limit on headers.
            http="h11",
            ws="none",
            proxy_headers=False,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run,
            kwargs={"sockets": [listener]},
            name="keras_bnrnn.local_server",
            daemon=True,
        )
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                self._thread = None
                raise RuntimeError(f"The server ended while starting, at {self.url}.")
            time.sleep(0.005)

    def _poll_often(self):
        while not self._stopping.wait(self.poll_seconds):
            try:
                self.poll()
            # Keeps the thread alive, since the next search may succeed.
            except Exception:
                _logger.exception("Looking for versions failed")

    def _make_app(self):
        model = "/v1/models/{name}"
        endpoints = [
            (":predict", "POST", "Predict", self._predict),
            ("/metadata", "GET", "GetModelMetadata", self._metadata),
            ("", "GET", "GetModelStatus", self._status),
        ]
        routes = [
            Route(model + which + suffix, self._answered(name, call), methods=[verb])
            for which in ("", "/versions/{version}", "/labels/{label}")
            for suffix, verb, name, call in endpoints
        ]
        routes += [
            Route(path, self._answer_metrics, methods=["GET"])
            for path in ("/metrics", "/monitoring/prometheus/metrics")
        ]
        for route in routes:
            # Starlette adds HEAD to GET; TensorFlow Serving rejects HEAD.
            route.methods.discard("HEAD")
        app = Starlette(
            routes=routes, exception_handlers={HTTPException: _answer_unknown_path}
        )
        app.router.redirect_slashes = False
        return _refuse_two_lengths(app)

    def _answered(self, method, call):
        """Wraps an endpoint: counts requests, and turns errors into responses."""

        async def answer(request):
            with self.metrics.request("rest", method) as record:
                try:
                    response = _json_response(await call(request, record))
                # uvicorn would close the connection for an unhandled error.
                except Exception as error:
                    response = _answer_error(error, method)
                record.status = str(response.status_code)
            return response

        return answer

    async def _predict(self, request, record):
        body = await self._read(request)
        is_gzip = "gzip" in request.headers.get("content-encoding", "")
        # Parsing, the model and writing block, so they run outside the event loop.
        return await run_in_threadpool(
            self._predict_blocking, _model_spec(request), body, is_gzip, record
        )

    def _predict_blocking(self, model_spec, body, is_gzip, record):
        if is_gzip:
            body = self._decompress(body)
        predict_request = rest.PredictRequest.parse(body)
        servable = self._models.find(model_spec, record)
        inputs = predict_request.inputs(servable.signatures)
        record.signature = predict_request.signature_name
        outputs = servable.predict(predict_request.signature_name, inputs)
        return predict_request.answer(outputs)

    async def _status(self, request, record):
        return rest.status(self._models.status(_model_spec(request), record))

    async def _metadata(self, request, record):
        return rest.metadata(self._models.find(_model_spec(request), record))

    async def _answer_metrics(self, request):
        content, media_type = self.metrics.text()
        return Response(content, media_type=media_type)

    async def _read(self, request):
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    # Reads and discards the rest of a body that is too large. A
                    # response before the end of the body would reset the connection,
                    # and the client might not receive the error.
                    if size > self.max_request_bytes:
                        body.clear()
                    else:
                        body += chunk
        except TimeoutError as error:
            raise rest.RestError(
                408,
                f"The request body must arrive within {_BODY_SECONDS} seconds. "
                f"Received: {size} bytes",
                closes=True,
            ) from error
        if size > self.max_request_bytes:
            raise self._too_large(f"{size} bytes")
        return bytes(body)

    def _decompress(self, body):
        decompressor = zlib.decompressobj(wbits=_GZIP)
        try:
            # Limits the output, since a small body can hold a very large one.
            content = decompressor.decompress(body, self.max_request_bytes + 1)
        except zlib.error as error:
            raise rest.RestError(
                400,
                "The request body must be gzip, as its Content-Encoding says. "
                f"Received: {body[:20]!r}, which fails with: {error}",
            ) from error
        if len(content) > self.max_request_bytes:
            raise self._too_large("a gzip body with a larger content")
        if not decompressor.eof:
            raise rest.RestError(
                400,
                "The request body must be gzip, as its Content-Encoding says. "
                f"Received: {len(body)} bytes, which end too early",
            )
        return content

    def _too_large(self, received):
        return rest.RestError(
            413,
            f"The request body must be at most {self.max_request_bytes} bytes. "
            f"Received: {received}",
        )


def _check_models(models):
    if not isinstance(models, dict) or not models:
        raise ValueError(
            "`models` must be a dict of model name -> base directory, with one "
            f"model or more. Received: models={models!r}"
        )
    for name in models:
        if not isinstance(name, str) or not name or set(name) & set("/:"):
            raise ValueError(
                "`models` must have names that are not empty and contain no `/` "
                f"or `:`. Received: name={name!r}"
            )


def _check_labels(version_labels, models):
    if version_labels is None:
        return
    valid = isinstance(version_labels, dict) and all(
        name in models
        and isinstance(labels, dict)
        and all(
            isinstance(label, str) and label and not set(label) & set("/:")
            for label in labels
        )
        and all(_is_int(version) and version >= 0 for version in labels.values())
        for name, labels in version_labels.items()
    )
    if not valid:
        raise ValueError(
            "`version_labels` must be a dict of model name -> dict of label -> "
            "version, where the names are those of `models` and labels contain no "
            f"`/` or `:`. Received: version_labels={version_labels!r}"
        )


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _model_spec(request):
    params = request.path_params
    if any(":" in value for value in params.values()):
        raise rest.RestError(400, _malformed(request))
    spec = model_pb2.ModelSpec(name=params["name"])
    if "version" in params:
        if not re.fullmatch("[0-9]+", params["version"]):
            raise rest.RestError(400, _malformed(request))
        try:
            # Python and protobuf limit the number of digits.
            spec.version.value = int(params["version"])
        except ValueError as error:
            # TensorFlow Serving answers with an empty body.
            raise rest.RestError(400, None) from error
    if "label" in params:
        spec.version_label = params["label"]
    return spec


def _refuse_two_lengths(app):
    """Wraps an application: refuses requests in which two headers state a length.

    A proxy may trust the other header than this server, and would then take a part of
    the body for the next request.
    """

    async def checked(scope, receive, send):
        if {b"content-length", b"transfer-encoding"} <= {
            n for n, _ in scope["headers"]
        }:
            message = (
                "A request must have Content-Length or Transfer-Encoding, not both"
            )
            refusal = _json_response({"error": message}, 400, closes=True)
            await refusal(scope, receive, send)
        else:
            await app(scope, receive, send)

    return checked


def _json_response(value, status=200, closes=False):
    headers = {"Connection": "close"} if closes else None
    return Response(rest.dumps(value), status, headers, media_type="application/json")


def _answer_error(error, method):
    status, closes = 500, False
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, rest.RestError):
        status, message, closes = error.status, error.message, error.closes
    elif isinstance(error, tf.errors.OpError):
        status, message = _HTTP_STATUS.get(error.error_code, 500), error.message
    elif isinstance(error, ClientDisconnect):
        # No client reads this response; it avoids logging an error.
        status, message = 499, "The client closed the connection"
    else:
        _logger.error("A %s request failed", method, exc_info=error)
    if message is None:
        return Response(status_code=status, media_type="application/json")
    return _json_response({"error": message}, status, closes)


async def _answer_unknown_path(request, error):
    path = request.url.path
    if not path.startswith("/v1/"):
        return _json_response({"error": f"Not found: {path}"}, 404)
    # TensorFlow Serving answers OPTIONS with an empty body.
    message = None if request.method == "OPTIONS" else _malformed(request)
    return _answer_error(rest.RestError(400, message), request.method)


def _malformed(request):
    return f"Malformed request: {request.method} {request.url.path}"
