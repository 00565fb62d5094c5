"""Page images for chat models: the picture that was embedded, in a file that every chat API accepts."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from colqwen3_retrievers.checks import whole_number
from colqwen3_retrievers.pages.images import (
    ImageSource,
    checked_size,
    decoding,
    image_label,
    is_upright,
    open_header,
    open_image,
    plain_image,
    read_image_bytes,
)

MAX_SIDE: Final = 2000
"""Default longest side in pixels of an image for a chat model."""

MAX_BYTES: Final = 3_700_000
"""Default most bytes of an image for a chat model: below 5 MB in base64."""

_MEDIA_TYPES: Final = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_PNG_PLAIN: Final = (b"\x08\x00", b"\x08\x02")  # 8 bits a channel, grey or RGB; Pillow reads 16 bits of RGB as 8
_PNG_METADATA: Final = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # may hold an orientation; to know, Pillow decodes a PNG
_QUALITIES: Final = (92, 80, 65)  # of JPEG, before the image is made smaller
_LEAST_BYTES: Final = 1024  # a JPEG of a single pixel has some 600


@dataclass(frozen=True, slots=True)
class ChatImages:
    """Prepares images for chat models, within the published limits of their APIs.

    A chat model shall see the pixels that were embedded (those of :func:`~colqwen3_retrievers.pages.images.open_image`:
    upright RGB, transparency over white, the first frame), whether or not its API applies orientations, colour
    profiles, or transparency. A file that holds just those pixels and is within the limits is sent unchanged. Anything
    else is encoded anew: as PNG, which is exact, or as JPEG where PNG has too many bytes.

    The defaults satisfy, as published in 2025:

    - Anthropic (https://platform.claude.com/docs/en/build-with-claude/vision): 5 MB of base64 and 8,000 pixels a side
      for each image; 2,000 pixels a side in a request with more than 20 images; 32 MB for a request, which six images
      of the most bytes fit into.
    - OpenAI (https://platform.openai.com/docs/guides/images-vision): PNG, JPEG, WebP or a GIF that is not animated,
      50 MB for a request; a longest side above 2,048 pixels is reduced by the API.

    Args:
        max_side: longest side in pixels; larger images are reduced.
        max_bytes: most bytes of the file, before base64; at least 1,024.

    Raises:
        ConfigError: an argument that is not a whole number, or too small.

    >>> data, media_type = ChatImages().encode(Image.new("CMYK", (40, 30)))
    >>> media_type, Image.open(io.BytesIO(data)).mode
    ('image/png', 'RGB')
    >>> data, _ = ChatImages(max_side=20).encode(Image.new("RGB", (40, 30)))
    >>> Image.open(io.BytesIO(data)).size
    (20, 15)
    """

    max_side: int = MAX_SIDE
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        whole_number(self.max_side, "max_side", least=1)
        whole_number(self.max_bytes, "max_bytes", least=_LEAST_BYTES)

    def encode(self, source: ImageSource, *, name: str | None = None) -> tuple[bytes, str]:
        """Return an image as the bytes of a PNG, JPEG or WebP file, and its media type.

        Args:
            source: any image, see :func:`~colqwen3_retrievers.pages.images.plain_image`.
            name: what to call it in an error; a path names itself.

        Raises:
            PageError, ConfigError: as for :func:`~colqwen3_retrievers.pages.images.open_image`.
        """
        source = plain_image(source, name=name)
        if isinstance(source, Image.Image):
            return self._encoded(open_image(source, name=name))
        name = name or image_label(source)
        data = read_image_bytes(source, name=name)
        with open_header(io.BytesIO(data), name=name) as header, decoding(name):
            if not self._accept(header, data):
                return self._encoded(open_image(data, name=name))
            media_type = _MEDIA_TYPES[str(header.format)]
            checked_size(header)  # an API answers a broken image with an error for the whole request
        return data, media_type

    def replacement(self, source: Path | bytes) -> tuple[bytes | None, str]:
        """Return what to send in place of an image file, or None if the file itself can be sent; and the media type.

        Nothing is decoded of a file that can be sent, unlike in :meth:`encode`: a broken one is not noticed.

        Args:
            source: a path, or the bytes of an image file.

        Raises:
            PageError, ConfigError: as for :meth:`encode`.

        >>> file = io.BytesIO()
        >>> Image.new("RGB", (4, 3)).save(file, "PNG")
        >>> ChatImages().replacement(file.getvalue())
        (None, 'image/png')
        """
        name = image_label(source)
        data = read_image_bytes(source, name=name)
        with open_header(io.BytesIO(data), name=name) as header, decoding(name):
            if self._accept(header, data):
                return None, _MEDIA_TYPES[str(header.format)]
        return self._encoded(open_image(data, name=name))

    def _accept(self, header: Image.Image, data: bytes) -> bool:
        """Return whether any decoder sees the pixels of ``open_image`` in a file within the limits."""
        upright = header.format == "PNG" and not any(chunk in data for chunk in _PNG_METADATA)
        return (
            header.format in _MEDIA_TYPES
            and header.mode in ("RGB", "L")
            and (header.format != "PNG" or data[24:26] in _PNG_PLAIN)
            and not getattr(header, "is_animated", False)
            and not {"transparency", "icc_profile"} & header.info.keys()
            and max(header.size) <= self.max_side
            and len(data) <= self.max_bytes
            and (upright or is_upright(header))
        )

    def _encoded(self, image: Image.Image) -> tuple[bytes, str]:
        image.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS)
        data = _file_of(image, "PNG")
        if len(data) <= self.max_bytes:
            return data, "image/png"
        while True:
            for quality in _QUALITIES:
                data = _file_of(image, "JPEG", quality=quality, subsampling=0)  # 4:4:4 keeps coloured text sharp
                if len(data) <= self.max_bytes:
                    return data, "image/jpeg"
            image.thumbnail((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)), Image.Resampling.LANCZOS)


def _file_of(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
