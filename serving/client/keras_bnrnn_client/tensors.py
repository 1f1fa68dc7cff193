"""Describes signatures and converts inputs to arrays that match them."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from .errors import InvalidRequest, InvalidResponse

# The input of `keras_bnrnn` signatures with the number of valid frames of each row.
LENGTHS = "lengths"

_BFLOAT16 = "bfloat16"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor of a signature.

    Attributes:
        dtype: str, TensorFlow's name of the dtype (`"float32"`, `"string"`).
        shape: Tuple of sizes, with `None` for a free size; `None` for any shape.
    """

    dtype: str
    shape: tuple[int | None, ...] | None

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of arrays; object for strings, which are bytes."""
        if self.dtype == "string":
            return np.dtype(object)
        if self.dtype == _BFLOAT16:
            import ml_dtypes  # NumPy itself has no bfloat16

            dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return dtype
        return np.dtype(self.dtype)

    def matches(self, shape: tuple[int, ...]) -> bool:
        """Returns whether an array of this shape can be the tensor."""
        return self.shape is None or (
            len(self.shape) == len(shape)
            and all(
                wanted in (None, size)
                for wanted, size in zip(self.shape, shape, strict=True)
            )
        )


@dataclasses.dataclass(frozen=True)
class Signature:
    """The inputs and the outputs of a signature, by name."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def fit(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Converts inputs to arrays of the signature's dtypes.

        Args:
            inputs: Dict from input name to array or nested list. Integers may become
                floats. Wider dtypes may become narrower ones; integers must be in the
                range of the new dtype.

        Returns:
            Dict from input name to array.

        Raises:
            ValueError: If names, dtypes or shapes do not match the signature.
            InvalidRequest: If the number of `lengths` is not the number of rows.
        """
        if set(inputs) != set(self.inputs):
            raise ValueError(
                f"`inputs` must have the names {sorted(self.inputs)}. "
                f"Received: inputs with the names {sorted(inputs)}"
            )
        # The caller's order, since the order in a signature depends on the server.
        arrays = {
            name: _fit(name, value, self.inputs[name]) for name, value in inputs.items()
        }
        _check_lengths(arrays)
        return arrays

    def check_names(self, names: Collection[str]) -> None:
        """Raises InvalidResponse if the names are not those of the outputs."""
        if set(names) != set(self.outputs):
            raise InvalidResponse(
                f"The response must have the outputs {sorted(self.outputs)}. "
                f"Received: {sorted(names)}",
                "INTERNAL",
            )

    def check_outputs(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Raises InvalidResponse if names or shapes do not match the signature."""
        self.check_names(outputs)
        for name, array in outputs.items():
            spec = self.outputs[name]
            if not spec.matches(array.shape):
                raise InvalidResponse(
                    f"The output `{name}` must have the shape {spec.shape}. "
                    f"Received: shape {array.shape}",
                    "INTERNAL",
                )


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The number of a version and its signatures by name."""

    version: int
    signatures: Mapping[str, Signature]


@dataclasses.dataclass(frozen=True)
class VersionStatus:
    """The state of a version.

    Attributes:
        version: int.
        state: str: `"START"`, `"LOADING"`, `"AVAILABLE"`, `"UNLOADING"` or `"END"`.
        error_code: str, `"OK"` unless loading failed.
        error_message: str, the reason if loading failed.
    """

    version: int
    state: str
    error_code: str = "OK"
    error_message: str = ""


def dtype_name(name: str) -> str:
    """Converts a proto's dtype name, as `"DT_FLOAT"`, to TensorFlow's, `"float32"`."""
    name = name.removeprefix("DT_").lower()
    return {"float": "float32", "double": "float64", "half": "float16"}.get(name, name)


def _fit(name: str, value: Any, spec: TensorSpec) -> np.ndarray:
    try:
        # NumPy's string dtypes would drop zero bytes at the end.
        array = np.asarray(value, object if spec.dtype == "string" else None)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must not be ragged: pad it, and give the lengths. "
            f"Received: {name}={_short(value)}"
        ) from error
    if spec.dtype == "string":
        array = _to_bytes(name, array)
    else:
        array = _to_numbers(name, array, spec)
    if not spec.matches(array.shape):
        raise ValueError(
            f"`{name}` must have the shape {spec.shape}. "
            f"Received: {name} of shape {array.shape}"
        )
    return array


def _check_lengths(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises InvalidRequest if `lengths` has not one number for each row."""
    lengths = arrays.get(LENGTHS)
    if lengths is None or lengths.ndim != 1:
        return
    for name, array in arrays.items():
        if array.ndim and len(array) != len(lengths):
            raise InvalidRequest(
                f"`{LENGTHS}` must have one number for each of the {len(array)} rows "
                f"of `{name}`. Received: {LENGTHS}={_short(lengths.tolist())}",
                "INVALID_ARGUMENT",
            )


def _to_bytes(name: str, array: np.ndarray) -> np.ndarray:
    result = np.empty(array.shape, object)
    for index, item in np.ndenumerate(array):
        if isinstance(item, str):
            item = item.encode("utf-8")
        if not isinstance(item, bytes):
            raise ValueError(
                f"`{name}` must be strings or bytes. Received: {name}={_short(item)}"
            )
        result[index] = bytes(item)
    return result


def _to_numbers(name: str, array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    dtype = spec.numpy_dtype
    if array.dtype == dtype:
        return array
    # An empty list is float64 in NumPy, but may become any dtype.
    kinds = {"b": "b", "i": "iu", "u": "iu", "c": "iufc"}.get(dtype.kind, "iufV")
    if array.size and array.dtype.kind not in kinds:
        raise ValueError(
            f"`{name}` must be {spec.dtype}. "
            f"Received: {name} of dtype {array.dtype}, {_short(array)}"
        )
    if dtype.kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        # Python integers, since NumPy would compare int64 with uint64 as floats.
        if not limits.min <= int(array.min()) <= int(array.max()) <= limits.max:
            raise ValueError(
                f"`{name}` must be within {spec.dtype}. "
                f"Received: {name}={_short(array)}"
            )
    return array.astype(dtype)


def _short(value: Any) -> str:
    text = str(value).replace("\n", "")
    return text if len(text) <= 80 else text[:77] + "..."
