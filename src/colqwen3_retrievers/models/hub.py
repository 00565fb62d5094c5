"""Reading parts of a hub model's weights remotely, for a client that does not need the rest.

The headers of the safetensors and the bytes that go into a fingerprint are a few megabytes of many gigabytes.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import urlsplit

from colqwen3_retrievers.errors import CheckpointError, require

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
        self._metadata: dict[str, Any] = {}  # of each file: its size, and where the hub redirects to

    def size(self, file: str) -> int:
        """Return a file's size in bytes.

        Raises:
            CheckpointError: the hub is unreachable, has no such file, or does not say.
        """
        if file not in self._metadata:
            try:
                self._metadata[file] = self._hub.get_hf_file_metadata(self._url(file), timeout=_TIMEOUT)
            except Exception as exc:  # of the HTTP library that this version of huggingface_hub uses
                raise CheckpointError(f"{self._model}: {file} cannot be read on the hub: {exc}") from exc
        if self._metadata[file].size is None:
            raise CheckpointError(f"{self._model}: the hub does not tell the size of {file}")
        return int(self._metadata[file].size)

    def read(self, file: str, start: int, length: int) -> bytes:
        """Read one part.

        Raises:
            CheckpointError: as :meth:`size`, or the hub does not serve parts of files.
        """
        if length == 0 or start >= self.size(file):
            return b""
        url = self._metadata[file].location
        headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        if urlsplit(url).netloc == urlsplit(self._url(file)).netloc:  # the key stays with the hub
            headers = {**self._hub.utils.build_hf_headers(), **headers}
        content = bytearray()
        try:
            with self._hub.utils.get_session().stream(
                "GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True
            ) as response:
                status = response.status_code
                for piece in response.iter_raw() if status == 206 else ():  # 200 would be the whole file
                    content += piece
                    if len(content) > length:
                        break
        except Exception as exc:  # of the same HTTP library
            raise CheckpointError(f"{self._model}: {file} cannot be read on the hub: {exc}") from exc
        if status != 206:
            raise CheckpointError(f"{self._model}: {file}: HTTP {status} instead of a part of it")
        if len(content) != length:
            raise CheckpointError(f"{self._model}: {file}: {len(content)} bytes or more instead of {length}")
        return bytes(content)

    def _url(self, file: str) -> str:
        return str(self._hub.hf_hub_url(self._model, file, revision=self._commit))
