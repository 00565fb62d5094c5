"""The Debian fonts that pages are printed in, split by design into training and held-out families."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache, lru_cache

from PIL import ImageFont

# Debian package -> licence of its fonts, after the copyright file of the package.
PACKAGES: dict[str, str] = {
    "fonts-dejavu-core": "Bitstream Vera / public domain",
    "fonts-dejavu-extra": "Bitstream Vera / public domain",
    "fonts-liberation2": "OFL-1.1",
    "fonts-liberation": "GPL-2 with font exception",
    "fonts-freefont-ttf": "GPL-3 with font exception",
    "fonts-croscore": "OFL-1.1",
    "fonts-crosextra-carlito": "OFL-1.1",
    "fonts-crosextra-caladea": "Apache-2.0",
    "fonts-open-sans": "Apache-2.0",
    "fonts-roboto-unhinted": "Apache-2.0",
    "fonts-roboto-slab": "Apache-2.0",
    "fonts-lato": "OFL-1.1",
    "fonts-noto-core": "OFL-1.1",
    "fonts-cantarell": "OFL-1.1",
    "fonts-linuxlibertine": "OFL-1.1 or GPL-2 with font exception",
    "fonts-ebgaramond": "OFL-1.1",
    "fonts-firacode": "OFL-1.1",
    "fonts-go": "BSD-3-Clause",
    "fonts-b612": "OFL-1.1 (also EPL-2.0, EDL-1.0)",
    "fonts-hack": "MIT and Bitstream Vera",
    "fonts-inter": "OFL-1.1",
    "fonts-cabin": "OFL-1.1",
    "fonts-quicksand": "OFL-1.1",
    "fonts-vollkorn": "OFL-1.1",
    "fonts-sil-gentium": "OFL-1.1",
    "fonts-sil-charis": "OFL-1.1",
    "fonts-jetbrains-mono": "Apache-2.0",
    "fonts-texgyre": "GUST Font License",
    "fonts-urw-base35": "AGPL-3 with font exception",
    "fonts-inconsolata": "OFL-1.0",
    "fonts-lmodern": "GUST Font License",
    "fonts-cmu": "OFL-1.1",
    "fonts-clear-sans": "Apache-2.0",
    "fonts-karla": "OFL-1.1",
    "fonts-manrope": "OFL-1.1",
    "fonts-play": "OFL-1.1",
    "fonts-quattrocento": "OFL-1.1",
    "fonts-oldstandard": "OFL-1.0",
    "fonts-paratype": "ParaType Free Font License",
    "fonts-adf-gillius": "GPL-2 with font exception",
    "fonts-adf-universalis": "GPL-2 with font exception",
    "fonts-adf-baskervald": "GPL-2 with font exception",
    "fonts-adf-accanthis": "GPL-2 with font exception",
    "fonts-sil-andika": "OFL-1.1",
    "fonts-stix": "OFL-1.1",
    "fonts-yrsa-rasa": "OFL-1.1",
    "fonts-courier-prime": "OFL-1.1",
    "fonts-mononoki": "OFL-1.1",
}

# Families that open the curriculum.
FIRST_FAMILIES = ("Liberation Sans", "Liberation Serif", "DejaVu Sans", "DejaVu Serif", "Roboto", "Open Sans")

TRAIN_FAMILIES = (
    *FIRST_FAMILIES,
    "Liberation Mono",
    "Liberation Sans Narrow",
    "DejaVu Sans Mono",
    "FreeSans",
    "FreeSerif",
    "FreeMono",
    "Arimo",
    "Tinos",
    "Cousine",
    "Caladea",
    "Roboto Condensed",
    "Roboto Slab",
    "Noto Sans",
    "Noto Serif",
    "Noto Sans Display",
    "Noto Serif Display",
    "Cantarell",
    "Linux Libertine O",
    "Linux Biolinum O",
    "EB Garamond",
    "Fira Code",
    "Hack",
    "Inter",
    "Inter Display",
    "Quicksand",
    "Charis SIL",
    "JetBrains Mono",
    "TeX Gyre Termes",
    "TeX Gyre Heros",
    "TeX Gyre Heros Cn",
    "TeX Gyre Pagella",
    "TeX Gyre Schola",
    "TeX Gyre Cursor",
    "TeX Gyre Adventor",
    "Nimbus Sans",
    "Nimbus Roman",
    "Nimbus Mono PS",
    "Nimbus Sans Narrow",
    "C059",
    "P052",
    "URW Gothic",
    "Inconsolata",
    "Latin Modern Roman",
    "Latin Modern Sans",
    "CMU Serif",
    "CMU Sans Serif",
    "Clear Sans",
    "Karla",
    "Manrope",
    "Play",
    "Quattrocento",
    "Old Standard TT",
    "Gillius ADF",
    "Universalis ADF Std",
    "Baskervald ADF Std",
    "Andika",
    "STIX",
    "Courier Prime",
)

# Designs that training never sees (Carlito is drawn after Lato, TeX Gyre Bonum is URW Bookman).
HELD_OUT_FAMILIES = (
    "Lato",
    "Carlito",
    "PT Sans",
    "PT Serif",
    "Cabin",
    "Vollkorn",
    "Gentium",
    "URW Bookman",
    "TeX Gyre Bonum",
    "Go",
    "B612",
    "Yrsa",
    "mononoki",
    "Accanthis ADF Std",
)

_PLAIN = {"regular", "book", "roman", "medium", "normal", "10 regular", "12 regular", "light", "semilight", "text"}
_BOLD = {"bold", "semibold", "demi", "demibold", "semi bold"}
_ITALIC = {"italic", "oblique", "medium italic", "light italic", "10 italic"}
_BOLD_ITALIC = {"bold italic", "bold oblique", "demi oblique"}


@dataclass(frozen=True)
class FontFile:
    """One font file with its family and cut."""

    path: str
    family: str
    cut: str


@cache
def installed_fonts(split: str) -> tuple[FontFile, ...]:
    """List the installed files of the ``first``, ``train`` or ``test`` families, in a fixed order."""
    families = {"first": FIRST_FAMILIES, "train": TRAIN_FAMILIES, "test": HELD_OUT_FAMILIES}[split]
    listing = subprocess.run(
        ["fc-list", "--format", "%{family[0]}\t%{style[0]}\t%{file}\n"], capture_output=True, text=True, check=True
    ).stdout
    found = []
    for line in sorted(set(listing.splitlines())):
        family, style, path = line.split("\t")
        if family not in families or not path.endswith((".ttf", ".otf")):
            continue
        style = style.lower()
        for cut, names in (("plain", _PLAIN), ("bold", _BOLD), ("italic", _ITALIC), ("bold italic", _BOLD_ITALIC)):
            if style in names:
                found.append(FontFile(path, family, cut))
    return tuple(found)


@lru_cache(maxsize=4096)
def load_font(path: str, size: float) -> ImageFont.FreeTypeFont:
    """Open a font at a size in px."""
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=400_000)
def advance(path: str, size: float, text: str) -> float:
    """Width in px of a short text."""
    return load_font(path, size).getlength(text)
