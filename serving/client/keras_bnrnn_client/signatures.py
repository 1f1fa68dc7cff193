"""Finds signatures of a model by name."""

from .errors import SignatureNotFound
from .tensors import Metadata, Signature

DEFAULT_SIGNATURE = "serving_default"


def find_signature(metadata: Metadata, name: str, model: str) -> Signature:
    """Finds a signature of a model.

    Args:
        metadata: `Metadata` of the model.
        name: str.
        model: str, the name of the model for the error message.

    Returns:
        `Signature`.

    Raises:
        SignatureNotFound: If the model has no signature of this name.
    """
    if name not in metadata.signatures:
        raise SignatureNotFound(
            f"Version {metadata.version} of model {model!r} has no signature {name!r}; "
            f"it has {sorted(metadata.signatures)}",
            "INVALID_ARGUMENT",
        )
    return metadata.signatures[name]
