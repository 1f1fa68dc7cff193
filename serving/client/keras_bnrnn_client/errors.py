"""What can go wrong between a client and a server, as exceptions."""


class ServingError(Exception):
    """A request that was not answered as asked.

    Args:
        message: str, the server's words where it has any.
        code: str, the name of the status code in gRPC's terms (`"UNAVAILABLE"`).
        http_status: int, the HTTP status of a REST answer; `None` where there was no
            answer, and over gRPC.
        retriable: bool, whether the same request may succeed a moment later and may be
            sent again without harm.

    Attributes:
        code, http_status, retriable: as given.
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
    """There was no answer in time, retries included."""


class InvalidRequest(ServingError):
    """The server refuses the request: its inputs, its signature or its label."""


class ModelNotFound(ServingError):
    """The server does not serve the model, or not this version of it."""


class SessionExpired(ModelNotFound):
    """The version whose states a session holds is no longer served."""


class SignatureNotFound(InvalidRequest):
    """The model has no signature of this name."""


class Unavailable(ServingError):
    """The server cannot be reached, or takes no requests now."""


def make_error(
    message: str, code: str, http_status: int | None = None, retriable: bool = False
) -> ServingError:
    """Makes the exception of a status code.

    Args:
        message: str.
        code: str, as in `ServingError`.
        http_status: int or None.
        retriable: bool.

    Returns:
        A `ServingError` of the class that fits the code. It is retriable, too, if the
        request was refused for the shape of another one in its batch.
    """
    retriable = retriable or _OF_A_BATCH in message
    return _CLASSES.get(code, ServingError)(message, code, http_status, retriable)


# TensorFlow Serving's words for a batch of unequal shapes, all of whose requests it
# refuses.
_OF_A_BATCH = "from different tasks have different shapes and padding is turned off"

_CLASSES: dict[str, type[ServingError]] = {
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "FAILED_PRECONDITION": InvalidRequest,
    "INVALID_ARGUMENT": InvalidRequest,
    "NOT_FOUND": ModelNotFound,
    "OUT_OF_RANGE": InvalidRequest,
    "UNAVAILABLE": Unavailable,
}
