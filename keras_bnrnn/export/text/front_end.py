"""`TextFrontEnd` says how text becomes token ids."""

import dataclasses
import typing

import keras
import numpy as np

from keras_bnrnn.export.text.tokenizers import own_size, vocabulary_of


@dataclasses.dataclass(frozen=True)
class TextFrontEnd:
    """A tokenizer and, for language models, its special tokens and limits.

    The signature `text` takes `text`, strings (B,). For a language model, which is a
    causal model with an output (B, T, `vocabulary_size`), it returns

    - `tokens`, strings (B, T): the text of each token alone;
    - `log_probabilities` (B, T): log p(token | those before it), 0 past the length;
    - `lengths` int32 (B,): the number of tokens;
    - `perplexity` (B,): exp(-mean log p), 1 for a text without tokens.

    For any other model it returns the model's outputs, as `serving_default` does.

    The signature `generate` of a language model takes `prompt`, strings (B,),
    `max_tokens` int32 (B,), `temperature` float32 (B,) and `seed` int32 (B,). It
    returns `text`, strings (B,): the prompt as it was written and up to `max_tokens`
    tokens more, drawn from softmax(logits / temperature), the likeliest one where the
    temperature is 0. A row ends before the end token; unknown, start and padding
    tokens never come, nor ids that the tokenizer does not know. What a row draws
    depends on its own seed alone, not on the other rows of a batch. Out of their
    range, `max_tokens` counts as the nearest value in 0..`self.max_tokens` and a
    temperature that is negative or NaN as 0: an error would fail the requests of
    others in the batch.

    Text that is not UTF-8 has U+FFFD for each wrong part. A token that is not below
    `vocabulary_size` becomes the unknown token, or is left out if there is none.

    The tokenizers of KerasHub work in the exported graph as they do in `tf.data`; a
    `BytePairTokenizer` without the cache that it fills as it serves. There it splits
    numbers unlike the `BytePairTokenizer` that is called on Python strings.
    For words, take `keras.layers.TextVectorization`, with `split=` a function such
    as `tensorflow_text.UnicodeScriptTokenizer().tokenize` where whitespace will not do.

    Args:
        tokenizer: Function of TensorFlow operations from strings (B,) to integer ids
            (B, T), ragged, or dense with 0 (or `tokenizer.pad_token_id`) as padding;
            what tables it has must be found in its attributes, as in a Keras layer or
            a `tf.Module`.
        start_token: The token before the first: a string of the tokenizer's vocabulary
            or an id below `vocabulary_size`. `None` (default): what the tokenizer calls
            `start_token_id`, or `"<s>"`, or the end token.
        end_token: The token after the last, likewise. `None` (default):
            `end_token_id`, or `"</s>"`, or there is none.
        unknown_token: Likewise. `None` (default): `oov_token`, `unk_token`, `"[UNK]"`,
            `"<unk>"`, or there is none.
        vocabulary_size: Positive int, how many ids the model knows. `None` (default):
            what the tokenizer says.
        detokenize: Function of TensorFlow operations from ragged int32 ids (B, T) to
            strings (B,). `None` (default): `tokenizer.detokenize`; for
            `TextVectorization`, words joined by spaces.
        max_tokens: Positive int, the most that a request may have generated.
        logits: Whether a language model's output is logits; else probabilities.

    Raises:
        ValueError: For an argument that is none of these.

    Example:

    >>> words = ["<eos>", "the", "cat", "sat"]
    >>> tokenizer = keras.layers.TextVectorization(
    ...     vocabulary=words, standardize="lower", ragged=True
    ... )
    >>> front_end = TextFrontEnd(tokenizer, end_token="<eos>")
    """

    tokenizer: typing.Callable
    start_token: str | int | None = None
    end_token: str | int | None = None
    unknown_token: str | int | None = None
    vocabulary_size: int | None = None
    detokenize: typing.Callable | None = None
    max_tokens: int = 200
    logits: bool = True

    def __post_init__(self):
        if not callable(self.tokenizer):
            raise ValueError(
                "`tokenizer` must be a function from strings to token ids, such as a "
                f"KerasHub tokenizer. Received: tokenizer={self.tokenizer!r}"
            )
        if isinstance(self.tokenizer, keras.layers.TextVectorization):
            mode = self.tokenizer.get_config()["output_mode"]
            if mode != "int":
                raise ValueError(
                    "`tokenizer` must return token ids. "
                    f"Received: tokenizer=TextVectorization(output_mode={mode!r})"
                )
        if self.detokenize is not None and not callable(self.detokenize):
            raise ValueError(
                "`detokenize` must be a function from token ids to strings, or None. "
                f"Received: detokenize={self.detokenize!r}"
            )
        for name in ("vocabulary_size", "max_tokens"):
            value = getattr(self, name)
            optional = name == "vocabulary_size"
            if not (_is_int(value) and value > 0) and not (optional and value is None):
                raise ValueError(
                    f"`{name}` must be a positive integer{' or None' * optional}. "
                    f"Received: {name}={value!r}"
                )
        if not isinstance(self.logits, bool):
            raise ValueError(
                f"`logits` must be True or False. Received: logits={self.logits!r}"
            )
        for name in ("start_token", "end_token", "unknown_token"):
            self._id(name)

    @property
    def start_id(self):
        """Id of the token before the first, or `None`."""
        own = self._id("start_token", ["start_token"], ["<s>"])
        return self.end_id if own is None else own

    @property
    def end_id(self):
        """Id of the token after the last, or `None`."""
        return self._id("end_token", ["end_token"], ["</s>"])

    @property
    def unknown_id(self):
        """Id of the token for what has none, or `None`."""
        attributes = ["oov_token", "unk_token"]
        return self._id("unknown_token", attributes, ["[UNK]", "<unk>"])

    @property
    def size(self):
        """How many ids the model knows, or `None`."""
        if self.vocabulary_size is not None:
            return self.vocabulary_size
        return own_size(self.tokenizer)

    def _id(self, argument, attributes=(), pieces=()):
        """The id of a token that was given or, by these, found; `None` if neither."""
        token = getattr(self, argument)
        if token is None:
            for attribute in attributes:
                token = getattr(self.tokenizer, f"{attribute}_id", None)
                if token is None:
                    token = getattr(self.tokenizer, attribute, None)
                if token is not None:
                    break
            else:
                known = (
                    vocabulary_of(self.tokenizer)
                    if hasattr(self.tokenizer, "get_vocabulary")
                    else {}
                )
                token = next((piece for piece in pieces if piece in known), None)
        if token is None:
            return None
        if isinstance(token, str):
            known = vocabulary_of(self.tokenizer)
            if token not in known:
                raise ValueError(
                    f"`{argument}` must be in the tokenizer's vocabulary. "
                    f"Received: {argument}={token!r}"
                )
            return known[token]
        fits = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
        if not fits or token < 0 or (self.size is not None and token >= self.size):
            raise ValueError(
                f"`{argument}` must be a string or an id below {self.size}, the size "
                f"of the vocabulary. Received: {argument}={token!r}"
            )
        return int(token)


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)
