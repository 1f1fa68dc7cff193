"""Scores a folder of Parquet files with an exported model, on Apache Beam.

Each row of a file is one sequence: a column with the name of each input of the model
holds a list of frames. Sequences may differ in length. The program writes a file of the
same name for each file, with the same rows in the same order: the other columns of the
row, the outputs of the model, and `error`. A row that the model cannot score has null
outputs, and `error` says why.

A file is written under a temporary name and renamed when it is complete. After a crash,
start the program again: it skips the files that are complete. It prints its progress
after every few files. Options that the program does not know, such as `--runner`, are
those of Beam's pipeline.

`--smoke` makes a small model and files with random sequences, and scores them.
"""

import argparse
import collections
import json
import os
import pathlib
import sys
import time
import uuid

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

try:
    import apache_beam as beam
    import pyarrow as pa
    import pyarrow.parquet as pq
    from apache_beam.ml.inference.base import (
        KeyedModelHandler,
        ModelHandler,
        RunInference,
    )
except ImportError as error:
    raise SystemExit(
        f"error: {error} (the example needs "
        "`pip install -r examples/requirements-bulk-scoring.txt`)"
    ) from error

SIGNATURE = "serve"  # of whole sequences
MANIFEST = "keras_bnrnn.json"  # of an exported version
LENGTHS = "lengths"  # the input of an exported model with the number of valid frames
# Runs in this process. Beam's default may download another program.
RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--input-dir", help="folder of *.parquet files")
    add("--model", help="folder of exported versions, or one version")
    add("--output-dir", default="runs/scores", help="(default: runs/scores)")
    add("--batch-size", type=int, default=64, help="rows at most (default: 64)")
    add(
        "--files-at-once",
        type=int,
        default=8,
        help="files of one pipeline; they are complete together (default: 8)",
    )
    add("--runner", default=RUNNER, help="of Beam (default: in this process)")
    add("--smoke", action="store_true", help="a trial with a model and data of its own")
    options, beam_options = parser.parse_known_args(argv)
    for name in ("batch_size", "files_at_once"):
        if getattr(options, name) < 1:
            option = name.replace("_", "-")
            parser.error(
                f"--{option}: must be at least 1. Received: {getattr(options, name)}"
            )
    output = pathlib.Path(options.output_dir)
    if options.smoke:
        options.model, options.input_dir = make_trial(output / "trial")
    elif not (options.model and options.input_dir):
        parser.error("--model and --input-dir are needed, or --smoke")
    version = find_version(options.model)
    files = sorted(pathlib.Path(options.input_dir).glob("*.parquet"))
    if not files:
        raise SystemExit(f"error: {options.input_dir} has no *.parquet files")
    inputs = pathlib.Path(options.input_dir).resolve()
    if inputs == output.resolve():
        raise SystemExit("error: --output-dir must not be --input-dir")
    claim(output, {"model": str(version.resolve()), "input_dir": str(inputs)})
    return score(files, output, version, options, beam_options)


def score(files, output, version, options, beam_options):
    """Scores the files whose results are not there yet, and reports.

    Returns:
        int, 1 if a file cannot be read. Bad rows are no failure.
    """
    for left in [*output.glob("*.tmp"), *output.glob("*.unreadable")]:
        left.unlink()  # of a run that was killed, or to be read again
    missing = [file for file in files if not (output / file.name).exists()]
    print(f"{len(files)} files, {len(files) - len(missing)} of them complete")
    start, rows_done = time.monotonic(), 0
    for first in range(0, len(missing), options.files_at_once):
        part = missing[first : first + options.files_at_once]
        run_pipeline(part, output, version, options, beam_options)
        rows_done += count_rows([output / file.name for file in part])[0]
        seconds = time.monotonic() - start
        print(
            f"{min(first + options.files_at_once, len(missing))} of {len(missing)} "
            f"files, {rows_done:,} rows, {rows_done / seconds:,.0f} rows/s",
            flush=True,
        )
    rows, bad = count_rows([output / file.name for file in files])
    print(f"{rows:,} rows in {output}, {bad:,} of them with an error")
    unreadable = sorted(output.glob("*.unreadable"))
    for path in unreadable:
        print(f"error: {path.stem}: {path.read_text().strip()}", file=sys.stderr)
    return 1 if unreadable else 0


def run_pipeline(files, output, version, options, beam_options):
    signature = read_signature(version)
    handler = SavedModelHandler(version, signature, options.batch_size)
    with beam.Pipeline(runner=options.runner, argv=beam_options) as pipeline:
        rows, errors = (
            pipeline
            | beam.Create([str(file) for file in files])
            | beam.Reshuffle()
            | beam.ParDo(ReadRows(signature["inputs"], output)).with_outputs(
                ERRORS, main=ROWS
            )
        )
        # One identifier for all pipelines, so that the model is loaded once.
        results = rows | RunInference(
            KeyedModelHandler(handler), model_identifier=str(version)
        )
        _ = (
            (results, errors)
            | beam.Flatten()
            | beam.MapTuple(lambda key, result: (key[0], (key[1], result)))
            | beam.GroupByKey()
            | beam.ParDo(WriteFile(signature, output))
        )


ROWS, ERRORS = "rows", "errors"
END = "end"  # the key of the element that ends a file


class ReadRows(beam.DoFn):
    """Reads a file and checks its rows.

    The main output has `((path, index), row)`, a row a dict from the inputs of the
    model to arrays. The output `ERRORS` has `((path, index), message)`, and an element
    for the end of each file. A file without an end was not read completely.
    """

    def __init__(self, inputs, output):
        self.inputs, self.output = inputs, output

    def process(self, path):
        names = [name for name in self.inputs if name != LENGTHS]
        number = 0
        try:
            with pq.ParquetFile(path) as file:
                absent = {*names} - {*file.schema_arrow.names}
                if absent:
                    raise ValueError(f"has no column {', '.join(sorted(absent))}")
                for batch in file.iter_batches(batch_size=256, columns=names):
                    for row in batch.to_pylist():
                        key = (path, number)
                        try:
                            yield key, self.checked(row)
                        except (TypeError, ValueError) as error:
                            yield beam.pvalue.TaggedOutput(ERRORS, (key, str(error)))
                        number += 1
        except (OSError, ValueError, pa.ArrowException) as failure:
            message = f"{failure}\n"
            write(
                self.output / f"{pathlib.Path(path).name}.unreadable",
                lambda place: place.write_text(message),
            )
            return
        yield beam.pvalue.TaggedOutput(ERRORS, ((path, END), str(number)))

    def checked(self, row):
        """Returns the arrays of a row.

        Raises:
            ValueError: If the row does not fit the signature, or is not finite.
        """
        arrays, steps = {}, set()
        for name, spec in self.inputs.items():
            if name == LENGTHS:
                continue
            if row.get(name) is None:
                raise ValueError(f"{name}: is missing")
            shape = spec["shape"][1:]
            try:
                array = np.asarray(row[name])
                array = array.astype(spec["dtype"], casting="same_kind")
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from error
            if len(array.shape) != len(shape) or any(
                size not in (None, own)
                for size, own in zip(shape, array.shape, strict=True)
            ):
                raise ValueError(
                    f"{name}: must have the shape {tuple(shape)}. "
                    f"Received: shape {array.shape}"
                )
            if array.size == 0:
                raise ValueError(f"{name}: must have at least one frame")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{name}: must be finite")
            if is_sequence(spec):
                steps.add(len(array))
            arrays[name] = array
        if len(steps) > 1:
            raise ValueError(f"inputs must have equal lengths. Received: {steps}")
        return arrays


class SavedModelHandler(ModelHandler):
    """Runs a signature of a SavedModel on padded batches of rows.

    Args:
        version: Path of the SavedModel.
        signature: What `read_signature` returns.
        batch_size: int, number of rows of a batch at most.
    """

    def __init__(self, version, signature, batch_size):
        super().__init__(min_batch_size=1, max_batch_size=batch_size)
        self.version, self.signature = str(version), signature

    def load_model(self):
        return tf.saved_model.load(self.version)

    def run_inference(self, batch, model, inference_args=None):
        """Returns the outputs of each row, a dict, or the message of an error."""
        results = [None] * len(batch)
        for numbers in self.groups(batch):
            rows = [batch[number] for number in numbers]
            for number, result in zip(numbers, self.outputs(rows, model), strict=True):
                results[number] = result
        return results

    def groups(self, batch):
        """Groups the rows that may share a batch: of one length, without `lengths`."""
        if LENGTHS in self.signature["inputs"]:
            return [range(len(batch))]
        groups = collections.defaultdict(list)
        for number, row in enumerate(batch):
            groups[self.length(row)].append(number)
        return groups.values()

    def length(self, row):
        """Returns the number of frames of a row."""
        inputs = self.signature["inputs"]
        sequences = [a for name, a in row.items() if is_sequence(inputs[name])]
        return len((sequences or list(row.values()))[0])

    def outputs(self, rows, model):
        inputs = {}
        for name in rows[0]:
            arrays = [row[name] for row in rows]
            if is_sequence(self.signature["inputs"][name]):
                arrays = padded(arrays)
            inputs[name] = tf.constant(np.stack(arrays))
        lengths = [self.length(row) for row in rows]
        if LENGTHS in self.signature["inputs"]:
            inputs[LENGTHS] = tf.constant(lengths, tf.int32)
        try:
            found = model.signatures[self.signature["name"]](**inputs)
        except tf.errors.OpError as error:
            if len(rows) == 1:
                return [f"{type(error).__name__}: {error.message}"]
            # Finds the row that is the reason.
            return [result for row in rows for result in self.outputs([row], model)]
        specs = self.signature["outputs"]
        found = {name: value.numpy() for name, value in found.items()}
        return [
            {
                name: value[row, :length] if is_sequence(specs[name]) else value[row]
                for name, value in found.items()
            }
            for row, length in enumerate(lengths)
        ]


def padded(arrays):
    """Pads sequences with zeros to the length of the longest one."""
    longest = max(map(len, arrays))
    return [
        np.pad(a, [(0, longest - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in arrays
    ]


class WriteFile(beam.DoFn):
    """Writes the results of a file, beside its columns that are no inputs."""

    def __init__(self, signature, output):
        self.signature, self.output = signature, output

    def process(self, element):
        path, results = element
        results = dict(results)
        if END not in results:
            return  # the file could not be read to its end
        results = [results[number] for number in range(int(results[END]))]
        outputs = self.signature["outputs"]
        replaced = {*self.signature["inputs"], *outputs, "error"}
        with pq.ParquetFile(path) as file:
            others = [n for n in file.schema_arrow.names if n not in replaced]
            table = file.read(columns=others)
        for name, spec in outputs.items():
            values = [r[name].tolist() if is_good(r) else None for r in results]
            table = table.append_column(name, pa.array(values, arrow_type(spec)))
        errors = [None if is_good(r) else r for r in results]
        table = table.append_column("error", pa.array(errors, pa.string()))
        bad = sum(error is not None for error in errors)
        table = table.replace_schema_metadata({"bad": str(bad)})
        write(
            self.output / pathlib.Path(path).name,
            lambda place: pq.write_table(table, place),
        )


def is_good(result):
    return not isinstance(result, str)


def is_sequence(spec):
    """Whether a tensor has a free number of frames."""
    return len(spec["shape"]) > 1 and spec["shape"][1] is None


def arrow_type(spec):
    """Returns the type of a column: lists of lists of numbers, without the batch."""
    type_ = pa.from_numpy_dtype(np.dtype(spec["dtype"]))
    for _ in spec["shape"][1:]:
        type_ = pa.list_(type_)
    return type_


def write(path, function):
    """Calls `function` with a temporary path, and then renames the file."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    function(temporary)
    os.replace(temporary, path)


def count_rows(paths):
    """Returns the number of rows, and of rows with an error, of complete files."""
    rows = bad = 0
    for path in paths:
        if path.exists():
            metadata = pq.read_metadata(path)
            rows += metadata.num_rows
            bad += int(metadata.metadata[b"bad"])
    return rows, bad


def find_version(folder):
    """Returns the path of the highest version in a folder, or of the folder itself."""
    folder = pathlib.Path(folder)
    versions = [path for path in folder.glob("*") if path.name.isdecimal()]
    version = max(versions, key=lambda path: int(path.name), default=folder)
    if not (version / MANIFEST).exists():
        raise SystemExit(
            f"error: --model must be a folder that `export_saved_model` wrote, or one "
            f"of its versions. Received: {folder}"
        )
    return version


def read_signature(version):
    """Returns the name, inputs and outputs of the signature for whole sequences.

    `inputs` and `outputs` are dicts from a name to `{"dtype": ..., "shape": ...}`.
    """
    manifest = json.loads((version / MANIFEST).read_text(encoding="utf-8"))
    return {"name": SIGNATURE, **manifest["signatures"][SIGNATURE]}


def claim(output, configuration):
    """Creates the output folder, or checks that it has results of this run."""
    path = output / "scoring.json"
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        if there != configuration:
            raise SystemExit(
                f"error: {output} has results of another model or folder: {there}. "
                f"Received: {configuration}. Give another --output-dir."
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    write(path, lambda place: place.write_text(json.dumps(configuration) + "\n"))


def make_trial(folder):
    """Exports a small model and writes sequences to score.

    Returns:
        The folder of the model and that of the sequences.
    """
    # Scoring itself needs neither Keras nor the package.
    import keras

    import keras_bnrnn

    model, data = folder / "model", folder / "input"
    if data.exists():
        return model, data
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(1)
    network = keras.Sequential(
        [
            keras.Input((None, 3), name="features"),
            keras_bnrnn.BNLSTM(4),
            keras.layers.Dense(2, name="logits"),
        ]
    )
    keras_bnrnn.export_saved_model(network, model)
    data.mkdir()
    for part in range(4):
        rows = [rng.normal(size=(rng.integers(1, 30), 3)).tolist() for _ in range(50)]
        rows[part] = None  # a bad row
        names = [f"{part}-{number}" for number in range(50)]
        table = pa.table({"id": names, "features": rows})
        write(data / f"part-{part}.parquet", lambda p, t=table: pq.write_table(t, p))
    return model, data


if __name__ == "__main__":
    sys.exit(main())
