"""What REST and gRPC have in common for the client."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from .tensors import Metadata, Signature, VersionStatus


@dataclasses.dataclass(frozen=True)
class Target:
    """The version of a model that a request is for.

    Attributes:
        model: str.
        version: int, or None for the latest or the labelled one.
        label: str or None.
    """

    model: str
    version: int | None
    label: str | None


class Transport(Protocol):
    """A protocol's requests. Each raises a `ServingError`, and none tries twice."""

    def encode(
        self,
        target: Target,
        name: str,
        signature: Signature,
        inputs: Mapping[str, np.ndarray],
    ) -> Any:
        """Makes the request that `predict` sends."""

    def predict(
        self, request: Any, signature: Signature, seconds: float
    ) -> dict[str, np.ndarray]:
        """Sends what `encode` made."""

    def metadata(self, target: Target, seconds: float) -> Metadata:
        """Asks for the signatures."""

    def status(self, target: Target, seconds: float) -> list[VersionStatus]:
        """Asks for the states of the versions."""

    def close(self) -> None:
        """Closes the connections."""
