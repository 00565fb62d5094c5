"""The encoder: pages and queries in, multi-vectors out, whatever the engine."""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar

from colqwen3_retrievers.encoding.batching import Kind
from colqwen3_retrievers.encoding.futures import ListFuture
from colqwen3_retrievers.encoding.opened_model import OpenedModel
from colqwen3_retrievers.encoding.settings import EncoderSettings
from colqwen3_retrievers.encoding.shared_engine import IN_FLIGHT_PAGES, EngineStats, ModelHandle, about
from colqwen3_retrievers.engines.options import EngineOptions
from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.models.rendering import EncoderInput
from colqwen3_retrievers.pages.images import ImageSource, is_image
from colqwen3_retrievers.pages.page import Page, Query, Video
from colqwen3_retrievers.pages.remote_images import AllowRemote, checked_remote, local_image
from colqwen3_retrievers.progress import progress_bar
from colqwen3_retrievers.vectors.kernels import default_kernel
from colqwen3_retrievers.vectors.late_interaction import Mode, maxsim
from colqwen3_retrievers.vectors.multi_vector import EncoderInfo, Float32, MultiVector

T = TypeVar("T")


class ColQwen3Encoder:
    """Encodes queries and pages into multi-vectors with a ColQwen3 checkpoint.

    Nothing is loaded or downloaded before it is needed; encoders with equal settings share one model in a process; it
    may be called from any number of threads, whose inputs are gathered into batches.

    Args:
        model: hub name, folder, or ``"tiny"``; None reads ``COLQWEN3_MODEL``, then takes TomoroAI's 4B checkpoint.
        engine: ``"auto"``, ``"torch"``, ``"vllm"``, ``"server"``, or a :class:`TorchOptions`, :class:`VLLMOptions` or
            :class:`ServerOptions`; ``"auto"`` reads ``COLQWEN3_ENGINE``, then is the server when a url is known, else
            torch.
        device: for torch: ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"cpu"``; None takes the best there is.
        dtype: of the backbone: ``"auto"``, ``"bfloat16"``, ``"float16"`` or ``"float32"``; the rest stays float32.
        dim: Matryoshka dim, one the checkpoint was trained for; None keeps its full dim.
        pool_factor: document tokens pooled into one, from 1 (none); queries are never pooled.
        max_visual_tokens: most visual tokens a page (32 x 32 pixels each); None takes the family's bound.
        url: of a vLLM server, or several that serve the same model as one fleet; None reads ``COLQWEN3_URL``.
        api_key: for the servers; None reads ``COLQWEN3_API_KEY``. It is in no repr, dict, pickle or log.
        revision: branch, tag or commit of a hub model.
        family: overrules the family told from the checkpoint: tomoro, ops, nemotron, sauerkraut or colpali.
        include_text: whether a page's text joins its image in the prompt.
        truncate: whether a text beyond the limit is cut to fit instead of refused.

    Raises:
        ConfigError: a setting that cannot be used. What depends on the checkpoint is checked at the first use.

    Example:
        >>> encoder = ColQwen3Encoder("tiny", dim=64)        # nothing is loaded yet
        >>> encoder.to_dict()["dim"], encoder
        (64, ColQwen3Encoder(model='tiny', dim=64))
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        engine: str | EngineOptions = "auto",
        device: str | None = None,
        dtype: str = "auto",
        dim: int | None = None,
        pool_factor: int = 1,
        max_visual_tokens: int | None = None,
        url: str | Sequence[str] | None = None,
        api_key: str | None = None,
        revision: str | None = None,
        family: str | None = None,
        include_text: bool = False,
        truncate: bool = False,
    ) -> None:
        settings = EncoderSettings.resolve(
            model,
            engine,
            url=url,
            api_key=api_key,
            device=device,
            dtype=dtype,
            dim=dim,
            pool_factor=pool_factor,
            max_visual_tokens=max_visual_tokens,
            revision=revision,
            family=family,
            include_text=include_text,
            truncate=truncate,
        )
        self._settings = settings
        self._handle = ModelHandle(settings)

    # -- encoding ------------------------------------------------------------------------------------------------------

    def encode_queries(self, queries: Sequence[str | Query], *, show_progress: bool = False) -> list[MultiVector]:
        """Encode queries.

        Args:
            queries: texts, or :class:`Query` for an image, or an image with text.
            show_progress: whether to draw a progress bar.

        Returns:
            For each query in order, a multi-vector (n_tokens, dim); prompt and augmentation tokens count, as trained.

        Raises:
            EncodeError: one cannot be encoded; ``.index`` says which.
            InputTooLongError: one is beyond the family's limit and ``truncate`` is off.
        """
        return self._collect(_listed(queries, "queries"), self._submit_query, "queries", show_progress, queries)

    def encode_pages(self, pages: Iterable[Page], *, show_progress: bool = False) -> list[MultiVector]:
        """Encode pages: the image alone (with its text when ``include_text``), else the text, or the video.

        Args:
            pages: any iterable; a generator is read at most 64 pages ahead of what is encoded.
            show_progress: whether to draw a progress bar.

        Returns:
            For each page in order, a multi-vector (n_tokens, dim), pooled when ``pool_factor`` > 1.

        Raises:
            EncodeError: one cannot be encoded; ``.index`` says which.
        """
        return self._collect(_listed(pages, "pages"), self._submit_page, "pages", show_progress, pages)

    def encode_images(
        self, images: Iterable[ImageSource], *, show_progress: bool = False, allow_remote: AllowRemote = False
    ) -> list[MultiVector]:
        """Encode images as documents.

        Args:
            images: PIL images, paths, bytes of image files, binary file objects, NumPy arrays or tensors (see
                :func:`~colqwen3_retrievers.pages.images.plain_image`), or web addresses where they may be fetched.
            show_progress: whether to draw a progress bar.
            allow_remote: which web addresses are fetched; see
                :data:`~colqwen3_retrievers.pages.remote_images.AllowRemote`.

        Raises:
            EncodeError: one cannot be read; ``.index`` says which.
        """
        remote = checked_remote(allow_remote)

        def page(image: ImageSource, name: str) -> Page:
            return Page(id=name, image=local_image(image, remote))

        return self._collect(_as_pages(images, "images", page), self._submit_page, "images", show_progress, images)

    def encode_texts(self, texts: Iterable[str], *, show_progress: bool = False) -> list[MultiVector]:
        """Encode texts as documents.

        Args:
            texts: non-empty texts within the context length.
            show_progress: whether to draw a progress bar.

        Raises:
            EncodeError: one is empty or too long; ``.index`` says which.
        """
        pages = _as_pages(texts, "texts", lambda text, name: Page(id=name, text=text))
        return self._collect(pages, self._submit_page, "texts", show_progress, texts)

    def encode_videos(
        self, videos: Iterable[Video | str | Path | Sequence[ImageSource]], *, fps: float = 1.0
    ) -> list[MultiVector]:
        """Encode videos as documents, where the family has a prompt for them.

        Args:
            videos: files (need the ``video`` extra), lists of frames already sampled, or :class:`Video`.
            fps: frames sampled a second from a file, and the pace of a list of frames.

        Raises:
            EncodeError: one cannot be read, or the family has no video prompt; ``.index`` says which.
        """
        if not isinstance(fps, int | float) or not fps > 0:
            raise ConfigError(f"fps: expected a number above 0, got {fps!r}")
        return self.encode_pages(
            _as_pages(videos, "videos", lambda video, name: Page(id=name, video=_sampled(video, fps)))
        )

    def submit_queries(self, queries: Iterable[str | Query]) -> Future[list[MultiVector]]:
        """Start encoding queries; the future's result is that of :meth:`encode_queries`.

        Returns at once, also when a checkpoint has to be downloaded first. Cancelling the future takes back what was
        not yet encoded. Its callbacks run in a thread that other queries need: they must be short.
        """
        return self._submit_all(_listed(queries, "queries"), self._submit_query)

    def submit_pages(self, pages: Iterable[Page]) -> Future[list[MultiVector]]:
        """Start encoding pages; the future's result is that of :meth:`encode_pages`. See :meth:`submit_queries`."""
        return self._submit_all(_listed(pages, "pages"), self._submit_page)

    def score(self, queries: Sequence[MultiVector], documents: Sequence[MultiVector], mode: Mode = "sum") -> Float32:
        """Compare multi-vectors by MaxSim, in float32.

        Args:
            queries: from :meth:`encode_queries`; may be empty.
            documents: from the other encode methods; may be empty.
            mode: ``"sum"`` over query tokens, or ``"mean"``.

        Returns:
            float32 (n_queries, n_documents).

        Raises:
            ConfigError, DimensionError: as for :func:`~colqwen3_retrievers.maxsim`.
        """
        return maxsim(queries, documents, mode=mode, kernel=default_kernel())

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EncoderInfo:
        """What shapes its multi-vectors. Reads the checkpoint's headers, not its weights."""
        return self.opened().info

    def opened(self) -> OpenedModel:
        """Return its checkpoint and renderer, without loading weights."""
        return self._handle.opened()

    @property
    def stats(self) -> EngineStats:
        """How often the shared engine was loaded, and how many batches and inputs it has encoded."""
        return self._handle.engine().stats

    def to_dict(self) -> dict[str, Any]:
        """Return its settings as JSON values: no weights, no secrets."""
        return self._settings.to_dict()

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> ColQwen3Encoder:
        """Create an encoder from the settings of :meth:`to_dict`; nothing is loaded.

        Raises:
            ConfigError: an unknown setting.

        >>> ColQwen3Encoder.from_dict(ColQwen3Encoder("tiny").to_dict())
        ColQwen3Encoder(model='tiny')
        """
        return cls._of(EncoderSettings.from_dict(settings))

    @classmethod
    def _of(cls, settings: EncoderSettings) -> ColQwen3Encoder:
        values = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}
        return cls(**{**values, "url": settings.url or None})

    @classmethod
    def from_info(
        cls,
        info: EncoderInfo,
        *,
        model: str | os.PathLike[str] | None = None,
        device: str | None = None,
        url: str | Sequence[str] | None = None,
    ) -> ColQwen3Encoder:
        """Create the encoder that an index was made with; nothing is loaded.

        Args:
            info: of the index.
            model: where the checkpoint is now, if it has moved.
            device: as for the constructor.
            url: as for the constructor.
        """
        return cls(
            info.model if model is None else model,
            device=device,
            url=url,
            dim=info.dim,
            pool_factor=info.pool_factor,
            max_visual_tokens=info.max_visual_tokens,
            include_text=info.include_text,
            family=info.family,
            revision=info.revision if model is None else None,
        )

    def close(self) -> None:
        """Release the model, which is freed when no other encoder shares it. Further use is an error."""
        self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle as settings; a copy in the same process shares the model, one in another process loads its own."""
        return ColQwen3Encoder.from_dict, (self.to_dict(),)

    def __copy__(self) -> ColQwen3Encoder:
        """Copy within this process, the server's key with it."""
        return ColQwen3Encoder._of(self._settings)

    def __deepcopy__(self, memo: dict[int, Any]) -> ColQwen3Encoder:
        return self.__copy__()

    def __repr__(self) -> str:
        return f"ColQwen3Encoder({', '.join(f'{key}={value!r}' for key, value in self._settings.changed.items())})"

    # -- inside --------------------------------------------------------------------------------------------------------

    def _submit_query(self, query: str | Query, index: int, future: ListFuture[MultiVector]) -> None:
        def render(opened: OpenedModel) -> EncoderInput:
            if not isinstance(query, str | Query):
                raise ConfigError(f"a query is a text or a Query, not {type(query).__name__}")
            return opened.renderer.query(Query(query) if isinstance(query, str) else query)

        kind: Kind = "image" if isinstance(query, Query) and query.image is not None else "text"
        self._handle.submit(kind, index, render, future)

    def _submit_page(self, page: Page, index: int, future: ListFuture[MultiVector]) -> None:
        def render(opened: OpenedModel) -> EncoderInput:
            if not isinstance(page, Page):
                raise ConfigError(f"expected a Page, not {type(page).__name__}")
            return opened.renderer.document(page)

        self._handle.submit("page", index, render, future)

    def _submit_all(self, items: Iterable[T], submit: _Submit[T]) -> Future[list[MultiVector]]:
        """Submit all inputs with one future for all; if one cannot be submitted, the others are cancelled."""
        future = self._handle.new_future()
        try:
            for index, item in enumerate(items):
                submit(item, index, future)
        except BaseException:
            future.cancel()
            raise
        future.complete()
        return future

    def _collect(
        self, items: Iterable[T], submit: _Submit[T], unit: str, show_progress: bool, source: object
    ) -> list[MultiVector]:
        """Encode inputs, read at most :data:`IN_FLIGHT_PAGES` ahead, and return the results in order.

        Args:
            items: the inputs.
            submit: starts encoding one, given its position and its future.
            unit: what a progress bar counts.
            show_progress: whether to draw one (on a terminal).
            source: what the caller gave; its length, if it has one, is the bar's total.
        """
        results: list[MultiVector] = []
        pending: deque[ListFuture[MultiVector]] = deque()
        total = len(source) if isinstance(source, Sized) else None
        with progress_bar(show_progress, total, unit) as bar:

            def take() -> None:
                results.extend(pending.popleft().result())
                bar.update(1)

            try:
                for index, item in enumerate(items):
                    future = self._handle.new_future()
                    submit(item, index, future)
                    future.complete()
                    pending.append(future)
                    if len(pending) > IN_FLIGHT_PAGES:
                        take()
                while pending:
                    take()
            finally:
                for future in pending:
                    future.cancel()
        return results


_Submit = Callable[[T, int, ListFuture[MultiVector]], None]


def _listed(values: Iterable[T], name: str) -> Iterable[T]:
    """Refuse a single input where a list is expected."""
    if isinstance(values, str | Page | Query) or is_image(values) or not isinstance(values, Iterable):
        raise ConfigError(f"{name}: expected a list, got {type(values).__name__}; wrap a single one: [...]")
    return values


def _as_pages(values: Iterable[T], name: str, page: Callable[[T, str], Page]) -> Iterator[Page]:
    """Wrap inputs as pages, named by their positions; an error of one carries its position."""
    for index, value in enumerate(_listed(values, name)):
        with about(index):
            wrapped = page(value, f"input {index}")
        yield wrapped


def _sampled(video: Video | str | Path | Sequence[ImageSource], fps: float) -> Video:
    """Sample a video file, or wrap frames that are sampled already."""
    if isinstance(video, Video):
        return video
    if isinstance(video, str | Path):
        from colqwen3_retrievers.pages.video import load_video

        return load_video(video, fps=fps)
    if not isinstance(video, Sequence):
        raise ConfigError(f"a video is a file, a list of frames or a Video, not {type(video).__name__}")
    return Video(tuple(video), tuple(i / fps for i in range(len(video))))
