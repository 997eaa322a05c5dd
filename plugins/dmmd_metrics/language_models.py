"""Reference language models: a small one trained on the training split, and any of `transformers`."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmmd_core import (
    CheckpointError,
    Codec,
    Data,
    FieldError,
    LanguageModel,
    RunError,
    hub_problem,
    option,
    show_progress,
)
from dmmd_core.checkpoint import load_tensors, load_weights, save_tensors, verify_directory, write_directory


class CausalTransformer(nn.Module):
    """Pre-norm causal transformer with learned positions; the token before the first is a start id.

    Args:
        vocab_size: Number of tokens.
        length: Longest sequence.
        width: Width of the residual stream.
        depth: Number of blocks.
        heads: Attention heads.
    """

    def __init__(self, vocab_size: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.start, self.heads = vocab_size, heads
        self.tokens = nn.Embedding(vocab_size + 1, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.mix = nn.Conv1d(width, width, 3, groups=width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "feed": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every token given those before it: int64 ``[n, length]`` to ``[n, length, vocab]``."""
        start = torch.full_like(tokens[:, :1], self.start)
        x = self.tokens(torch.cat((start, tokens[:, :-1]), 1)) + self.positions[: tokens.shape[1]]
        # A causal convolution over three tokens: short contexts need no attention.
        x = x + self.mix(nn.functional.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
        for block in self.blocks:
            query, key, value = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in block["qkv"](block["norm1"](x)).chunk(3, -1)
            )
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + block["out"](mixed.transpose(1, 2).flatten(2))
            x = x + block["feed"](block["norm2"](x))
        logits: Tensor = self.head(self.norm(x))
        return logits


class Trained(LanguageModel):
    """A small causal transformer trained on the training split, kept in the run's cache by its fingerprint."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        width: int = option(128, help="width of the residual stream", minimum=8)
        depth: int = option(3, help="number of blocks", minimum=1)
        heads: int = option(4, help="attention heads; must divide width", minimum=1)
        steps: int = option(1500, help="training steps", minimum=1)
        batch_size: int = option(64, help="sequences per step", minimum=1)
        learning_rate: float = option(2e-3, help="peak learning rate of AdamW, falling to zero on a cosine", above=0)
        weight_decay: float = option(0.1, help="decoupled weight decay", minimum=0)
        seed: int = option(0, help="seed of weights and batches", minimum=0)

        def __post_init__(self) -> None:
            """Check sizes against each other."""
            if self.width % self.heads:
                raise FieldError("heads", f"must divide width {self.width}, got {self.heads}")

    def __init__(
        self,
        config: Trained.Config,
        *,
        data: Data,
        codec: Codec,
        vocab_size: int,
        length: int,
        cache_directory: Path | None,
    ) -> None:
        self.config = config
        self.data = data
        self.codec = codec
        self.cache_directory = cache_directory
        self.sizes = (vocab_size, length, config.width, config.depth, config.heads)
        self.held_out = math.nan

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`."""
        return type(config)(**{**vars(config), "width": 16, "depth": 1, "heads": 2, "steps": min(config.steps, 10)})

    def prepare(self) -> dict[str, float]:
        """See `LanguageModel.prepare`; trains only where the cache holds no whole model of this fingerprint."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.module = CausalTransformer(*self.sizes)
        folder = self.cache_directory and self.cache_directory / f"language_model-{self._fingerprint()}"
        if folder is None or not self._load(folder):
            self._train()
            if folder is not None:
                folder.parent.mkdir(parents=True, exist_ok=True)
                write_directory(folder, lambda path: save_tensors(path / "model.safetensors", self.module.state_dict()))
        self.module.eval().requires_grad_(True)
        self.held_out = self._held_out()
        return {"language_model_test_nats_per_token": self.held_out}

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `LanguageModel.losses`."""
        per_token = nn.functional.cross_entropy(self.module(tokens).transpose(1, 2), tokens, reduction="none")
        return per_token.sum(1), torch.full(tokens.shape[:1], tokens.shape[1], device=tokens.device)

    @property
    def reference_name(self) -> str:
        """See `LanguageModel.reference_name`."""
        config = self.config
        return f"causal transformer {config.width}x{config.depth}, {config.steps} steps on train, float32"

    def _train(self) -> None:
        config, size = self.config, self.data.size("train")
        optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
        )
        warmup = min(100, config.steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / config.steps)),
        )
        generator = torch.Generator().manual_seed(config.seed)
        self.module.train().requires_grad_(True)
        for _ in show_progress(range(config.steps), "reference language model", total=config.steps):
            rows = torch.randint(size, (config.batch_size,), generator=generator)
            losses, counts = self.losses(self.data.take("train", rows).tokens)
            optimizer.zero_grad(set_to_none=True)
            (losses.sum() / counts.sum()).backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            optimizer.step()
            schedule.step()

    def _load(self, folder: Path) -> bool:
        try:
            verify_directory(folder)
            load_weights(self.module, load_tensors(folder / "model.safetensors"), str(folder))
        except CheckpointError:
            return False  # never written, or damaged: trained again
        return True

    @torch.no_grad()
    def _held_out(self) -> float:
        count = min(1000, self.data.size("test"))
        total = tokens = 0.0
        for rows in torch.arange(count).split(100):
            losses, counts = self.losses(self.data.take("test", rows).tokens)
            total, tokens = total + float(losses.sum()), tokens + float(counts.sum())
        return total / tokens

    def _fingerprint(self) -> str:
        size = self.data.size("train")
        seen = self.data.take("train", torch.linspace(0, size - 1, min(size, 1000)).long()).tokens
        parts = [vars(self.config), self.sizes, self.codec.fingerprint(), size]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        digest.update(seen.numpy().tobytes())
        return digest.hexdigest()[:16]


class TransformersCausal(LanguageModel):
    """Any causal language model of `transformers`, by local path or hub name; safetensors only, no remote code."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        path: str = option(help="a folder, or a name on the hub, for example gpt2-large")
        revision: str | None = option(None, help="revision on the hub")
        same_tokens: bool = option(
            False, help="the data's tokens are the model's own; otherwise text is decoded and tokenised again"
        )
        max_length: int = option(1024, help="most tokens of the model per sequence", minimum=2)

    def __init__(self, config: TransformersCausal.Config, *, codec: Codec, vocab_size: int) -> None:
        self.config = config
        self.codec = codec
        self.vocab_size = vocab_size
        self._tokenizer: Any = None

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a model out of reach before anything is trained."""
        problem = hub_problem(config.path, "config.json", revision=config.revision)
        if problem:
            raise FieldError("path", problem)

    def prepare(self) -> dict[str, float]:
        """See `LanguageModel.prepare`.

        Raises:
            RunError: The model cannot be loaded, or has another vocabulary than ``same_tokens`` says.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path, revision = self.config.path, self.config.revision
        try:
            self.module = AutoModelForCausalLM.from_pretrained(
                path, revision=revision, use_safetensors=True, dtype=torch.float32
            ).eval()
            if not self.config.same_tokens:
                self._tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        except Exception as error:  # the library raises whatever its network and file layers raise
            reason = (str(error).splitlines() or [""])[0]
            raise RunError(
                f"language model {path!r} cannot be loaded ({type(error).__name__}: {reason}); give a folder on this "
                "machine, or a name on the hub with the hub within reach"
            ) from error
        size = int(self.module.config.vocab_size)
        if self.config.same_tokens and size < self.vocab_size:
            raise RunError(
                f"language model {path!r} has {size} tokens, the data {self.vocab_size}; they cannot be the same "
                "tokens, "
                "set same_tokens to false"
            )
        if not self.config.same_tokens and self.codec.media != "text":
            raise RunError(f"language model {path!r} reads text, but the data's codec gives {self.codec.media}")
        return {}

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `LanguageModel.losses`; the first token of the model is context and not scored."""
        if self.config.same_tokens:
            ids, mask = tokens[:, : self.config.max_length], torch.ones_like(tokens[:, : self.config.max_length])
        else:
            if self._tokenizer.pad_token is None:
                self._tokenizer.pad_token = self._tokenizer.eos_token
            encoded = self._tokenizer(
                list(self.codec.decode(tokens)), return_tensors="pt", padding=True, truncation=True,
                max_length=self.config.max_length,
            )  # fmt: skip
            ids, mask = encoded["input_ids"], encoded["attention_mask"]
        logits = self.module(input_ids=ids, attention_mask=mask).logits[:, :-1]
        per_token = nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        weight = mask[:, 1:].to(per_token.dtype)
        return (per_token * weight).sum(1), mask[:, 1:].sum(1)

    @property
    def reference_name(self) -> str:
        """See `LanguageModel.reference_name`."""
        return f"{self.config.path}, float32"
