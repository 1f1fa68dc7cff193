"""Pads requests to a few numbers of timesteps, and cuts the answers back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .tensors import Signature, TensorSpec

LENGTHS = "lengths"


def check_pad_to(pad_to: Sequence[int] | None) -> tuple[int, ...] | None:
    """Checks the argument `pad_to` of a client.

    Args:
        pad_to: positive integers, ascending, or None.

    Returns:
        `pad_to` as a tuple, or None.

    Raises:
        ValueError: for anything else.
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
        signature: `Signature` that has `lengths`.
        inputs: as for `Signature.fit`. `lengths` may be missing: all frames are real.
        pad_to: as returned by `check_pad_to`.

    Returns:
        The arrays, their number of timesteps before padding, and the number after. Both
        numbers are 0 if the signature fixes the number of timesteps.

    Raises:
        ValueError: if the inputs do not fit, or differ in their number of timesteps.
    """
    names = [n for n, spec in signature.inputs.items() if _has_free_timesteps(spec)]
    if not names:
        return signature.fit(inputs), 0, 0
    if LENGTHS in inputs:
        # Before padding, so that lengths are compared with the caller's frames.
        arrays = signature.fit(inputs)
    else:
        others = {n: spec for n, spec in signature.inputs.items() if n != LENGTHS}
        arrays = dataclasses.replace(signature, inputs=others).fit(inputs)
        rows, timesteps = arrays[names[0]].shape[:2]
        arrays[LENGTHS] = np.full([rows], timesteps, np.int32)
    found = {name: arrays[name].shape[1] for name in names}
    if len(set(found.values())) > 1:
        raise ValueError(
            "Inputs must have one number of timesteps where `pad_to` is given. "
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
    """Cuts the outputs per frame to the frames of the request.

    Args:
        signature: the `Signature` that answered.
        outputs: dict of output name -> array.
        timesteps, padded: as returned by `fit_and_pad`.

    Returns:
        Dict of output name -> array. An output is one per frame if the signature leaves
        its second size free and it has `padded` timesteps, or more from a server that
        pads batches.
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
    """The first of the sizes that holds it, or a multiple of the last."""
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
