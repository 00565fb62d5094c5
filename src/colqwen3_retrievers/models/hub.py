"""Reading parts of a hub model's weights remotely, for a client that does not need the rest.

The headers of the safetensors and the bytes that go into a fingerprint are a few megabytes of many gigabytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from urllib.parse import urlsplit

from colqwen3_retrievers.errors import CheckpointError, require

_AT_ONCE: Final = 16
_TIMEOUT: Final = 60.0


class HubFiles:
    """Byte ranges of files of one revision of a hub model.

    Args:
        model: ``owner/name``.
        commit: of the revision, so that all parts are of one.

    Raises:
        MissingExtraError: ``huggingface_hub`` is not installed.
    """

    def __init__(self, model: str, commit: str) -> None:
        self._hub: Any = require("server", "huggingface_hub", "huggingface-hub")
        self._model = model
        self._commit = commit
        self._sizes: dict[str, int] = {}
        self._places: dict[str, tuple[str, dict[str, str]]] = {}

    def size(self, file: str) -> int:
        """Return a file's size in bytes.

        Raises:
            CheckpointError: no such file, or the hub does not say.
        """
        if file not in self._sizes:
            self.read(file, 0, 8)
        return self._sizes[file]

    def read_all(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Read many parts, several at once.

        Args:
            parts: file, first byte and number of bytes of each.

        Raises:
            CheckpointError: as :meth:`read`.
        """
        for file in {file for file, _, _ in parts}:
            self.size(file)  # follows the redirect once a file
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda part: self.read(*part), parts))

    def read(self, file: str, start: int, length: int) -> bytes:
        """Read one part.

        Raises:
            CheckpointError: the hub is unreachable, has no such file, or does not serve parts of files.
        """
        if length == 0:
            return b""
        url, headers = self._places.get(file) or (
            self._hub.hf_hub_url(self._model, file, revision=self._commit), self._hub.utils.build_hf_headers(),
        )  # fmt: skip
        headers = {**headers, "Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        session = self._hub.utils.get_session()
        try:
            with session.stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
                if response.status_code != 206:  # 200 would be the start of the whole file
                    raise CheckpointError(f"{self._model}: {file}: HTTP {response.status_code} instead of a part of it")
                content = bytearray()
                for piece in response.iter_raw():
                    content += piece
                    if len(content) > length:
                        raise CheckpointError(f"{self._model}: {file}: more than the {length:,} bytes asked for")
                total = str(response.headers.get("content-range", "")).rpartition("/")[2]
                final = str(response.url)
        except CheckpointError:
            raise
        except Exception as exc:  # of the HTTP library that this version of huggingface_hub uses
            raise CheckpointError(f"{self._model}: {file} cannot be read on the hub: {exc}") from exc
        if len(content) != length:
            raise CheckpointError(f"{self._model}: {file}: {len(content)} bytes instead of {length}")
        with contextlib.suppress(ValueError):
            self._sizes[file] = int(total)
        if file not in self._sizes:
            raise CheckpointError(f"{self._model}: the hub does not tell the size of {file}")
        own = urlsplit(final).netloc == urlsplit(url).netloc
        self._places.setdefault(file, (final, headers if own else {}))  # the key stays with the hub
        return bytes(content)
