"""A server that answers as vLLM does, or misbehaves on purpose: over real sockets, on loopback.

Good answers come from the torch engine over a checkpoint, in vLLM's wire format (as vLLM 0.32 writes it); what it does
with pictures and templates is what vLLM was seen to do. Faults are asked for one by one, and met by the next requests::

    with FaultServer(checkpoint.folder) as server:
        server.fault("429", retry_after=1)
"""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from colqwen3_retrievers.engines.torch.engine import TorchEngine
from colqwen3_retrievers.errors import EngineError
from colqwen3_retrievers.models.checkpoint import open_checkpoint
from colqwen3_retrievers.models.rendering import EncoderInput, VisualSpan, fit_size
from colqwen3_retrievers.models.tokenizer import PromptTokenizer

VISION = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass
class Seen:
    """A request it has seen."""

    path: str
    n_inputs: int
    bytes_in: int
    bytes_out: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class FaultServer:
    """Serves a checkpoint.

    Args:
        folder: the checkpoint, or ``"tiny"``.
        api_key: asked of clients.
        trusted: whether a chat template sent along is taken.
        template: the served one: ``"whole"`` leaves a text with a placeholder as it is, ``"turn"`` writes the family's
            prompt around a picture and its text, ``"stock"`` is Qwen3-VL's own.
        max_pixels: beyond which it resizes.
        name: of the model.
        max_model_len: as it tells.
        with_bias: whether the projection's bias is added.
        delay: seconds each good answer of ``/pooling`` takes.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        api_key: str | None = None,
        trusted: bool = True,
        template: str = "whole",
        max_pixels: int = 16_777_216,
        min_pixels: int = 1024,
        name: str = "served",
        max_model_len: int = 4096,
        with_bias: bool = True,
        family: str | None = None,
        delay: float = 0.0,
    ) -> None:
        self.checkpoint = open_checkpoint(folder, family=family)
        self.engine = TorchEngine(self.checkpoint, device="cpu", dtype="float32")
        if not with_bias:
            self.engine._model.projection.bias = None
        self.tokenizer = PromptTokenizer(self.checkpoint.folder, model="served")
        self.api_key, self.trusted, self.template, self.name = api_key, trusted, template, name
        self.max_pixels, self.min_pixels, self.max_model_len, self.delay = max_pixels, min_pixels, max_model_len, delay
        self.seen: list[Seen] = []
        self.active = self.most_active = 0
        self.port = 0
        self._faults: deque[tuple[str, float]] = deque()
        self._lock = threading.Lock()
        self._compute = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._http: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault(self, kind: str, times: int = 1, *, retry_after: float = -1.0) -> None:
        """Let the next requests that are not checks of ``/v1/models`` meet a fault."""
        with self._lock:
            self._faults.extend([(kind, retry_after)] * times)

    def clear(self) -> None:
        """Behave from now on."""
        with self._lock:
            self._faults.clear()

    def pooled(self) -> list[Seen]:
        """The ``/pooling`` requests it has seen."""
        return [one for one in self.seen if one.path == "/pooling"]

    def start(self) -> Self:
        owner = self

        class Handler(_Handler):
            server_state = owner

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # broken pipes are the point

        self._http = Server(("127.0.0.1", self.port), Handler)
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Vanish as a killed process does: nobody listens, and every connection is reset."""
        if self._http is None:
            return
        self._http.shutdown()
        self._http.server_close()
        self._http = None
        with self._lock:
            connections, self._connections = self._connections, set()
        for connection in connections:
            reset(connection)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- what vLLM does ------------------------------------------------------------------------------------------------

    def inputs_of(self, asked: dict[str, Any]) -> list[EncoderInput]:
        if "input" in asked:
            return [_text(np.asarray(ids, dtype=np.int64)) for ids in asked["input"]]
        if asked.get("chat_template") is not None and not self.trusted:
            raise RefusedError(400, "Chat template is passed, but --trust-request-chat-template is not set.")
        (message,) = asked["messages"]
        return [self.item_of(message["content"], whole=asked.get("chat_template") is not None)]

    def item_of(self, parts: list[dict[str, Any]], *, whole: bool) -> EncoderInput:
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        images = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        if not whole and not (self.template == "whole" and "<|image_pad|>" in text):
            shown = VISION * len(images)
            if self.template == "turn":
                family = self.checkpoint.family.image
                head, tail = family.partition("{visual}")[0], family.partition("{text}")[2]
                text = head + shown + text + tail
            else:
                text = f"<|im_start|>user\n{shown}{text}<|im_end|>\n"
        ids = self.tokenizer.encode(text).ids
        if not images:
            return _text(np.asarray(ids, dtype=np.int64))
        head, _, data = images[0].partition(",")
        assert head == "data:image/png;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")
        size = fit_size(*picture.size, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC) if size != picture.size else picture)
        rows, cols = pixels.shape[0] // 32, pixels.shape[1] // 32
        pad = self.tokenizer.id_of("<|image_pad|>")
        at = ids.index(pad)
        expanded = np.asarray(ids[:at] + [pad] * (rows * cols) + ids[at + 1 :], dtype=np.int64)
        return EncoderInput(
            False, text, expanded, slice(0, 0), spans=(VisualSpan(at, rows, cols),), pixels=pixels[None]
        )

    def embed(self, items: list[EncoderInput]) -> list[np.ndarray]:
        with self._compute:
            found = self.engine.embed(items)
        return [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in found]

    def scored(self, asked: dict[str, Any], query: Any, documents: list[Any]) -> tuple[list[float], int]:
        items = []
        for one in (query, *documents):
            if isinstance(one, str):
                items.append(_text(np.asarray(self.tokenizer.encode(one).ids, dtype=np.int64)))
            else:
                items.append(self.item_of(one["content"], whole=True))
        rows = self.embed(items)
        scores = [float((rows[0] @ one.T).max(axis=1).sum()) for one in rows[1:]]
        return scores, sum(len(item) for item in items)


class RefusedError(Exception):
    """What it answers with an error's status."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: FaultServer

    def setup(self) -> None:
        super().setup()
        with self.server_state._lock:
            self.server_state._connections.add(self.connection)

    def finish(self) -> None:
        with self.server_state._lock:
            self.server_state._connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        state = self.server_state
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        seen = Seen(self.path, 0, len(body), headers=dict(self.headers.items()))
        fault = ("", -1.0)
        with state._lock:
            state.seen.append(seen)
            state.active += 1
            state.most_active = max(state.active, state.most_active)
            if self.path != "/v1/models" and state._faults:
                fault = state._faults.popleft()
        try:
            if state.api_key is not None and self.headers.get("Authorization") != f"Bearer {state.api_key}":
                raise RefusedError(401, "Unauthorized")
            if fault[0].isdigit():
                more = {"Retry-After": f"{fault[1]:g}"} if fault[1] >= 0 else {}
                more.update({"Location": "http://127.0.0.1:1/elsewhere"} if fault[0].startswith("3") else {})
                quoted = self.headers.get("Authorization", "")
                raise RefusedError(int(fault[0]), f"fault {fault[0]} for {quoted}", more)
            headers, content = self.good(json.loads(body) if body else {}, seen)
            self.misbehave(fault[0], headers, content, seen)
        except RefusedError as exc:
            self.refuse(exc)
        except (EngineError, ValueError, IndexError) as exc:  # as vLLM does when a prompt and its pictures do not fit
            self.refuse(RefusedError(500, str(exc)))
        finally:
            with state._lock:
                state.active -= 1

    def refuse(self, exc: RefusedError) -> None:
        content = json.dumps({"error": {"message": str(exc), "code": exc.status}}).encode()
        self.send(exc.status, {"Content-Type": "application/json", **exc.headers}, content)

    def good(self, asked: dict[str, Any], seen: Seen) -> tuple[dict[str, str], bytes]:
        state = self.server_state
        if self.path == "/v1/models":
            model = {"id": state.name, "object": "model", "max_model_len": state.max_model_len}
            return {"Content-Type": "application/json"}, json.dumps({"object": "list", "data": [model]}).encode()
        if asked.get("model") != state.name:
            raise RefusedError(404, f"The model `{asked.get('model')}` does not exist.")
        if self.path in ("/score", "/rerank"):
            documents = asked["documents"]
            scores, tokens = state.scored(asked, asked["queries" if self.path == "/score" else "query"], documents)
            seen.n_inputs = len(documents)
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            if self.path == "/score":
                items = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
                return {"Content-Type": "application/json"}, json.dumps({"data": items, "usage": usage}).encode()
            ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
            results = [{"index": i, "document": {}, "relevance_score": scores[i]} for i in ranked]
            return {"Content-Type": "application/json"}, json.dumps({"results": results, "usage": usage}).encode()
        if self.path != "/pooling":
            raise RefusedError(404, "Not Found")
        items = state.inputs_of(asked)
        seen.n_inputs = len(items)
        if max(map(len, items)) > state.max_model_len:
            raise RefusedError(400, "This model's maximum context length is exceeded.")
        rows = state.embed(items)
        time.sleep(state.delay)
        return pooling_answer(rows, asked["embed_dtype"])

    def misbehave(self, fault: str, headers: dict[str, str], body: bytes, seen: Seen) -> None:
        if fault in ("close", "reset", "hang"):
            if fault == "hang":
                time.sleep(30)
            if fault == "reset":
                reset(self.connection)
            self.close_connection = True
            return
        if fault in _EDITS:
            headers, body = _EDITS[fault](dict(headers), body)
        seen.bytes_out = len(body) + sum(len(key) + len(value) + 4 for key, value in headers.items())
        if fault == "truncated":
            self.head(200, {**headers, "Content-Length": str(len(body))})
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault in ("drip", "header drip"):
            head = b"HTTP/1.1 200 OK\r\nX-Filler: " if fault == "header drip" else None
            if head is None:
                self.head(200, {**headers, "Content-Length": str(len(body))})
            for byte in (head or b"") + b"a" * 10_000:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.03)
        elif fault == "endless":
            self.head(200, {**headers, "Transfer-Encoding": "chunked"})
            chunk = b"10000\r\n" + b"\0" * 65_536 + b"\r\n"
            for _ in range(4096):
                self.wfile.write(chunk)
        else:
            self.send(200, headers, body)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.head(status, {**headers, "Content-Length": str(len(body))})
        self.wfile.write(body)


def pooling_answer(rows: list[np.ndarray], dtype: str) -> tuple[dict[str, str], bytes]:
    """vLLM's answer of ``encoding_format="bytes"``."""
    items, parts, at = [], [], 0
    for index, one in enumerate(rows):
        part = one.astype(f"<f{2 if dtype == 'float16' else 4}").tobytes()
        items.append(
            {
                "index": index, "embed_dtype": dtype, "endianness": "little", "start": at, "end": at + len(part),
                "shape": list(one.shape),
            }
        )  # fmt: skip
        at += len(part)
        parts.append(part)
    return {"Content-Type": "application/octet-stream", "metadata": json.dumps({"data": items})}, b"".join(parts)


def reset(connection: socket.socket) -> None:
    """Break a connection off as a killed process's kernel does."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    connection.close()


def _text(ids: np.ndarray) -> EncoderInput:
    return EncoderInput(True, "", ids, slice(0, len(ids)))


def _edited(headers: dict[str, str], **changes: Any) -> dict[str, str]:
    told = json.loads(headers["metadata"])
    told["data"][0].update(changes)
    return {**headers, "metadata": json.dumps(told)}


def _rows_short(headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
    (item,) = json.loads(headers["metadata"])["data"]
    n, dim = item["shape"]
    end = item["end"] // n * (n - 1)
    return _edited(headers, shape=[n - 1, dim], end=end), body[:end]


def _half_the_dim(headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
    (item,) = json.loads(headers["metadata"])["data"]
    n, dim = item["shape"]
    end = item["end"] // 2
    return _edited(headers, shape=[n, dim // 2], end=end), body[:end]


def _nan(headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
    return headers, b"\xff\xff\xff\xff" + body[4:]


_EDITS = {
    "rows short": _rows_short,
    "half the dim": _half_the_dim,
    "nan": _nan,
    "body short": lambda headers, body: (headers, body[:-8]),
    "body long": lambda headers, body: (headers, body + b"\0" * 8),
    "garbage": lambda headers, body: ({**headers, "metadata": "<html>"}, body),
    "no header": lambda headers, body: ({key: value for key, value in headers.items() if key != "metadata"}, body),
    "two inputs": lambda headers, body: (
        {**headers, "metadata": json.dumps({"data": json.loads(headers["metadata"])["data"] * 2})}, body,
    ),
    "negative": lambda headers, body: (_edited(headers, start=-8), body),
    "shape of words": lambda headers, body: (_edited(headers, shape=["a", "b"]), body),
}  # fmt: skip
