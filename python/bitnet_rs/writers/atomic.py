"""Files and folders that appear under their name whole, or not at all.

For `convert.py`. Apart because it is about disks and other processes and nothing else. What is
written goes to a temporary beside the destination, `.NAME.HOST-PID.tmp`, which is renamed when
everything in it is on the disk. After an error or Ctrl-C the temporary is removed at once. A
process that is killed leaves it behind, and the next one that writes the same destination on the
same machine removes it, since the pid in its name is nobody's any more. (A pid that was given to
another process keeps it; it is safe to delete by hand.)
"""

import errno
import glob
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

# Temporaries that this process is writing. One with its pid that is not among them was left by a
# process that had the pid before, as is usual in containers.
_in_use: set[Path] = set()

# Process ids mean something on one machine only, and folders may be shared between machines.
_HOST: Final = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())[:32]


@contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """A file that gets its name when the `with` block ends, and only if it ends well.

    Args:
        path: The destination; its folder must exist.
        overwrite: Whether it may be there already. It stays as it is until the new one is whole.

    Yields:
        The open temporary, for writing and reading; its `name` is the temporary's path.

    Raises:
        FileExistsError: The destination is there, and `overwrite` is false.
        OSError: The folder cannot be written, or the disk is full; the message names it.
    """
    with _named_errors(path), _claimed(path) as temporary:
        try:
            with temporary.open("x+b") as file:
                yield file
                sync(file)
            if path.exists() and not overwrite:
                raise _appeared(path)
            temporary.replace(path)
        except BaseException:  # Ctrl-C, too
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextmanager
def new_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder that gets its name when the `with` block ends, and only if it ends well.

    Args:
        path: The destination; the folder that it lies in must exist.
        overwrite: Whether it may be there already. Folders cannot be exchanged in one step: the
            old one is moved to a temporary name, the new one takes its place, then the old one is
            deleted. Should the process be killed between the first two, neither has the name,
            and the old one stays as `.NAME.HOST-PID.old`.

    Yields:
        The temporary folder. Whoever opens files in it calls `sync` on them before closing them.

    Raises:
        FileExistsError: The destination is there, and `overwrite` is false.
        OSError: The folder cannot be written, or the disk is full; the message names it.
    """
    with _named_errors(path), _claimed(path) as temporary:
        old = temporary.with_suffix(".old")
        try:
            temporary.mkdir()
            yield temporary
            _sync_folder(temporary)
            if path.exists():
                if not overwrite:
                    raise _appeared(path)
                path.replace(old)
            try:
                temporary.replace(path)
            except BaseException:
                if old.exists():
                    old.replace(path)
                raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def sync(file: BinaryIO) -> None:
    """Makes sure that what was written is on the disk, and that reading it reads the disk."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _claimed(path: Path) -> Iterator[Path]:
    """The name of the temporary, which nothing has and nobody else takes."""
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")
    if temporary in _in_use:
        raise FileExistsError(
            f"{path} is being written by this process already; wait for it, or name another"
        )
    _in_use.add(temporary)
    try:
        _remove_stale(path)
        yield temporary
    finally:
        _in_use.discard(temporary)


def _appeared(path: Path) -> FileExistsError:
    return FileExistsError(
        f"{path} appeared while it was being written, and was left as it is; "
        "name another destination, or say overwrite"
    )


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Errors of the system get the destination's name and a cure; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionError(
                f"{path.parent}: cannot write there ({error.strerror}); "
                "name a destination in a folder of your own"
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                f"{path}: cannot be written ({error.strerror}); what was written of it is "
                "removed. Free some space, or name a destination on another disk"
            ) from error
        raise


def _remove_stale(path: Path) -> None:
    """Removes what killed processes of this machine left of the same destination.

    Not on Windows, where asking whether a process lives would end it.
    """
    if os.name != "posix":
        return
    prefix = f".{path.name}.{_HOST}-"
    for found in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        pid = found.name.removeprefix(prefix).removesuffix(".tmp")
        if not pid.isdecimal() or (int(pid) != os.getpid() and _lives(int(pid))):
            continue
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found, ignore_errors=True)
        else:
            found.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # someone else's, or no number that a process can have
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Makes a rename in a folder last, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems have no such thing
        pass
    finally:
        os.close(handle)
