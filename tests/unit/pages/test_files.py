from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from colqwen3_retrievers.errors import ConfigError, PageError
from colqwen3_retrievers.pages.files import find_page_files
from colqwen3_retrievers.pages.loading import load_pages
from tests.bad_pages import (
    make_image,
    make_pdf,
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.png", "a.png", "A.png", "2024/z.PNG", "2024/q1/deep.png", "2024/a.jpg", "c.png/inside.png"):
        make_image(tmp_path / name)
    for name in (".hidden.png", ".git/x.png", "2024/.cache/y.png"):
        make_image(tmp_path / name)
    for name in ("notes.txt", "table.xlsx", "README", "x.pdf.bak"):
        (tmp_path / name).write_text("no page")
    return tmp_path


ALL = ["2024/a.jpg", "2024/q1/deep.png", "2024/z.PNG", "A.png", "a.png", "b.png", "c.png/inside.png"]


def sources(*args, **kwargs) -> list[str]:
    return [page.source for page in load_pages(*args, **kwargs)]


def test_a_folder_is_read_in_order_without_hidden_files_and_other_types(tree):
    assert sources(tree) == ALL
    assert [file.source for file in find_page_files(tree)] == ALL


def test_paths_may_be_strings_relative_and_roundabout(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert sources(".") == sources("2024/..") == sources("./") == sources([Path()]) == ALL
    assert sources("b.png") == sources(tree / "b.png") == sources("2024/../b.png") == ["b.png"]
    (page,) = load_pages("b.png")
    monkeypatch.chdir(tree.parent)
    assert page.image.size == (40, 30)  # the page keeps an absolute path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["A.png", "a.png", "b.png"]),
        ("[ab].png", ["a.png", "b.png"]),
        ("?.png", ["A.png", "a.png", "b.png"]),
        ("*", ["A.png", "a.png", "b.png"]),
        ("**", ALL),
        ("**/*.png", ["2024/q1/deep.png", "A.png", "a.png", "b.png", "c.png/inside.png"]),
        ("2024/**/*", ["a.jpg", "q1/deep.png", "z.PNG"]),
        ("20*/*.jpg", ["2024/a.jpg"]),
        ("*/*/deep.*", ["2024/q1/deep.png"]),
        ("c.png/*", ["inside.png"]),
        ("**/**/deep.png", ["2024/q1/deep.png"]),
    ],
)
def test_patterns_find_files_relative_to_what_stands_before_them(tree, pattern, expected):
    assert sources(str(tree / pattern)) == expected


def test_a_relative_pattern_works_in_a_folder_named_like_a_pattern(tree, monkeypatch):
    odd = tree / "odd[1]"
    make_image(odd / "in.png")
    make_image(odd / "x[1].png")
    assert sources(str(odd / "i*.png")) == ["in.png"]
    assert sources(str(odd)) == ["in.png", "x[1].png"]
    assert sources(str(odd / "x[1].png")) == ["x[1].png"]
    monkeypatch.chdir(odd)
    assert sources("i*.png") == ["in.png"]


@pytest.mark.parametrize("pattern", ["*.pdf", "nowhere/*.png", "**/*.bmp"])
def test_a_pattern_that_finds_nothing_is_an_error(tree, pattern):
    with pytest.raises(PageError, match=r"matches the pattern|cannot be listed"):
        load_pages(str(tree / pattern))
    assert sources(str(tree / pattern), on_error="skip") == []


def test_an_empty_folder_and_no_paths_give_no_pages(tmp_path):
    assert sources(tmp_path) == []
    assert sources([]) == []


def test_errors_of_paths_are_raised_by_the_call_itself(tree):
    with pytest.raises(PageError, match="no such file or folder"):
        load_pages(tree / "missing")


def test_one_file_reached_by_two_paths_is_read_once(tree):
    assert sources([tree / "b.png", tree, tree / "2024", str(tree / "*.png")])[0] == "b.png"
    assert sorted(sources([tree / "b.png", tree, tree / "2024", str(tree / "*.png")])) == sorted(ALL)


def test_two_files_of_the_same_source_are_refused_naming_both(tmp_path):
    one, two = make_image(tmp_path / "one" / "a.png"), make_image(tmp_path / "two" / "a.png")
    with pytest.raises(ConfigError, match=r"would both be 'a\.png'") as caught:
        load_pages([tmp_path / "one", tmp_path / "two"])
    assert str(one) in str(caught.value) and str(two) in str(caught.value)
    assert sources([tmp_path / "one", tmp_path / "two"], root=tmp_path) == ["one/a.png", "two/a.png"]


def test_a_root_above_names_the_sources_and_one_beside_is_refused(tree):
    assert sources(tree / "2024" / "q1", root=tree) == ["2024/q1/deep.png"]
    assert sources(str(tree / "2024" / "*.jpg"), root=tree) == ["2024/a.jpg"]
    with pytest.raises(ConfigError, match="outside the root"):
        load_pages(tree / "b.png", root=tree / "2024")


def test_links_to_files_are_read_and_loops_of_folders_are_not_followed(tmp_path):
    make_image(tmp_path / "real" / "a.png")
    (tmp_path / "link.png").symlink_to("real/a.png")
    (tmp_path / "real" / "loop").symlink_to("..")
    (tmp_path / "real" / "loop2").symlink_to(".")
    assert sources(tmp_path) == ["link.png", "real/a.png"]
    assert sources(str(tmp_path / "**")) == ["link.png", "real/a.png"]
    (tmp_path / "alias").symlink_to("real")
    assert sources(tmp_path / "alias") == ["a.png"]  # a link that is named is meant


def test_a_folder_with_bad_entries_reports_each_and_reads_the_rest(tmp_path):
    make_image(tmp_path / "good.png")
    os.mkfifo(tmp_path / "pipe.pdf")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "zero.pdf").write_bytes(b"")
    told: list[PageError] = []
    assert [page.source for page in load_pages(tmp_path, on_error=told.append)] == ["good.png"]
    assert [error.source for error in told] == ["gone.png", "pipe.pdf", "self.png", "zero.pdf"]


def test_a_file_that_vanishes_before_its_turn_is_an_error(tree):
    pages = load_pages([tree / "a.png", tree / "b.png"])
    (tree / "b.png").unlink()
    assert next(pages).source == "a.png"
    with pytest.raises(PageError, match=r"b\.png: cannot be read: No such file"):
        next(pages)


def test_the_same_page_of_a_changed_file_keeps_its_id_and_changes_its_digest(tmp_path):
    path = make_image(tmp_path / "a.png")
    (before,) = load_pages(tmp_path)
    digest = before.sha256
    make_image(path, colour="red")
    (after,) = load_pages(tmp_path)
    assert after.id == before.id
    assert after.sha256 != digest


def test_a_moved_folder_gives_the_same_pages(tmp_path):
    pytest.importorskip("pypdfium2")
    pytest.importorskip("reportlab")
    make_pdf(tmp_path / "one" / "a.pdf", 2)
    make_image(tmp_path / "one" / "b.png")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    kept = [[(p.id, p.metadata, p.sha256) for p in load_pages(tmp_path / name)] for name in ("one", "two")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"paths": 3}, "expected a path or a list"),
        ({"paths": None}, "expected a path or a list"),
        ({"paths": b"a.pdf"}, "a bytes has no file name"),
        ({"paths": ""}, "non-empty path"),
        ({"paths": [""]}, "non-empty path"),
        ({"paths": [b"a.pdf"]}, "a bytes has no file name"),
        ({"paths": [None]}, "non-empty path"),
        ({"paths": "https://example.org/a.pdf"}, "a URL is not fetched"),
        ({"paths": [], "on_error": "ignore"}, "on_error"),
        ({"paths": [], "max_pixels": 0}, "max_pixels"),
        ({"paths": [], "max_pixels": True}, "max_pixels"),
        ({"paths": [], "max_pixels": 1e6}, "max_pixels"),
        ({"paths": [], "max_pixels": 10**12}, "max_pixels"),
        ({"paths": [], "password": b"geheim"}, "password: expected a string, got bytes"),
        ({"paths": [], "root": ""}, "non-empty path"),
    ],
)
def test_wrong_arguments_are_config_errors_at_once(arguments, text):
    with pytest.raises(ConfigError, match=text) as caught:
        load_pages(**arguments)
    assert "geheim" not in str(caught.value)
