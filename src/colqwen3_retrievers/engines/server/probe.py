"""Checks run against a server before first use: that it serves the model, with exact prompts and images.

No name is trusted. Each check compares token embeddings of the server with what they must be, so that a wrong template,
a low pixel bound, another model or a dropped bias is a ConfigError that says what to change.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from colqwen3_retrievers.engines.options import ServerOptions
from colqwen3_retrievers.engines.server.reference import TokenReference, can_compute, lone_token, trunk_bytes
from colqwen3_retrievers.engines.server.transport import RefusalError, shown
from colqwen3_retrievers.engines.server.wire import RAW_TEMPLATE, Dialect, picture_part, server_prompt, user_turn
from colqwen3_retrievers.errors import ConfigError, DimensionError, EngineError
from colqwen3_retrievers.models.checkpoint import Checkpoint
from colqwen3_retrievers.models.families import IMAGE_PLACEHOLDER, VISUAL_TOKEN_SIDE
from colqwen3_retrievers.models.rendering import EncoderInput, Renderer
from colqwen3_retrievers.models.tokenizer import PromptTokenizer
from colqwen3_retrievers.pages.page import Page
from colqwen3_retrievers.vectors.multi_vector import Float32

if TYPE_CHECKING:
    from colqwen3_retrievers.engines.server.client import ServerClient

_log = logging.getLogger(__name__)

SAME = 0.99
"""Least cosine of two runs of one model over the same tokens, whatever its dtype and quantisation."""

OWN_MODEL = 0.9  # least cosine to the checkpoint's lone token: more in a 4-bit copy, far less in another model
_SMALL_PIXELS = 65_536  # not resized by stock processors
_CHEAP = 2**30  # bytes of weights that are read by default
_TEMPLATE_FAULTS = (400, 422, 500)  # vLLM answers 500 when a template fails
_SERVE = "start it with the command that `colqwen3 serve MODEL` prints"
_PLUGIN = "install colqwen3-retrievers where vLLM runs: its plugin mends this"


@dataclass(frozen=True, slots=True)
class Findings:
    """Facts about a server, of its check.

    Attributes:
        model: its name of the model.
        dialect: how exact prompts reach the model.
        context_length: most tokens it accepts, or None if unknown.
        first_rows: unit rows of prompts' first tokens, by their ids.
    """

    model: str
    dialect: Dialect
    context_length: int | None = None
    first_rows: dict[int, Float32] = field(default_factory=dict, compare=False, repr=False)


class Probe:
    """The checks, prepared for a checkpoint.

    Args:
        checkpoint: the one to be served.
        options: of the client.
        max_pixels: most pixels of an image.

    Raises:
        CheckpointError: its tokenizer cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint, options: ServerOptions, max_pixels: int) -> None:
        self._checkpoint = checkpoint
        self._family = checkpoint.family
        self._options = options
        self._tokenizer = PromptTokenizer(checkpoint.folder, model=checkpoint.model)
        renderer = Renderer(
            self._family,
            self._tokenizer,
            min_pixels=checkpoint.min_pixels,
            max_pixels=max_pixels,
            context_length=checkpoint.context_length,
        )
        self._image = renderer.document(Page(id="probe", image=_ramp(max_pixels)))
        self._image_part = picture_part(self._image)
        self._small = renderer.document(Page(id="probe", image=_ramp(min(max_pixels, _SMALL_PIXELS))))
        self._small_part = picture_part(self._small)
        self._bare_prompt = self._family.image.replace("{visual}", "").replace("{text}", "")
        self._bare_ids = np.asarray(self._tokenizer.encode(self._bare_prompt).ids, dtype=np.int64)
        self._reference: TokenReference | None = None
        self._warned = False
        self._first: tuple[str, Float32] | None = None

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest prompt sent."""
        return len(self._image)

    async def run(self, url: str, client: ServerClient) -> Findings:
        """Check one server.

        Raises:
            ConfigError: it serves another model, another dim, with a wrong template or too low a pixel bound.
            EngineError: it does not answer, or not with token embeddings.
        """
        model, room = self._model_name(await client.models(url), url)
        half = len(self._bare_ids) // 2
        try:
            lone, bare, part = await client.texts(
                url, model, [self._bare_ids[half : half + 1], self._bare_ids, self._bare_ids[:half]]
            )
        except RefusalError as exc:
            if exc.status_code != 400:
                raise
            raise ConfigError(f"{url} does not give token embeddings: {exc.said}; {_SERVE}") from exc
        for rows, count in ((lone, 1), (bare, len(self._bare_ids)), (part, half)):
            if rows.shape[1] != self._checkpoint.dim:
                raise DimensionError(
                    f"{url}: not {self._checkpoint.model}, or cut to a Matryoshka dim, which is done here",
                    expected=self._checkpoint.dim, actual=rows.shape[1],
                )  # fmt: skip
            if len(rows) != count:
                raise ConfigError(
                    f"{url}: {len(rows)} token embeddings for {count} token ids: its pooling type is not ALL; {_SERVE}"
                )
        self._check_attention(url, part, bare[:half])
        self._check_weights(url, lone[0])
        dialect = await self._find_dialect(url, client, model, bare)
        self._check_likeness(url, bare)
        return Findings(model, dialect, room)

    def _check_likeness(self, url: str, rows: Float32) -> None:
        """Compare a prompt's embeddings with the first server's: weights to compute them are rarely available."""
        first, expected = self._first = self._first or (url, rows)
        likeness = float(_cosines(rows, expected).mean())
        if likeness < SAME:
            when = "it did before" if first == url else f"{first} does, and a fleet is of one"
            raise ConfigError(f"{url} serves another model than {when} (cosine {likeness:.3f} of a known prompt)")

    def _model_name(self, served: list[dict[str, Any]], url: str) -> tuple[str, int | None]:
        names = [str(item.get("id")) for item in served]
        listed = shown(", ".join(names)) or "nothing"
        asked = self._options.served_model
        if asked is not None and asked not in names:
            raise ConfigError(f"served_model {asked!r}: {url} serves {listed}")
        if asked is None and len(names) != 1:
            raise ConfigError(f"{url} serves {listed}: say which by ServerOptions(served_model=)")
        model = asked or names[0]
        room = served[names.index(model)].get("max_model_len")
        if isinstance(room, int) and room < len(self._image):
            raise ConfigError(
                f"{url} takes at most {room} tokens, a page has up to {len(self._image)}: start it with "
                f"--max-model-len {len(self._image)} or more, or lower max_visual_tokens"
            )
        return model, room if isinstance(room, int) else None

    def _check_attention(self, url: str, alone: Float32, inside: Float32) -> None:
        """Check the mask: a prompt's first half must not depend on its second if causal, and must otherwise."""
        least = float(_cosines(alone, inside).min())
        if self._family.causal and least < SAME:
            raise ConfigError(
                f"{url}: what follows a token changes its embedding (cosine {least:.3f}), which family "
                f"{self._family.name} rules out: is it served bidirectional, or by another model?"
            )
        if not self._family.causal and least > 0.9999:
            raise ConfigError(
                f"{url}: the text trunk runs causal, family {self._family.name} is bidirectional; {_PLUGIN}"
            )

    def _check_weights(self, url: str, row: Float32) -> None:
        """Compare a lone token with its embedding by the checkpoint's own weights, when they are available."""
        wanted = self._options.check_weights
        if wanted is False:
            return
        possible = can_compute(self._checkpoint)
        if not possible or (wanted is None and trunk_bytes(self._checkpoint) > _CHEAP):
            if wanted:
                raise ConfigError(f"check_weights: the weights of {self._checkpoint.model} are not in its folder")
            if self._checkpoint.has_bias and not self._warned:
                self._warned = True
                how = "; ServerOptions(check_weights=True) reads them all and finds out" if possible else ""
                _log.warning(
                    "%s: not checked whether the projection's bias is kept, which vLLM alone drops; %s%s",
                    url, _PLUGIN, how,
                )  # fmt: skip
            return
        if self._reference is None:
            try:
                self._reference = lone_token(self._checkpoint, int(self._bare_ids[len(self._bare_ids) // 2]))
            except (KeyError, ValueError, OSError) as exc:
                raise EngineError(f"{self._checkpoint.model}: its weights cannot be read: {exc!r}") from exc
        known = self._reference
        right, other_norm = float(row @ known.right), float(row @ known.other_norm)
        without = -1.0 if known.without_bias is None else float(row @ known.without_bias)
        if without > max(right, other_norm):
            raise ConfigError(
                f"{url} drops the projection's bias (cosine {right:.4f} with it, {without:.4f} without); {_PLUGIN}"
            )
        if other_norm > right:
            where = "after" if self._family.final_norm else "before"
            raise ConfigError(
                f"{url} does not read the hidden state {where} the final norm, as family {self._family.name} does "
                f"(cosine {right:.4f}, otherwise {other_norm:.4f}); {_PLUGIN}"
            )
        if right < OWN_MODEL:
            raise ConfigError(f"{url} does not serve {self._checkpoint.model}: cosine {right:.3f} of a known token")

    async def _find_dialect(self, url: str, client: ServerClient, model: str, bare: Float32) -> Dialect:
        faults: list[str] = []
        failures: list[RefusalError] = []
        for dialect in Dialect:
            try:
                fault = await self._try_dialect(url, client, model, dialect, bare)
            except RefusalError as exc:
                if exc.status_code not in _TEMPLATE_FAULTS:
                    raise
                failures += [exc] if exc.retryable else []
                fault = exc.said
            if fault is None:
                return dialect
            faults.append(f"{dialect.value}: {fault}")
        if len(failures) == len(Dialect):
            raise failures[-1]  # no template's fault: it fails at any picture, or at anything at all
        raise ConfigError(
            f"{url} does not show pictures to the model as family {self._family.name} needs; {_SERVE} "
            f"(or with --trust-request-chat-template). Tried {'; '.join(faults)}"
        )

    async def _try_dialect(
        self, url: str, client: ServerClient, model: str, dialect: Dialect, bare: Float32
    ) -> str | None:
        """Return the fault of a dialect, or None.

        Raises:
            ConfigError: the template is right, but an image has a wrong number of tokens.
            RefusalError: the server refused it.
        """
        if fault := await self._try_template(url, client, model, dialect, bare):
            return fault
        text = message_text(self._image, dialect, self._family.image)
        rows = await client.message(url, model, dialect, self._image_part, text)
        if len(rows) != len(self._image):
            raise ConfigError(wrong_count(self._image, len(rows), url))
        if not self._family.causal:
            return None
        before = self._image.token_ids[: self._image.spans[0].start]  # must not depend on the image
        (alone,) = await client.texts(url, model, [before])
        return _difference(rows[: len(before)], alone)

    async def _try_template(
        self, url: str, client: ServerClient, model: str, dialect: Dialect, bare: Float32
    ) -> str | None:
        """Compare a message with the same prompt given as token ids, which no template changes.

        Counting is not enough: a template that ends a turn by a line break has as many tokens as one that ends it by a
        pad. A whole prompt is sent with an image after it, since templates may only treat prompts with one as whole,
        and under a causal mask everything before the image belongs to the prompt.
        """
        if dialect is Dialect.USER_TURN:
            text = user_turn(self._family.image, "{visual}").replace("{text}", "")
            rows, count = await client.message(url, model, dialect, b"", text), len(bare)
        else:
            rows = await client.message(url, model, dialect, self._small_part, self._bare_prompt + IMAGE_PLACEHOLDER)
            span = self._small.spans[0]
            count = len(bare) + span.rows * span.cols + 2
        if len(rows) != count:
            larger = dialect is not Dialect.USER_TURN and len(rows) > 2 * count
            hint = " (does it enlarge small pictures? lower min_pixels)" if larger else ""
            return f"{len(rows)} tokens instead of {count}{hint}"
        if dialect is Dialect.USER_TURN or self._family.causal:
            return _difference(rows[: len(bare)], bare)
        return None


def message_text(item: EncoderInput, dialect: Dialect, template: str, *, bare: bool = False) -> str:
    """Return the text beside an image in a message, in a server's dialect.

    Args:
        item: with pixels.
        dialect: the server's.
        template: the family's prompt of that kind of picture, with ``{visual}``.
        bare: see :func:`server_prompt`; a served template writes its own placeholder.
    """
    prompt = server_prompt(item, bare=bare and dialect is not Dialect.USER_TURN)
    if dialect is not Dialect.USER_TURN:
        return prompt
    placeholder = IMAGE_PLACEHOLDER if not item.is_video else IMAGE_PLACEHOLDER.replace("image", "video")
    before = template.partition("{visual}")[0]
    return user_turn(prompt.removeprefix(before), placeholder)


def wrong_count(item: EncoderInput, n_rows: int, url: str) -> str:
    """Return the message for an answer whose number of rows differs from the prompt's tokens."""
    if item.pixels is None:
        return f"{url}: {n_rows} token embeddings for {len(item)} token ids; {_SERVE}"
    _, height, width, _ = item.pixels.shape
    pixels = (item.pixels.shape[0] if item.is_video else 1) * height * width
    bound = f'{{"max_pixels": {pixels}}} or more' if n_rows < len(item) else f"a min_pixels of at most {pixels}"
    return (
        f"{url}: {n_rows} token embeddings for the {len(item)} tokens of a {width} x {height} "
        f"{'video' if item.is_video else 'image'}: it resizes what is already resized (--mm-processor-kwargs needs "
        f"{bound}), or its chat template is another; {_SERVE}"
    )


def request_template(dialect: Dialect) -> dict[str, Any]:
    """Return the key of a message request that a dialect adds."""
    return {"chat_template": RAW_TEMPLATE} if dialect is Dialect.OWN_TEMPLATE else {}


def _cosines(one: Float32, other: Float32) -> Float32:
    one, other = one.astype(np.float64), other.astype(np.float64)  # float32 overflows where a server sends 1e30
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray((one * other).sum(axis=1) / np.maximum(norms, 1e-30), dtype=np.float32)


def _difference(rows: Float32, expected: Float32) -> str | None:
    least = float(_cosines(rows, expected).min())
    return None if least >= SAME else f"other tokens than the prompt's (cosine {least:.3f})"


def _ramp(max_pixels: int) -> Image.Image:
    """Return a grey ramp of the most visual tokens of a page, neither side over twice the other if possible."""
    budget = max(1, max_pixels // VISUAL_TOKEN_SIDE**2)
    rows, cols = max(
        ((rows, budget // rows) for rows in range(1, budget + 1) if rows <= budget // rows),
        key=lambda size: (size[1] <= 2 * size[0], size[0] * size[1]),
    )
    ramp = np.linspace(0, 255, cols * VISUAL_TOKEN_SIDE).astype(np.uint8)
    return Image.fromarray(np.tile(ramp, (rows * VISUAL_TOKEN_SIDE, 1))).convert("RGB")
