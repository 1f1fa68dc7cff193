"""A client for TensorFlow Serving and servers with the same API.

REST needs httpx and NumPy. gRPC also needs grpcio, tensorflow and
tensorflow-serving-api. The package does not import Keras or `keras_bnrnn`.
"""

from .client import ServingClient
from .errors import (
    DeadlineExceeded,
    InvalidRequest,
    InvalidResponse,
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
    "InvalidResponse",
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
