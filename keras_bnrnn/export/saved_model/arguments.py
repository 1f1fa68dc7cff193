"""Checks the arguments of `export_saved_model`."""

import json
import os


def check_version(version):
    if version is not None and (
        isinstance(version, bool) or not isinstance(version, int) or version < 0
    ):
        raise ValueError(
            "`version` must be a non-negative integer or None. "
            f"Received: version={version!r}"
        )


def check_lengths(lengths):
    if lengths is not None and not isinstance(lengths, bool):
        raise ValueError(
            f"`lengths` must be True, False or None. Received: lengths={lengths!r}"
        )


def check_streaming(streaming):
    if streaming not in ("auto", True, False):
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
    if not isinstance(xla_warmup, bool):
        raise ValueError(
            f"`xla_warmup` must be True or False. Received: xla_warmup={xla_warmup!r}"
        )
    if xla_warmup and not xla_buckets:
        raise ValueError(
            "`xla_warmup=True` needs `xla_buckets`. Received: xla_warmup=True, "
            f"xla_buckets={xla_buckets or None}"
        )


def check_directory(directory):
    if "://" in os.fspath(directory):
        raise ValueError(
            "`directory` must be a local path, since publishing renames a folder. "
            f"Export to a local path, then copy. Received: directory={directory!r}"
        )
