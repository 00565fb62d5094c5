"""Files, folders and patterns to a list of page files with unique names, without opening any."""

from __future__ import annotations

import fnmatch
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final, Literal, TypeVar

from colqwen3_retrievers.errors import ColQwen3Error, ConfigError, EncodeError, PageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""Suffixes of image files, in any case."""

FILE_KEYS: Final = frozenset({"file_name", "file_type", "page_count", "width", "height"})
"""Metadata keys that :func:`load_pages` writes; any other key is a user's own."""

ONE_ROOT: Final = "give a root= above both of them (--root on the command line)"
"""Advice for two files with the same source."""

PagePath = str | os.PathLike[str]
PageData = bytes | bytearray | memoryview | IO[bytes]
PageInput = PagePath | IO[bytes] | tuple[str, PageData]
OnError = Literal["raise", "skip"] | Callable[[PageError], None]
_Failure = TypeVar("_Failure", bound=ColQwen3Error)

_LOG = logging.getLogger("colqwen3_retrievers.pages")  # one name for all that concerns pages
_SUFFIXES = IMAGE_SUFFIXES | {".pdf"}


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file that holds pages, or bytes with a name.

    Attributes:
        path: absolute, symbolic links kept; of data, the name that it was given.
        source: path relative to the loaded root, with forward slashes: ``Page.source`` of its pages.
        data: bytes, or a file object that :meth:`read` replaces by its bytes; None when they are in the file.

    >>> PageFile(Path("/reports/2024/a.PDF"), "2024/a.PDF").is_pdf, PageFile(Path("a"), "a", b"%PDF-1.7").is_pdf
    (True, True)
    """

    path: Path
    source: str
    data: PageData | None = None

    @property
    def is_pdf(self) -> bool:
        """Whether its name, or of bytes their beginning, says that it is a PDF."""
        return self.path.suffix.lower() == ".pdf" or (isinstance(self.data, bytes) and b"%PDF-" in self.data[:1024])

    def read(self) -> PageFile:
        """Return a file whose content can be read: one with a path as it is, data as bytes.

        Raises:
            PageError: not a regular file, empty, or a file object that cannot be read.
            ConfigError: a file object that is open as text.
        """
        if self.data is None:
            check_not_empty(self.path, self.source)
            return self
        data: Any = self.data
        if hasattr(data, "read"):
            try:
                if hasattr(data, "seekable") and data.seekable():
                    data.seek(0)
                data = data.read()
            except Exception as exc:  # a file object of any library
                raise PageError(f"cannot be read: {reason_of(exc) or type(exc).__name__}", source=self.source) from exc
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ConfigError(f"{self.source}: open the file in binary mode; it gave {type(data).__name__}, not bytes")
        if len(data) == 0:
            raise PageError("the file is empty (0 bytes)", source=self.source)
        return replace(self, data=bytes(data))


def user_path(given: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` and ``~name`` replaced by home folders.

    Args:
        given: absolute or relative; nothing is looked up but the home.

    Raises:
        ConfigError: no such user.

    >>> user_path("~nobody-at-all/index")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.ConfigError: ~nobody-at-all/index: Could not determine home directory.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as exc:
        raise ConfigError(f"{os.fspath(given)}: {exc}") from exc


def find_page_files(
    paths: PageInput | Iterable[PageInput],
    *,
    root: PagePath | None = None,
    on_error: OnError = "raise",
    data: bool = False,
) -> list[PageFile]:
    """List the files :func:`load_pages` would read, without opening any.

    Args:
        paths: as in :func:`load_pages`; file objects and named bytes only with ``data``.
        root: as in :func:`load_pages`.
        on_error: as in :func:`load_pages`; here for paths and folders that cannot be found or listed.
        data: whether file objects and named bytes are accepted, too.

    Returns:
        Files in the order in which they would be read; sources are unique.

    Raises:
        PageError: a path does not exist, matches nothing, is of another type, or a folder cannot be listed.
        ConfigError: as in :func:`load_pages`.

    >>> find_page_files([])
    []
    """
    failed = error_policy(on_error)
    items: Any = [paths] if isinstance(paths, str | os.PathLike) or is_data(paths) else paths
    if not isinstance(items, Iterable):
        raise ConfigError(f"paths: expected a path or a list of paths, got {type(paths).__name__}")
    base = None if root is None else _absolute(root)
    paths_read: set[Path] = set()
    by_source: dict[str, PageFile] = {}
    for item in items:
        if is_data(item):
            if not data:
                raise ConfigError("paths: expected paths of files; read bytes and file objects with load_pages")
            files = [_named(item, base)]
        else:
            try:
                matches, own_root = _expand(item, failed)
            except PageError as error:
                failed(error)
                continue
            files = [PageFile(path, _source(path, base or own_root)) for path in matches if path not in paths_read]
            paths_read.update(matches)
        for file in files:
            other = by_source.setdefault(file.source, file)
            if other is not file:
                remedy = ONE_ROOT if file.data is other.data is None else "give each a name, as a pair (name, data)"
                raise ConfigError(f"{other.path} and {file.path} would both be {file.source!r}: {remedy}")
    return list(by_source.values())


def is_data(item: object) -> bool:
    """Return whether an argument is bytes or a file object, with or without a name, instead of paths.

    >>> is_data(("a.pdf", b"%PDF-1.7")), is_data(("a.pdf", "b.pdf"))
    (True, False)
    """
    if isinstance(item, tuple) and len(item) == 2:
        item = item[1]
    return isinstance(item, bytes | bytearray | memoryview) or (
        hasattr(item, "read") and not isinstance(item, os.PathLike)
    )


def _named(item: Any, root: Path | None) -> PageFile:
    """Return data as a file: named by the caller, else as its file would be."""
    if isinstance(item, tuple):
        name, data = item
        if not isinstance(name, str) or not name:
            raise ConfigError(f"paths: expected a name and its data, got {type(name).__name__} as a name")
        return PageFile(Path(name), name, data)
    name = getattr(item, "name", None)
    if not isinstance(name, str) or not name:  # an open file may be called by its number
        raise ConfigError(f"paths: a {type(item).__name__} has no file name; give a pair (name, data)")
    return PageFile(Path(name), Path(name).name if root is None else _source(_absolute(name), root), item)


def _expand(item: PagePath, failed: Callable[[PageError], None]) -> tuple[list[Path], Path]:
    """Return the files of one argument and the root its sources are relative to."""
    path = _absolute(item)
    name = os.path.expanduser(str(item))  # noqa: PTH111 - a pattern is no path
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as exc:
        missing = isinstance(exc, FileNotFoundError | NotADirectoryError)
        if missing and any(character in name for character in "*?["):
            return _matching(name, failed)
        reason = "no such file or folder" if missing else f"cannot be read: {reason_of(exc)}"
        raise PageError(reason, source=name) from exc
    if stat.S_ISDIR(mode):
        return list(_walk(path, failed)), path
    if not _is_page_file(path.name):
        known = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise PageError(f"not a page file: expected pdf {known}", source=name)
    return [path], path.parent


def _matching(name: str, failed: Callable[[PageError], None]) -> tuple[list[Path], Path]:
    parts = Path(name).parts
    root, first = Path(), 0
    while not any(character in parts[first] for character in "*?[") or (root / parts[first]).exists():
        root, first = root / parts[first], first + 1  # a folder may really be called "a[1]"
    root = _absolute(root)
    matches = sorted(set(_glob(root, parts[first:], failed)), key=lambda path: path.parts)
    if not matches:
        raise PageError("no file matches the pattern", source=name)
    return matches, root


def _glob(folder: Path, parts: Sequence[str], failed: Callable[[PageError], None]) -> Iterator[Path]:
    """Yield matching page files below ``folder``; ``**`` does not follow links, which might form a loop."""
    head, rest = parts[0], parts[1:]
    entries = _entries(folder, failed)
    if head == "**":
        if rest:
            yield from _glob(folder, rest, failed)
        for entry in entries:
            if _is_folder(entry, follow=False) and not entry.name.startswith("."):
                yield from _glob(Path(entry.path), parts, failed)
            elif not rest and _is_page_file(entry.name) and not _is_folder(entry, follow=True):
                yield Path(entry.path)
        return
    for entry in entries:
        if not fnmatch.fnmatch(entry.name, head) or (entry.name.startswith(".") and not head.startswith(".")):
            continue
        if _is_folder(entry, follow=True):
            if rest:
                yield from _glob(Path(entry.path), rest, failed)
        elif not rest and Path(entry.name).suffix.lower() in _SUFFIXES:
            yield Path(entry.path)


def _walk(folder: Path, failed: Callable[[PageError], None]) -> Iterator[Path]:
    """Yield page files of a folder and its subfolders, sorted by the parts of their paths."""
    for entry in _entries(folder, failed):
        if _is_folder(entry, follow=False):
            if not entry.name.startswith("."):
                yield from _walk(Path(entry.path), failed)
        elif _is_page_file(entry.name) and not _is_folder(entry, follow=True):
            yield Path(entry.path)


def _entries(folder: Path, failed: Callable[[PageError], None]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as exc:
        failed(caused_by(PageError(f"the folder cannot be listed: {reason_of(exc)}", source=str(folder)), exc))
        return []


def _is_folder(entry: os.DirEntry[str], *, follow: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError:  # a link that leads in a circle: read it as a file and report it there
        return False


def _is_page_file(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in _SUFFIXES


def _absolute(path: PagePath) -> Path:
    """Return an absolute path without ``..``, links kept: sources show the names the user knows."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not os.fspath(path):
        raise ConfigError(f"paths: expected a non-empty path, got {path!r}")
    if "://" in str(path):
        raise ConfigError(f"{path}: a URL is not fetched; download it and give the file")
    return Path(os.path.abspath(user_path(path)))  # noqa: PTH100 - resolve() would replace links by their targets


def _source(path: Path, root: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError as exc:
        raise ConfigError(f"{path} is outside the root {root}") from exc


def file_size(path: PagePath, source: str) -> int:
    """Return the bytes of a regular file.

    Raises:
        PageError: it cannot be read, or is no regular file: opening a pipe would block, a device might never end.

    >>> file_size("/dev/null", "null.png")
    Traceback (most recent call last):
    colqwen3_retrievers.errors.PageError: null.png: not a regular file
    """
    try:
        status = Path(path).stat()
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
        raise PageError(f"cannot be read: {reason_of(exc)}", source=source) from exc
    if not stat.S_ISREG(status.st_mode):
        raise PageError("not a regular file", source=source)
    return status.st_size


def check_not_empty(path: PagePath, source: str) -> None:
    """Check that a path is a regular file with content.

    Raises:
        PageError: as :func:`file_size`, or it has no bytes.
    """
    if file_size(path, source) == 0:
        raise PageError("the file is empty (0 bytes)", source=source)


def error_policy(on_error: Literal["raise", "skip"] | Callable[[_Failure], None]) -> Callable[[_Failure], None]:
    """Return the function called with the error of each file or page; when it returns, the next one follows.

    Raises:
        ConfigError: neither ``"raise"``, ``"skip"`` nor a function.

    >>> error_policy("raise")(PageError("broken", source="a.pdf"))
    Traceback (most recent call last):
    colqwen3_retrievers.errors.PageError: a.pdf: broken
    """
    if callable(on_error):
        return on_error
    if on_error == "raise":
        return _raise
    if on_error == "skip":
        return lambda error: _LOG.warning("skipped: %s", error)
    raise ConfigError(f"on_error: expected 'raise', 'skip' or a function, got {on_error!r}")


def _raise(error: ColQwen3Error) -> None:
    raise error


def reason_of(error: Exception) -> str:
    """Return the message of an error, without the number, file and page that name it.

    >>> reason_of(FileNotFoundError(2, "No such file or directory", "/a.pdf"))
    'No such file or directory'
    >>> reason_of(PageError("the page has no size", source="a.pdf", page=3))
    'the page has no size'
    """
    if isinstance(error, PageError | EncodeError):
        return error.message
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def caused_by(error: PageError, cause: Exception) -> PageError:
    """Return an error that is passed on instead of raised, with its cause.

    >>> caused_by(PageError("broken", source="a.pdf"), OSError("disk")).__cause__
    OSError('disk')
    """
    error.__cause__ = cause
    return error
