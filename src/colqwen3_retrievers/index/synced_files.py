"""Which files a sync is about: those that are there, those that are gone for sure, and what must not be lost."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.index.file_ledger import FileEntry, device_of
from colqwen3_retrievers.index.page_images import PageImages
from colqwen3_retrievers.pages.files import ONE_ROOT, PageFile, PagePath, find_page_files, reason_of, user_path
from colqwen3_retrievers.stores.protocol import MultiVectorStore

MOVED: Final = "give moved=True (--moved) if it was moved and changed"
"""What helps where a file's name is known from another place."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class NotSynced:
    """A file, page or folder that could not be read or encoded; what the index had of it is still there.

    Attributes:
        source: of the file's pages, or a folder's path.
        page: the page's number, or None when it is the whole file.
        reason: why.

    >>> print(NotSynced("a.pdf", 3, "the page is missing or broken"))
    a.pdf, page 3: the page is missing or broken
    """

    source: str
    page: int | None
    reason: str

    def __str__(self) -> str:
        """Put it in one line."""
        return f"{self.source}{'' if self.page is None else f', page {self.page}'}: {self.reason}"


@dataclass(slots=True)
class FoundFiles:
    """The files of one call, looked up by :meth:`find` or :meth:`find_added`; nothing is changed, no file is opened.

    Args:
        store: where the index's records are.
        images: where its page images are.
        known: what its ledger knows, by source.
        moved: whether a file known by the same name from another place is the one found now.

    Attributes:
        forgets: whether pages that a file no longer has are to be forgotten.
        files: that are there, in the order in which they are read.
        gone: known ones under the paths that are gone for sure.
        failed: folders that cannot be listed, and files that may be gone and may not.
        renamed: of files that have another name now, by that name: what they were called before. A file has the name of
            the last sync, for one that is reached by two roots would be found twice.
    """

    store: MultiVectorStore
    images: PageImages
    known: Mapping[str, FileEntry]
    moved: bool = False
    forgets: bool = True
    files: list[PageFile] = field(default_factory=list)
    gone: list[FileEntry] = field(default_factory=list)
    failed: list[NotSynced] = field(default_factory=list)
    renamed: dict[str, list[FileEntry]] = field(default_factory=dict)
    _followed: set[str] = field(default_factory=set)
    _unlisted: list[Path] = field(default_factory=list)

    def find(self, paths: PagePath | Iterable[PagePath], root: PagePath | None, allow_empty: bool) -> None:
        """Look the files up, and refuse what would lose pages.

        Raises:
            PageError, ConfigError: see :meth:`~colqwen3_retrievers.index.page_index.PageIndex.sync`.
        """
        given = _listed(paths)
        roots = [_absolute(item) for item in given]
        there = [item for item, path in zip(given, roots, strict=True) if _exists(path, item)]
        self._list(there, root, self._unreadable)
        listed = {file.path for file in self.files}
        beneath = _under(set(roots), self.known.values(), lambda entry: entry.path)
        if not allow_empty:
            found = _under(set(roots), listed, lambda path: path)
            for item, path in zip(given, roots, strict=True):
                self._check_root(item, path, beneath[path], listed, bool(found[path]))
        gone = [
            entry
            for entry in {entry.source: entry for entries in beneath.values() for entry in entries}.values()
            if entry.path not in listed
            and not any(entry.path.is_relative_to(folder) for folder in self._unlisted)
            and self._is_gone(entry, allow_empty)
        ]
        names = {file.source for file in self.files}
        called = {file.path: file.source for file in self.files}
        for entry in self.known.values():
            if entry.path in called and entry.source not in names:
                self.renamed.setdefault(called[entry.path], []).append(entry)
        self.gone = [entry for entry in gone if entry.source not in names]
        self._followed = names & {entry.source for entry in gone}
        self._check_names()

    def find_added(
        self, paths: PagePath | Iterable[PagePath], root: PagePath | None, tell: Callable[[PageError], None]
    ) -> None:
        """Look the files up, for a call that forgets nothing: known files elsewhere may be gone or not.

        Args:
            paths: as in :func:`~colqwen3_retrievers.pages.files.find_page_files`, patterns too.
            root: as there.
            tell: told of each path and folder that cannot be used.

        Raises:
            PageError: of ``tell``.
            ConfigError: a file whose name is another one's.
        """

        def failed(error: PageError) -> None:
            tell(error)
            self.failed.append(NotSynced(error.source, error.page, reason_of(error)))

        self.forgets = False
        self._list(paths, root, failed)
        self._check_names()

    def _list(
        self, paths: PagePath | Iterable[PagePath], root: PagePath | None, failed: Callable[[PageError], None]
    ) -> None:
        # An index inside the folder that it indexes would take its own page images for pages, more at every call.
        found = find_page_files(paths, root=root, on_error=failed)
        self.files = [file for file in found if self.images.path(file.path.name) != file.path]

    def _check_names(self) -> None:
        """Refuse a file that would take the pages of another one, which is there too."""
        for file in self.files:
            known = self.known.get(file.source)
            if known is not None and os.path.lexists(known.path) and self.belongs_elsewhere(known, file):
                raise ConfigError(
                    f"{known.path}, which is in the index, and {file.path} would both be {file.source!r}: {ONE_ROOT}"
                )

    def belongs_elsewhere(self, known: FileEntry, file: PageFile) -> bool:
        """Whether a file's name is that of another one, which is there or perhaps on a disk that is not mounted."""
        if self.moved or known.path == file.path or file.source in self._followed or _same_file(known.path, file.path):
            return False
        return bool(page_ids(self.store, file.source))

    def _unreadable(self, error: PageError) -> None:
        if not Path(error.source).is_dir():
            raise error
        self._unlisted.append(Path(error.source))
        self.failed.append(NotSynced(error.source, None, reason_of(error)))

    def _check_root(
        self, item: PagePath, root: Path, known: list[FileEntry], listed: set[Path], any_left: bool
    ) -> None:
        """Refuse a path that looks as if its disk were not there."""
        here = _exists(root, item)
        if here and any(root.is_relative_to(folder) for folder in self._unlisted):
            return  # reported; nothing under it counts as gone
        if not here and any(character in str(item) for character in "*?["):
            raise ConfigError(f"{item}: no such file or folder; sync takes files and folders, not patterns")
        if not known and here:
            return  # an empty folder that never held anything
        pages = sum(len(entry.pages) for entry in known)
        remedy = f"; allow_empty=True forgets the {pages} pages known from there" if known else ""
        if not here:
            raise PageError(f"no such file or folder{remedy}", source=str(item))
        if any(entry.path in listed for entry in known):
            return
        if not any_left:
            raise PageError(f"no page file is left; is its disk mounted?{remedy}", source=str(item))
        device = device_of(root)
        if all(entry.device != device for entry in known):
            raise PageError(f"another disk is mounted there, without any of the known files{remedy}", source=str(item))

    def _is_gone(self, entry: FileEntry, allow_empty: bool) -> bool:
        """Whether a known file that was not listed is gone for sure, and not merely out of sight."""
        try:
            if not stat.S_ISDIR(entry.path.lstat().st_mode):
                return False  # there, though not among the files now: behind a link to a folder, perhaps
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as exc:
            self.failed.append(NotSynced(entry.source, None, f"cannot be looked at: {reason_of(exc)}"))
            return False
        if allow_empty:
            return True
        folder = next(parent for parent in entry.path.parents if os.path.lexists(parent))
        try:
            unmounted = device_of(folder) != entry.device and not any(folder.iterdir())
        except OSError:
            unmounted = True
        if unmounted:
            reason = f"{folder} is empty; is its disk mounted? allow_empty=True forgets its pages"
            self.failed.append(NotSynced(entry.source, None, reason))
        return not unmounted


def page_ids(store: MultiVectorStore, source: str) -> list[str]:
    """Give the ids a store has of a file's pages; ids that a caller made up are none of them."""
    ours = re.compile(re.escape(source) + r"#page=[1-9][0-9]*")
    return [page_id for page_id in store.ids({"source": source}) if ours.fullmatch(page_id)]


def _listed(paths: Any) -> list[Any]:
    several = isinstance(paths, Iterable) and not isinstance(paths, str | bytes | bytearray | os.PathLike)
    return list(paths) if several else [paths]


def _absolute(item: Any) -> Path:
    """Give what :func:`find_page_files` makes of a path; it refuses what is none."""
    if not isinstance(item, str | os.PathLike) or "://" in str(item) or not os.fspath(item):
        find_page_files([item])
    return Path(os.path.abspath(user_path(item)))  # noqa: PTH100 - resolve() would follow links


def _exists(path: Path, item: PagePath) -> bool:
    try:
        return path.exists()
    except OSError as exc:
        raise PageError(f"cannot be read: {reason_of(exc)}", source=str(item)) from exc


def _under(roots: set[Path], items: Iterable[_Item], path_of: Callable[[_Item], Path]) -> dict[Path, list[_Item]]:
    """Give what lies at or under each root; every path is taken apart once, however many roots there are."""
    found: dict[Path, list[_Item]] = {root: [] for root in roots}
    for item in items:
        path = path_of(item)
        for place in (path, *path.parents):
            if place in found:
                found[place].append(item)
    return found


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False
