"""TensorFlow Serving's protos: requests to tensors, tensors to answers.

Errors have the status codes and the words of TensorFlow Serving, where it has any.
"""

import math

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2

DEFAULT_SIGNATURE = "serving_default"
_INIT_OP = "__saved_model_init_op"


def find_signature(request, signatures):
    """Finds the signature that a request names.

    Args:
        request: `PredictRequest`.
        signatures: dict of signature name -> `SignatureDef`.

    Returns:
        The signature's name and its `SignatureDef`.

    Raises:
        tf.errors.FailedPreconditionError: if there is none of that name.
    """
    name = request.model_spec.signature_name or DEFAULT_SIGNATURE
    # An op that initialises the model is listed with the signatures.
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
        max_bytes: int, the most that a tensor may take in memory: a proto may give
            one value for all the elements of a large shape.

    Returns:
        Dict of input name -> tensor, of the signature's dtypes and shapes.

    Raises:
        tf.errors.InvalidArgumentError: if the inputs do not fit the signature.
        tf.errors.ResourceExhaustedError: for a tensor beyond `max_bytes`.
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
    """The names of the outputs that a request asks for.

    Args:
        request: `PredictRequest`.
        signature: `SignatureDef`.

    Returns:
        List of names: those of `output_filter`, all if it is empty.

    Raises:
        tf.errors.InvalidArgumentError: for a name that does not exist or is repeated.
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
    """Writes an output, in the field of its dtype as TensorFlow Serving does.

    Args:
        array: what `Tensor.numpy()` returned; strings are bytes.
        proto: the `TensorProto` to fill in.
    """
    array = np.asarray(array)
    dtype = tf.string if array.dtype == object else tf.as_dtype(array.dtype)
    proto.dtype = dtype.as_datatype_enum
    proto.tensor_shape.SetInParent()  # a scalar has a shape, too
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    values = array.ravel()
    if dtype.is_complex:
        # Real and imaginary parts by turns.
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


def invalid_argument(message):
    """The error of a request that is at fault."""
    return tf.errors.InvalidArgumentError(None, None, message)


def _read_tensor(proto, name, info, max_bytes):
    if proto.dtype != info.dtype:
        raise invalid_argument(
            f"Expects `{name}` to be {_dtype_name(info.dtype)} but "
            f"{_dtype_name(proto.dtype)} is provided"
        )
    expected = tf.as_dtype(info.dtype)
    sizes = [dim.size for dim in proto.tensor_shape.dim]
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in sizes):
        raise invalid_argument(f"tensor parsing error: {name}")
    shape = tf.TensorShape(info.tensor_shape)
    if not shape.is_compatible_with(sizes):
        raise invalid_argument(
            f"`{name}` must have the shape {shape}. Received: shape={sizes}"
        )
    # Strings count by their number here; their bytes were counted in the request.
    if math.prod(sizes) * max(expected.size or 1, 1) > max_bytes:
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
    """TensorFlow's own name, as in `double`; a number that it does not know as such."""
    if number not in types_pb2.DataType.values():
        return f"dtype {number}"
    return types_pb2.DataType.Name(number).removeprefix("DT_").lower()


def _names(names):
    return ",".join(sorted(names))
