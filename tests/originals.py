"""Image files whose pixels a chat model would not see as they were embedded, if it were sent the files themselves."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

SCAN_SIZE = (2500, 3500)


def two_colours(mode: str = "RGB") -> Image.Image:
    """A picture whose sides, corners and colours differ."""
    image = Image.new("RGB", (48, 32), (200, 40, 20))
    image.paste((10, 60, 220), (24, 0, 48, 16))
    return image.convert(mode)


def write_originals(folder: Path, *, scan: bool = True) -> dict[str, Path]:
    """Write one file of each kind, and return their paths by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    transparent = Image.new("RGBA", (48, 32), (0, 0, 0, 0))  # black on black for who drops the alpha channel
    transparent.paste((0, 0, 0, 255), (4, 4, 20, 20))
    grey_16 = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "cmyk": (two_colours("CMYK"), "a.jpg", {"quality": 95}),
        "grey of 16 bits": (Image.fromarray(grey_16), "b.png", {}),
        "animated gif": (two_colours("P"), "c.gif", {"save_all": True, "append_images": [Image.new("P", (48, 32), 9)]}),
        "animated webp": (two_colours(), "d.webp", {"save_all": True, "append_images": [Image.new("RGB", (48, 32))]}),
        "animated png": (two_colours(), "e.png", {"save_all": True, "append_images": [Image.new("RGB", (48, 32))]}),
        "transparent": (transparent, "f.png", {}),
        "transparent colour": (two_colours(), "g.png", {"transparency": (200, 40, 20)}),
        "palette": (two_colours("P"), "h.png", {"transparency": 0}),
        "turned jpeg": (two_colours(), "i.jpg", {"quality": 95, "exif": turned}),
        "turned png": (two_colours(), "j.png", {"exif": turned}),
        "turned webp": (two_colours(), "k.webp", {"lossless": True, "exif": turned}),
        "tiff": (two_colours(), "l.tif", {}),
        "profile": (two_colours(), "m.png", {"icc_profile": profile}),
        "bilevel": (two_colours("1"), "n.tif", {"compression": "group4"}),
    }
    for image, name, options in kinds.values():
        image.save(folder / name, **options)
    paths = {kind: folder / name for kind, (_, name, _) in kinds.items()}
    paths["colour of 16 bits"] = folder / "o.png"
    paths["colour of 16 bits"].write_bytes(colour_of_16_bits())
    if scan:
        rng = np.random.default_rng(0)
        paper = rng.integers(0, 80, (SCAN_SIZE[1], SCAN_SIZE[0], 3), dtype=np.uint8)
        paper += np.linspace(24, 160, SCAN_SIZE[0]).astype(np.uint8)[None, :, None]
        paths["scan"] = folder / "p.png"
        Image.fromarray(paper).save(paths["scan"], compress_level=1)
        assert paths["scan"].stat().st_size * 4 / 3 > 25e6
    return paths


def colour_of_16_bits() -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads but cannot write."""
    values = (np.asarray(two_colours()).astype(">u2") << 8) | 0x7F
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 48, 32, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def naive_pixels(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What a decoder sees that ignores orientations, profiles and alpha; it must get RGB or grey of 8 bits."""
    image = Image.open(io.BytesIO(data))
    assert image.format in ("PNG", "JPEG", "WEBP")
    assert image.mode in ("RGB", "L")
    assert not getattr(image, "is_animated", False)
    assert not image.info.keys() & {"transparency", "icc_profile"}
    return np.asarray(image.convert("RGB"))
