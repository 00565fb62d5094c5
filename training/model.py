"""The tiny ColQwen3: its configuration, its weights and a batched forward for equal-sized images.

The modules are those of ``transformers.Qwen3VLModel``; the forward is written again without masks and for equal-sized
images, so that ``torch.compile`` makes it quick on a CPU.  ``python -m training.check_forward`` shows that both give
the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as fn
from transformers import Qwen3VLConfig, Qwen3VLModel

PATCH = 16
MERGE = 2
CELL = 8  # px; the auxiliary character head reads cells of 8 x 8 px
CELLS_PER_PATCH = (PATCH // CELL) ** 2
EMBED_DIM = 128
MATRYOSHKA_DIMS = (128, 64, 32)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
AUGMENTATION_PADS = 10


def build_config(
    vocab_size: int, special_ids: dict[str, int], hidden: int = 256, vision_hidden: int = 192, depth: int = 6
) -> Qwen3VLConfig:
    """Return the configuration of the tiny model for a vocabulary and the ids of its special tokens."""
    text = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 4,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
        "pad_token_id": special_ids["<|endoftext|>"],
        "bos_token_id": None,
        "eos_token_id": special_ids["<|im_end|>"],
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": depth,
        "hidden_size": vision_hidden,
        "intermediate_size": 4 * vision_hidden,
        "num_heads": vision_hidden // 32,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": hidden,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [depth // 2 - 1],
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=special_ids["<|image_pad|>"],
        video_token_id=special_ids["<|video_pad|>"],
        vision_start_token_id=special_ids["<|vision_start|>"],
        vision_end_token_id=special_ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class _Attention(torch.autograd.Function):
    """Attention that keeps its weights in the dtype of the values; on a CPU quicker to train through than flash."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        logits = torch.matmul(q * scale, k.transpose(-1, -2)).float()
        weights = torch.softmax(logits if mask is None else logits + mask, dim=-1).to(v.dtype)
        out = torch.matmul(weights, v)
        ctx.save_for_backward(q, k, v, weights, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, weights, out = ctx.saved_tensors
        grad = grad.to(weights.dtype)
        of_weights = torch.matmul(grad, v.transpose(-1, -2)).float()
        inner = (grad.float() * out.float()).sum(-1, keepdim=True)
        of_logits = (weights.float() * (of_weights - inner)).to(weights.dtype)
        of_q = torch.matmul(of_logits, k) * ctx.scale
        of_k = torch.matmul(of_logits.transpose(-1, -2), q) * ctx.scale
        return of_q, of_k, torch.matmul(weights.transpose(-1, -2), grad), None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    return _Attention.apply(q, k, v, scale, mask)


class TinyColQwen3(nn.Module):
    """Qwen3-VL trunk, projection with bias, and the character heads that exist during training only."""

    def __init__(self, config: Qwen3VLConfig, n_chars: int, embed_dim: int = EMBED_DIM) -> None:
        super().__init__()
        self.config = config
        self.vlm = Qwen3VLModel(config)
        hidden, vision_hidden = config.text_config.hidden_size, config.vision_config.hidden_size
        self.embedding_proj_layer = nn.Linear(hidden, embed_dim)
        self.n_chars = n_chars
        self.char_head = nn.Linear(vision_hidden, CELLS_PER_PATCH * n_chars)
        self.merged_char_head = nn.Linear(hidden, CELLS_PER_PATCH * MERGE**2 * n_chars)
        self.letter_head = nn.Linear(embed_dim, n_chars)  # shared by queries and pages, so that both sides meet
        self.logit_scale = nn.Parameter(torch.tensor(math.log(15.0)))
        self.maxsim_scale = nn.Parameter(torch.tensor(math.log(2.0)))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        visual = self.vlm.visual
        nn.init.trunc_normal_(visual.patch_embed.proj.weight, std=0.05)
        nn.init.normal_(self.vlm.language_model.embed_tokens.weight, std=0.5)
        nn.init.zeros_(visual.pos_embed.weight)  # pages come in all sizes: the rotary positions carry the place
        visual.pos_embed.weight.requires_grad_(False)
        for block in visual.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.linear_fc2.weight)
            self._look_at_neighbours(block.attn)
        for layer in self.vlm.language_model.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)

    @torch.no_grad()
    def _look_at_neighbours(self, attention: nn.Module, amplitude: float = 5.0, frequencies: int = 4) -> None:
        """Set query and key biases so that head ``i`` starts by attending to one neighbour of each patch.

        With rotary positions the product of a constant query and a constant key depends on the offset alone; rotating
        the key by an offset puts the peak there.  Without this the tower needs long to find out what is near.
        """
        inv_freq = self.vlm.visual.rotary_pos_emb.inv_freq
        offsets = ((0, -1), (0, 1), (0, 0), (-1, 0), (1, 0), None)
        heads, dim = attention.num_heads, attention.head_dim
        query, key, _ = attention.qkv.bias.view(3, heads, dim)
        n = len(inv_freq)
        use = torch.zeros(n)
        use[:frequencies] = amplitude
        for head in range(heads):
            offset = offsets[head % len(offsets)]
            if offset is None:
                continue
            angles = torch.cat([inv_freq * offset[0], inv_freq * offset[1]])
            strength = torch.cat([use, use])
            query[head] = torch.cat([strength, torch.zeros(2 * n)])
            # The query at p and the key at p + offset match when the key is rotated back by the offset.
            key[head] = torch.cat([strength * torch.cos(angles), -strength * torch.sin(angles)])

    # ---- vision -------------------------------------------------------------------------------------------------

    def patchify(self, images: Tensor) -> Tensor:
        """Turn ``(B, 3, H, W)`` pixels in [-1, 1] into ``(B, N, 3*16*16)`` patches in merge-block order."""
        b, c, h, w = images.shape
        x = images.reshape(b, c, h // 32, MERGE, PATCH, w // 32, MERGE, PATCH)
        return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)

    def _vision_rotary(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        rows, cols = torch.meshgrid(torch.arange(h // PATCH), torch.arange(w // PATCH), indexing="ij")
        order = (h // 32, MERGE, w // 32, MERGE)
        grid = torch.stack([g.reshape(order).transpose(1, 2).flatten() for g in (rows, cols)], dim=-1)
        return self.vlm.visual.rotary_pos_emb(grid, grid)

    def vision(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return patch states ``(B, N, C)``, merged tokens ``(B, N/4, H)`` and the deepstack features."""
        visual = self.vlm.visual
        b, _, h, w = images.shape
        weight = visual.patch_embed.proj.weight.sum(2).flatten(1)  # both frames of a still image are the same
        x = fn.linear(self.patchify(images), weight, visual.patch_embed.proj.bias).float()
        cos, sin = self._vision_rotary(h, w)
        n = x.shape[1]
        deepstack = []
        for index, block in enumerate(visual.blocks):
            attention = block.attn
            qkv = attention.qkv(block.norm1(x)).view(b, n, 3, attention.num_heads, attention.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            q, k = _rotate(q, cos.to(q.dtype), sin.to(q.dtype)), _rotate(k, cos.to(k.dtype), sin.to(k.dtype))
            out = _attend(q, k, v, attention.scaling)
            x = x + attention.proj(out.transpose(1, 2).reshape(b, n, -1))
            x = x + block.mlp(block.norm2(x))
            if index in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(index)]
                deepstack.append(merger(x.flatten(0, 1)))
        return x, visual.merger(x.flatten(0, 1)).view(b, n // MERGE**2, -1), deepstack

    # ---- embeddings ---------------------------------------------------------------------------------------------

    def text_rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the 3-D rotary positions ``(3, L)`` that all rows of a batch share."""
        return self.vlm.language_model.rotary_emb(torch.zeros(1), position_ids[:, None])

    def text(self, x: Tensor, cos: Tensor, sin: Tensor, deepstack: list[Tensor], start: int) -> Tensor:
        """The causal text trunk and the projection; deepstack features are added from position ``start``."""
        b, n, _ = x.shape
        causal = torch.full((n, n), float("-inf")).triu(1)
        trunk = self.vlm.language_model
        for index, layer in enumerate(trunk.layers):
            attention = layer.self_attn
            h = layer.input_layernorm(x)
            q, k, v = (
                proj(h).view(b, n, -1, attention.head_dim)
                for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = attention.q_norm(q.float()).transpose(1, 2), attention.k_norm(k.float()).transpose(1, 2)
            q, k = _rotate(q, cos, sin).to(v.dtype), _rotate(k, cos, sin).to(v.dtype)
            out = _attend(q, k, v.transpose(1, 2), attention.scaling, causal)
            x = x + attention.o_proj(out.transpose(1, 2).reshape(b, n, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if index < len(deepstack):
                features = deepstack[index].view(b, -1, x.shape[-1])
                x = x + fn.pad(features, (0, 0, start, n - start - features.shape[1]))
        return self.embedding_proj_layer(trunk.norm(x)).float()

    def embed_documents(
        self, images: Tensor, input_ids: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed equal-sized images: projections of all tokens (not normalised), patch states and merged tokens."""
        patches, merged, deepstack = self.vision(images)
        b = images.shape[0]
        mask = input_ids == self.config.image_token_id
        embeds = self.vlm.language_model.embed_tokens(input_ids).unsqueeze(0).expand(b, -1, -1)
        start, count = int(mask.nonzero()[0]), int(mask.sum())
        embeds = torch.cat([embeds[:, :start], merged.float(), embeds[:, start + count :]], dim=1)
        return self.text(embeds, *rotary, deepstack, start), patches, merged

    def embed_queries(self, input_ids: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Embed right-padded queries (no mask needed: the trunk is causal); projections, not normalised."""
        return self.text(self.vlm.language_model.embed_tokens(input_ids), *rotary, [], 0)

    def document_inputs(self, prefix: list[int], suffix: list[int], h: int, w: int) -> tuple[Tensor, Tensor]:
        """Token ids and 3-D positions of a document with one ``h`` x ``w`` px image."""
        count = (h // 32) * (w // 32)
        ids = torch.tensor([*prefix, *[self.config.image_token_id] * count, *suffix])
        grid = torch.tensor([[1, h // PATCH, w // PATCH]])
        types = (ids == self.config.image_token_id).int()
        positions, _ = self.vlm.get_rope_index(ids[None], mm_token_type_ids=types[None], image_grid_thw=grid)
        return ids, positions[:, 0]

    def shipped_state(self) -> dict[str, Tensor]:
        """The tensors that are shipped, under the names of the TomoroAI family, in float16."""
        state = {f"vlm.model.{name}": tensor for name, tensor in self.vlm.state_dict().items()}
        state["embedding_proj_layer.weight"] = self.embedding_proj_layer.weight
        state["embedding_proj_layer.bias"] = self.embedding_proj_layer.bias
        return {name: tensor.detach().to(torch.float16).contiguous().clone() for name, tensor in state.items()}
