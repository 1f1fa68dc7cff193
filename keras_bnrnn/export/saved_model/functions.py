"""Makes the functions that `export_saved_model` saves as signatures."""

import tensorflow as tf

from keras_bnrnn.export.saved_model.causality import why_not_causal
from keras_bnrnn.export.saved_model.signatures import (
    chunk_function,
    initial_state_function,
    serve_function,
    step_function,
)
from keras_bnrnn.export.saved_model.xla import xla_function
from keras_bnrnn.export.text import text_signatures

DEFAULT_SIGNATURE = "serving_default"
SERVE, XLA, STEP, CHUNK, INITIAL_STATE, TEXT, GENERATE = OWN_SIGNATURES = (
    "serve",
    "serve_xla",
    "step",
    "chunk",
    "initial_state",
    "text",
    "generate",
)


def check_signatures(signatures, text_front_end):
    """Checks the names of further signatures, and that they are given by functions.

    Args:
        signatures, text_front_end: Arguments of `export_saved_model`.
    """
    if signatures is None:
        return
    if not isinstance(signatures, dict):
        raise ValueError(
            "`signatures` must be a dict from names to functions, or None. "
            f"Received: signatures={signatures!r}"
        )
    taken = {*OWN_SIGNATURES, DEFAULT_SIGNATURE}
    if text_front_end is None:
        taken -= {TEXT, GENERATE}
    for name, make in signatures.items():
        if name in taken or not isinstance(name, str) or not name.isidentifier():
            raise ValueError(
                "A name in `signatures` must be an identifier other than "
                f"{sorted(taken)}. Received: {name!r}"
            )
        if not callable(make):
            raise ValueError(
                "`signatures` must have functions as values. "
                f"Received: signatures[{name!r}]={make!r}"
            )


def traced_functions(served, streaming):
    """Traces `serve` and, unless `streaming` is `False`, `step`.

    Args:
        served: `ServedModel`.
        streaming: The argument `streaming` of `export_saved_model`.

    Returns:
        Dict from name to `tf.function`, and the reason why the export does not have
        the signatures for streaming, or `None`.

    Raises:
        ValueError: If `streaming` is True and the model is not causal.
    """
    serve = serve_function(served)
    serve.get_concrete_function()
    if streaming is False:
        return {SERVE: serve}, "`streaming` is False"
    step = step_function(served)
    reason = why_not_causal(served, serve, step)
    if reason is not None and streaming is True:
        raise ValueError(
            "`streaming=True` needs a causal model, which can process single frames: "
            f"{reason}. Received: model={served.model.name!r}"
        )
    return {SERVE: serve, STEP: step}, reason


def all_functions(served, traced, causal, text_front_end, signatures, xla_buckets):
    """Makes the object to save and the concrete functions of its signatures.

    Args:
        served: `ServedModel`, traced.
        traced: The dict that `traced_functions` returned, or `None` to make its
            functions again.
        causal: Whether to make the signatures for streaming.
        text_front_end, signatures, xla_buckets: Arguments of `export_saved_model`.

    Returns:
        A `tf.Module` that holds all variables, and a dict from the name of each
        signature to its concrete function.
    """
    if traced is None:
        traced = {SERVE: serve_function(served), STEP: step_function(served)}
    functions = {SERVE: traced[SERVE]}
    if causal:
        functions[STEP] = traced[STEP]
        functions[CHUNK] = chunk_function(served)
        functions[INITIAL_STATE] = initial_state_function(served)
    if xla_buckets:
        functions[XLA] = xla_function(served, xla_buckets)
    root = tf.Module()
    root.parts = {}
    if text_front_end is not None:
        root.parts.update(text_signatures(served, text_front_end, causal))
    for name, make in (signatures or {}).items():
        root.parts[name] = make(served.predict)
    for name, part in root.parts.items():
        functions[name] = getattr(part, "__call__", None)  # noqa: B004
        if not hasattr(functions[name], "get_concrete_function"):
            raise ValueError(
                "A function in `signatures` must return a `tf.Module` whose `__call__` "
                f"is a `tf.function`. Received: {name!r}, which returned {part!r}"
            )
    concrete = {name: f.get_concrete_function() for name, f in functions.items()}
    root.weights = list(
        {id(v): v for f in concrete.values() for v in f.graph.variables}.values()
    )
    return root, {DEFAULT_SIGNATURE: concrete[SERVE], **concrete}
