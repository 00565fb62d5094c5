"""Train the tiny ColQwen3: ``python -m training.train --work /tmp/tiny-run`` runs all stages and can be resumed."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from .data import collate, coloured, shards
from .losses import character_loss, letter_loss, letters_of_cells, order_cells, positives, retrieval_losses
from .model import MATRYOSHKA_DIMS, SPECIAL_TOKENS, TinyColQwen3, build_config
from .pages import CHAR_INDEX, N_CHARS
from .stages import ORDER, STAGES, Size, Stage
from .tokenizer import train_tokenizer

IMAGE_PREFIX = "<|im_start|>user\n<|vision_start|>"
IMAGE_SUFFIX = "<|vision_end|>Describe the image.<|im_end|><|endoftext|>"
SAVE_EVERY_S = 240
EMA_DECAY = 0.99


class Trainer:
    """Model, optimisers, averaged weights and the log of one training run."""

    def __init__(self, work: Path, compiled: bool = True) -> None:
        torch.manual_seed(0)
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = train_tokenizer()
        special = {t: self.tokenizer.token_to_id(t) for t in SPECIAL_TOKENS}
        self.pad_id = special["<|endoftext|>"]
        self.prefix = self.tokenizer.encode(IMAGE_PREFIX).ids
        self.suffix = self.tokenizer.encode(IMAGE_SUFFIX).ids
        self.model = TinyColQwen3(build_config(self.tokenizer.get_vocab_size(), special), N_CHARS)
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # one graph for each page size
            self.model.vision = torch.compile(self.model.vision, dynamic=False)
            self.model.text = torch.compile(self.model.text, dynamic=False)
        matrices, others = [], []
        for name, parameter in self.model.named_parameters():
            inner = name.startswith("vlm.") and parameter.ndim == 2 and "embed" not in name
            if parameter.requires_grad:
                (matrices if inner else others).append(parameter)
        self.trained: list[nn.Parameter] = matrices + others
        self.muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
        self.average = [p.detach().clone() for p in self.trained]
        self.limit_s: float | None = None
        self.documents: dict[Size, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        self.bank: list[tuple[Tensor, Tensor]] = []
        self.step, self.seconds = 0, 0.0
        self.position = {"stage": ORDER[0], "step": 0, "shard": 0}
        self.piece_letters = torch.zeros(self.tokenizer.get_vocab_size(), N_CHARS)
        for index in range(self.tokenizer.get_vocab_size() - len(SPECIAL_TOKENS)):
            for char in self.tokenizer.decode([index]):
                if char in CHAR_INDEX:
                    self.piece_letters[index, CHAR_INDEX[char]] = 1.0
        self.blank = torch.ones(N_CHARS)
        self.blank[0] = 0.25

    # ---- state --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write everything that a later call needs to go on."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "position": dict(self.position),
        }
        torch.save(state, self.work / "state.part")
        (self.work / "state.part").rename(self.work / "state.pt")

    def load(self, path: Path) -> None:
        """Go on from a saved state."""
        state = torch.load(path, weights_only=True)
        missing = self.model.load_state_dict(state["model"], strict=False).missing_keys
        if missing:
            self.log({"new tensors, fresh optimisers": missing})
            self.step, self.seconds, self.position = state["step"], state["seconds"], state["position"]
            self.average = [p.detach().clone() for p in self.trained]
            return
        self.average = state["average"]
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.seconds, self.position = state["step"], state["seconds"], state["position"]

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged weights into the model (for export)."""
        for parameter, average in zip(self.trained, self.average, strict=True):
            parameter.copy_(average)

    def log(self, record: dict[str, object]) -> None:
        """Append a line to the log and print it."""
        line = json.dumps(record)
        with (self.work / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    # ---- training -----------------------------------------------------------------------------------------------

    def losses(self, shard: dict, rows: slice, stage: Stage, generator: torch.Generator) -> dict[str, Tensor]:
        """All losses of one batch."""
        model = self.model
        images = coloured(torch.from_numpy(shard["ink"][rows]), generator)
        cells = order_cells(torch.from_numpy(shard["cells"][rows]).long())
        batch = collate(shard, rows, stage.pads, self.pad_id, stage.query_length + stage.pads)
        size = stage.size(self.position["shard"])
        ids, rotary = self.inputs(size)
        with torch.autocast("cpu", torch.bfloat16):
            documents, patches, merged = model.embed_documents(images, ids, rotary)
            patch_logits = model.char_head(patches)
            merged_logits = model.merged_char_head(merged)
            queries = model.embed_queries(batch.ids, self.query_rotary)
        out = {
            "char": character_loss(patch_logits, cells, self.blank),
            "merged": character_loss(merged_logits, cells, self.blank),
        }
        start = len(self.prefix)
        visual = documents[:, start : start + cells.shape[1]]
        page_letters = letters_of_cells(cells, N_CHARS)
        inked = 0.1 + 0.9 * page_letters.any(-1)
        out["letters"] = letter_loss(model.letter_head, visual, page_letters, inked) + letter_loss(
            model.letter_head, queries, self.piece_letters[batch.ids], batch.piece.float()
        )
        shown = positives(batch, size.height // 32, size.width // 32)
        scale, maxsim_scale = model.logit_scale.exp().clamp(max=60.0), model.maxsim_scale.exp()
        dims = MATRYOSHKA_DIMS[:1]
        if stage.nested_every and self.step % stage.nested_every == 0:
            dims = (MATRYOSHKA_DIMS[0], MATRYOSHKA_DIMS[1 + self.step // stage.nested_every % 2])
        out.update(retrieval_losses(queries, documents, batch, shown, start, scale, maxsim_scale, dims, self.bank))
        if stage.bank:
            self.bank = [*self.bank, (documents.detach().to(torch.bfloat16), batch.printed)][-stage.bank :]
        out["total"] = (
            stage.char_weight * out["char"]
            + stage.merged_weight * out["merged"]
            + stage.align_weight * (out["align"] + 0.5 * out["back"])
            + stage.letter_weight * out["letters"]
            + stage.maxsim_weight * out["maxsim"]
        )
        return out

    def inputs(self, size: Size) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Token ids and rotary positions of the documents of a size."""
        if size not in self.documents:
            ids, positions = self.model.document_inputs(self.prefix, self.suffix, size.height, size.width)
            self.documents[size] = ids, self.model.text_rotary(positions)
        return self.documents[size]

    def progress(self, stage: Stage, began: float) -> float:
        """How much of a stage is done in [0, 1]: by its steps, or by the time left where the last stage has a limit."""
        done = self.position["step"] / stage.steps
        if self.limit_s is not None and stage.name == ORDER[-1]:
            done = max(done, (time.perf_counter() - began) / self.limit_s)
        return min(done, 1.0)

    def learning_rate(self, stage: Stage, progress: float) -> float:
        """Warm up in the first steps of the run, then go from the stage's first to its last rate."""
        warm = min(1.0, (self.step + 1) / 150)
        return warm * (stage.lr + (stage.last_lr - stage.lr) * progress)

    def run_stage(self, stage: Stage) -> None:
        """Train one stage from where it was left."""
        folder = self.work / "pool"
        first = self.position["shard"]
        for old in folder.glob("*.npz"):
            old.unlink()
        command = [sys.executable, "-m", "training.pool", "--stage", stage.name, "--out", str(folder)]
        pool = subprocess.Popen(["nice", "-n", "15", *command, "--first", str(first)])
        self.bank = []
        self.query_rotary = self.model.text_rotary(torch.arange(stage.query_length + stage.pads).expand(3, -1))
        generator = torch.Generator().manual_seed(1000 + self.step)
        stage_began = time.perf_counter()
        means: dict[str, float] = {}
        count, began, saved = 0, time.perf_counter(), time.perf_counter()
        self.model.train()
        for number, shard in shards(stage, folder, first):
            self.position["shard"] = number
            batch = stage.size(number).batch
            for start in range(0, stage.shard_steps * batch, batch):
                if pool.poll() is not None:
                    raise RuntimeError("the page pool has ended")
                done = self.progress(stage, stage_began)
                rate = self.learning_rate(stage, done)
                for group in (*self.muon.param_groups, *self.adam.param_groups):
                    group["lr"] = rate * 1e-3
                out = self.losses(shard, slice(start, start + batch), stage, generator)
                out["total"].backward()
                norm = nn.utils.clip_grad_norm_(self.trained, 5.0)
                if not math.isfinite(float(norm)):
                    self.log({"step": self.step, "skipped": "gradient is not finite"})
                else:
                    self.muon.step()
                    self.adam.step()
                self.muon.zero_grad()
                self.adam.zero_grad()
                decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
                torch._foreach_lerp_(self.average, [p.detach() for p in self.trained], 1 - decay)
                self.step += 1
                self.position["step"] += 1
                for name, value in out.items():
                    means[name] = means.get(name, 0.0) + float(value.detach())
                count += 1
                if count == 25:
                    now = time.perf_counter()
                    self.seconds += now - began
                    record = {name: round(value / count, 4) for name, value in means.items()}
                    self.log(
                        {
                            "step": self.step,
                            "stage": stage.name,
                            "s": round(self.seconds),
                            **record,
                            "scale": round(float(self.model.logit_scale.detach().exp()), 1),
                            "norm": round(float(norm), 2),
                            "mscale": round(float(self.model.maxsim_scale.detach().exp()), 2),
                            "lr": round(rate, 3),
                            "step_s": round((now - began) / count, 3),
                        }
                    )
                    means, count, began = {}, 0, time.perf_counter()
                if self.progress(stage, stage_began) >= 1.0:
                    break
            self.position["shard"] = number + 1
            if time.perf_counter() - saved > SAVE_EVERY_S:
                self.save()
                saved = time.perf_counter()
            if self.progress(stage, stage_began) >= 1.0:
                break
        pool.terminate()
        pool.wait()

    def run(self) -> None:
        """Run all stages that are left."""
        for index in range(ORDER.index(self.position["stage"]), len(ORDER)):
            stage = STAGES[ORDER[index]]
            if self.position["stage"] != stage.name:
                self.position = {"stage": stage.name, "step": 0, "shard": 0}
            if self.position["step"] < stage.steps:
                self.run_stage(stage)
            self.save()
            state = self.work / "state.pt"
            (self.work / f"after-{stage.name}.pt").write_bytes(state.read_bytes())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the run: state, log and pages")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--limit-s", type=float, help="seconds for the last stage; its rate falls with the time left")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args.work, compiled=not args.no_compile)
    trainer.limit_s = args.limit_s
    if args.resume:
        trainer.load(args.work / "state.pt")
    trainer.run()


if __name__ == "__main__":
    main()
