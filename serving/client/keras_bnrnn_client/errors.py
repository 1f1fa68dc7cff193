"""Defines the exceptions of the client."""

import contextlib
from collections.abc import Iterator


class ServingError(Exception):
    """Raised if a request fails.

    Args:
        message: str, the message of the server, if there is one.
        code: str, the name of the gRPC status code, such as `"UNAVAILABLE"`.
        http_status: int, the HTTP status of a REST response; `None` without a response,
            and over gRPC.
        retriable: bool, whether the same request may succeed later.

    Attributes:
        code, http_status, retriable: The arguments.
    """

    def __init__(
        self,
        message: str,
        code: str = "UNKNOWN",
        http_status: int | None = None,
        retriable: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.http_status = http_status
        self.retriable = retriable

    def __str__(self) -> str:
        status = "" if self.http_status is None else f", HTTP {self.http_status}"
        return f"{super().__str__()} [{self.code}{status}]"


class DeadlineExceeded(ServingError):
    """Raised if no response arrives in time, including retries."""


class InvalidRequest(ServingError):
    """Raised if the server rejects the inputs, the signature or the label."""


class InvalidResponse(ServingError):
    """Raised if a response is too large, malformed, or unlike the signature."""


class ModelNotFound(ServingError):
    """Raised if the server does not serve the model or the version."""


class SessionExpired(ModelNotFound):
    """Raised if the version of a streaming session is no longer served."""


class SignatureNotFound(InvalidRequest):
    """Raised if the model has no signature of this name."""


class Unavailable(ServingError):
    """Raised if the server cannot be reached or does not accept requests."""


def make_error(
    message: str, code: str, http_status: int | None = None, retriable: bool = False
) -> ServingError:
    """Makes the exception of a status code.

    Args:
        message: str.
        code: str, as in `ServingError`.
        http_status: int or `None`, as in `ServingError`.
        retriable: bool, as in `ServingError`.

    Returns:
        A `ServingError` of the class for this code. The error is also retriable if the
        shape of another request in the same batch caused it.
    """
    retriable = retriable or _OF_A_BATCH in message
    return _CLASSES.get(code, ServingError)(message, code, http_status, retriable)


@contextlib.contextmanager
def reading(http_status: int | None = None) -> Iterator[None]:
    """Turns the exceptions of a malformed response into `InvalidResponse`.

    Args:
        http_status: int or `None`, as in `ServingError`.
    """
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise InvalidResponse(
            "The response must be that of TensorFlow Serving, and cannot be read: "
            f"{type(error).__name__}: {error}",
            "INTERNAL",
            http_status,
        ) from error


def too_large(max_bytes: int, http_status: int | None = None) -> InvalidResponse:
    """Returns the error for a response of more than `max_bytes`."""
    return InvalidResponse(
        f"The response must have at most {max_bytes} bytes, the `max_response_bytes` "
        "of the client. Received: a larger one. Raise the limit if you trust the "
        "server",
        "RESOURCE_EXHAUSTED",
        http_status,
    )


# The message of TensorFlow Serving if requests in a batch have unequal shapes. All
# requests of the batch fail.
_OF_A_BATCH = "from different tasks have different shapes and padding is turned off"

_CLASSES: dict[str, type[ServingError]] = {
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "FAILED_PRECONDITION": InvalidRequest,
    "INVALID_ARGUMENT": InvalidRequest,
    "NOT_FOUND": ModelNotFound,
    "OUT_OF_RANGE": InvalidRequest,
    "UNAVAILABLE": Unavailable,
}
