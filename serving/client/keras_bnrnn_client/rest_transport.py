"""Sends requests to TensorFlow Serving's REST API with httpx.

Reference: https://www.tensorflow.org/tfx/serving/api_rest.
"""

import base64
import json
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np

from .errors import InvalidResponse, make_error, reading, too_large
from .retries import Deadline
from .tensors import Metadata, Signature, TensorSpec, VersionStatus, dtype_name
from .transport import Target


class RestTransport:
    """Sends requests over HTTP.

    Args:
        url: str, `http://host:port`, followed by the path of the server if it has one.
        max_response_bytes: int, the size limit of a response after decompression.
    """

    def __init__(self, url: str, max_response_bytes: int) -> None:
        self._url = url.rstrip("/")
        self._max_response_bytes = max_response_bytes
        # No limit: each calling thread uses one connection.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        verify: bool | ssl.SSLContext = True
        if url.startswith("http://"):
            # Plain HTTP: skips loading CA certificates.
            verify = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._http = httpx.Client(
            limits=limits, verify=verify, headers={"Accept-Encoding": _ENCODING}
        )

    def encode(
        self,
        target: Target,
        name: str,
        signature: Signature,
        inputs: Mapping[str, np.ndarray],
    ) -> tuple[str, bytes]:
        # The column format also supports inputs without a batch dimension.
        columns = {key: _to_json(array) for key, array in inputs.items()}
        body = {"signature_name": name, "inputs": columns}
        content = json.dumps(body, separators=(",", ":")).encode()
        return f"{self._path(target)}:predict", content

    def predict(
        self, request: tuple[str, bytes], signature: Signature, seconds: float
    ) -> dict[str, np.ndarray]:
        url, content = request
        answer = self._send("POST", url, seconds, content)
        with reading(200):
            outputs = answer["outputs"]
            if len(signature.outputs) == 1:
                outputs = {next(iter(signature.outputs)): outputs}
            signature.check_names(outputs)
            return {
                name: _to_array(value, signature.outputs[name])
                for name, value in outputs.items()
            }

    def metadata(self, target: Target, seconds: float) -> Metadata:
        answer = self._send("GET", f"{self._path(target)}/metadata", seconds)
        with reading(200):
            signatures = answer["metadata"]["signature_def"]["signature_def"]
            return Metadata(
                int(answer["model_spec"]["version"]),
                {
                    name: Signature(_specs(info["inputs"]), _specs(info["outputs"]))
                    for name, info in signatures.items()
                    # Signatures of TensorFlow itself, which requests cannot call.
                    if not name.startswith("__saved_model")
                },
            )

    def status(self, target: Target, seconds: float) -> list[VersionStatus]:
        path = self._path(Target(target.model, target.version, None))
        answer = self._send("GET", path, seconds)
        with reading(200):
            return [
                VersionStatus(
                    int(state["version"]),
                    str(state["state"]),
                    str(state["status"]["error_code"]),
                    str(state["status"]["error_message"]),
                )
                for state in answer["model_version_status"]
            ]

    def close(self) -> None:
        self._http.close()

    def _path(self, target: Target) -> str:
        path = f"{self._url}/v1/models/{quote(target.model, safe='')}"
        if target.version is not None:
            return f"{path}/versions/{target.version}"
        if target.label is not None:
            return f"{path}/labels/{quote(target.label, safe='')}"
        return path

    def _send(
        self, method: str, url: str, seconds: float, content: bytes | None = None
    ) -> Any:
        deadline = Deadline(seconds)
        received = bytearray()
        try:
            with self._http.stream(
                method, url, content=content, timeout=seconds
            ) as response:
                _check_encoding(response)
                # The timeout of httpx limits each read, not the whole response.
                for chunk in response.iter_bytes():
                    received += chunk
                    if len(received) > self._max_response_bytes:
                        raise too_large(self._max_response_bytes, response.status_code)
                    deadline.require()
        except httpx.TimeoutException as error:
            raise deadline.exceeded(error) from error
        except httpx.DecodingError as error:
            raise InvalidResponse(
                f"The response must be {_ENCODING}, as its Content-Encoding says: "
                f"{error}",
                "INTERNAL",
                response.status_code,
            ) from error
        except httpx.TransportError as error:
            raise make_error(
                f"{url} cannot be reached: {error or type(error).__name__}",
                "UNAVAILABLE",
                retriable=not isinstance(error, httpx.UnsupportedProtocol),
            ) from error
        if response.is_redirect:
            raise make_error(
                f"The server redirects to {response.headers['location'][:200]!r}, and "
                "the client does not follow. Give the final address as `rest_url`",
                "UNKNOWN",
                response.status_code,
            )
        return _read(response.status_code, bytes(received))


def _check_encoding(response: httpx.Response) -> None:
    """Raises InvalidResponse for an encoding that the client did not ask for.

    Others may unpack to more than a thousand times their size before the size can be
    checked, as does an encoding within an encoding.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", _ENCODING):
        raise InvalidResponse(
            f"The Content-Encoding of a response must be {_ENCODING} or none. "
            f"Received: {encoding[:80]!r}",
            "INTERNAL",
            response.status_code,
        )


_ENCODING = "gzip"


def _read(status: int, content: bytes) -> Any:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        if status == 200:
            raise InvalidResponse(
                f"The response is not JSON: {content[:200]!r}, which fails with: "
                f"{error}",
                "INTERNAL",
                status,
            ) from error
        # The response of a proxy may not be JSON.
        answer = {"error": content[:200].decode("utf-8", "replace")}
    if status == 200:
        return answer
    message = str(answer.get("error", "") if isinstance(answer, dict) else answer)
    code = _CODES.get(status, "UNKNOWN" if status < 500 else "INTERNAL")
    raise make_error(message, code, status, retriable=status in (429, 503))


# Status code of TensorFlow Serving for each HTTP status.
_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def _specs(infos: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return {name: _spec(info) for name, info in infos.items()}


def _spec(info: Mapping[str, Any]) -> TensorSpec:
    shape = info["tensor_shape"]
    if shape["unknown_rank"]:
        return TensorSpec(dtype_name(info["dtype"]), None)
    sizes = [int(dim["size"]) for dim in shape["dim"]]
    free = tuple(None if size < 0 else size for size in sizes)
    return TensorSpec(dtype_name(info["dtype"]), free)


def _to_json(array: np.ndarray) -> Any:
    if array.dtype == object:
        # Base64 represents any bytes, including text.
        texts = [{"b64": base64.b64encode(item).decode()} for item in array.ravel()]
        return np.array(texts, object).reshape(array.shape).tolist()
    if array.dtype.kind in "cV":
        raise ValueError(
            "An input must be of a dtype that JSON can carry; gRPC carries any. "
            f"Received: dtype {array.dtype}"
        )
    return array.tolist()


def _to_array(value: Any, spec: TensorSpec) -> np.ndarray:
    if spec.dtype != "string":
        array = np.asarray(value, spec.numpy_dtype)
    else:
        array = np.asarray(value, object)
        flat = [_to_bytes(item) for item in array.ravel()]
        result = np.empty(array.size, object)
        result[:] = flat
        array = result.reshape(array.shape)
    if not array.size and spec.shape is not None and array.ndim < len(spec.shape):
        # JSON gives no sizes after an empty list.
        known = [0 if size is None else size for size in spec.shape[array.ndim :]]
        array = array.reshape([*array.shape, *known])
    return array


def _to_bytes(item: Any) -> bytes:
    if isinstance(item, dict):
        return base64.b64decode(item["b64"])
    return str(item).encode("utf-8")
