"""The checkpoint's own tokenizer, read from ``tokenizer.json``: the same token ids for every engine.

The tokenizer's config is not read: some families' configs break loaders, and none of what they add is needed for exact
prompts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from colqwen3_retrievers.errors import CheckpointError, EncodeError, require
from colqwen3_retrievers.fork import ForkSafeLock

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


class PromptTokenizer:
    """Tokenises whole prompts, special tokens included.

    Args:
        folder: the checkpoint's folder.
        model: what to call it in an error.

    Raises:
        CheckpointError: there is no readable ``tokenizer.json``.
        MissingExtraError: ``tokenizers`` is not installed.
    """

    def __init__(self, folder: Path, *, model: str) -> None:
        tokenizers = require("torch", "tokenizers")
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{model}: no tokenizer.json in {folder}", missing=["tokenizer.json"])
        try:
            self._tokenizer: Tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as exc:  # the tokenizers library raises bare Exception
            raise CheckpointError(f"{model}: tokenizer.json cannot be read: {exc}") from exc
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._model = model
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        alternatives = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if len(token) > 1)
        self._special = re.compile(alternatives or r"(?!)")
        self._lock = ForkSafeLock()  # concurrent calls contend for the tokenizer's cache and are slower

    def neutralise(self, text: str) -> str:
        """Break special tokens inside a user's text, so that they are read as plain characters.

        A space is inserted after the first character of each; nothing is removed, so no new special token can form.

        Args:
            text: a user's text.

        Returns:
            The text, unchanged unless it spells a special token: ``<|im_end|>`` becomes ``< |im_end|>``.
        """
        while self._special.search(text):
            text = self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        return text

    def encode(self, prompt: str) -> Encoding:
        """Tokenise a prompt.

        Returns:
            Its ``ids``, and for each token in ``offsets`` its characters [start, stop) of the prompt.

        Raises:
            EncodeError: the prompt is not valid Unicode (a lone surrogate).
        """
        try:
            with self._lock:
                return self._tokenizer.encode(prompt)
        except (TypeError, UnicodeEncodeError) as exc:
            raise EncodeError("the text holds a lone surrogate: not valid Unicode") from exc

    def id_of(self, token: str) -> int:
        """Return a special token's id.

        Raises:
            CheckpointError: the tokenizer does not have it.
        """
        number = self.find(token)
        if number is None:
            raise CheckpointError(f"{self._model}: the tokenizer has no {token}", missing=[token])
        return number

    def find(self, token: str) -> int | None:
        """Return a token's id, or None if there is none."""
        return self._tokenizer.token_to_id(token)
