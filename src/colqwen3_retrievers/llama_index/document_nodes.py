"""Nodes cut from documents, under ids by which the same document finds them again."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Collection, Sequence

from llama_index.core.schema import BaseNode, RelatedNodeType


def with_steady_ids(nodes: Sequence[BaseNode], documents: Collection[str]) -> list[BaseNode]:
    """Name the nodes of documents by document and place, where they have random ids only.

    Splitters draw a new UUID for every piece each time, so that a document cut again is a stranger to its own pieces.
    What they say of each other (previous, next, parent) follows. An id that someone chose stays.

    Args:
        nodes: what the transformations made; left as they are.
        documents: ids of the documents it was made of; nodes of others keep their ids.

    Returns:
        Copies, in order, with ids such as ``d#text=2``.

    >>> from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
    >>> of_d = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="d")}
    >>> pieces = [TextNode(text="a", relationships=of_d), TextNode(id_="mine", text="b", relationships=of_d)]
    >>> [node.node_id for node in with_steady_ids(pieces, ["d"])]
    ['d#text=1', 'mine']
    """
    places: Counter[str] = Counter()
    names: dict[str, str] = {}
    for node in nodes:
        document = node.ref_doc_id
        if document is None or document not in documents:
            continue
        places[document] += 1
        if _is_random(node.node_id) and node.node_id != document:
            names[node.node_id] = f"{document}#text={places[document]}"
    return [
        node.model_copy(
            update={
                "id_": names.get(node.node_id, node.node_id),
                "relationships": {kind: _renamed(known, names) for kind, known in node.relationships.items()},
            }
        )
        for node in nodes
    ]


def _renamed(known: RelatedNodeType, names: dict[str, str]) -> RelatedNodeType:
    if isinstance(known, list):
        return [info.model_copy(update={"node_id": names.get(info.node_id, info.node_id)}) for info in known]
    return known.model_copy(update={"node_id": names.get(known.node_id, known.node_id)})


def _is_random(id_: str) -> bool:
    try:
        return uuid.UUID(id_).version == 4
    except ValueError:
        return False
