"""A client of TensorFlow Serving, and of servers that speak as it does.

It needs httpx and NumPy; over gRPC, grpcio and tensorflow-serving-api, too. It imports
neither Keras nor `keras_bnrnn`.
"""

from .client import ServingClient
from .errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    ServingError,
    SessionExpired,
    SignatureNotFound,
    Unavailable,
)
from .session import StreamingSession
from .tensors import Metadata, Signature, TensorSpec, VersionStatus

__all__ = [
    "DeadlineExceeded",
    "InvalidRequest",
    "Metadata",
    "ModelNotFound",
    "ServingClient",
    "ServingError",
    "SessionExpired",
    "Signature",
    "SignatureNotFound",
    "StreamingSession",
    "TensorSpec",
    "Unavailable",
    "VersionStatus",
]
