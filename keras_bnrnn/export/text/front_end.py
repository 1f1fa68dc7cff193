"""Defines `TextFrontEnd`, the conversion between text and token ids."""

import dataclasses
import typing

import keras
import numpy as np

from keras_bnrnn.export.text.tokenizers import own_size, vocabulary_of


@dataclasses.dataclass(frozen=True)
class TextFrontEnd:
    """A tokenizer and, for language models, its special tokens and limits.

    The signature `text` takes `text`, strings (B,). A language model is a causal model
    with an output (B, T, `vocabulary_size`). For a language model, `text` returns

    - `tokens`, strings (B, T): the text of each token;
    - `log_probabilities` (B, T): log p(token | the tokens before it), 0 in padding;
    - `lengths` int32 (B,): the number of tokens;
    - `perplexity` (B,): exp(-mean log p), 1 for a text without tokens.

    For any other model, `text` returns the model's outputs, as `serving_default` does.

    Language models also have the signature `generate`. It takes `prompt`, strings (B,),
    `max_tokens` int32 (B,), `temperature` float32 (B,) and `seed` int32 (B,). It
    returns `text`, strings (B,): the unchanged prompt, followed by up to `max_tokens`
    generated tokens.

    - Tokens are sampled from softmax(logits / temperature). If the temperature is 0,
      the most likely token is chosen.
    - Generation stops before the end token. Unknown, start and padding tokens, and ids
      without a token in the tokenizer's vocabulary, are never generated.
    - The sampled tokens of a row depend on the row's seed, not on the other rows of the
      batch.
    - `max_tokens` is clipped to 0..`self.max_tokens`; a negative or NaN temperature
      counts as 0. The graph raises no error, because an error would fail the other
      requests of the batch.

    Each invalid UTF-8 sequence in a text is replaced by U+FFFD. An id outside
    0..`vocabulary_size` - 1 becomes the unknown token, or is dropped if there is no
    unknown token.

    KerasHub tokenizers work in the exported graph as they do in `tf.data`. A
    `BytePairTokenizer` runs without its cache, which would grow while serving. In a
    graph, a `BytePairTokenizer` splits numbers differently than when it is called on
    Python strings. For tokens that are words, use `keras.layers.TextVectorization`. If
    whitespace is not the right boundary, pass it a `split` function such as
    `tensorflow_text.UnicodeScriptTokenizer().tokenize`.

    Args:
        tokenizer: Function of TensorFlow operations from strings (B,) to integer ids
            (B, T). The ids are ragged, or dense and padded with 0 (or
            `tokenizer.pad_token_id`). Any lookup tables must be attributes of the
            tokenizer, as in a Keras layer or a `tf.Module`.
        start_token: The token before the first token of a text: a string in the
            tokenizer's vocabulary or an id below `vocabulary_size`. `None` (default):
            the tokenizer's `start_token_id` or `start_token`, or else `"<s>"`, or else
            the end token.
        end_token: The token after the last token of a text, a string or an id. `None`
            (default): the tokenizer's `end_token_id` or `end_token`, or else `"</s>"`,
            or else no end token.
        unknown_token: The token for text outside the vocabulary, a string or an id.
            `None` (default): the tokenizer's `oov_token` or `unk_token` (or the
            attribute of this name with `_id`), or else `"[UNK]"` or `"<unk>"`, or else
            no unknown token.
        vocabulary_size: Positive int, the number of ids of the model. `None` (default):
            the vocabulary size of the tokenizer.
        detokenize: Function of TensorFlow operations from ragged int32 ids (B, T) to
            strings (B,). `None` (default): `tokenizer.detokenize`; for
            `TextVectorization`, joins words with spaces (characters without).
        max_tokens: Positive int, the largest number of tokens that a request may
            generate. Default: 200.
        logits: Whether the output of a language model is logits (default) or
            probabilities.

    Raises:
        ValueError: If an argument is invalid.

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

    def __post_init__(self) -> None:
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
    def start_id(self) -> int | None:
        """The id of the start token, or `None`."""
        own = self._id("start_token", ["start_token"], ["<s>"])
        return self.end_id if own is None else own

    @property
    def end_id(self) -> int | None:
        """The id of the end token, or `None`."""
        return self._id("end_token", ["end_token"], ["</s>"])

    @property
    def unknown_id(self) -> int | None:
        """The id of the unknown token, or `None`."""
        attributes = ["oov_token", "unk_token"]
        return self._id("unknown_token", attributes, ["[UNK]", "<unk>"])

    @property
    def size(self) -> int | None:
        """The vocabulary size of the model, or `None` if it is not known."""
        if self.vocabulary_size is not None:
            return self.vocabulary_size
        return own_size(self.tokenizer)

    def _id(self, argument, attributes=(), pieces=()):
        """Returns the id of a special token, or `None`.

        Args:
            argument: The name of the argument that gives the token.
            attributes: Names of attributes of the tokenizer to try if the argument is
                `None`; each is tried with the suffix `_id` first.
            pieces: Tokens of the vocabulary to try after that.
        """
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
