"""The vector store, over an encoder without a model: what comes back, in which order, and what is refused."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.load import dumps
from PIL import Image

from colqwen3_retrievers import ColQwen3Encoder, Page, Query
from colqwen3_retrievers.errors import ConfigError, DimensionError, EncodeError, PageError, StoreError
from colqwen3_retrievers.langchain import ColQwen3Retriever, ColQwen3VectorStore, page_key_encoder
from tests.hashing import DIM, HashingEncoder, picture


def ids(documents: list[Document]) -> list[str | None]:
    return [document.id for document in documents]


def both(owner: Any, method: str, *args: Any, **options: Any) -> list[Any]:
    """What a method and its async twin return."""
    return [getattr(owner, method)(*args, **options), asyncio.run(getattr(owner, f"a{method}")(*args, **options))]


def png(path: Path, seed: int) -> Path:
    picture(seed).save(path)
    return path


def test_documents_come_back_word_for_word(store: ColQwen3VectorStore) -> None:
    metadatas: list[dict[str, Any]] = [
        {}, {"id": 7, "number": "x", "label": None, "text": [1], "sha256": "file", "page": "iv", "score": 3},
        {"source": 7, "page": 0, "citation": "Smith 2020", "nested": {"a": [{"b": None}]}, "relevance_score": 0.5},
        {"source": "a.pdf", "page": 12, "page_label": "12", "image": "https://example.com/preview.png"},
    ]  # fmt: skip
    added = [Document(f"  word{n} \n", metadata=metadata, id=f"d{n}") for n, metadata in enumerate(metadatas)]
    before = copy.deepcopy(added)
    assert store.add_documents(added) == ["d0", "d1", "d2", "d3"]
    assert added == before
    assert store.get_by_ids(["d3", "nobody", "d0", "d1", "d2"]) == [before[n] for n in (3, 0, 1, 2)]
    for n in range(4):
        assert store.similarity_search(f"word{n}", k=1) == [before[n]]


def test_a_text_that_begins_with_its_citation_comes_back_so(store: ColQwen3VectorStore) -> None:
    for content in ("Smith 2020\n\nwine", "Smith 2020", "Smith 2020\n\n", "Smith 2020 wine", "wine"):
        document = Document(content, metadata={"citation": "Smith 2020"}, id="x")
        store.add_documents([document])
        assert store.get_by_ids(["x"]) == [document]


def test_images_come_back_as_files_of_the_index(store: ColQwen3VectorStore, tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", 1)
    store.add_documents(
        [
            Document("", metadata={"image_path": str(path), "source": "a.pdf", "page": 4, "year": 2020}, id="x"),
            Document("The text.", metadata={"image": picture(2)}, id="y"),
        ]
    )
    path.unlink()
    first, second = store.get_by_ids(["x", "y"])
    for document, seed in ((first, 1), (second, 2)):
        assert Image.open(document.metadata.pop("image_path")).tobytes() == picture(seed).tobytes()
    assert first.page_content == "a.pdf, page 4 [x]"
    assert first.metadata == {"source": "a.pdf", "page": 4, "year": 2020, "citation": "a.pdf, page 4 [x]"}
    assert second == Document("The text.", metadata={}, id="y")
    assert ids(store.similarity_search(picture(2), k=1)) == ["y"]


def test_pages_of_the_index_and_documents_of_pages_are_the_same(
    store: ColQwen3VectorStore, tmp_path: Path, encoder: HashingEncoder
) -> None:
    page = Page(source="a.pdf", number=3, label="iii", image=picture(1), text="wine", metadata={"year": 2020})
    store.index.add(page)
    document = store.similarity_search("wine", k=1)[0]
    assert document.metadata["citation"] == "a.pdf, page 3 (iii)"
    assert "score" not in document.metadata
    before = list(encoder.encoded)
    assert store.add_documents([document]) == [page.id]
    assert store.index.get([page.id])[0].page.metadata == {"year": 2020, "file_name": "a.pdf"}
    assert encoder.encoded == before  # the same content is not encoded again
    scored = ColQwen3Retriever(index=store.index).invoke("wine")[0]
    store.add_documents([scored])
    assert store.get_by_ids([page.id]) == [document]


def test_add_images(store: ColQwen3VectorStore, tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", 1)
    assert store.add_images([path, str(path)]) == [f"{path}#page=1"] * 2
    made = store.add_images(
        [picture(2), path.read_bytes()],
        [{"source": "b.pdf", "page": 7, "page_label": "7", "year": 2021}, {}],
        ids=["b7", None],
        texts=["Rent rose.", ""],
    )
    assert made[0] == "b7"
    assert len(store.index) == 3
    document = store.similarity_search(picture(2), k=1)[0]
    assert document.page_content == "b.pdf, page 7 [b7]\n\nRent rose."
    assert (document.metadata["page"], document.metadata["year"]) == (7, 2021)
    assert asyncio.run(store.aadd_images([picture(3)], ids=["c"])) == ["c"]
    assert store.similarity_search(Query(image=picture(3)), k=1)[0].id == "c"


def test_every_way_of_asking_gives_the_order_of_maxsim(words: ColQwen3VectorStore, encoder: HashingEncoder) -> None:
    hits = words.index.search("wine cheese", 4)
    made = encoder.multi_vector("wine cheese", None)
    scored = [
        *both(words, "similarity_search_with_score", "wine cheese"),
        *both(words, "similarity_search_with_relevance_scores", "wine cheese"),
    ]
    ways = [
        *both(words, "similarity_search", "wine cheese"),
        *both(words, "similarity_search_by_vector", made),
        words.similarity_search_by_vector(made.vectors.tolist()),
        *([document for document, _ in pairs] for pairs in scored),
        *both(words, "max_marginal_relevance_search", "wine cheese", lambda_mult=1),
        words.search("wine cheese", "similarity"),
        *both(words.as_retriever(), "invoke", "wine cheese"),
    ]
    for documents in ways:
        assert ids(documents) == [hit.page.id for hit in hits]
        assert all("score" not in document.metadata for document in documents)
    for n, (_, score) in enumerate(scored[0]):
        assert score == scored[1][n][1] == pytest.approx(hits[n].score)
        assert scored[2][n][1] == scored[3][n][1] == pytest.approx((1 + hits[n].score / 2) / 2)
        assert type(scored[2][n][1]) is float
        assert 0 <= scored[2][n][1] <= 1


def test_a_threshold_is_inclusive_and_the_same_for_long_and_short_queries(words: ColQwen3VectorStore) -> None:
    exact = words.similarity_search_with_relevance_scores("wine", k=4)
    top = exact[0][1]
    assert top == pytest.approx(1, abs=1e-6)
    kept = words.similarity_search_with_relevance_scores("wine", k=4, score_threshold=exact[1][1])
    assert ids([document for document, _ in kept]) == ids([document for document, _ in exact[:2]])
    long = words.similarity_search_with_relevance_scores("wine wine wine wine", k=1)
    assert long[0][1] == pytest.approx(top, abs=1e-6)
    retriever = words.as_retriever(
        search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.95, "k": 4}
    )
    assert set(ids(retriever.invoke("wine"))) == set(ids(asyncio.run(retriever.ainvoke("wine")))) == {"rent", "wine"}


def test_mmr_passes_over_what_is_said_already(store: ColQwen3VectorStore) -> None:
    store.add_texts(
        ["wine red dry", "wine red dry", "wine white sweet", "bread"], ids=["one", "copy", "other", "bread"]
    )
    assert set(ids(store.similarity_search("wine red", k=2))) == {"one", "copy"}
    how = {"k": 2, "fetch_k": 3, "lambda_mult": 0.4}
    [asked] = store.index.encoder.submit_queries(["wine red"]).result()
    for chosen in (
        *both(store, "max_marginal_relevance_search", "wine red", **how),
        *both(store, "max_marginal_relevance_search_by_vector", asked, **how),
        *both(store.as_retriever(search_type="mmr", search_kwargs=how), "invoke", "wine red"),
    ):
        assert ids(chosen)[1] == "other"
        assert len(chosen) == 2
    assert "bread" in ids(store.max_marginal_relevance_search("wine red", k=3, fetch_k=4, lambda_mult=0))
    assert len(store.max_marginal_relevance_search("wine", k=9, fetch_k=1)) == 4  # never fewer for a small fetch_k


def test_sources_and_neighbours(words: ColQwen3VectorStore) -> None:
    best = words.similarity_search("wine", k=9, group_by="source")
    assert sorted(document.metadata["source"] for document in best) == ["a.pdf", "b.pdf"]
    found = words.similarity_search("tax", k=1, window=1)
    assert [(document.id, document.metadata.get("neighbour_of")) for document in found] == [
        ("tax", None), ("rent", "tax"),
    ]  # fmt: skip
    assert found == asyncio.run(words.asimilarity_search("tax", k=1, window=1))
    retriever = ColQwen3Retriever(index=words.index, k=1, window=1)
    for documents in (
        *both(retriever, "invoke", "tax"),
        *(answers[0] for answers in both(retriever, "batch", ["tax"])),
    ):
        assert ids(documents) == ["tax", "rent"]
        assert ["score" in document.metadata for document in documents] == [True, False]


def test_a_neighbour_is_listed_once_and_a_hit_is_no_neighbour(words: ColQwen3VectorStore) -> None:
    words.index.add([Page(source="a.pdf", number=n, text="filler") for n in (3, 4)])
    found = words.similarity_search("rent tax", k=2, window=2)
    assert [(document.id, document.metadata.get("neighbour_of")) for document in found] == [
        ("tax", None), ("a.pdf#page=3", "tax"), ("rent", None), ("a.pdf#page=4", "rent"),
    ]  # fmt: skip


def test_delete(words: ColQwen3VectorStore) -> None:
    assert words.delete(["tax", "nobody"]) is True
    assert words.delete(filter={"page": 1}) is True
    assert asyncio.run(words.adelete(["wine", "bread"], filter={"source": "b.pdf", "year": 2022})) is True
    assert words.index.ids() == ["bread"]
    for nothing in (lambda: words.delete(), lambda: words.delete(filter={})):
        with pytest.raises(ConfigError, match="all of them"):
            nothing()
    assert len(words.index) == 1


def test_the_same_id_overwrites(words: ColQwen3VectorStore, encoder: HashingEncoder) -> None:
    words.add_documents([Document("new words", metadata={"a": 1})], ids=["tax"])
    assert words.get_by_ids(["tax"]) == [Document("new words", metadata={"a": 1}, id="tax")]
    assert len(words.index) == 4
    count = len(encoder.encoded)
    words.add_documents([Document("new words", metadata={"a": 2})], ids=["tax"])
    assert words.get_by_ids(["tax"])[0].metadata == {"a": 2}
    assert len(encoder.encoded) == count  # only the metadata is new
    with pytest.raises(ConfigError, match="'x': given at 0 and, with another content, at 1"):
        words.add_texts(["one", "two"], ids=["x", "x"])
    with pytest.raises(ConfigError, match="'x': given at 0 and, with another content, at 1"):
        words.add_images([picture(1), picture(2)], ids=["x", "x"])
    assert words.get_by_ids(["x"]) == [], "nothing of such a call is kept"


def test_dates_are_kept_as_text_that_filters_compare(words: ColQwen3VectorStore) -> None:
    day, moment = date(2024, 5, 17), datetime(2024, 5, 18, 9, 30, tzinfo=UTC)
    words.add_texts(["x", "y"], [{"day": day, "nested": {"days": [day]}}, {"day": moment}], ids=["x", "y"])
    documents = words.get_by_ids(["x", "y"])
    assert [document.metadata for document in documents] == [
        {"day": "2024-05-17", "nested": {"days": ["2024-05-17"]}}, {"day": "2024-05-18T09:30:00+00:00"},
    ]  # fmt: skip
    later = words.similarity_search("x", k=9, filter={"day": {"$gte": "2024-05-18"}})
    assert [document.id for document in later] == ["y"]
    dated = Document("x", id="x", metadata={"day": day})
    assert page_key_encoder(dated) == page_key_encoder(Document("x", id="x", metadata={"day": "2024-05-17"}))
    with pytest.raises(ConfigError, match="document 0: metadata must be JSON values by name: 'size': a complex"):
        words.add_texts(["x"], [{"day": day, "size": 1j}])


def test_ids(store: ColQwen3VectorStore) -> None:
    made = store.add_documents([Document("a"), Document("b", id="own"), Document("c", id="own")], ids=[None, None, "x"])
    assert made[1:] == ["own", "x"]
    assert len(made[0]) == 36
    assert store.add_texts([]) == store.add_documents([]) == store.add_images([]) == []


def test_what_cannot_be_kept_is_refused_by_name(store: ColQwen3VectorStore, tmp_path: Path) -> None:
    for call, says in (
        (lambda: store.add_documents([Document("a"), Document(" ")]), "document 1: neither a text nor an image"),
        (lambda: store.add_documents([Document("a", metadata={"x": b"1"})]), "document 0: metadata must be JSON"),
        (lambda: store.add_documents([Document("a", metadata={"x": picture(1)})]), "document 0: metadata must be JSON"),
        (lambda: store.add_documents([Document("a", metadata={"x": float("nan")})]), "document 0: metadata must be"),
        (lambda: store.add_documents([Document("a", metadata={"image": "x.png"})]), "document 0: metadata..image"),
        (lambda: store.add_documents(Document("a")), "documents: expected a list"),
        (lambda: store.add_documents(["a"]), "documents: 0 is a str, expected a Document"),
        (lambda: store.add_documents([Document("a")], ids=["1", "2"]), "ids: 2 for 1 documents"),
        (lambda: store.add_documents([Document("a")], ids="1"), "ids: expected a list, got str"),
        (lambda: store.add_documents([Document("a")], ids=[7]), "ids: expected a non-empty text or None at 0, got 7"),
        (lambda: store.add_documents([Document("a")], id=["1"]), "id: unknown argument; known: ids, allow_remote"),
        (lambda: store.add_documents([Document("a")], batch_size=0), "batch_size"),
        (lambda: store.add_texts("abc"), "texts: expected a list"),
        (lambda: store.add_texts(["a", 7]), "texts: expected a text at 1, got int"),
        (lambda: store.add_texts(["a"], [{}, {}]), "metadatas: 2 for 1 texts"),
        (lambda: store.add_images("a.png"), "images: expected a list"),
        (lambda: store.add_images([picture(1)], ids=[]), "ids: 0 for 1 images"),
        (lambda: store.add_images([7]), "image 0: page .* an image is a PIL image"),
        (lambda: store.add_images([picture(1)], [{"page": 0}]), "image 0: .*expected a whole number from 1, got 0"),
        (lambda: store.add_images(["https://example.com/a.png"]), "not fetched"),
        (lambda: asyncio.run(store.aadd_texts(["a"], ids=["1", "2"])), "ids: 2 for 1 texts"),
        (lambda: store.similarity_search(" "), "query: give a text"),
        (lambda: store.similarity_search(7), "query: expected a text, a Query, an image"),
        (lambda: store.similarity_search("a", k=0), "k: expected a whole number from 1"),
        (lambda: store.similarity_search("a", filtre={"a": 1}), "filtre: unknown argument; known: k, filter"),
        (lambda: store.similarity_search_with_score("a", window=1), "window: unknown argument"),
        (lambda: store.similarity_search_with_relevance_scores("a", top=1), "top: unknown argument"),
        (lambda: store.max_marginal_relevance_search("a", lambda_mult=1.5), "lambda_mult: expected a number from 0"),
        (lambda: store.max_marginal_relevance_search("a", fetch_k=0), "fetch_k: expected a whole number from 1"),
        (lambda: store.similarity_search_by_vector([0.1] * DIM), r"embedding: expected shape \(n_tokens"),
        (lambda: store.similarity_search_by_vector(["x"]), "embedding: expected numbers"),
        (lambda: store.similarity_search_by_vector([[0.5] * DIM]), "expected unit rows"),
        (lambda: store.get_by_ids("abc"), "ids: expected a list of ids"),
        (lambda: asyncio.run(store.asimilarity_search("a", group_by="page")), "group_by"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            call()
    assert len(store.index) == 0
    with pytest.raises(PageError, match=r"gone\.png"):
        store.add_documents([Document("a", metadata={"image_path": str(tmp_path / "gone.png")})])
    with pytest.raises(EncodeError, match="page 'x'") as caught:
        store.add_texts(["a", "unreadable"], ids=["w", "x"])
    assert caught.value.index == 1
    store.add_texts(["a"])
    with pytest.raises(DimensionError):
        store.similarity_search_by_vector([[1.0, 0.0]])


def test_an_empty_store_answers_without_its_encoder(store: ColQwen3VectorStore, encoder: HashingEncoder) -> None:
    encoder.hold.clear()
    assert store.similarity_search("a") == asyncio.run(store.asimilarity_search("a")) == []
    assert store.similarity_search_with_relevance_scores("a") == store.max_marginal_relevance_search("a") == []
    encoder.hold.set()


def test_cancelling_a_search_leaves_the_loop_at_once(words: ColQwen3VectorStore, encoder: HashingEncoder) -> None:
    async def main() -> None:
        task = asyncio.create_task(words.asimilarity_search("wine"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 1)

    encoder.hold.clear()
    asyncio.run(main())
    encoder.hold.set()


def test_a_foreign_embeddings_is_refused(tmp_path: Path, store: ColQwen3VectorStore) -> None:
    foreign = DeterministicFakeEmbedding(size=8)
    for make in (
        lambda: ColQwen3VectorStore.from_texts(["a"], foreign, index=tmp_path / "new"),
        lambda: ColQwen3VectorStore.from_documents([Document("a")], foreign, index=store.index),
        lambda: asyncio.run(ColQwen3VectorStore.afrom_texts(["a"], foreign)),
        lambda: asyncio.run(ColQwen3VectorStore.afrom_documents([Document("a")], embedding=foreign)),
    ):
        with pytest.raises(ConfigError, match="embedding: DeterministicFakeEmbedding gives one vector a text"):
            make()
    assert not (tmp_path / "new").exists()
    assert len(store.index) == 0
    assert store.embeddings is None


def test_from_texts_and_from_documents(store: ColQwen3VectorStore) -> None:
    made = ColQwen3VectorStore.from_texts(["a", "b"], None, [{"n": 1}, {"n": 2}], ids=["1", "2"], index=store.index)
    assert made.index is store.index
    documents = [Document("c", id="3"), Document("d", metadata={"image": picture(1)})]
    asyncio.run(ColQwen3VectorStore.afrom_documents(documents, index=store.index))
    asyncio.run(ColQwen3VectorStore.afrom_texts(["e"], ids=["5"], index=store.index, batch_size=3))
    assert {"1", "2", "3", "5"} < set(store.index.ids())
    made.close()  # not its own
    assert len(store.index) == 5


def test_a_store_without_a_place_goes_when_it_goes(monkeypatch: pytest.MonkeyPatch, encoder: HashingEncoder) -> None:
    monkeypatch.setattr("colqwen3_retrievers.langchain.vector_store._encoder_of", lambda embedding: encoder)
    made = ColQwen3VectorStore.from_texts(["wine", "bread"])
    folder = Path(made.index.location)
    assert folder.exists()
    assert made.similarity_search("bread", k=1)[0].page_content == "bread"
    del made
    gc.collect()
    assert not folder.parent.exists()


def test_a_store_that_could_not_be_filled_is_closed(tmp_path: Path, encoder: HashingEncoder) -> None:
    folder = tmp_path / "index"
    ColQwen3VectorStore(folder, encoder).close()
    with pytest.raises(ConfigError, match="neither a text") as caught:
        ColQwen3VectorStore.from_texts([" "], index=folder)
    with ColQwen3VectorStore(folder, encoder) as store:  # nobody else holds it
        assert caught.value.__traceback__ is not None  # which keeps alive what it saw, were it not closed
        with pytest.raises(EncodeError):
            ColQwen3VectorStore.from_documents([Document("unreadable")], index=store.index)
        assert len(store.index) == 0  # what was handed in stays open


def test_places_and_modes(tmp_path: Path, encoder: HashingEncoder, words: ColQwen3VectorStore) -> None:
    reader = ColQwen3VectorStore(words.index.location, encoder, read_only=True)
    assert ids(reader.similarity_search("tax", k=1)) == ["tax"]
    with pytest.raises(StoreError, match="read_only"):
        reader.add_texts(["x"])
    reader.close()
    with pytest.raises(StoreError, match="closed"):
        reader.similarity_search("tax")
    assert words.similarity_search("tax", k=1)
    with pytest.raises(StoreError):
        ColQwen3VectorStore(tmp_path / "nothing-here")
    with pytest.raises(ConfigError, match="has its own"):
        ColQwen3VectorStore(words.index, ColQwen3Encoder("tiny"))
    with pytest.raises(ConfigError, match="index: expected a PageIndex or its folder, got NoneType"):
        ColQwen3VectorStore(None)


def test_copies_share_and_json_tells_the_place_only(words: ColQwen3VectorStore) -> None:
    assert copy.deepcopy(words) is words
    retriever = words.as_retriever(search_kwargs={"k": 1})
    assert copy.deepcopy(retriever).vectorstore.index is words.index
    assert repr(words) == f"ColQwen3VectorStore(PageIndex({words.index.location!r}))"
    assert json.loads(dumps(words))["type"] == "not_implemented"
