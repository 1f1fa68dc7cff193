"""Makes the signatures `text` and `generate` of a model of token ids."""

import tensorflow as tf

from keras_bnrnn.export.shapes import require_shapes
from keras_bnrnn.export.text.codec import Codec
from keras_bnrnn.export.text.front_end import TextFrontEnd
from keras_bnrnn.export.text.language_model import Generator, LanguageModel, Scorer


def text_signatures(served, front_end, causal):
    """Makes the signatures `text` and `generate` of a model of token ids.

    Args:
        served: `ServedModel`.
        front_end: `TextFrontEnd`, or a tokenizer for a default `TextFrontEnd`.
        causal: Whether the model is causal and can process frames one at a time.

    Returns:
        Dict from the name of each signature to a `tf.Module`. Its `__call__` is the
        `tf.function` of the signature. The module holds the tables of the function.

    Raises:
        ValueError: If the model has inputs other than token ids; if the tokenizer does
            not run as TensorFlow operations; if the front end does not fit the model.
        ImportError: If the tokenizer needs tensorflow-text, which is not installed.
    """
    if not isinstance(front_end, TextFrontEnd):
        front_end = TextFrontEnd(front_end)
    _require_token_ids(served)
    codec = Codec(front_end)
    output = _language_model_output(served, front_end, causal)
    if output is None:
        return {"text": _Task(served, codec)}
    model = LanguageModel(served, output, front_end.logits)
    _require_language_front_end(front_end, codec)
    return {
        "text": Scorer(model, codec),
        "generate": Generator(model, codec, front_end.max_tokens),
    }


def _require_token_ids(served):
    """Raises ValueError if token ids are not the only input of a model."""
    shapes = {name: (x.shape, x.dtype) for name, x in served.interface.inputs.items()}
    fits = len(shapes) == 1
    for shape, dtype in shapes.values():
        fits &= len(shape) == 2 and shape[0] is None and tf.as_dtype(dtype).is_integer
    if not fits:
        given = ", ".join(f"{n}: {s} {d}" for n, (s, d) in shapes.items())
        raise ValueError(
            "`text_front_end` needs a model whose only input is token ids, integers "
            f"of shape (None, T). Received: inputs {given}"
        )


def _language_model_output(served, front_end, causal):
    """Returns the name of a language model's output, or `None` for other models."""
    (name, x), size = *served.interface.inputs.items(), front_end.size
    predict = tf.function(
        lambda ids, lengths: served.predict({name: ids}, lengths), autograph=False
    ).get_concrete_function(
        tf.TensorSpec(x.shape, x.dtype), tf.TensorSpec([x.shape[0]], tf.int32)
    )
    shapes = {n: tuple(y.shape) for n, y in predict.structured_outputs.items()}
    per_step = served.interface.per_step
    found = [
        n
        for n, shape in shapes.items()
        if causal and per_step[n] and len(shape) == 3 and shape[-1] == size is not None
    ]
    if len(found) > 1:
        raise ValueError(
            "A language model must have one output (B, T, vocabulary size). "
            f"Received: outputs {found} with vocabulary_size={size}"
        )
    if found:
        return found[0]
    for argument in ("start_token", "end_token"):
        token = getattr(front_end, argument)
        if token is not None:
            raise ValueError(
                f"`{argument}` is for language models, which are causal and have an "
                f"output (B, T, `vocabulary_size`). Received: {argument}={token!r} and "
                f"vocabulary_size={size} for outputs {shapes} of a model that is "
                f"{'' if causal else 'not '}causal"
            )
    return None


def _require_language_front_end(front_end, codec):
    """Raises ValueError if a front end does not suit a language model."""
    tokenizer = front_end.tokenizer
    kind = type(tokenizer).__name__
    if front_end.start_id is None:
        raise ValueError(
            "`start_token` must be given for a language model: the tokenizer has none. "
            f"Received: tokenizer={kind}, start_token=None"
        )
    if codec.detokenizer is None:
        raise ValueError(
            "`detokenize` must be given for a language model: the tokenizer has none. "
            f"Received: tokenizer={kind}, detokenize=None"
        )
    for argument in ("add_bos", "add_eos"):
        if getattr(tokenizer, argument, False):
            raise ValueError(
                "The tokenizer of a language model must leave start and end tokens to "
                f"the signatures. Received: tokenizer={kind} with {argument}=True"
            )


class _Task(tf.Module):
    """The signature `text` of a model that is not a language model."""

    def __init__(self, served, codec):
        super().__init__()
        self._served, self.codec = served, codec

    @tf.function(
        autograph=False, input_signature=[tf.TensorSpec([None], tf.string, name="text")]
    )
    def __call__(self, text):
        text = require_shapes({"text": text}, {"text": ["B"]})["text"]
        ((name, x),) = self._served.interface.inputs.items()
        ids = self.codec.ids(text)
        lengths = tf.cast(ids.row_lengths(), tf.int32)
        if x.shape[1] is None:
            ids = _at_least_one(ids.to_tensor())
        else:
            ids = ids.to_tensor(shape=[None, x.shape[1]])
        return self._served.predict({name: tf.cast(ids, x.dtype)}, lengths)


def _at_least_one(ids):
    """Pads ids (B, T) to (B, max(T, 1)), since layers need at least one timestep."""
    return tf.pad(ids, [[0, 0], [0, tf.maximum(1 - tf.shape(ids)[1], 0)]])
