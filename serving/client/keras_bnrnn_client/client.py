"""Defines `ServingClient`, which calls a model on a server."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from .errors import (
    DeadlineExceeded,
    InvalidRequest,
    InvalidResponse,
    ModelNotFound,
    ServingError,
    Unavailable,
)
from .padding import LENGTHS, check_pad_to, cut, fit_and_pad
from .retries import Deadline, call_with_retries
from .session import StreamingSession
from .signatures import DEFAULT_SIGNATURE, find_signature
from .tensors import Metadata, VersionStatus
from .transport import Target, Transport

if TYPE_CHECKING:
    import grpc
    import numpy as np

# Seconds between two status requests while waiting for a model.
_POLL_SECONDS = 0.2


class ServingClient:
    """A client for one model, over REST or gRPC.

    Several threads may use one client at once. Requests do not change the server, so
    the client repeats a request after a transient error. These errors are a refused or
    broken connection; UNAVAILABLE (HTTP 503); RESOURCE_EXHAUSTED (HTTP 429) unless a
    message was too large; and an error that the shape of another request in the same
    batch caused.

    Args:
        model: str, the name of the model on the server.
        rest_url: str, `http://host:port`, to use REST. TensorFlow Serving's default
            port of REST is 8501.
        grpc_target: str, `host:port`, to use gRPC. TensorFlow Serving's default port of
            gRPC is 8500. Pass either `rest_url` or `grpc_target`.
        version: int, the version to call. Default: `None`, the latest version.
        label: str, the label of the version to call, such as `"stable"`. Default:
            `None`.
        timeout: Positive float, the time limit of a call in seconds, including retries.
            Default: 10.
        retries: Non-negative int, the largest number of retries. Default: 3.
        grpc_credentials: `grpc.ChannelCredentials` for TLS. Default: `None`, no TLS.
        pad_to: Positive ints in ascending order, the numbers of timesteps to pad to. If
            a signature has `lengths`, its inputs are padded with zeros to the first of
            these numbers that is large enough, or else to a multiple of the last. The
            client cuts per-frame outputs to the frames of the request. The caller may
            omit `lengths` if all frames are valid. If a server batches requests and
            does not pad them, all its clients should use the same single number.
            Default: `None`, no padding.
        max_response_bytes: Positive int, the size limit of a response in bytes. It
            holds after decompression, and over gRPC also for each output in memory. A
            larger response raises `InvalidResponse`. Default: 64 MiB.

    Attributes:
        model, version, label, timeout, retries: The arguments.
        pad_to: The argument, as a tuple.

    Raises:
        ValueError: If an argument is invalid.
        ImportError: If a package that REST or gRPC needs is missing.

    Example:

        with ServingClient("speech", rest_url="http://127.0.0.1:8501") as client:
            client.wait_until_available(60)
            outputs = client.predict({"features": frames, "lengths": [57]})
            outputs["logits"].shape  # (1, 57, 11)
    """

    def __init__(
        self,
        model: str,
        *,
        rest_url: str | None = None,
        grpc_target: str | None = None,
        version: int | None = None,
        label: str | None = None,
        timeout: float = 10.0,
        retries: int = 3,
        grpc_credentials: grpc.ChannelCredentials | None = None,
        pad_to: Sequence[int] | None = None,
        max_response_bytes: int = 64 * 1024**2,
    ) -> None:
        _check_arguments(model, rest_url, grpc_target, version, label)
        _check_timeout(timeout)
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(
                f"`retries` must be a non-negative integer. Received: {retries=}"
            )
        if type(max_response_bytes) is not int or max_response_bytes < 1:
            raise ValueError(
                "`max_response_bytes` must be a positive integer. "
                f"Received: {max_response_bytes=}"
            )
        self.model = model
        self.version = version
        self.label = label
        self.timeout = timeout
        self.retries = retries
        self.pad_to = check_pad_to(pad_to)
        self._transport = _make_transport(
            rest_url, grpc_target, grpc_credentials, max_response_bytes
        )
        self._metadata: Metadata | None = None

    def predict(
        self,
        inputs: Mapping[str, Any],
        signature: str = DEFAULT_SIGNATURE,
        *,
        timeout: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Calls a signature of the model.

        Args:
            inputs: Dict from input name to array or nested list. The values are
                converted to the dtypes of the signature. Strings may be str or bytes.
            signature: str, the name of the signature.
            timeout: Positive float, the time limit of this call in seconds. Default:
                `None`, the timeout of the client.

        Returns:
            Dict from output name to array. Strings are bytes in an array of objects.

        Raises:
            ValueError: If the inputs do not match the signature.
            InvalidRequest: If the number of `lengths` is not the number of rows, or the
                server rejects the request.
            SignatureNotFound: If the model has no such signature.
            ModelNotFound: If the server does not serve the model or the version.
            DeadlineExceeded: If no response arrives in time.
            InvalidResponse: If the response is larger than `max_response_bytes`, is
                malformed, or does not match the signature.
            ServingError: For any other error, or a subclass such as `Unavailable`.
        """
        deadline = self._deadline(timeout)
        known = self._metadata
        metadata = known or self._fetch_metadata(deadline)
        try:
            return self._predict(metadata, signature, inputs, deadline)
        except (ValueError, InvalidRequest, InvalidResponse):
            if known is None:
                raise
            # A new version with other signatures may be served since.
            latest = self._fetch_metadata(deadline)
            if latest.signatures == known.signatures:
                raise
        return self._predict(latest, signature, inputs, deadline)

    def metadata(self, *, timeout: float | None = None) -> Metadata:
        """Requests the current version number and its signatures.

        Args:
            timeout: As in `predict`.

        Returns:
            `Metadata`.

        Raises:
            ServingError: As in `predict`.
        """
        return self._fetch_metadata(self._deadline(timeout))

    def status(self, *, timeout: float | None = None) -> list[VersionStatus]:
        """Requests the states of the model's versions.

        The label of the client has no effect here, because servers ignore it.

        Args:
            timeout: As in `predict`.

        Returns:
            List of `VersionStatus`, the highest version first. If the client has a
            version, the list contains only this version.

        Raises:
            ServingError: As in `predict`.
        """
        return self._fetch_status(self._deadline(timeout))

    def wait_until_available(self, timeout: float) -> None:
        """Waits until the model is available, even if the server is not reachable yet.

        Args:
            timeout: Positive float, the time limit in seconds.

        Raises:
            DeadlineExceeded: If the model is not available in time. The message
                contains the last state.
        """
        deadline = self._deadline(timeout)
        last = ""
        while True:
            try:
                states = self._fetch_status(deadline)
                # The version of a label may differ from the available versions.
                if any(state.state == "AVAILABLE" for state in states):
                    if self.label is not None:
                        self._fetch_metadata(deadline)
                    return
                last = ", ".join(
                    f"version {state.version} is {state.state} {state.error_message}"
                    for state in states
                )
            except (ModelNotFound, Unavailable, InvalidRequest) as error:
                last = str(error)
            except DeadlineExceeded as error:
                raise self._not_available(timeout, last or str(error)) from error
            if deadline.remaining() <= _POLL_SECONDS:
                raise self._not_available(timeout, last)
            time.sleep(_POLL_SECONDS)

    def session(
        self, batch_size: int = 1, *, timeout: float | None = None
    ) -> StreamingSession:
        """Starts a session that sends sequences frame by frame or in chunks.

        Args:
            batch_size: Positive int, the number of sequences.
            timeout: As in `predict`.

        Returns:
            A `StreamingSession`, which uses the current version until its end.

        Raises:
            SignatureNotFound: If the model has no signatures for streaming.
            ServingError: As in `predict`.
        """
        return StreamingSession(self, batch_size, timeout=timeout)

    def at_version(self, version: int) -> ServingClient:
        """Returns a client for one version that shares the connections.

        Args:
            version: int.

        Returns:
            A `ServingClient`. Closing either client closes both.
        """
        client = object.__new__(ServingClient)
        client.__dict__.update(self.__dict__)
        client.version, client.label = version, None
        if self._metadata is None or self._metadata.version != version:
            client._metadata = None
        return client

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def _target(self) -> Target:
        return Target(self.model, self.version, self.label)

    def _deadline(self, timeout: float | None) -> Deadline:
        if timeout is not None:
            _check_timeout(timeout)
        return Deadline(self.timeout if timeout is None else timeout)

    def _predict(
        self,
        metadata: Metadata,
        name: str,
        inputs: Mapping[str, Any],
        deadline: Deadline,
    ) -> dict[str, np.ndarray]:
        signature = find_signature(metadata, name, self.model)
        timesteps = padded = 0
        if self.pad_to is not None and LENGTHS in signature.inputs:
            arrays, timesteps, padded = fit_and_pad(signature, inputs, self.pad_to)
        else:
            arrays = signature.fit(inputs)
        request = self._transport.encode(self._target, name, signature, arrays)
        outputs = call_with_retries(
            lambda seconds: self._transport.predict(request, signature, seconds),
            deadline,
            self.retries,
        )
        signature.check_outputs(outputs)
        return cut(signature, outputs, timesteps, padded)

    def _fetch_metadata(self, deadline: Deadline) -> Metadata:
        self._metadata = call_with_retries(
            lambda seconds: self._transport.metadata(self._target, seconds),
            deadline,
            self.retries,
        )
        return self._metadata

    def _fetch_status(self, deadline: Deadline) -> list[VersionStatus]:
        states = call_with_retries(
            lambda seconds: self._transport.status(self._target, seconds),
            deadline,
            self.retries,
        )
        return sorted(states, key=lambda state: -state.version)

    def _not_available(self, timeout: float, last: str) -> ServingError:
        which = "" if self.version is None else f" version {self.version}"
        if self.label is not None:
            which = f" label {self.label!r}"
        return DeadlineExceeded(
            f"Model {self.model!r}{which} was not available within {timeout:g} s: "
            f"{last}",
            "DEADLINE_EXCEEDED",
        )


def _make_transport(
    rest_url: str | None,
    grpc_target: str | None,
    grpc_credentials: grpc.ChannelCredentials | None,
    max_response_bytes: int,
) -> Transport:
    # Imported here, so that REST does not need the packages of gRPC, and vice versa.
    if rest_url is not None:
        if grpc_credentials is not None:
            raise ValueError(
                "`grpc_credentials` must be None with `rest_url`; for TLS, give an "
                f"https URL. Received: grpc_credentials={grpc_credentials!r}"
            )
        with _explained("REST", "httpx"):
            from .rest_transport import RestTransport

            return RestTransport(rest_url, max_response_bytes)
    assert grpc_target is not None
    with _explained("gRPC", "grpcio tensorflow tensorflow-serving-api"):
        from .grpc_transport import GrpcTransport

        return GrpcTransport(grpc_target, grpc_credentials, max_response_bytes)


@contextlib.contextmanager
def _explained(protocol: str, packages: str) -> Any:
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"`ServingClient` over {protocol} needs a package that is missing: "
            f"{error}. Install it with `pip install {packages}`."
        ) from error


def _check_arguments(
    model: str,
    rest_url: str | None,
    grpc_target: str | None,
    version: int | None,
    label: str | None,
) -> None:
    if not isinstance(model, str) or not model or set(model) & set("/:"):
        raise ValueError(
            "`model` must be a name that is not empty and has no `/` or `:`. "
            f"Received: {model=}"
        )
    if (rest_url is None) == (grpc_target is None):
        raise ValueError(
            "Give `rest_url` or `grpc_target`, one of them. "
            f"Received: {rest_url=}, {grpc_target=}"
        )
    if rest_url is not None and not rest_url.startswith(("http://", "https://")):
        raise ValueError(
            f"`rest_url` must start with http:// or https://. Received: {rest_url=}"
        )
    if version is not None and (
        isinstance(version, bool) or not isinstance(version, int) or version < 0
    ):
        raise ValueError(
            f"`version` must be a non-negative integer or None. Received: {version=}"
        )
    if label is not None and (not label or set(label) & set("/:")):
        raise ValueError(
            "`label` must be a name that is not empty and has no `/` or `:`, or None. "
            f"Received: {label=}"
        )
    if version is not None and label is not None:
        raise ValueError(
            f"Give `version` or `label`, not both. Received: {version=}, {label=}"
        )


def _check_timeout(timeout: float) -> None:
    if isinstance(timeout, bool) or not 0 < timeout < math.inf:
        raise ValueError(f"`timeout` must be positive seconds. Received: {timeout=}")
