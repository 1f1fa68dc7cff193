"""Defines the interface that REST and gRPC transports share."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from .tensors import Metadata, Signature, VersionStatus


@dataclasses.dataclass(frozen=True)
class Target:
    """The model and version that a request addresses.

    Attributes:
        model: str, the name of the model.
        version: int, or `None` for the latest or labelled version.
        label: str, the label of a version, or `None`.
    """

    model: str
    version: int | None
    label: str | None


class Transport(Protocol):
    """Sends requests over one protocol. Raises `ServingError`; does not retry."""

    def encode(
        self,
        target: Target,
        name: str,
        signature: Signature,
        inputs: Mapping[str, np.ndarray],
    ) -> Any:
        """Makes a request for `predict`."""

    def predict(
        self, request: Any, signature: Signature, seconds: float
    ) -> dict[str, np.ndarray]:
        """Sends a request of `encode` and returns the outputs."""

    def metadata(self, target: Target, seconds: float) -> Metadata:
        """Requests the version number and the signatures."""

    def status(self, target: Target, seconds: float) -> list[VersionStatus]:
        """Requests the states of the versions."""

    def close(self) -> None:
        """Closes the connections."""
