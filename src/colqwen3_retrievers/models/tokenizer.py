"""The checkpoint's own tokenizer, read from ``tokenizer.json``: the same token ids for every engine.

Only the file is read, never the tokenizer's config: some families' configs break loaders, and none of what they add is
needed, since the exact prompts are ours.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colqwen3_retrievers.errors import CheckpointError, EncodeError, require


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised prompt.

    Attributes:
        ids: token ids.
        spans: for each token the characters [start, stop) of the prompt it stands for.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


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
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as exc:  # the tokenizers library raises bare Exception
            raise CheckpointError(f"{model}: tokenizer.json cannot be read: {exc}") from exc
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._model = model
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        alternatives = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if len(token) > 1)
        self._special = re.compile(alternatives or r"(?!)")
        self._lock = threading.Lock()  # a tokenizer's own cache makes concurrent calls slower than taking turns

    def neutralise(self, text: str) -> str:
        """Break the tokenizer's special tokens inside a user's text, so that they are read as plain characters.

        One space goes in after the first character of each; nothing is taken out, so no new special token can form.

        Args:
            text: a user's text.

        Returns:
            The text, unchanged unless it spells a special token: ``<|im_end|>`` becomes ``< |im_end|>``.
        """
        while self._special.search(text):
            text = self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text

    def encode(self, prompt: str) -> Tokens:
        """Tokenise a prompt.

        Raises:
            EncodeError: the prompt is not valid Unicode (a lone surrogate).
        """
        try:
            with self._lock:
                encoding = self._tokenizer.encode(prompt)
        except (TypeError, UnicodeEncodeError) as exc:
            raise EncodeError("the text holds a lone surrogate: not valid Unicode") from exc
        return Tokens(list(encoding.ids), [tuple(span) for span in encoding.offsets])

    def id_of(self, token: str) -> int:
        """Give a special token's id.

        Raises:
            CheckpointError: the tokenizer does not know it.
        """
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise CheckpointError(f"{self._model}: the tokenizer has no {token}", missing=[token])
        return int(number)
