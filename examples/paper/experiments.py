"""The runs behind docs/experiments.md: `make experiments`.

Each run is a program of this folder with its arguments. A run with a log in
docs/experiments/ and the same arguments is not made again, and an interrupted run
continues. The whole list takes about four hours on two cores. Groups or runs can be
named. Each run has a core of its own, so that `cpu_seconds` are comparable.
"""

import argparse
import concurrent.futures
import importlib.metadata
import json
import os
import pathlib
import platform
import queue
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import options
import run_log
from run_list import LOGS, is_published, runs

HERE = pathlib.Path(__file__).parent
PACKAGES = ("tensorflow", "keras", "keras-bnrnn")


def main(argv=None):
    arguments = parse_arguments(argv)
    chosen = [
        run
        for run in runs()
        if not arguments.names or {run.name, run.group} & set(arguments.names)
    ]
    todo = [run for run in chosen if not is_published(run, arguments.log_dir)]
    print(f"{len(chosen)} runs, {len(todo)} of them to be made")
    for run in todo:
        print(f"  {run.group:<11}{run.name:<36}{run.command}")
    if arguments.list:
        return 0
    cores = queue.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[: arguments.jobs]:
        cores.put(core)
    failed = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for run, error in zip(
            todo, pool.map(lambda run: make(run, cores, arguments), todo), strict=True
        ):
            if error:
                failed.append(run.name)
                print(f"{run.name}: {error}", file=sys.stderr)
    return 1 if failed else 0


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", help="groups or runs (default: all)")
    add("--list", action="store_true", help="print the runs to make, and stop")
    add(
        "--data-dir",
        help="folder with Penn Treebank in ptb/ and the Free Spoken Digit Dataset in "
        "fsdd/ (default: downloaded)",
    )
    add("--output-dir", default="runs/experiments", help="(default: runs/experiments)")
    add("--log-dir", type=pathlib.Path, default=LOGS, help=f"(default: {LOGS.name}/)")
    add(
        "--jobs",
        type=options.positive,
        default=len(os.sched_getaffinity(0)),
        help="number of runs at a time, each on a core of its own (default: all cores)",
    )
    arguments = parser.parse_args(argv)
    known = {name for run in runs() for name in (run.name, run.group)}
    for name in arguments.names:
        if name not in known:
            groups = ", ".join(sorted({run.group for run in runs()}))
            parser.error(
                f"names must be those of runs or of {groups}. Received: {name}"
            )
    if arguments.jobs > len(os.sched_getaffinity(0)):
        parser.error(
            f"--jobs must be at most the {len(os.sched_getaffinity(0))} cores. "
            f"Received: {arguments.jobs}"
        )
    return arguments


def make(run, cores, arguments):
    """Makes or continues a run, and publishes its log.

    Returns:
        An error message, or `None`.
    """
    core = cores.get()
    try:
        output = pathlib.Path(arguments.output_dir) / run.name
        output.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, HERE / f"{run.script}.py", *run.arguments]
        command += ["--output-dir", output]
        if run.data and arguments.data_dir:
            command += ["--data-dir", pathlib.Path(arguments.data_dir) / run.data]
        print(f"{run.name} begins on core {core}", flush=True)
        with (output / "output.txt").open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment()
            )
            # Immediately, before TensorFlow counts the cores and starts its threads.
            os.sched_setaffinity(process.pid, {core})
            process.wait()
        if process.returncode:
            return f"failed with {process.returncode}; see {output / 'output.txt'}"
        publish(run, output, arguments.log_dir)
        print(f"{run.name} ended", flush=True)
        return None
    finally:
        cores.put(core)


def environment():
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }


def publish(run, output, folder=LOGS):
    """Writes one file with the command, the machine and the results of a run."""
    (log,) = output.rglob("log.jsonl")
    rows = run_log.read_log(log)
    record = {
        "name": run.name,
        "command": run.command,
        "machine": machine(),
        "configuration": json.loads((log.parent / "configuration.json").read_text()),
        "epochs": [
            {name: rounded(value) for name, value in row.items()} for row in rows
        ],
        "results": results_of(output / "results.json"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.name}.json"
    path.with_suffix(".part").write_text(as_json(record), encoding="utf-8")
    path.with_suffix(".part").replace(path)


def rounded(value):
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return value if isinstance(value, int) else float(f"{value:.6g}")


def results_of(path):
    results = json.loads(path.read_text(encoding="utf-8"))
    results.pop("epochs", None)
    return results


def as_json(record):
    """Returns JSON with a line for each epoch and each other entry."""
    entries = []
    for name, value in record.items():
        if name == "epochs":
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            entries.append(f'  "epochs": [\n{rows}\n  ]')
        else:
            entries.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def machine():
    """Returns a dict of what the durations depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if "model name" in x]
        model = lines[0].split(":")[1].strip() if lines else model
    versions = [f"{p} {importlib.metadata.version(p)}" for p in PACKAGES]
    return {
        "processor": model,
        "cores": 1,
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(main())
