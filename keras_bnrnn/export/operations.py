"""Lists a SavedModel's operations and finds those that TensorFlow Serving lacks."""

import collections
import pathlib

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2


def saved_model_proto(version_directory):
    """Reads the `SavedModel` proto of a version.

    Raises:
        ValueError: If the directory holds no SavedModel, or a damaged one.
    """
    path = pathlib.Path(version_directory) / "saved_model.pb"
    try:
        proto = saved_model_pb2.SavedModel.FromString(path.read_bytes())
        if not proto.meta_graphs:
            raise ValueError("saved_model.pb has no graph")
        return proto
    except Exception as error:
        raise ValueError(
            "A version must hold a SavedModel. "
            f"Received: {str(version_directory)!r}, which fails with: {error}. Export "
            "or copy the version again"
        ) from error


def operations(proto):
    """Counts the operations in the graphs of a SavedModel and in their functions."""
    counts = collections.Counter()
    for meta_graph in proto.meta_graphs:
        graph = meta_graph.graph_def
        counts.update(node.op for node in graph.node)
        functions = {f.signature.name for f in graph.library.function}
        for function in graph.library.function:
            counts.update(n.op for n in function.node_def if n.op not in functions)
    return counts


def why_not_served(name):
    """Returns why stock TensorFlow Serving lacks an operation, or `None`."""
    if name in PYTHON:
        return "it runs Python"
    if name.startswith("Cudnn"):
        return "it needs a GPU"
    if name in TEXT_OPERATIONS or hasattr(tf.raw_ops, name):
        return None
    return "it is neither TensorFlow's nor tensorflow-text's"


def xla_functions(proto):
    """Returns the names of the functions that only XLA can run."""
    return [
        function.signature.name
        for meta_graph in proto.meta_graphs
        for function in meta_graph.graph_def.library.function
        if function.attr["_XlaMustCompile"].b
    ]


def require_stock_operations(version_directory):
    """Raises ValueError if stock TensorFlow Serving lacks an operation of a version."""
    lacking = {
        name: reason
        for name in operations(saved_model_proto(version_directory))
        if (reason := why_not_served(name)) is not None
    }
    if lacking:
        raise ValueError(
            "`model` must use operations that TensorFlow Serving has. Received: "
            + "; ".join(f"{name}: {reason}" for name, reason in lacking.items())
        )


PYTHON = frozenset(["PyFunc", "PyFuncStateless", "EagerPyFunc", "NumpyFunction"])

# The operations of tensorflow-text, which stock TensorFlow Serving links.
TEXT_OPERATIONS = frozenset(
    [
        "CaseFoldUTF8",
        "ConstrainedSequence",
        "FastBertNormalize",
        "FastWordpieceTokenizeWithOffsets",
        "FindSourceOffsets",
        "MaxSpanningTree",
        "NormalizeUTF8",
        "NormalizeUTF8WithOffsetsMap",
        "PhraseTokenize",
        "RegexSplitWithOffsets",
        "RougeL",
        "SentenceFragments",
        "SentenceFragmentsV2",
        "SentencepieceDetokenizeOp",
        "SentencepieceIdToStringOp",
        "SentencepieceOp",
        "SentencepieceStringToIdOp",
        "SentencepieceTokenizeOp",
        "SentencepieceTokenizeWithOffsetsOp",
        "SentencepieceVocabSizeOp",
        "SplitMergeTokenizeWithOffsets",
        "TFText>BoiseTagsToOffsets",
        "TFText>ByteSplitByOffsets",
        "TFText>ByteSplitWithOffsets",
        "TFText>FastSentencepieceDetokenize",
        "TFText>FastSentencepieceTokenize",
        "TFText>FastWordpieceDetokenize",
        "TFText>NgramsStringJoin",
        "TFText>OffsetsToBoiseTags",
        "TFText>PhraseDetokenize",
        "TFText>RoundRobinGenerateMasks",
        "TFText>RoundRobinTrim",
        "TFText>Utf8Binarize",
        "TFText>WhitespaceTokenizeWithOffsetsV2",
        "TokenizerFromLogits",
        "UnicodeScriptTokenizeWithOffsets",
        "WhitespaceTokenizeWithOffsets",
        "WordpieceTokenizeWithOffsets",
    ]
)
