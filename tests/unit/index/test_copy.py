"""Copying an index: folder to Qdrant and back, byte for byte, encoding nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from qdrant_client import QdrantClient

from colqwen3_retrievers import Page, PageIndex, open_store
from colqwen3_retrievers.cli.main import main
from colqwen3_retrievers.errors import ConfigError, StoreError, StoreMismatchError, StoreUnavailableError
from colqwen3_retrievers.index import copy
from colqwen3_retrievers.index.copy import Copied, copy_index
from colqwen3_retrievers.stores.embedded.store import EmbeddedStore
from colqwen3_retrievers.stores.protocol import MultiVectorStore, Record
from colqwen3_retrievers.stores.qdrant.store import QdrantStore
from tests import hashing
from tests.contracts.store_contract import INFO, record, tokens
from tests.hashing import HashingEncoder


def picture(n: int) -> Image.Image:
    return Image.new("RGB", (16 + n, 16), (n * 20, 0, 0))


@pytest.fixture
def folder(tmp_path: Path, encoder: HashingEncoder) -> Path:
    """An index of pages with pictures, of texts, and of one page that points at its original."""
    original = tmp_path / "original.png"
    picture(9).save(original)
    with PageIndex.open(tmp_path / "index", encoder) as index:
        index.add(Page(source="a.pdf", number=n + 1, image=picture(n), metadata={"n": n}) for n in range(5))
        index.add(
            Page(source="b.txt", number=n + 1, text=f"text {n}", metadata={"big": 2**70, "half": "\ud800"})
            for n in range(4)
        )
    with PageIndex.open(tmp_path / "index", encoder, images="reference") as index:
        index.add(Page(source="original.png", image=original))
    return tmp_path / "index"


def contents(store: MultiVectorStore) -> dict[str, tuple[Any, ...]]:
    """All there is of every page, token embeddings as the bytes of their float16."""
    found = {}
    for kept in store.get(store.ids(), vectors=True):
        page, made = kept.page, kept.multi_vector
        assert made is not None
        rows = np.asarray(made).astype(np.float16)
        assert (rows.astype(np.float32) == np.asarray(made)).all()
        clusters = None if made.clusters is None else made.clusters.tolist()
        found[page.id] = (
            page.source, page.number, page.label, page.text, page.metadata, page.sha256, kept.image, rows.tobytes(),
            made.content, made.visual, made.tokens, made.grid, clusters,
        )  # fmt: skip
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.png")}


def test_to_qdrant_and_back_is_the_same_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    qdrant, pictures = f"qdrant+path:{tmp_path}/q/pages", tmp_path / "pictures"
    assert copy_index(folder, qdrant, dst_images_dir=pictures) == Copied(added=10, images=5)
    assert copy_index(qdrant, tmp_path / "back", src_images_dir=pictures) == Copied(added=10, images=5)
    with EmbeddedStore(folder, read_only=True) as before, EmbeddedStore(tmp_path / "back") as after:
        assert contents(after) == contents(before) and len(after) == 10 and after.info == before.info
    assert (
        files(tmp_path / "back" / "images") == files(folder / "images") == files(pictures) and len(files(pictures)) == 5
    )
    with PageIndex.open(tmp_path / "back", read_only=True) as index:
        shown = index.get(["a.pdf#page=3", "original.png#page=1"])
        assert [r.page.image and r.page.image.size for r in shown] == [(18, 16), (25, 16)]


def test_copying_again_sends_only_what_changed(folder: Path, tmp_path: Path, encoder: HashingEncoder) -> None:
    copy_index(folder, tmp_path / "there")
    assert copy_index(folder, tmp_path / "there") == Copied(unchanged=10)
    with PageIndex.open(folder, encoder) as index:
        index.add(Page(source="a.pdf", number=1, image=picture(7), metadata={"n": 0}))
        index.add(Page(source="a.pdf", number=2, image=picture(1), metadata={"n": True}))  # True == 1, and is not 1
        index.add(Page(source="new.txt", text="new"))
    with EmbeddedStore(tmp_path / "there") as there:
        there.add([Record(Page(id="own", sha256="0"), there.get(["a.pdf#page=1"], vectors=True)[0].multi_vector)])
        before = files(tmp_path / "there")
    assert copy_index(folder, tmp_path / "there") == Copied(added=1, updated=2, unchanged=8, images=1)
    with EmbeddedStore(folder, read_only=True) as one, EmbeddedStore(tmp_path / "there") as other:
        assert "own" in other  # what only the destination has stays
        other.delete(["own"])
        assert contents(one) == contents(other)
    assert files(tmp_path / "there") == files(folder) != before  # and the picture nobody has any more is gone


def test_a_picture_kept_elsewhere_is_a_change(folder: Path, tmp_path: Path, encoder: HashingEncoder) -> None:
    copy_index(folder, tmp_path / "there")
    with PageIndex.open(folder, encoder) as index:  # pointed to until now, stored from now on
        assert index.add(Page(source="original.png", image=tmp_path / "original.png")).updated == 1
    assert copy_index(folder, tmp_path / "there") == Copied(updated=1, unchanged=9, images=1)
    (tmp_path / "original.png").unlink()
    with PageIndex.open(tmp_path / "there", read_only=True) as copy:
        assert copy.get(["original.png#page=1"])[0].page.image is not None


class Breaking(EmbeddedStore):
    """A store that is lost after some pages."""

    left = 4

    def add(self, records: Any) -> None:
        if self.left <= 0:
            raise StoreUnavailableError("gone")
        self.left -= len(records)
        super().add(records)


def test_an_interrupted_copy_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    with Breaking(tmp_path / "there", info=hashing.INFO) as there:
        with pytest.raises(StoreUnavailableError):
            copy_index(folder, there, batch_size=2)
        assert len(there) == 4
    assert copy_index(folder, tmp_path / "there", batch_size=2) == Copied(added=6, unchanged=4)
    with EmbeddedStore(folder, read_only=True) as one, EmbeddedStore(tmp_path / "there", read_only=True) as other:
        assert contents(one) == contents(other)
    assert files(tmp_path / "there") == files(folder)


def test_open_stores_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "BATCH", 32)
    client = QdrantClient(":memory:")
    with EmbeddedStore(tmp_path / "a", info=INFO) as one, QdrantStore("pages", info=INFO, client=client) as other:
        one.add([record(n, f"p{n}") for n in range(70)])
        assert copy_index(one, other, batch_size=10) == Copied(added=70)
        assert contents(one) == contents(other)
        two = QdrantStore("others", info=INFO, client=client)
        assert copy_index(other, two).added == 70
        assert [m.record.page.id for m in two.search([tokens(5)], 3)[0]] == [
            m.record.page.id for m in one.search([tokens(5)], 3)[0]
        ]
    client.close()


@pytest.mark.parametrize(
    ("field", "value"), [("fingerprint", "other"), ("dim", 8), ("pool_factor", 3), ("max_visual_tokens", 512)]
)
def test_another_info_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    with EmbeddedStore(tmp_path / "a", info=INFO) as one:
        one.add([record(1)])
    other = dataclasses.replace(INFO, **{field: value})
    with EmbeddedStore(tmp_path / "b", info=other) as there:
        with pytest.raises(StoreMismatchError, match=field):
            copy_index(tmp_path / "a", there)
        assert len(there) == 0
    with pytest.raises(StoreMismatchError, match=field):
        copy_index(tmp_path / "a", tmp_path / "b")


def test_pictures_need_a_place_to_come_from_and_to_go_to(folder: Path, tmp_path: Path) -> None:
    qdrant, pictures = f"qdrant+path:{tmp_path}/q/pages", tmp_path / "pictures"
    with pytest.raises(ConfigError, match=r"page 'a\.pdf#page=1' has a stored image: give dst_images_dir="):
        copy_index(folder, qdrant)
    assert copy_index(folder, qdrant, images=False) == Copied(added=10)
    with pytest.raises(ConfigError, match="give src_images_dir="):
        copy_index(qdrant, tmp_path / "back")
    assert copy_index(qdrant, tmp_path / "back", images=False).added == 10
    assert copy_index(folder, qdrant, dst_images_dir=pictures) == Copied(unchanged=10, images=5)  # they come later
    assert copy_index(qdrant, tmp_path / "back", src_images_dir=pictures) == Copied(unchanged=10, images=5)


def test_lost_and_damaged_pictures(folder: Path, tmp_path: Path) -> None:
    first, second = sorted((folder / "images").rglob("*.png"))[:2]
    first.unlink()
    assert copy_index(folder, tmp_path / "there") == Copied(added=10, images=4, missing_images=1)
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=f"{second.name}: the image of page .* is not what was written"):
        copy_index(folder, tmp_path / "other")


def test_a_place_onto_itself(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for dst in (folder, "index", f"{folder}/"):
        with pytest.raises(ConfigError, match="the same"):
            copy_index(folder, dst)
    with EmbeddedStore(folder) as store, pytest.raises(ConfigError, match="the same"):
        copy_index(store, store)


def test_bad_arguments(folder: Path, tmp_path: Path) -> None:
    for wrong in (0, True, 1.5):
        with pytest.raises(ConfigError, match="batch_size: expected a whole number from 1"):
            copy_index(folder, tmp_path / "x", batch_size=wrong)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="no index there"):
        copy_index(tmp_path / "nowhere", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qdrant, pictures = f"qdrant+path:{tmp_path}/q/pages", str(tmp_path / "pictures")
    assert main(["copy", str(folder), qdrant, "--dst-images-dir", pictures]) == 0
    assert capsys.readouterr().out == "10 added, 0 updated, 0 unchanged; 5 images written\n"
    assert main(["copy", qdrant, str(tmp_path / "back"), "--src-images-dir", pictures, "--batch-size", "3"]) == 0
    with open_store(tmp_path / "back") as back, EmbeddedStore(folder, read_only=True) as before:
        assert contents(back) == contents(before)
    assert main(["copy", str(folder), f"qdrant+path:{tmp_path}/r/pages"]) == 1
    assert "give dst_images_dir=" in capsys.readouterr().err
    assert main(["copy", str(folder), f"qdrant+path:{tmp_path}/r/pages", "--no-images"]) == 0
    assert main(["info", "--index", qdrant]) == 0
    assert "pages              10" in capsys.readouterr().out
