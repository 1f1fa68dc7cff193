"""Finds the versions of a model and publishes new versions and files.

Imports only the standard library, so that a server can use it without Keras.
"""

import contextlib
import os
import pathlib
import re
import shutil
import socket
import uuid


def find_versions(directory):
    """Finds the versions in a model's directory, as TensorFlow Serving does.

    Args:
        directory: str or path.

    Returns:
        Dict from version, an int, to its directory, in ascending order. Ignores files,
        and directories whose name is not a non-negative int64.

    Raises:
        OSError: If `directory` is not a directory.
    """
    found = _numbered(directory)
    # TensorFlow Serving reads the names as int64.
    return {n: path for n, path in found.items() if n < 2**63 and path.is_dir()}


class VersionExistsError(FileExistsError, ValueError):
    """Raised if the version to export already exists."""


def refuse_existing_version(directory, version):
    """Raises `VersionExistsError` if a version exists.

    Args:
        directory: `pathlib.Path` of the model; it need not exist.
        version: Int.
    """
    if directory.is_dir() and version in _numbered(directory):
        raise VersionExistsError(
            "`version` must not exist: versions are never overwritten. "
            f"Received: version={version} with directory={os.fspath(directory)!r}"
        )


def publish_version(directory, version, write):
    """Writes a version under a temporary name, then renames the complete version.

    Args:
        directory: `pathlib.Path` of the model; created if it does not exist.
        version: Int. `None`: one above the highest version in `directory`, or 1 if
            there is none.
        write: Function of a path. Creates a folder at this path, writes the version
            into it and checks the version.

    Returns:
        `pathlib.Path` of the version.

    Raises:
        VersionExistsError: If the version exists.
    """

    def rename(unfinished):
        while True:
            chosen = version
            if chosen is None:
                chosen = max(_numbered(directory), default=0) + 1
            refuse_existing_version(directory, chosen)
            final = directory / str(chosen)
            try:
                return unfinished.rename(final)
            except OSError:
                # Another export has taken this version number in the meantime.
                if version is not None or not final.exists():
                    raise

    directory.mkdir(parents=True, exist_ok=True)
    return _publish(directory, write, rename)


def refuse_existing_file(path, overwrite):
    """Raises `FileExistsError` if a file exists and `overwrite` is false."""
    if path.exists() and not overwrite:
        raise FileExistsError(
            "`path` is there already: `overwrite=True` replaces it. "
            f"Received: path={os.fspath(path)!r}"
        )


def publish_file(path, overwrite, write):
    """Writes a file under a temporary name, then renames the complete file.

    Args:
        path: `pathlib.Path` of the file.
        overwrite: Whether to replace an existing file.
        write: Function of a path with the suffix of `path`. Writes a file at this path
            and checks the file.

    Returns:
        `path`.

    Raises:
        FileExistsError: If the file exists and `overwrite` is false.
    """

    def rename(unfinished):
        refuse_existing_file(path, overwrite)
        return unfinished.replace(path)

    return _publish(path.parent, write, rename, path.suffix)


def _numbered(directory):
    """Returns a dict from number to path of the entries whose name is a number."""
    entries = pathlib.Path(directory).iterdir()
    numbered = {int(p.name): p for p in entries if re.fullmatch("[0-9]+", p.name)}
    return dict(sorted(numbered.items()))


def _publish(directory, write, rename, suffix=""):
    """Writes a folder or a file, flushes it to disk and renames it.

    Removes the unfinished folder or file after an error.

    Args:
        directory: `pathlib.Path` of the parent directory.
        write: Function of the temporary path.
        rename: Function of the temporary path. Returns the final path.
        suffix: str, the suffix of the temporary name.

    Returns:
        The final path.
    """
    _remove_unfinished(directory)
    unfinished = directory / unfinished_name(os.getpid(), suffix)
    try:
        write(unfinished)
        _sync(unfinished)
        final = rename(unfinished)
        _sync_one(directory)
    finally:
        _remove(unfinished)
    return final


def unfinished_name(pid, suffix=""):
    """Returns a temporary name, which a server does not read as a version.

    The name contains the host and the process id, so that another export on this host
    can tell whether the process that writes still runs.
    """
    return f".unfinished-{socket.gethostname()}-{pid}-{uuid.uuid4().hex}{suffix}"


def _remove_unfinished(directory):
    """Removes unfinished exports of processes of this host that no longer run."""
    host = re.escape(socket.gethostname())
    pattern = rf"\.unfinished-{host}-(\d+)-[0-9a-f]{{32}}(\.\w+)?"
    for path in directory.iterdir():
        if (match := re.fullmatch(pattern, path.name)) and not _runs(int(match[1])):
            _remove(path)


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path):
    """Removes a folder or a file; ignores errors, such as missing permission."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(path):
    """Flushes a file, or a folder and its files, to disk."""
    for root, _, files in os.walk(path):
        for name in files:
            _sync_one(os.path.join(root, name))
        _sync_one(root)
    if path.is_file():
        _sync_one(path)


def _sync_one(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
