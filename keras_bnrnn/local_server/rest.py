"""Converts TensorFlow Serving's JSON to arrays and arrays to JSON.

An error message is the message of TensorFlow Serving if clients may depend on it. Other
messages name the input and the value.
"""

import base64
import contextlib
import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from tensorflow_serving.apis import get_model_metadata_pb2, model_pb2

from keras_bnrnn.local_server import predict


class RestError(Exception):
    """An HTTP response with a status other than 200.

    Args:
        status: int, the HTTP status.
        message: str, the value of `error` in the response, which is cut after 1024
            characters; `None` for an empty body.
        closes: bool, whether the server closes the connection. Default: `False`.
    """

    def __init__(self, status, message, closes=False):
        super().__init__(message)
        self.status = status
        self.message = None if message is None else predict.shorten(message)
        self.closes = closes


@dataclasses.dataclass
class PredictRequest:
    """The body of a predict request.

    Attributes:
        signature_name: str.
        row: bool, True for row format (`instances`), False for column format
            (`inputs`).
        values: The JSON value of `instances` or `inputs`.
    """

    signature_name: str
    row: bool
    values: Any

    @classmethod
    def parse(cls, body):
        """Parses a request body.

        Args:
            body: bytes.

        Returns:
            A `PredictRequest`.

        Raises:
            RestError: 400 if the body is not the JSON of a predict request.
        """
        try:
            content = _loads(body)
        # The UTF-8 and JSON errors are subclasses of ValueError.
        except (ValueError, RecursionError) as error:
            raise RestError(400, f"JSON Parse error: {error}") from error
        if not isinstance(content, dict):
            raise RestError(
                400, f"The request must be a JSON object. Received: {_short(content)}"
            )
        signature_name = content.get("signature_name", "")
        if not isinstance(signature_name, str):
            raise RestError(
                400,
                "'signature_name' key must be a string value. "
                f"Received: {_short(signature_name)}",
            )
        forms = [key for key in ("instances", "inputs") if key in content]
        if not forms:
            raise RestError(400, "Missing 'inputs' or 'instances' key")
        if len(forms) > 1:
            raise RestError(
                400,
                "Expecting only one of 'inputs' or 'instances' keys to exist. "
                "Received: both",
            )
        values = content[forms[0]]
        row = forms[0] == "instances"
        if row and (not isinstance(values, list) or not values):
            raise RestError(
                400,
                "'instances' must be a list of one instance or more. "
                f"Received: {_short(values)}",
            )
        return cls(signature_name or "serving_default", row, values)

    def inputs(self, signatures):
        """Converts the values to the inputs of the signature.

        Args:
            signatures: dict of signature name -> `SignatureDef`.

        Returns:
            Dict from input name to NumPy array of the signature's dtype. Strings are
            bytes in an array of objects.

        Raises:
            RestError: 400 if the signature does not exist or the values do not match
                it; 501 if JSON cannot represent a dtype.
        """
        signature = signatures.get(self.signature_name)
        if signature is None:
            raise RestError(
                400,
                f'Serving signature name: "{self.signature_name}" '
                "not found in signature def",
            )
        infos = signature.inputs
        if not infos:
            raise RestError(
                400, f"Failed to get input map for signature: {self.signature_name}"
            )
        columns = self._columns_of_rows(infos) if self.row else self._columns(infos)
        return {name: _to_array(columns[name], name, infos[name]) for name in infos}

    def answer(self, outputs):
        """Converts the outputs of a signature to the response.

        Args:
            outputs: Dict from output name to NumPy array.

        Returns:
            A dict that `dumps` can write.

        Raises:
            RestError: 400 if JSON cannot represent a dtype, or if a request in row
                format has outputs of different batch sizes.
        """
        if self.row:
            _check_batch(outputs)
        values = {name: _to_json(array, name) for name, array in outputs.items()}
        single = next(iter(values.values())) if len(values) == 1 else None
        if not self.row:
            return {"outputs": values if single is None else single}
        if single is not None:
            return {"predictions": single}
        rows = zip(*values.values(), strict=True)
        return {"predictions": [dict(zip(values, row, strict=True)) for row in rows]}

    def _columns_of_rows(self, infos):
        are_objects = [_is_object(instance) for instance in self.values]
        if not any(are_objects):
            if len(infos) > 1:
                raise RestError(
                    400,
                    "instances is a plain list, but expecting list of objects as "
                    f"multiple input tensors required: {_names(infos)}",
                )
            return {next(iter(infos)): self.values}
        for index, instance in enumerate(self.values):
            if not are_objects[index]:
                raise RestError(
                    400,
                    "'instances' must be all objects or all values. Received: "
                    f"instances[{index}]={_short(instance)} among objects",
                )
            if set(instance) != set(infos):
                raise RestError(
                    400,
                    f"instances[{index}] must have the keys: {_names(infos)}. "
                    f"Received: {_names(instance)}",
                )
        return {name: [row[name] for row in self.values] for name in infos}

    def _columns(self, infos):
        if not _is_object(self.values):
            if len(infos) > 1:
                raise RestError(
                    400,
                    "inputs is a plain value/list, but expecting an object as "
                    f"multiple input tensors required: {_names(infos)}",
                )
            return {next(iter(infos)): self.values}
        # Further keys are ignored, as in TensorFlow Serving.
        if not set(infos) <= set(self.values):
            raise RestError(
                400,
                f"'inputs' must have the keys: {_names(infos)}. "
                f"Received: {_names(self.values)}",
            )
        return self.values


def status(response):
    """Converts a response to a model status request to JSON values.

    Args:
        response: A `GetModelStatusResponse`.

    Returns:
        A dict that `dumps` can write.
    """
    return _proto_to_json(response)


def metadata(servable):
    """Makes the response to a model metadata request.

    Args:
        servable: A `Servable`.

    Returns:
        A dict that `dumps` can write.
    """
    model_spec = model_pb2.ModelSpec(name=servable.name)
    model_spec.version.value = servable.version
    signatures = get_model_metadata_pb2.SignatureDefMap(
        signature_def=servable.signatures
    )
    # Not converted from the response proto, which wraps the signatures in an `Any`: the
    # JSON would contain the type of the `Any`. TensorFlow Serving does the same.
    return {
        "model_spec": _proto_to_json(model_spec),
        "metadata": {"signature_def": _proto_to_json(signatures)},
    }


def dumps(value):
    """Writes JSON as TensorFlow Serving does, with NaN, Infinity and -Infinity.

    Args:
        value: A result of `PredictRequest.answer`, `status` or `metadata`.

    Returns:
        Bytes.
    """
    # "replace": an error message may quote a lone surrogate from a request.
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def _loads(body):
    """Parses JSON as RapidJSON does in TensorFlow Serving.

    Accepts NaN, Infinity and -Infinity as numbers, and skips a byte order mark.
    """
    return json.loads(
        body.decode("utf-8-sig"),
        parse_float=_parse_float,
        parse_int=_parse_int,
        object_pairs_hook=_keep_first,
    )


def _parse_float(text):
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {_short(text)} is too big for a double")
    return value


def _parse_int(text):
    # An integer of more than 64 bits becomes a float. It is not parsed as an integer,
    # since Python limits the number of digits.
    if len(text) > len(str(2**64)):
        return _parse_float(text)
    value = int(text)
    return value if -(2**63) <= value < 2**64 else _parse_float(text)


def _keep_first(pairs):
    """Makes a dict of JSON pairs; a repeated key keeps its first value."""
    content = {}
    for key, value in pairs:
        content.setdefault(key, value)
    return content


def _to_array(value, name, info):
    expected = tf.TensorShape(info.tensor_shape)
    nesting = shape = _dense_shape(value)
    if shape[-1:] == (0,) and expected.rank is not None:
        # JSON gives no sizes after an empty list: take them from the signature.
        shape += tuple(size or 0 for size in expected.as_list()[len(shape) :])
    # NumPy supports at most 32 axes, which matters if the signature has no fixed rank.
    if not expected.is_compatible_with(shape) or len(shape) > 32:
        raise RestError(
            400,
            f"`{name}` must have the shape {expected}. "
            f"Received: shape={_short(list(shape))}",
        )
    leaves = _flatten(value, nesting, name)
    dtype = tf.dtypes.as_dtype(info.dtype)
    return _convert(leaves, dtype, name, shape).reshape(shape)


def _dense_shape(value):
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        value = value[0] if value else None
    return tuple(shape)


def _flatten(value, shape, name):
    items = [value]
    for level, size in enumerate(shape):
        for index, item in enumerate(items):
            if type(item) is not list or len(item) != size:
                raise RestError(
                    400,
                    f"`{name}` must not be ragged: {_place(name, index, shape[:level])}"
                    f" must be a list of {size}, like the first of its level. "
                    f"Received: {_describe(item)}",
                )
        items = list(itertools.chain.from_iterable(items))
    for index, item in enumerate(items):
        if type(item) is list:
            raise RestError(
                400,
                f"`{name}` must not be ragged: {_place(name, index, shape)} must be a "
                f"value, like the first of its level. Received: {_describe(item)}",
            )
    return items


def _place(name, index, shape):
    return name + "".join(f"[{i}]" for i in np.unravel_index(index, shape))


def _describe(item):
    return f"a list of {len(item)}" if isinstance(item, list) else _short(item)


def _convert(leaves, dtype, name, shape):
    if dtype.name in _FLOATS:
        _check_leaves(leaves, {int, float}, None, dtype, name, shape)
        # As TensorFlow Serving: convert through float64; overflow gives infinity.
        with np.errstate(over="ignore"):
            return np.array(leaves, np.float64).astype(dtype.as_numpy_dtype)
    if dtype.name in _INTEGERS:
        low, high = dtype.min, dtype.max
        _check_leaves(leaves, {int}, lambda i: low <= i <= high, dtype, name, shape)
        return np.array(leaves, dtype.as_numpy_dtype)
    if dtype == tf.bool:
        _check_leaves(leaves, {bool}, None, dtype, name, shape)
        return np.array(leaves, bool)
    if dtype == tf.string:
        _check_leaves(leaves, {str, dict}, None, dtype, name, shape)
        array = np.empty(len(leaves), object)
        for index, leaf in enumerate(leaves):
            array[index] = _to_bytes(leaf)
            if array[index] is None:
                raise RestError(
                    400,
                    f"`{_place(name, index, shape)}` must be UTF-8 text or base64 "
                    f"data, {{'b64': text}}. Received: {_short(leaf)}",
                )
        return array
    raise RestError(
        501, f"`{name}` must be of a dtype that JSON can carry. Received: {dtype.name}"
    )


_FLOATS = {"float32", "float64"}
_INTEGERS = {"int8", "int16", "int32", "int64", "uint8", "uint32", "uint64"}


def _check_leaves(leaves, types, valid, dtype, name, shape):
    # This check is fast; the slow loop below runs only to find the wrong element.
    if set(map(type, leaves)) <= types and (not valid or all(map(valid, leaves))):
        return
    for index, leaf in enumerate(leaves):
        if type(leaf) not in types or (valid and not valid(leaf)):
            raise RestError(
                400,
                f"`{_place(name, index, shape)}` must be {dtype.name}. "
                f"Received: {_short(leaf)}",
            )


def _to_bytes(leaf):
    """Returns the bytes of a string or of base64 data, or `None` if malformed."""
    with contextlib.suppress(ValueError):
        if isinstance(leaf, str):
            return leaf.encode("utf-8")
        if not _is_object(leaf):
            text = "".join(leaf["b64"].split())
            # TensorFlow Serving's decoder accepts base64 without padding.
            return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    return None


def _check_batch(outputs):
    batch_size = None
    for name, array in outputs.items():
        if np.ndim(array) == 0:
            raise RestError(
                400,
                f"Tensor name: {name} has no shape information: 'instances' need a "
                "batch dimension in every output; 'inputs' do not",
            )
        if batch_size not in (None, len(array)):
            raise RestError(
                400,
                f"Tensor name: {name} has inconsistent batch size: {len(array)} "
                f"expecting: {batch_size}",
            )
        batch_size = len(array)


def _to_json(array, name):
    if isinstance(array, bytes) or array.dtype == object:
        return _strings_to_json(np.asarray(array, object), name)
    if array.dtype == np.float32:
        # Writes the shortest decimal that equals this float32, such as 0.2, instead of
        # its float64 value 0.20000000298023224.
        return array.astype(str).astype(np.float64).tolist()
    if array.dtype.name in _FLOATS | _INTEGERS | {"bool"}:
        return array.tolist()
    raise RestError(
        400,
        f"Failed to write JSON value for tensor type: {array.dtype.name}. Cast output "
        f"`{name}` to float32 or another type of JSON in the signature",
    )


def _strings_to_json(array, name):
    values = np.empty(array.size, object)
    for index, content in enumerate(array.ravel()):
        if name.endswith("_bytes"):
            values[index] = {"b64": base64.b64encode(content).decode("ascii")}
            continue
        try:
            values[index] = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RestError(
                400,
                f"Output `{name}` must be UTF-8, or have a name that ends in `_bytes` "
                f"to be sent as base64. Received: {content[:40]!r}",
            ) from error
    return values.reshape(array.shape).tolist()


def _is_object(value):
    """Returns whether a value is a JSON object other than base64 data."""
    is_base64 = (
        isinstance(value, dict)
        and list(value) == ["b64"]
        and isinstance(value["b64"], str)
    )
    return isinstance(value, dict) and not is_base64


def _names(mapping):
    return ", ".join(sorted(mapping))


def _short(value, length=80):
    # Only the first parts of the text are made: `value` may be large or nested deeply.
    parts = itertools.islice(json.JSONEncoder().iterencode(value), length + 1)
    text = "".join(parts)
    return text if len(text) <= length else text[: length - 3] + "..."


def _proto_to_json(message):
    return json_format.MessageToDict(
        message,
        always_print_fields_with_no_presence=True,
        preserving_proto_field_name=True,
    )
