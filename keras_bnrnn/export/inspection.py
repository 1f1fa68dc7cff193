"""Describes an exported version; the implementation of `keras-bnrnn inspect`."""

import json
import pathlib
import sys

from keras_bnrnn.export.directory import find_versions
from keras_bnrnn.export.manifest import describe, read_manifest
from keras_bnrnn.export.operations import why_not_served
from keras_bnrnn_cli import arguments


def main(argv=None):
    return run(arguments.inspect(argv))


def run(args):
    """Prints the signatures, layers, checks, sizes and operations of a SavedModel.

    Args:
        args: The namespace that `keras_bnrnn_cli.arguments.inspect` returns.

    Returns:
        int, the exit status: 1 if stock TensorFlow Serving lacks an operation, 2 if
        the directory holds no SavedModel or a damaged one, otherwise 0.
    """
    try:
        found = inspect_version(args.directory)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print(_printable("\n".join(_lines(found))))
    return 1 if found["lacking"] else 0


def inspect_version(directory):
    """Describes a version, or the highest version of a model.

    Args:
        directory: Path of a version, which holds `saved_model.pb`, or of a model.

    Returns:
        Dict with the entries of `keras_bnrnn.json`, if the version has this file;
        `signatures`, `operations`, `xla_functions` and `bytes`, read from the
        SavedModel, which need not come from this package; `path`; and `lacking`, a
        dict from each operation that stock TensorFlow Serving lacks to the reason.

    Raises:
        ValueError: If the directory holds no SavedModel, or if `saved_model.pb` or
            `keras_bnrnn.json` is damaged or has a newer format.
    """
    directory = pathlib.Path(directory)
    path = directory
    if directory.is_dir() and not (directory / "saved_model.pb").exists():
        *_, path = directory, *find_versions(directory).values()
    found = describe(path)
    manifest = read_manifest(path)
    lacking = {
        name: reason
        for name in found["operations"]
        if (reason := why_not_served(name)) is not None
    }
    # What the SavedModel and its place say counts more than the manifest.
    return {**manifest, **found, "path": str(path), "lacking": lacking}


def _lines(found):
    yield f"{found['path']}"
    for key in ("model", "created"):
        if key in found:
            yield f"{key}: {found[key]}"
    if "versions" in found:
        yield "made with: " + ", ".join(
            f"{k} {v}" for k, v in found["versions"].items()
        )
    for name, signature in found["signatures"].items():
        yield f"\n{name}"
        for end in ("inputs", "outputs"):
            yield from _table(
                [
                    ["", end[:-1], tensor, info["dtype"], _shape(info["shape"])]
                    for tensor, info in signature[end].items()
                ]
            )
    if found.get("layers"):
        yield "\nfolded"
        yield from _table(
            [
                [
                    "",
                    e["name"],
                    e["layer"],
                    e["folded_into"] or "kept: " + e["kept_because"],
                ]
                for e in found["layers"]
            ]
        )
    if found.get("lengths") is False:
        yield "\nno lengths: every frame of a request counts"
    streaming = found.get("streaming", {})
    if streaming.get("because"):
        yield f"\nno step signature: {streaming['because']}"
    if found.get("quantize"):
        halved, kept = (len(found["quantize"][k]) for k in ("float16", "float32"))
        yield f"\nweights: {halved} in float16, {kept} in float32"
    checks = found.get("checks", {})
    if checks:
        yield (
            f"\nchecked: {checks['warmup_requests']} warm-up requests answered; "
            f"largest difference from the model {checks['largest_difference']:.1e}"
        )
        if checks.get("padding_counts_from"):
            yield f"padding counts as frames past {checks['padding_counts_from']}"
    yield "\nsize"
    yield from _table([["", k, f"{v:,} bytes"] for k, v in found["bytes"].items()])
    yield "\noperations"
    yield from _table(
        [
            ["", name, str(count), f"LACKING: {found['lacking'][name]}"]
            if name in found["lacking"]
            else ["", name, str(count), ""]
            for name, count in found["operations"].items()
        ]
    )
    if found["xla_functions"]:
        yield (
            f"\n{found['xla_functions']} functions need XLA: start TensorFlow Serving "
            "with --xla_cpu_compilation_enabled"
        )
    if found["lacking"]:
        yield f"\nStock TensorFlow Serving lacks {', '.join(found['lacking'])}."
    else:
        yield "\nStock TensorFlow Serving has every operation."


def _printable(text):
    """Replaces control characters in names, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _shape(shape):
    if shape is None:
        return "any"
    return "(" + ", ".join("?" if n is None else str(n) for n in shape) + ")"


def _table(rows):
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (c.ljust(w) for c, w in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


if __name__ == "__main__":
    sys.exit(main())
