"""The tool for agents: what a model is shown of the nodes any retriever finds."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ImageBlock, TextBlock
from llama_index.core.schema import (
    BaseNode,
    ImageNode,
    MediaResource,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index.core.tools import ToolMetadata, ToolOutput
from PIL import Image

from colqwen3_retrievers.errors import ConfigError
from colqwen3_retrievers.llama_index import ColQwen3Reranker, PageRetrieverTool, node_from_hit
from colqwen3_retrievers.pages.page import Hit, Page
from tests.frameworks.page_folder import base64_of


class Given(BaseRetriever):
    """Finds what it was given, and keeps what it was asked."""

    def __init__(self, *nodes: BaseNode) -> None:
        super().__init__()
        self.nodes = [NodeWithScore(node=node, score=1.0) for node in nodes]
        self.asked: list[str] = []

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self.asked.append(query_bundle.query_str)
        return self.nodes


def page_node(file: Path) -> BaseNode:
    return node_from_hit(Hit(Page(source="a.pdf", number=3, label="iii", image=file, text="Revenue."), 1.0)).node


def told(output: ToolOutput) -> list[str | bytes]:
    return [block.text if isinstance(block, TextBlock) else block.resolve_image().read()  # type: ignore[union-attr]
            for block in output.blocks]  # fmt: skip


def test_each_page_is_its_name_and_its_picture(file: Path) -> None:
    retriever = Given(page_node(file), TextNode(id_="t", text="Costs fell."))
    output = PageRetrieverTool.from_defaults(retriever).call(input="what was the revenue?")
    assert told(output) == [
        "[1] page: 3, source: a.pdf, page_label: iii", file.read_bytes(), "[2] t\n\nCosts fell.",
    ]  # fmt: skip
    assert isinstance(output.blocks[1], ImageBlock)
    assert output.blocks[1].image_mimetype == "image/png"
    assert retriever.asked == ["what was the revenue?"]
    assert (output.raw_input, output.tool_name, output.is_error) == (
        {"input": "what was the revenue?"}, "search_pages", False,
    )  # fmt: skip
    assert [found.node_id for found in output.raw_output] == ["a.pdf#page=3", "t"]
    assert "a.pdf" in output.content, "who reads texts only can cite the page too"
    assert told(asyncio.run(PageRetrieverTool(retriever).acall(input="x"))) == told(output)


def test_pictures_of_any_carrier_are_shown(file: Path) -> None:
    data = base64_of(file)
    output = PageRetrieverTool(
        Given(
            ImageNode(id_="a", image=data),
            ImageNode(id_="b", image_url=f"data:image/png;base64,{data}"),
            Node(id_="c", image_resource=MediaResource(data=file.read_bytes())),
        )
    ).call("x")
    assert told(output) == [part for name in ("[1] a", "[2] b", "[3] c") for part in (name, file.read_bytes())]


def test_pictures_that_cannot_be_had_leave_name_and_text(tmp_path: Path) -> None:
    output = PageRetrieverTool(
        Given(
            ImageNode(id_="remote", image_url="https://example.org/a.png", text="Revenue rose."),
            ImageNode(id_="gone", image_path=str(tmp_path / "gone.png")),
            ImageNode(id_="broken", image=base64.b64encode(b"no picture").decode()),
        )
    ).call("x")
    assert told(output) == ["[1] remote\n\nRevenue rose.", "[2] gone", "[3] broken"]


def test_pictures_that_chat_models_do_not_read_are_sent_as_png(image: Image.Image, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "a.tif")
    image.save(tmp_path / "b.png", exif=turned)
    nodes = [ImageNode(id_=name, image_path=str(tmp_path / name)) for name in ("a.tif", "b.png")]
    _, first, _, second = PageRetrieverTool(Given(*nodes)).call("x").blocks
    for block, expected in ((first, image), (second, image.transpose(Image.Transpose.ROTATE_270))):
        assert isinstance(block, ImageBlock)
        shown = Image.open(block.resolve_image())
        assert (shown.format, block.image_mimetype) == ("PNG", "image/png")
        assert np.array_equal(np.asarray(shown), np.asarray(expected))


def test_no_more_pictures_than_asked_for(file: Path) -> None:
    retriever = Given(page_node(file), ImageNode(id_="b", image_path=str(file), text="Text of b."))
    assert told(PageRetrieverTool(retriever, max_images=1).call("x"))[2:] == ["[2] b\n\nText of b."]
    assert not any(isinstance(part, bytes) for part in told(PageRetrieverTool(retriever, max_images=0).call("x")))


def test_nothing_found_is_said() -> None:
    assert told(PageRetrieverTool(Given()).call("x")) == ["No page was found."]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_postprocessors_rank_before_pictures_are_taken(file: Path, asynchronous: bool) -> None:
    class Reversed(ColQwen3Reranker):
        """Turns the order round, and loads nothing."""

        def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: Any = None) -> list[NodeWithScore]:
            assert query_bundle.query_str == "x"
            return nodes[::-1]

        async def _apostprocess_nodes(
            self, nodes: list[NodeWithScore], query_bundle: Any = None
        ) -> list[NodeWithScore]:
            return self._postprocess_nodes(nodes, query_bundle)

    tool = PageRetrieverTool.from_defaults(
        Given(TextNode(id_="a", text="1"), TextNode(id_="b", text="2")), node_postprocessors=[Reversed()]
    )
    output = asyncio.run(tool.acall("x")) if asynchronous else tool.call("x")
    assert told(output) == ["[1] b\n\n2", "[2] a\n\n1"]


def test_a_model_can_read_what_it_is_for() -> None:
    tool = PageRetrieverTool.from_defaults(Given(), name="reports", description="Looks into reports.")
    schema = tool.metadata.to_openai_tool()["function"]
    assert (schema["name"], schema["description"]) == ("reports", "Looks into reports.")
    assert (list(schema["parameters"]["properties"]), schema["parameters"]["required"]) == (["input"], ["input"])
    assert PageRetrieverTool(Given(), ToolMetadata("d", "n")).metadata.name == "n"


@pytest.mark.parametrize("question", ["", "  ", None, 3])
def test_an_empty_question_is_refused(question: Any) -> None:
    tool = PageRetrieverTool(Given())
    with pytest.raises(ConfigError, match=r"^input: "):
        tool.call(question)
    with pytest.raises(ConfigError, match=r"^input: "):
        asyncio.run(tool.acall(question))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("index",), "retriever"), ((Given(), None, None, -1), "max_images"), ((Given(), None, None, True), "max_images")],
)
def test_a_bad_argument_is_named(arguments: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}: "):
        PageRetrieverTool(*arguments[:3], max_images=arguments[3] if len(arguments) > 3 else None)
