"""Defines `StreamingSession`, which streams sequences to a model."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, Protocol

import numpy as np

from .errors import ModelNotFound, SessionExpired, SignatureNotFound
from .signatures import find_signature
from .tensors import LENGTHS, Metadata, Signature

_INITIAL_STATE, _STEP, _CHUNK = "initial_state", "step", "chunk"


class Client(Protocol):
    """The part of `ServingClient` that a session uses."""

    model: str

    def metadata(self, *, timeout: float | None = None) -> Metadata: ...

    def at_version(self, version: int) -> Client: ...

    def predict(
        self,
        inputs: Mapping[str, Any],
        signature: str,
        *,
        timeout: float | None = None,
    ) -> dict[str, np.ndarray]: ...


class StreamingSession:
    """Streams sequences to a model, frame by frame or in chunks, and holds its states.

    The model needs the signature `initial_state`, and `step` or `chunk`.
    `keras_bnrnn.export_saved_model` writes these signatures for causal models. The
    server keeps no states: each request contains the current states, and each response
    contains the next states. The session replaces its states only when a response has
    arrived. Therefore a failed call can be repeated, and any replica can answer.

    The states of one version are not valid for another version, so the session uses the
    version of its first response until its end. A session is not thread-safe.

    Args:
        client: `ServingClient`. It must not be closed while the session is in use.
        batch_size: Positive int, the number of sequences, which advance together.
            Default: 1.
        timeout: Positive float, the time limit of each call in seconds, including
            retries. Default: `None`, the timeout of the client.

    Attributes:
        version: int, the version of the model.
        batch_size: The argument.
        states: Dict from name to array (B, ...): the current states, and `t`, the
            number of frames processed so far.

    Raises:
        ValueError: If `batch_size` is invalid.
        SignatureNotFound: If the model has no signatures for streaming.
        ServingError: As in `ServingClient.predict`.

    Example:

        session = client.session()
        for frame in frames:  # (F,) each
            outputs = session.step(frame[None])
    """

    def __init__(
        self, client: Client, batch_size: int = 1, timeout: float | None = None
    ) -> None:
        if (
            isinstance(batch_size, bool)
            or not isinstance(batch_size, int)
            or batch_size < 1
        ):
            raise ValueError(
                f"`batch_size` must be a positive integer. Received: {batch_size=}"
            )
        self.batch_size = batch_size
        self._timeout = timeout
        metadata = client.metadata(timeout=timeout)
        self.version = metadata.version
        self._client = client.at_version(metadata.version)
        self._metadata = metadata
        initial = self._find(_INITIAL_STATE)
        if not {_STEP, _CHUNK} & set(metadata.signatures):
            self._find(_STEP)
        self._initial_states = self._call(
            _INITIAL_STATE, _placeholders(initial, batch_size)
        )
        self.states = dict(self._initial_states)

    def step(
        self, frame: np.ndarray | Mapping[str, Any], *, timeout: float | None = None
    ) -> dict[str, np.ndarray]:
        """Processes the next frame of each sequence.

        Args:
            frame: Array (B, ...), or a dict from input name to array if the model has
                several inputs.
            timeout: Positive float, the time limit of this call in seconds. Default:
                `None`, the timeout of the session.

        Returns:
            Dict from output name to array (B, ...).

        Raises:
            ValueError: If the frame does not match the signature.
            SignatureNotFound: If the model has no signature `step`.
            SessionExpired: If the version is no longer served.
            ServingError: As in `ServingClient.predict`.
        """
        signature = self._find(_STEP)
        inputs = self._inputs(signature, frame, set(), "frame")
        return self._advance(_STEP, inputs, timeout)

    def chunk(
        self,
        frames: np.ndarray | Mapping[str, Any],
        lengths: Any = None,
        *,
        timeout: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Processes the next frames of each sequence.

        Args:
            frames: Array (B, T, ...), or a dict from input name to array if the model
                has several inputs.
            lengths: Integers (B,), the number of valid frames in each row. 0 does not
                advance the row. Default: `None`, all frames are valid.
            timeout: As in `step`.

        Returns:
            Dict from output name to array. Per-frame outputs (B, T, ...) are zero past
            the lengths. If the server pads batches, they may have additional zero
            frames after T.

        Raises:
            ValueError: If the frames or the lengths do not match the signature.
            SignatureNotFound: If the model has no signature `chunk`.
            SessionExpired, ServingError: As in `step`.
        """
        signature = self._find(_CHUNK)
        inputs = self._inputs(signature, frames, {LENGTHS}, "frames")
        if lengths is None:
            timesteps = max(
                (x.shape[1] for x in inputs.values() if x.ndim > 1), default=0
            )
            lengths = np.full([self.batch_size], timesteps, np.int32)
        lengths = np.asarray(lengths)
        if lengths.shape != (self.batch_size,):
            raise ValueError(
                f"`lengths` must have the shape ({self.batch_size},). "
                f"Received: lengths of shape {lengths.shape}"
            )
        return self._advance(_CHUNK, {**inputs, LENGTHS: lengths}, timeout)

    def reset(self) -> None:
        """Starts new sequences with the same version."""
        self.states = dict(self._initial_states)

    def _find(self, name: str) -> Signature:
        try:
            return find_signature(self._metadata, name, self._client.model)
        except SignatureNotFound as error:
            raise SignatureNotFound(
                f"{error.args[0]}. A session needs {_INITIAL_STATE!r}, and {_STEP!r} "
                f"or {_CHUNK!r}: the signatures of a causal model",
                error.code,
            ) from error

    def _inputs(
        self,
        signature: Signature,
        value: np.ndarray | Mapping[str, Any],
        others: Set[str],
        argument: str,
    ) -> dict[str, np.ndarray]:
        names = [n for n in signature.inputs if n not in {*self.states, *others}]
        if not isinstance(value, Mapping):
            if len(names) != 1:
                raise ValueError(
                    f"`{argument}` must be a dict with the names {sorted(names)}. "
                    f"Received: {argument} of type {type(value).__name__}"
                )
            value = {names[0]: value}
        if set(value) != set(names):
            raise ValueError(
                f"`{argument}` must have the names {sorted(names)}. "
                f"Received: {argument} with the names {sorted(value)}"
            )
        arrays = {name: np.asarray(x) for name, x in value.items()}
        for name, array in arrays.items():
            # A server might broadcast the states of one row over several rows.
            if not array.ndim or len(array) != self.batch_size:
                raise ValueError(
                    f"`{argument}` must have batch_size={self.batch_size} rows. "
                    f"Received: {name!r} of shape {array.shape}"
                )
        return arrays

    def _advance(
        self, name: str, inputs: Mapping[str, Any], timeout: float | None
    ) -> dict[str, np.ndarray]:
        answer = self._call(name, {**self.states, **inputs}, timeout)
        self.states = {state: answer.pop(state) for state in self.states}
        answer.pop(LENGTHS, None)
        return answer

    def _call(
        self, name: str, inputs: Mapping[str, Any], timeout: float | None = None
    ) -> dict[str, np.ndarray]:
        try:
            return self._client.predict(
                inputs, name, timeout=self._timeout if timeout is None else timeout
            )
        except ModelNotFound as error:
            raise SessionExpired(
                f"Version {self.version} of model {self._client.model!r}, whose states "
                "this session holds, is no longer served: start a new session. "
                f"{error.args[0]}",
                error.code,
                error.http_status,
            ) from error


def _placeholders(signature: Signature, batch_size: int) -> dict[str, np.ndarray]:
    """Makes zero inputs for `initial_state`, which reads only their batch size."""
    arrays = {}
    for name, spec in signature.inputs.items():
        shape = spec.shape or (None, 1)
        sizes = [batch_size, *(1 if size is None else size for size in shape[1:])]
        fill: Any = b"" if spec.dtype == "string" else 0
        arrays[name] = np.full(sizes, fill, spec.numpy_dtype)
    return arrays
