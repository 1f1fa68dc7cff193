"""Pads requests to given numbers of timesteps, and cuts the padding from outputs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .tensors import Signature, TensorSpec

LENGTHS = "lengths"


def check_pad_to(pad_to: Sequence[int] | None) -> tuple[int, ...] | None:
    """Checks the argument `pad_to` of a client.

    Args:
        pad_to: Positive integers in ascending order, or `None`.

    Returns:
        `pad_to` as a tuple, or `None`.

    Raises:
        ValueError: If `pad_to` is invalid.
    """
    if pad_to is None:
        return None
    valid = isinstance(pad_to, Sequence) and not isinstance(pad_to, str | bytes)
    if valid:
        valid = bool(pad_to) and all(type(size) is int for size in pad_to)
    if not valid or pad_to[0] < 1 or list(pad_to) != sorted(set(pad_to)):
        raise ValueError(
            "`pad_to` must be positive integers in ascending order, or None. "
            f"Received: {pad_to=}"
        )
    return tuple(pad_to)


def fit_and_pad(
    signature: Signature, inputs: Mapping[str, Any], pad_to: Sequence[int]
) -> tuple[dict[str, np.ndarray], int, int]:
    """Converts inputs to arrays of the signature, and pads their timesteps with zeros.

    Args:
        signature: A `Signature` with the input `lengths`.
        inputs: As for `Signature.fit`. Without `lengths`, all frames are valid.
        pad_to: A tuple that `check_pad_to` returned.

    Returns:
        The arrays, and their number of timesteps before and after padding. Both numbers
        are 0 if the signature has a fixed number of timesteps.

    Raises:
        ValueError: If the inputs do not match the signature, or differ in their number
            of timesteps.
    """
    names = [n for n, spec in signature.inputs.items() if _has_free_timesteps(spec)]
    if not names:
        return signature.fit(inputs), 0, 0
    if LENGTHS in inputs:
        # Checks `lengths` against the frames before padding.
        arrays = signature.fit(inputs)
    else:
        others = {n: spec for n, spec in signature.inputs.items() if n != LENGTHS}
        arrays = dataclasses.replace(signature, inputs=others).fit(inputs)
        rows, timesteps = arrays[names[0]].shape[:2]
        arrays[LENGTHS] = np.full([rows], timesteps, np.int32)
    found = {name: arrays[name].shape[1] for name in names}
    if len(set(found.values())) > 1:
        raise ValueError(
            "Inputs must have one number of timesteps if `pad_to` is given. "
            f"Received: {found}"
        )
    timesteps = found[names[0]]
    padded = _round_up(timesteps, pad_to)
    for name in names:
        arrays[name] = _pad(arrays[name], padded)
    return arrays, timesteps, padded


def cut(
    signature: Signature,
    outputs: Mapping[str, np.ndarray],
    timesteps: int,
    padded: int,
) -> dict[str, np.ndarray]:
    """Cuts per-frame outputs to the frames of the request.

    An output is a per-frame output if its second size is free in the signature and is
    at least `padded`. The size may be larger if the server pads batches.

    Args:
        signature: The `Signature` of the outputs.
        outputs: Dict from output name to array.
        timesteps, padded: The numbers that `fit_and_pad` returned.

    Returns:
        Dict from output name to array.
    """
    return {
        name: array[:, :timesteps]
        if padded
        and _has_free_timesteps(signature.outputs[name], array.ndim)
        and array.shape[1] >= padded
        else array
        for name, array in outputs.items()
    }


def _has_free_timesteps(spec: TensorSpec, rank: int = 0) -> bool:
    if spec.shape is None:
        return rank > 1
    return len(spec.shape) > 1 and spec.shape[1] is None


def _round_up(timesteps: int, pad_to: Sequence[int]) -> int:
    """Returns the first size of at least `timesteps`, or a multiple of the last."""
    for size in pad_to:
        if timesteps <= size:
            return size
    return -(-timesteps // pad_to[-1]) * pad_to[-1]


def _pad(array: np.ndarray, timesteps: int) -> np.ndarray:
    fill: Any = b"" if array.dtype == object else 0
    shape = [array.shape[0], timesteps, *array.shape[2:]]
    result = np.full(shape, fill, array.dtype)
    result[:, : array.shape[1]] = array
    return result
