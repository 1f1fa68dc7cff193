"""The HTTP side of the local model server: routes, limits, start and stop."""

import logging
import socket
import threading
import time

try:
    import tensorflow as tf
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response
    from starlette.routing import Route

    from keras_bnrnn.serving import rest
    from keras_bnrnn.serving.servable import Servable
except ImportError as error:
    raise ImportError(
        "`keras_bnrnn.serving.ModelServer` needs TensorFlow, starlette, uvicorn and "
        f"tensorflow-serving-api, and an import failed: {error}. "
        "Install them with `pip install 'keras-bnrnn[serving]'`."
    ) from error

_logger = logging.getLogger(__name__)

# Requests in flight get this long to finish after `stop()`.
_GRACE_SECONDS = 30

# The same table as TensorFlow Serving's: error code of TensorFlow -> HTTP status.
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
    """Serves SavedModels over TensorFlow Serving's REST API, for development.

    The requests it answers work unchanged against TensorFlow Serving, which is what
    production should run. The models are loaded when the server is made, the highest
    version of each; they stay loaded until the object goes.

    | request | answer |
    |---|---|
    | `POST /v1/models/NAME[/versions/N]:predict` | `predictions` or `outputs` |
    | `GET /v1/models/NAME[/versions/N]` | state of the loaded version |
    | `GET /v1/models/NAME[/versions/N]/metadata` | the signatures |

    Args:
        models: dict of model name -> base directory, str or path, whose
            sub-directories are named by version (`1`, `2`, ...) and hold a SavedModel
            each. Names must not contain `/` or `:`.
        host: str, the address to listen on. Default 127.0.0.1, this machine only.
        port: int in [0, 65535]; 0 picks a free one. Default 8501, as in TensorFlow
            Serving.
        max_request_bytes: positive int, the largest request body in bytes; a larger
            one is answered with 413. Default 64 MiB.

    Attributes:
        host: the address given.
        port: the port; for `port=0` the one that was picked, once started.
        url: `http://host:port`.

    Raises:
        ValueError: for an argument out of range, or a directory without a version
            that can be loaded.

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
    >>> with ModelServer({"double": directory}, port=0) as server:
    ...     url = f"{server.url}/v1/models/double:predict"
    ...     httpx.post(url, json={"instances": [1.0, 2.5]}).json()
    {'predictions': [2.0, 5.0]}

    Reference: https://www.tensorflow.org/tfx/serving/api_rest. It differs from
    TensorFlow Serving in what it leaves out: gRPC, classify and regress, version
    labels, batching, more than one version of a model, loading a version that appears
    later; and in refusing what TensorFlow Serving lets pass: names of inputs that the
    signature does not have, shapes that its signature excludes, integers beyond the
    input's dtype, output strings that are not UTF-8.
    """

    def __init__(
        self, models, host="127.0.0.1", port=8501, max_request_bytes=64 * 1024**2
    ):
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
        if not _is_int(port) or not 0 <= port <= 65535:
            raise ValueError(f"`port` must be in [0, 65535]. Received: port={port!r}")
        if not _is_int(max_request_bytes) or max_request_bytes < 1:
            raise ValueError(
                "`max_request_bytes` must be a positive integer. "
                f"Received: max_request_bytes={max_request_bytes!r}"
            )
        self.host = host
        self.port = port
        self.max_request_bytes = max_request_bytes
        self.servables = {
            name: Servable(name, directory) for name, directory in models.items()
        }
        self._app = self._make_app()
        self._server = None
        self._thread = None

    @property
    def url(self):
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def start(self):
        """Serves in a daemon thread; returns once requests are accepted.

        Returns:
            The server itself.

        Raises:
            RuntimeError: if it is already started.
            OSError: if it cannot listen on host and port.
        """
        if self._thread is not None:
            raise RuntimeError(f"The server is already started, at {self.url}.")
        # Bound here and not by uvicorn, which leaves the process when it fails.
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.create_server((self.host, self.port), family=family)
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run,
            kwargs={"sockets": [listener]},
            name="keras_bnrnn.serving",
            daemon=True,
        )
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                self._thread = None
                raise RuntimeError(f"The server ended while starting, at {self.url}.")
            time.sleep(0.005)
        return self

    def stop(self):
        """Takes no new requests, finishes those in flight, and returns.

        Without effect on a server that is not started. A stopped server can be
        started again, on the same port.
        """
        if self._thread is None:
            return
        self._server.should_exit = True
        # A little longer than uvicorn waits itself; the thread is a daemon, so a
        # model that never returns cannot hold the process.
        self._thread.join(_GRACE_SECONDS + 5)
        self._thread = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc_info):
        self.stop()

    def _make_app(self):
        model = "/v1/models/{name}"
        version = model + "/versions/{version:int}"
        routes = []
        for path in (model, version):
            routes += [
                Route(path + ":predict", self._predict, methods=["POST"]),
                Route(path + "/metadata", self._metadata, methods=["GET"]),
                Route(path, self._status, methods=["GET"]),
            ]
        app = Starlette(
            routes=routes,
            exception_handlers={
                rest.RestError: _answer_rest_error,
                tf.errors.OpError: _answer_op_error,
                HTTPException: _answer_unknown_path,
                ClientDisconnect: _answer_disconnect,
            },
        )
        app.router.redirect_slashes = False
        return app

    async def _predict(self, request):
        body = await self._read(request)
        # Parsing, the model and writing all block: none of them on the event loop.
        try:
            answer = await run_in_threadpool(
                self._predict_blocking, request.path_params, body
            )
        except (rest.RestError, tf.errors.OpError):
            raise
        # Caught here, because an error that reaches uvicorn closes the connection.
        except Exception as error:
            _logger.exception("A predict request failed")
            raise rest.RestError(500, f"{type(error).__name__}: {error}") from error
        return _json_response(answer)

    def _predict_blocking(self, path_params, body):
        predict_request = rest.PredictRequest.parse(body)
        servable = self._servable(path_params)
        inputs = predict_request.inputs(servable.signatures)
        outputs = servable.predict(predict_request.signature_name, inputs)
        return predict_request.answer(outputs)

    async def _status(self, request):
        return _json_response(rest.status(self._servable(request.path_params)))

    async def _metadata(self, request):
        return _json_response(rest.metadata(self._servable(request.path_params)))

    def _servable(self, path_params):
        name, version = path_params["name"], path_params.get("version")
        servable = self.servables.get(name)
        if servable is None or version not in (None, servable.version):
            wanted = (
                f"Latest({name})" if version is None else f"Specific({name}, {version})"
            )
            raise rest.RestError(404, f"Servable not found for request: {wanted}")
        return servable

    async def _read(self, request):
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            # The rest of a body that is too large is read and dropped: answering
            # before the client has sent it all would reset the connection, and the
            # client might never see why.
            if size > self.max_request_bytes:
                chunks.clear()
            else:
                chunks.append(chunk)
        if size > self.max_request_bytes:
            raise rest.RestError(
                413,
                f"The request body must be at most {self.max_request_bytes} bytes. "
                f"Received: {size} bytes",
            )
        return b"".join(chunks)


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _json_response(value, status=200):
    return Response(rest.dumps(value), status, media_type="application/json")


async def _answer_rest_error(request, error):
    return _json_response({"error": error.message}, error.status)


async def _answer_op_error(request, error):
    status = _HTTP_STATUS.get(error.error_code, 500)
    return _json_response({"error": error.message}, status)


async def _answer_unknown_path(request, error):
    path = request.url.path
    if not path.startswith("/v1/"):
        return _json_response({"error": f"Not found: {path}"}, 404)
    message = f"Malformed request: {request.method} {path}"
    return _json_response({"error": message}, 400)


async def _answer_disconnect(request, error):
    # Nobody reads it; it keeps the log free of a traceback for a client that left.
    return _json_response({"error": "The client closed the connection"}, 499)
