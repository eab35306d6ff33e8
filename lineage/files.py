"""Files at the edges: reading untrusted files, and writing whole files or none.

expanded       a path with the user's home folder in place of ~
read_regular   bytes of a regular file of bounded size
stand_in       what Git or a server put in place of a file
write_bytes    a file, all of it or nothing
check_output   that a file can be written, before the work whose result it is to hold
Lock           one process at a time in a folder
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from lineage.errors import UserError

# --- paths ----------------------------------------------------------------------------------------


def expanded(path: str | Path, name: str = "The path") -> Path:
    """`path` with the home folder in place of `~` or `~user`.

    Args:
        name: Name of the option that holds the path.

    Raises:
        UserError: it is empty, holds a character 0, or names a home folder that does not exist.
    """
    if not isinstance(path, (str, Path)):
        raise UserError(f"{name} must be a path, not {path!r:.80}.")
    text = str(path)
    if not text.strip():
        raise UserError(f"{name} is empty: name a file or folder.")
    if "\0" in text:
        raise UserError(f"{text} is no path: it holds a character 0.")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # there is no such user, or HOME is not set and the system knows no other
        raise UserError(
            f"{text} begins with a home folder that is not known: write the whole path."
        ) from None


# --- reading --------------------------------------------------------------------------------------


class NotRegularError(OSError):
    """A folder, a pipe, a device or a pointer in place of a file; `strerror` says which."""


class TooLargeError(OSError):
    """A file that is larger than anything of its kind; `strerror` says how large."""


_KINDS: dict[str, Callable[[int], bool]] = {
    "a folder": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    "a socket": stat.S_ISSOCK,
}


def check_regular(path: Path, limit: int | None = None) -> int:
    """Size of the regular file at `path`, without opening it.

    Args:
        limit: Largest number of bytes; None for any.

    Raises:
        NotRegularError, TooLargeError: it is another kind of file, or larger.
        OSError: it does not exist, or its folder cannot be read.
    """
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        kind = next(
            (name for name, is_kind in _KINDS.items() if is_kind(info.st_mode)), "a special file"
        )
        raise NotRegularError(errno.EINVAL, f"it is {kind}, not a file", str(path))
    if limit is not None and info.st_size > limit:
        raise TooLargeError(
            errno.EFBIG,
            f"its {info.st_size / 1e6:,.0f} MB are more than the {limit / 1e6:,.0f} MB allowed",
            str(path),
        )
    return info.st_size


def read_regular(path: Path, limit: int | None = None) -> bytes:
    """Bytes of a regular file of at most `limit` bytes.

    Raises:
        NotRegularError: it is another kind of file, or a stand-in for a file.
        TooLargeError, OSError: as in `check_regular`.
    """
    check_regular(path, limit)
    with path.open("rb") as file:
        content = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(content) > limit:  # files of /proc have no size
        reason = f"it is larger than the {limit / 1e6:,.0f} MB allowed"
        raise TooLargeError(errno.EFBIG, reason, str(path))
    check_stand_in(content, path)
    return content


_STAND_INS = {
    b"version https://git-lfs": "a Git LFS pointer, which stands for the file: run `git lfs pull` "
    "where it comes from, or download the file itself",
    b"/annex/objects/": "a git-annex pointer, which stands for the file: run `git annex get` where "
    "it comes from",
    **dict.fromkeys(
        (b"<!doctype html", b"<html", b"<?xml"),
        "a web page: download the file itself (on a hub the link with `resolve`, not the one with "
        "`blob`)",
    ),
}
"""First bytes, in lower case, of what stands in place of a file; what it is, and what to do."""


def stand_in(head: bytes) -> str | None:
    """What a file with these first bytes is, if Git or a server put it in place of another."""
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((what for first, what in _STAND_INS.items() if start.startswith(first)), None)


def check_stand_in(head: bytes, path: Path | None = None) -> None:
    """Raise `NotRegularError` for the first bytes of a stand-in for the file at `path`."""
    if what := stand_in(head):
        raise NotRegularError(errno.EINVAL, f"it is {what}", path and str(path))


def read_span(path: Path, offset: int, length: int) -> bytes:
    """At most `length` bytes of a regular file from `offset` on. Raises as `check_regular`."""
    check_regular(path)
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


# --- writing --------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, all of it or nothing; two writers of one path do not meet.

    Raises:
        UserError: the file cannot be written; the old one is still whole.
    """
    partial, name = None, os.fsdecode(os.fsencode(path.name)[:200])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        raise unwritable(path, error) from error


_ADVICE = {
    errno.ENOSPC: "free some space there or choose another folder",
    errno.EDQUOT: "your quota is used up: free some space there or choose another folder",
    errno.EACCES: "choose a folder that you may write to, or change its permissions",
    errno.EPERM: "choose a folder that you may write to, or change its permissions",
    errno.EROFS: "the file system is read-only: choose a folder on another one",
    errno.EIO: "the disk may be failing: choose a folder on another one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EEXIST: "a part of the path is a file: choose another folder",
    errno.EISDIR: "a folder has this name: choose another name",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n) and try again",
}


def unwritable(path: Path, error: OSError) -> UserError:
    """The error for a file that could not be written: the reason, and what to do about it."""
    reason = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0, "choose another folder")
    return UserError(f"Could not write {path}: {reason}; {advice}.")


def check_output(path: Path, *, folder: bool = False) -> None:
    """Check that `path` can be written, and leave nothing behind.

    Args:
        folder: If true, `path` is a folder that files are written into.

    Raises:
        UserError: it cannot; the sentence says why.
    """
    try:
        if not folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if folder and path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file has this name")
        place = path if folder else path.parent
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryDirectory(prefix=".lineage-", dir=place):
            pass
        if len(os.fsencode(path.name)) > 240:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:
        raise unwritable(path, error) from error


# --- one process at a time ------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The right to write in `folder`, for one process at a time.

    A missing folder is made, and removed again if it stays empty. The operating system holds the
    lock and drops it when the process ends, however it ends; no file is left behind. On a file
    system without locks, nothing is locked.

    Raises:
        UserError: another process is at work there, or the folder cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(folder)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows, which cannot lock a folder
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
    except BlockingIOError:
        is_free = False
    except OSError:
        os.close(descriptor)
        return None
    if not is_free:  # held, or removed by the process that held it
        os.close(descriptor)
        raise UserError(
            f"Another process is at work in {folder}: wait until it has ended, or choose another "
            "--out."
        )
    return descriptor
