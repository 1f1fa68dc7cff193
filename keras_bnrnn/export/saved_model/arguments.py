"""Checks the arguments of `export_saved_model`."""

import json
import os

from keras_bnrnn.checks import check_flag, is_integer
from keras_bnrnn.export.arguments import check_path
from keras_bnrnn.export.text import TextFrontEnd


def check_version(version):
    # TensorFlow Serving reads versions as int64.
    if version is not None and not (is_integer(version) and 0 <= version < 2**63):
        raise ValueError(
            "`version` must be a non-negative integer below 2**63, or None. "
            f"Received: version={version!r}"
        )


def check_lengths(lengths):
    if lengths is not None and not isinstance(lengths, bool):
        raise ValueError(
            f"`lengths` must be True, False or None. Received: lengths={lengths!r}"
        )


def check_streaming(streaming):
    if not isinstance(streaming, bool) and streaming != "auto":
        raise ValueError(
            "`streaming` must be 'auto', True or False. "
            f"Received: streaming={streaming!r}"
        )


def check_provenance(provenance):
    try:
        json.dumps(provenance)
        fits = provenance is None or isinstance(provenance, dict)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            "`provenance` must be a dict that JSON can represent, or None. "
            f"Received: provenance={provenance!r}"
        )


def check_xla_warmup(xla_warmup, xla_buckets):
    check_flag("xla_warmup", xla_warmup)
    if xla_warmup and not xla_buckets:
        raise ValueError(
            "`xla_warmup=True` needs `xla_buckets`. Received: xla_warmup=True, "
            f"xla_buckets={xla_buckets or None}"
        )


def check_text_front_end(text_front_end):
    is_front_end = isinstance(text_front_end, TextFrontEnd) or callable(text_front_end)
    if text_front_end is not None and not is_front_end:
        raise ValueError(
            "`text_front_end` must be a `TextFrontEnd`, a tokenizer or None. "
            f"Received: text_front_end={text_front_end!r}"
        )


def check_warmup(warmup):
    """Checks the type. The requests are checked once the signatures are known."""
    fits = warmup is None or isinstance(warmup, (dict, list, tuple))
    if not fits and not (isinstance(warmup, str) and warmup == "auto"):
        raise ValueError(
            "`warmup` must be 'auto', a list of requests, a dict from the names of "
            f"signatures to such lists, or None. Received: warmup={warmup!r}"
        )


def check_directory(directory):
    check_path("directory", directory)
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise ValueError(
            "`directory` must be a folder, or not exist yet. "
            f"Received: directory={os.fspath(directory)!r}, a file"
        )
    if "://" in os.fspath(directory):
        raise ValueError(
            "`directory` must be a local path, since publishing renames a folder. "
            f"Export to a local path, then copy. Received: directory={directory!r}"
        )
