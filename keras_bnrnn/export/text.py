"""Signatures that take text: `text` and, for language models, `generate`."""

import dataclasses
import sys
import typing

import keras
import numpy as np
import tensorflow as tf

from keras_bnrnn.export.shapes import require_shapes


def text_signatures(served, front_end, causal):
    """The signatures `text` and `generate` of a model of token ids.

    Args:
        served: `ServedModel`.
        front_end: `TextFrontEnd`, or a tokenizer to make one of.
        causal: Whether the model's frames can come one after another.

    Returns:
        Dict from name to a `tf.Module` whose `__call__` is the signature's
        `tf.function`, and which holds the tables that it needs.

    Raises:
        ValueError: If the model does not take token ids alone; if the tokenizer does
            not run as TensorFlow operations; for a front end that does not fit the
            model.
        ImportError: If the tokenizer needs tensorflow-text and it is not there.
    """
    if not isinstance(front_end, TextFrontEnd):
        front_end = TextFrontEnd(front_end)
    _require_token_ids(served)
    codec = _Codec(front_end)
    output = _language_model_output(served, front_end, causal)
    if output is None:
        return {"text": _Task(served, codec)}
    model = _LanguageModel(served, output, front_end.logits)
    _require_language_front_end(front_end, codec)
    return {
        "text": _Scorer(model, codec),
        "generate": _Generator(model, codec, front_end.max_tokens),
    }


@dataclasses.dataclass(frozen=True)
class TextFrontEnd:
    """What turns text into token ids, and what a language model needs besides.

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
        return _own_size(self.tokenizer)

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
                    _vocabulary(self.tokenizer)
                    if hasattr(self.tokenizer, "get_vocabulary")
                    else {}
                )
                token = next((piece for piece in pieces if piece in known), None)
        if token is None:
            return None
        if isinstance(token, str):
            known = _vocabulary(self.tokenizer)
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


def _own_size(tokenizer):
    size = getattr(tokenizer, "vocabulary_size", None)
    size = size() if callable(size) else size
    if _is_byte_pair(tokenizer):
        return max(tokenizer.vocabulary.values()) + 1  # it counts, but has gaps
    return None if size is None else int(size)


def _vocabulary(tokenizer):
    """Dict from token to id; empty where the tokenizer has none."""
    if not hasattr(tokenizer, "get_vocabulary") or _own_size(tokenizer) is None:
        return {}
    tokens = tokenizer.get_vocabulary()
    if isinstance(tokens, dict):
        return tokens
    if _is_byte_pair(tokenizer):
        return tokenizer.vocabulary  # its ids may come in any order
    return {token: i for i, token in enumerate(tokens)}


def _require_token_ids(served):
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
    """Name of the output with the next token's logits, or `None`."""
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
                f"`{argument}` is for language models: causal ones with an output (B, "
                f"T, `vocabulary_size`). Received: {argument}={token!r} and "
                f"vocabulary_size={size} for outputs {shapes} of a model that is "
                f"{'' if causal else 'not '}causal"
            )
    return None


def _require_language_front_end(front_end, codec):
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


class _Codec(tf.Module):
    """Text to ids and back, in a graph."""

    def __init__(self, front_end):
        super().__init__()
        _require_tensorflow_text(front_end.tokenizer)
        self.tokenizer = _without_cache(front_end.tokenizer)
        self.size = front_end.size
        self.start, self.end = front_end.start_id, front_end.end_id
        self.unknown = front_end.unknown_id
        self.padding = getattr(front_end.tokenizer, "pad_token_id", None) or 0
        known = _vocabulary(front_end.tokenizer)
        self.pads = any(known.get(piece) == self.padding for piece in PADDING)
        self.detokenizer = front_end.detokenize or _detokenizer(self.tokenizer)
        # Found here, not in a graph, where the size of a table is a tensor.
        self._known = sorted(known.values())
        self._require_operations(front_end.tokenizer)

    def _require_operations(self, tokenizer):
        kind = type(tokenizer).__name__
        ids = tf.function(self.ids, autograph=False)
        try:
            graph = ids.get_concrete_function(tf.TensorSpec([None], tf.string)).graph
        except _NotIds:
            raise
        except Exception as error:  # whatever a tokenizer of Python code may raise
            raise ValueError(
                "`tokenizer` must be made of TensorFlow operations, to run in an "
                f"exported graph. Received: tokenizer={kind}, which fails with: {error}"
            ) from error
        definition = graph.as_graph_def()
        names = {node.op for node in definition.node}
        for function in definition.library.function:
            names.update(node.op for node in function.node_def)
        bad = sorted(n for n in names if "PyFunc" in n or n.startswith(CHANGES_TABLES))
        if bad:
            raise ValueError(
                "`tokenizer` must not run Python nor change tables as it serves. "
                f"Received: tokenizer={kind}, with the operations {bad}"
            )

    def ids(self, text):
        """Ragged int32 ids (B, T) of strings (B,)."""
        text = self.utf8(text)
        # One row more: `ByteTokenizer`, for one, fails for a batch without a token.
        ids = self.tokenizer(tf.concat([text, ["a"]], axis=0))
        shape, dtype = getattr(ids, "shape", None), getattr(ids, "dtype", tf.string)
        if shape is None or shape.rank != 2 or not dtype.is_integer:
            raise _NotIds(
                "`tokenizer` must return integer ids of shape (B, T). Received: "
                f"tokenizer={type(self.tokenizer).__name__}, which returned {ids}"
            )
        ids = ids[:-1]
        if not isinstance(ids, tf.RaggedTensor):
            self.pads = True
            real = tf.cast(ids != self.padding, tf.int64)
            ends = real * tf.range(1, tf.shape(ids, tf.int64)[1] + 1)
            lengths = tf.reduce_max(tf.pad(ends, [[0, 0], [1, 0]]), axis=1)
            ids = tf.RaggedTensor.from_tensor(ids, lengths=lengths)
        ids = tf.cast(ids, tf.int32)
        if self.size is None:
            return ids
        known = (ids.flat_values >= 0) & (ids.flat_values < self.size)
        if self.unknown is None:
            return tf.ragged.boolean_mask(ids, ids.with_flat_values(known))
        return ids.with_flat_values(tf.where(known, ids.flat_values, self.unknown))

    def text(self, ids):
        """Strings (B,) of ragged int32 ids (B, T)."""
        return self.utf8(self.detokenizer(ids))

    def utf8(self, text):
        return tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")

    def pieces(self, ids):
        """Strings (B, T) of ragged int32 ids (B, T): that of each token alone."""
        alone = tf.RaggedTensor.from_tensor(ids.flat_values[:, None])
        return ids.with_flat_values(self.text(alone))

    def after_start(self, ids):
        """Ids (B, 1 + T): the start token, the ids, any padding."""
        start = tf.fill([ids.nrows(), 1], tf.constant(self.start, tf.int32))
        return tf.concat([start, ids.to_tensor()], axis=1)

    def never(self):
        """Boolean array (vocabulary size,): ids that no text should hold."""
        never = np.zeros([self.size], bool)
        if self._known:
            never[:] = True
            never[[i for i in self._known if i < self.size]] = False
        never[self.start] = True
        if self.pads:
            never[self.padding] = True
        if self.unknown is not None:
            never[self.unknown] = True
        if self.end is not None:
            never[self.end] = False
        return never


PADDING = ("", "<pad>", "[PAD]")
CHANGES_TABLES = ("LookupTableInsert", "LookupTableRemove", "MutableHashTable")


class _NotIds(ValueError):
    pass


def _require_tensorflow_text(tokenizer):
    if not any(t.__module__.startswith("keras_hub") for t in type(tokenizer).__mro__):
        return
    try:
        import tensorflow_text  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"`TextFrontEnd` with {type(tokenizer).__name__} needs tensorflow-text, "
            f"which cannot be imported: {error}. Install it with "
            "`pip install 'keras-bnrnn[text]'`."
        ) from error


def _is_byte_pair(tokenizer):
    keras_hub = sys.modules.get("keras_hub")  # else nobody has a tokenizer of it
    return keras_hub is not None and isinstance(
        tokenizer, keras_hub.tokenizers.BytePairTokenizer
    )


def _without_cache(tokenizer):
    """A `BytePairTokenizer` that remembers nothing, or any other as it is."""
    if not _is_byte_pair(tokenizer):
        return tokenizer
    copy = type(tokenizer).from_config(tokenizer.get_config())
    copy.set_vocabulary_and_merges(tokenizer.vocabulary, tokenizer.merges)
    copy.cache = _NoCache(copy.unsplittable_tokens or [])
    return copy


class _NoCache:
    """In place of a `BytePairTokenizer`'s cache, which grows with each new word.

    The tokenizer looks words up, inserts those that it did not find and looks all up
    again: here the second look finds what was just inserted, and nothing stays.
    """

    def __init__(self, unsplittable):
        self._unsplittable = list(unsplittable)
        self._inserted = None

    def lookup(self, words):
        found = tf.zeros_like(words)
        if self._unsplittable:
            whole = words[:, None] == tf.constant(self._unsplittable)
            found = tf.where(tf.reduce_any(whole, axis=1), words, found)
        if self._inserted is not None:
            found = tf.tensor_scatter_nd_update(
                found, tf.where(found == ""), self._inserted
            )
            self._inserted = None
        found.set_shape([None])
        return found

    def insert(self, words, pieces):
        self._inserted = pieces


def _detokenizer(tokenizer):
    """The function from ids to text that belongs to a tokenizer, or `None`."""
    if isinstance(tokenizer, keras.layers.TextVectorization):
        words = tokenizer.get_vocabulary()
        separator = "" if tokenizer.get_config()["split"] == "character" else " "

        def join_words(ids):
            known = ids.with_flat_values(tf.gather(words, ids.flat_values))
            return tf.strings.reduce_join(known, axis=-1, separator=separator)

        return join_words

    keras_hub = sys.modules.get("keras_hub")
    if keras_hub and isinstance(tokenizer, keras_hub.tokenizers.ByteTokenizer):
        # Its own keeps a tensor of the first graph that it was called in.
        characters = [bytes([i]) for i in range(256)]

        def join_bytes(ids):
            known = tf.ragged.boolean_mask(ids, ids > 0)
            known = known.with_flat_values(tf.gather(characters, known.flat_values))
            return tf.strings.reduce_join(known, axis=-1)

        return join_bytes
    return getattr(tokenizer, "detokenize", None)


class _Task(tf.Module):
    """`text` of a model that is no language model: its outputs."""

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
    """Ids (B, max(T, 1)): a loop over no timestep is nobody's concern."""
    return tf.pad(ids, [[0, 0], [0, tf.maximum(1 - tf.shape(ids)[1], 0)]])


class _LanguageModel:
    """The logits for next tokens, by way of a `ServedModel`."""

    def __init__(self, served, output, logits):
        ((self._input, x),) = served.interface.inputs.items()
        self._dtype = x.dtype
        self._served, self._output, self._logits = served, output, logits
        self.states = served.states

    def predict(self, ids, lengths):
        """Logits (B, T, V) of the tokens after ids (B, T)."""
        return self._from(self._served.predict(self._inputs(ids), lengths))

    def advance(self, ids, lengths, states):
        """The same for further ids, and states; `lengths` may be `None` for all."""
        outputs, states = self._served.advance(self._inputs(ids), lengths, states)
        return self._from(outputs), states

    def _inputs(self, ids):
        return {self._input: tf.cast(ids, self._dtype)}

    def _from(self, outputs):
        y = outputs[self._output]
        # Logarithms of the smallest normal number: JSON has no infinity.
        return y if self._logits else tf.math.log(tf.maximum(y, 1.2e-38))


class _Scorer(tf.Module):
    """`text` of a language model: what it makes of each token."""

    def __init__(self, model, codec):
        super().__init__()
        self._model, self.codec = model, codec

    @tf.function(
        autograph=False, input_signature=[tf.TensorSpec([None], tf.string, name="text")]
    )
    def __call__(self, text):
        text = require_shapes({"text": text}, {"text": ["B"]})["text"]
        ids = self.codec.ids(text)
        targets = ids.to_tensor()  # (B, T)
        timesteps = tf.shape(targets)[1]
        lengths = tf.cast(ids.row_lengths(), tf.int32)

        before = self.codec.after_start(ids)[:, : tf.maximum(timesteps, 1)]
        logits = self._model.predict(before, lengths)[:, :timesteps]  # (B, T, V)
        chosen = tf.gather(logits, targets, batch_dims=2)
        log_p = chosen - tf.reduce_logsumexp(logits, axis=-1)
        log_p = tf.where(tf.sequence_mask(lengths, timesteps), log_p, 0.0)
        mean = tf.reduce_sum(log_p, 1) / tf.cast(tf.maximum(lengths, 1), tf.float32)
        return {
            "tokens": self.codec.pieces(ids).to_tensor(),
            "log_probabilities": log_p,
            "lengths": lengths,
            "perplexity": tf.exp(-mean),
        }


class _Generator(tf.Module):
    """`generate`: each new token costs one step of the model."""

    def __init__(self, model, codec, most):
        super().__init__()
        self._model, self.codec, self._most = model, codec, most

    @tf.function(
        autograph=False,
        input_signature=[
            tf.TensorSpec([None], tf.string, name="prompt"),
            tf.TensorSpec([None], tf.int32, name="max_tokens"),
            tf.TensorSpec([None], tf.float32, name="temperature"),
            tf.TensorSpec([None], tf.int32, name="seed"),
        ],
    )
    def __call__(self, prompt, max_tokens, temperature, seed):
        given = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
        }
        given = require_shapes(given, {name: ["B"] for name in given})
        prompt, max_tokens, temperature, seed = given.values()
        max_tokens = tf.clip_by_value(max_tokens, 0, self._most)
        # NaN is not above 0. An infinite temperature would make 0 of no chance NaN.
        temperature = tf.where(temperature > 0, tf.minimum(temperature, 1e9), 0.0)

        ids = self.codec.ids(prompt)
        new = self._new_ids(ids, max_tokens, temperature, self._random_numbers(seed))
        head = self.codec.text(ids)
        whole = self.codec.text(tf.concat([ids, new], axis=1))
        return {"text": _continued(self.codec.utf8(prompt), head, whole)}

    def _new_ids(self, ids, max_tokens, temperature, numbers):
        """Ragged ids (B, N) that follow ids (B, T)."""
        read = self.codec.after_start(ids)  # (B, 1 + T)
        lengths = tf.cast(ids.row_lengths(), tf.int32)
        # The last of them is for the first step of the loop to read.
        last = tf.gather(read, lengths, batch_dims=1)
        read = read[:, : tf.maximum(tf.shape(read)[1] - 1, 1)]
        states = self._model.states(tf.shape(read)[0])
        _, states = self._model.advance(read, lengths, states)
        most = tf.reduce_max(tf.pad(max_tokens, [[1, 0]]))

        def goes_on(i, last, ended, new, count, states):
            return (i < most) & ~tf.reduce_all(ended)

        def step(i, last, ended, new, count, states):
            logits, states = self._model.advance(last[:, None], None, states)
            last = self._choose(logits[:, 0], temperature, numbers[:, i])
            if self.codec.end is not None:
                ended |= last == self.codec.end
            here = (tf.range(most) == i) & ~ended[:, None]
            new = tf.where(here, last[:, None], new)
            count += tf.cast(~ended, tf.int64)
            return i + 1, last, ended | (i + 1 >= max_tokens), new, count, states

        new = tf.zeros([tf.shape(read)[0], most], tf.int32)
        count = tf.zeros_like(lengths, tf.int64)
        loop = [0, last, max_tokens < 1, new, count, states]
        *_, new, count, _ = tf.while_loop(
            goes_on, step, loop, tf.nest.map_structure(_any_batch_size, loop)
        )
        return tf.RaggedTensor.from_tensor(new, lengths=count)

    def _random_numbers(self, seed):
        """(B, most tokens) in [0, 1), each row from its own seed.

        As many for each request, so that a row's do not depend on the batch.
        """

        def of_row(seed):
            return tf.random.stateless_uniform(
                [self._most], tf.stack([seed, 0]), dtype=tf.float64, alg="philox"
            )

        spec = tf.TensorSpec([self._most], tf.float64)
        return tf.map_fn(of_row, seed, fn_output_signature=spec)

    def _choose(self, logits, temperature, number):
        """A token (B,) for logits (B, V): the first whose cumulated chance exceeds
        the random number, or the likeliest."""
        never = self.codec.never()
        logits = tf.where(never, -np.inf, logits)
        likeliest = tf.argmax(logits, axis=1, output_type=tf.int32)
        logits -= tf.reduce_max(logits, axis=1, keepdims=True)
        divisor = tf.where(temperature > 0, temperature, 1.0)[:, None]
        chances = tf.exp(logits / divisor)
        # float64: a vocabulary of 100,000 leaves float32 few digits for each.
        sums = tf.cumsum(tf.cast(chances, tf.float64), axis=1)
        over = (sums > number[:, None] * sums[:, -1:]) & (chances > 0)
        drawn = tf.argmax(tf.cast(over, tf.int32), axis=1, output_type=tf.int32)
        return tf.where(temperature > 0, drawn, likeliest)


def _any_batch_size(x):
    shape = tf.convert_to_tensor(x).shape
    return tf.TensorShape([None] * min(shape.rank, 1)).concatenate(shape[1:])


def _continued(prompt, head, whole):
    """The prompt as it was written, and what the whole has beyond the prompt's ids.

    Args:
        prompt: Strings (B,).
        head: What becomes of them as ids and back: in lower case, maybe, and with
            marks for unknown words.
        whole: The same with what was generated.
    """
    size = tf.minimum(tf.strings.length(head), tf.strings.length(whole))
    tail = tf.strings.substr(whole, size, tf.strings.length(whole))
    # A tokenizer that drops the space at the end puts one before the next word.
    doubled = tf.strings.regex_full_match(tail, r"(?s) .*")
    doubled &= ~tf.strings.regex_full_match(head, r"(?s).*\s")
    start = tf.where(doubled, tf.strings.regex_replace(prompt, r"\s+$", ""), prompt)
    begins = tf.strings.substr(whole, tf.zeros_like(size), size) == head
    return tf.where(begins, tf.strings.join([start, tail]), whole)
