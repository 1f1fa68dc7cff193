"""Converts TensorFlow Serving's protos to tensors and tensors to protos.

Errors have the status codes and messages of TensorFlow Serving, if it raises an error.
"""

import math

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2

DEFAULT_SIGNATURE = "serving_default"
_INIT_OP = "__saved_model_init_op"

# gRPC sends an error in a header. TensorFlow Serving has the same limit.
_MAX_ERROR_LENGTH = 1024

# The size of a string of TensorFlow, `tstring`. The limit of the request bounds the
# bytes in it.
_STRING_BYTES = 24

# The largest rank of a tensor in TensorFlow.
_MAX_RANK = 254


def find_signature(request, signatures):
    """Finds the signature of a request.

    Args:
        request: `PredictRequest`.
        signatures: dict of signature name -> `SignatureDef`.

    Returns:
        The signature's name and its `SignatureDef`.

    Raises:
        tf.errors.FailedPreconditionError: If the model has no such signature.
    """
    name = request.model_spec.signature_name or DEFAULT_SIGNATURE
    # The signatures of a SavedModel include its initialisation op.
    if name not in signatures or name == _INIT_OP:
        raise tf.errors.FailedPreconditionError(
            None, None, f'Serving signature key "{name}" not found.'
        )
    return name, signatures[name]


def read_inputs(request, signature, max_bytes):
    """Reads the inputs of a request.

    Args:
        request: `PredictRequest`.
        signature: `SignatureDef`.
        max_bytes: int, the size limit of a tensor in memory. A small proto can describe
            a large tensor, since one value can stand for all elements.

    Returns:
        Dict from input name to tensor, with the dtypes and shapes of the signature.

    Raises:
        tf.errors.InvalidArgumentError: If the inputs do not match the signature.
        tf.errors.ResourceExhaustedError: If a tensor exceeds `max_bytes`.
    """
    sent, wanted = set(request.inputs), set(signature.inputs)
    if len(sent) != len(wanted):
        raise invalid_argument(
            f"input size does not match signature: {len(sent)}!={len(wanted)} "
            f"len({{{_names(sent)}}}) != len({{{_names(wanted)}}}). "
            f"Sent extra: {{{_names(sent - wanted)}}}. "
            f"Missing but required: {{{_names(wanted - sent)}}}."
        )
    for name in sorted(wanted - sent):
        raise invalid_argument(
            f"Signature input alias: {name}(feed name: {signature.inputs[name].name}) "
            "not found in request and no default value provided. Inputs expected to "
            f"be in the request {{{_names(sent)}}}, or default input alias set: "
        )
    return {
        name: _read_tensor(request.inputs[name], name, info, max_bytes)
        for name, info in signature.inputs.items()
    }


def filter_outputs(request, signature):
    """Returns the names of the outputs that a request asks for.

    Args:
        request: `PredictRequest`.
        signature: `SignatureDef`.

    Returns:
        List of the names in `output_filter`, or of all outputs if it is empty.

    Raises:
        tf.errors.InvalidArgumentError: If a name is unknown or repeated.
    """
    names = list(request.output_filter)
    for index, name in enumerate(names):
        if name not in signature.outputs:
            raise invalid_argument(
                f"output tensor alias not found in signature: {name} Outputs expected "
                f"to be in the set {{{_names(signature.outputs)}}}."
            )
        if name in names[:index]:
            raise invalid_argument(f"duplicate output tensor alias: {name}")
    return names or list(signature.outputs)


def write_tensor(array, proto):
    """Writes an output to a proto, in the same field as TensorFlow Serving.

    Args:
        array: The value of `Tensor.numpy()`; strings are bytes.
        proto: The `TensorProto` to write to.
    """
    array = np.asarray(array)
    dtype = tf.string if array.dtype == object else tf.as_dtype(array.dtype)
    proto.dtype = dtype.as_datatype_enum
    proto.tensor_shape.SetInParent()  # for scalars: an empty shape
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    values = array.ravel()
    if dtype.is_complex:
        # Real and imaginary parts alternate.
        values = values.view(values.real.dtype)
    elif dtype in (tf.float16, tf.bfloat16):
        values = values.view(np.uint16)
    field = _FIELDS.get(dtype.name)
    if field is None:
        proto.CopyFrom(tf.make_tensor_proto(array))
    else:
        getattr(proto, field).extend(values.tolist())


_FIELDS = {
    "float32": "float_val",
    "float64": "double_val",
    "float16": "half_val",
    "bfloat16": "half_val",
    "int8": "int_val",
    "int16": "int_val",
    "int32": "int_val",
    "uint8": "int_val",
    "uint16": "int_val",
    "uint32": "uint32_val",
    "int64": "int64_val",
    "uint64": "uint64_val",
    "bool": "bool_val",
    "string": "string_val",
    "complex64": "scomplex_val",
    "complex128": "dcomplex_val",
}


def shorten(message):
    """Cuts the text of an error, which may quote a large part of a request."""
    if len(message) <= _MAX_ERROR_LENGTH:
        return message
    return message[:_MAX_ERROR_LENGTH] + "...TRUNCATED"


def invalid_argument(message):
    """Returns the error for an invalid request."""
    return tf.errors.InvalidArgumentError(None, None, message)


def _read_tensor(proto, name, info, max_bytes):
    if proto.dtype != info.dtype:
        raise invalid_argument(
            f"Expects `{name}` to be {_dtype_name(info.dtype)} but "
            f"{_dtype_name(proto.dtype)} is provided"
        )
    expected = tf.as_dtype(info.dtype)
    if len(proto.tensor_shape.dim) > _MAX_RANK:
        raise invalid_argument(f"tensor parsing error: {name}")
    sizes = [dim.size for dim in proto.tensor_shape.dim]
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in sizes):
        raise invalid_argument(f"tensor parsing error: {name}")
    shape = tf.TensorShape(info.tensor_shape)
    if not shape.is_compatible_with(sizes):
        raise invalid_argument(
            f"`{name}` must have the shape {shape}. Received: shape={sizes}"
        )
    if math.prod(sizes) * (expected.size or _STRING_BYTES) > max_bytes:
        raise tf.errors.ResourceExhaustedError(
            None,
            None,
            f"`{name}` must take at most {max_bytes} bytes. Received: shape={sizes}",
        )
    try:
        return tf.io.parse_tensor(proto.SerializeToString(), expected)
    except tf.errors.InvalidArgumentError as error:
        raise invalid_argument(f"tensor parsing error: {name}") from error


def _dtype_name(number):
    """Returns TensorFlow's name of a dtype, such as `double`, or its unknown number."""
    if number not in types_pb2.DataType.values():
        return f"dtype {number}"
    return types_pb2.DataType.Name(number).removeprefix("DT_").lower()


def _names(names):
    return ",".join(sorted(names))
