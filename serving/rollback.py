"""Moves the labels of a model's versions, in the configuration and on the servers.

A roll-back is `--label stable=N` for the version before; so is a roll-out, for the
version after. A server moves a label only to a version that it has loaded. So this
script has the versions loaded first, waits until each is AVAILABLE on each server, and
then moves the labels: no request is lost on the way, and nothing is moved if a version
does not load.
"""

import argparse
import copy
import os
import pathlib
import sys
import time

from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2


def main(argv=None):
    args = _parse(argv)
    try:
        head, config = read_config(args.config)
        loaded = change_versions(config, args.model, load=args.versions)
        wanted = change_versions(
            loaded, args.model, labels=args.label, unload=args.unload
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.dry_run:
        print(head + text_format.MessageToString(wanted), end="")
        return 0
    # Imported here: without a server, the configuration's proto is all it takes.
    servers = []
    if args.grpc:
        import grpc

        servers = [
            _Server(target, grpc.insecure_channel(target)) for target in args.grpc
        ]
    try:
        # The file goes first at each step: a server that polls it would otherwise
        # return to what it says.
        for step in (loaded, wanted):
            write_config(args.config, head, step)
            for server in servers:
                server.reload(step, args.timeout)
            if step is loaded:
                for server in servers:
                    server.wait(args.model, args.versions, args.timeout)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        _undo(args, head, config, servers)
        return 1
    for model in wanted.model_config_list.config:
        if model.name == args.model:
            labels = ", ".join(
                f"{k}={v}" for k, v in sorted(model.version_labels.items())
            )
            versions = list(model.model_version_policy.specific.versions)
            print(f"{model.name}: versions {versions}, labels {labels or 'none'}")
    if not servers:
        print(f"{args.config} is changed; no server was told: they have to poll it")
    return 0


def read_config(path):
    """Reads a model configuration.

    Args:
        path: path of a ModelServerConfig in text form.

    Returns:
        The comment at the top of the file, a str, and the `ModelServerConfig`.

    Raises:
        ValueError: if it is not one.
    """
    text = pathlib.Path(path).read_text()
    head = []
    for line in text.splitlines(keepends=True):
        if line.strip() and not line.startswith("#"):
            break
        head.append(line)
    config = model_server_config_pb2.ModelServerConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        raise ValueError(f"{path} must be a ModelServerConfig: {error}") from error
    return "".join(head), config


def write_config(path, head, config):
    """Writes a model configuration; whoever reads the file sees all of it or the old.

    Args:
        path: path.
        head: str, the comment at its top.
        config: `ModelServerConfig`.
    """
    path = pathlib.Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(head + text_format.MessageToString(config))
    os.replace(unfinished, path)


def change_versions(config, model, load=(), labels=None, unload=()):
    """Changes what is loaded of a model, and its labels.

    Args:
        config: `ModelServerConfig`; it is not changed.
        model: str, the model's name.
        load: versions to load besides those that are.
        labels: dict of label -> version, to add or to move.
        unload: versions to drop.

    Returns:
        `ModelServerConfig`.

    Raises:
        ValueError: if there is no such model, if its policy is not `specific`, or if a
            label would name a version that is not loaded.
    """
    config = copy.deepcopy(config)
    found = [m for m in config.model_config_list.config if m.name == model]
    if len(found) != 1:
        names = [m.name for m in config.model_config_list.config]
        raise ValueError(
            f"The configuration must have the model once, among {names}. "
            f"Received: model={model!r}"
        )
    policy = found[0].model_version_policy
    if policy.WhichOneof("policy_choice") != "specific":
        raise ValueError(
            f"The model_version_policy of {model!r} must be `specific`, which names "
            "the versions that are loaded: others drop a version though a label names "
            f"it. Received: {policy.WhichOneof('policy_choice') or 'none'}"
        )
    versions = sorted(({*policy.specific.versions} | {*load}) - {*unload})
    found[0].version_labels.update(labels or {})
    for label, version in sorted(found[0].version_labels.items()):
        if version not in versions:
            raise ValueError(
                f"A label must name a version that is loaded, one of {versions}. "
                f"Received: {label}={version}"
            )
    policy.specific.versions[:] = versions
    return config


class _Server:
    """The ModelService of a server."""

    def __init__(self, target, channel):
        from tensorflow_serving.apis import model_service_pb2_grpc

        self.target = target
        self._stub = model_service_pb2_grpc.ModelServiceStub(channel)

    def reload(self, config, seconds):
        from tensorflow_serving.apis import model_management_pb2

        request = model_management_pb2.ReloadConfigRequest(config=config)
        status = self._call("HandleReloadConfigRequest", request, seconds).status
        if status.error_code:
            raise RuntimeError(f"{self.target}: {status.error_message}")

    def wait(self, model, versions, seconds):
        """Waits until versions are AVAILABLE."""
        from tensorflow_serving.apis import get_model_status_pb2

        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = model
        available = get_model_status_pb2.ModelVersionStatus.AVAILABLE
        deadline = time.monotonic() + seconds
        while True:
            answer = self._call("GetModelStatus", request, seconds)
            states = {s.version: s for s in answer.model_version_status}
            missing = [
                v for v in versions if v not in states or states[v].state != available
            ]
            if not missing:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self.target}: versions {missing} of {model!r} are not AVAILABLE "
                    f"after {seconds:g} s\n{answer}"
                )
            time.sleep(0.2)

    def _call(self, method, request, seconds):
        import grpc

        try:
            return getattr(self._stub, method)(request, timeout=seconds)
        except grpc.RpcError as error:
            raise RuntimeError(
                f"{self.target}: {error.code().name}: {error.details()}"
            ) from error


def _undo(args, head, config, servers):
    write_config(args.config, head, config)
    for server in servers:
        try:
            server.reload(config, args.timeout)
        except RuntimeError as error:
            print(f"error: not undone: {error}", file=sys.stderr)


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="rollback.py",
        description=(
            "Move the labels of a model's versions: change the configuration file, "
            "have each server load the versions, and move the labels once all are "
            "AVAILABLE everywhere. If one is not, everything is put back, and the exit "
            "status is 1."
        ),
        epilog=(
            "example: python serving/rollback.py serving/config/models.config "
            "--model speech --label stable=1 --grpc 127.0.0.1:8500. Versions stay "
            "loaded until --unload, so that the way back is short. All servers must "
            "have the same configuration."
        ),
    )
    parser.add_argument("config", help="models.config, which is changed")
    parser.add_argument("--model", required=True, help="the model's name")
    parser.add_argument(
        "--label",
        type=_label,
        action="append",
        default=[],
        metavar="LABEL=N",
        help="have the label name version N, which is loaded if need be; may be "
        "repeated",
    )
    parser.add_argument(
        "--load",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="load version N, whether or not it has a label; may be repeated",
    )
    parser.add_argument(
        "--unload",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="drop version N, which no label may name; may be repeated",
    )
    parser.add_argument(
        "--grpc",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a server to tell at once; may be repeated. Without it, servers take the "
        "file up when they poll it (--model_config_file_poll_wait_seconds)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        help="seconds that a server may take to load (default %(default)s)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the file that it would write"
    )
    args = parser.parse_args(argv)
    if not (args.label or args.load or args.unload):
        parser.error("give --label, --load or --unload")
    args.label = dict(args.label)
    args.versions = sorted({*args.label.values(), *args.load})
    return args


def _label(text):
    label, _, version = text.partition("=")
    if not (label and version.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be LABEL=N. Received: {text}")
    return label, int(version)


if __name__ == "__main__":
    sys.exit(main())
