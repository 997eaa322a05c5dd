"""Masked language models of `transformers` as teachers: any `AutoModelForMaskedLM`, local or from the hub.

A masked language model that was trained at all masking rates is a masked diffusion model (Sahoo et al.,
arXiv:2406.07524; Nie et al., LLaDA, arXiv:2502.09992): its logits at [MASK] are E[x | z_t].
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmmd_core import (
    Codec,
    Condition,
    Data,
    Denoiser,
    FieldError,
    Prediction,
    Process,
    Requirement,
    RunError,
    Teacher,
    TextCodec,
    hub_problem,
    option,
    per_position,
)

_AUTO_CLASSES = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")
_COMPARED = 32
_PROBES = ("The quick brown fox jumps over the lazy dog.", "Two  spaces, a tab\tand 3.14!", "naïve café")


class _MaskedPrediction(Prediction):
    """Logits of the whole batch; rows become log-probabilities when somebody asks.

    Args:
        process: Turns logits into the clean mean.
        logits: ``[batch, length, vocab]``.
        z_t: Noisy tokens, int64 ``[batch, length]``.
        t: Times.
        mask_id: The model's [MASK] where that is one of the clean tokens: it is never a prediction.
    """

    def __init__(self, process: Process, logits: Tensor, z_t: Tensor, t: Tensor, mask_id: int | None) -> None:
        self._process = process
        self._logits = logits.flatten(0, 1)
        self._z = z_t.flatten()
        self._t = per_position(t, z_t).flatten()
        self._mask_id = mask_id
        self.num_rows, self.vocab_size = self._logits.shape

    def log_probs(self, rows: Tensor | None = None) -> Tensor:
        """See `Prediction.log_probs`."""
        logits, z, t = self._logits, self._z, self._t
        if rows is not None:
            logits, z, t = logits[rows], z[rows], t[rows]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._mask_id is not None:
            logits = logits.index_fill(-1, torch.tensor([self._mask_id], device=logits.device), -torch.inf)
        return self._process.clean_log_probs(logits, z, t)


class MaskedLanguageModel(Denoiser):
    """A masked language model read as a denoiser of the masked process.

    Args:
        module: The model: ``input_ids [batch, length]`` to ``.logits [batch, length, tokens]``.
        process: The masked process.
        mask_id: The model's [MASK].
    """

    def __init__(self, module: nn.Module, process: Process, mask_id: int) -> None:
        super().__init__()
        self.module = module
        self.process = process
        self.mask_id = mask_id
        # Models of MDLM's kind are told the noise level, -log alpha_t per sample.
        self.takes_noise_level = "timesteps" in inspect.signature(module.forward).parameters

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        """See `Denoiser.forward`."""
        if latent is not None:
            raise ValueError("this denoiser takes no latent; use a generator with input noise")
        size = self.process.vocab_size
        more = {}
        if self.takes_noise_level:
            latest = per_position(t, z_t).amax(-1)
            more["timesteps"] = -self.process.alpha(latest).clamp_min(1e-4).log().float()
        output = self.module(input_ids=torch.where(z_t == size, self.mask_id, z_t), **more)
        logits = getattr(output, "logits", output if isinstance(output, Tensor) else None)
        if logits is None or logits.shape[:2] != z_t.shape or logits.shape[-1] < size:
            shape = None if logits is None else list(logits.shape)
            raise RunError(
                f"the model gives logits {shape} for tokens {list(z_t.shape)}; expected a number for each of the "
                f"data's {size} tokens at every position"
            )
        never = self.mask_id if self.mask_id < size else None
        return _MaskedPrediction(self.process, logits[..., :size], z_t, t, never)


class TransformersMasked(Teacher):
    """A masked language model of `transformers`; safetensors only, and no code of strangers unless it is asked for.

    It has no weights for the recipe's backbone: give ``distill.initialize``, which trains the networks on its outputs.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        path: str = option(help="a folder, or a name on the hub, for example google-bert/bert-base-uncased")
        revision: str | None = option(None, help="revision on the hub")
        mask_id: int | None = option(
            None, help="id of [MASK] in the model; by default what its tokenizer or config says", minimum=0
        )
        tokens: Literal["checked", "unchecked"] = option(
            "checked", help="compare the data's tokenizer with the model's; unchecked where the model has none"
        )
        dtype: Literal["float32", "bfloat16"] = option("float32", help="dtype of the weights")
        remote_code: str | None = option(
            None, help="for models that bring their own code, which then runs here: the words 'run the code of PATH'"
        )

        def __post_init__(self) -> None:
            """The permission must name the model."""
            if self.remote_code is not None and self.remote_code != self.words:
                raise FieldError("remote_code", f"must be {self.words!r}, or left out, got {self.remote_code!r}")

        @property
        def words(self) -> str:
            """The permission to run the model's own code."""
            return f"run the code of {self.path}"

    def __init__(
        self, config: TransformersMasked.Config, *, process: Process, data: Data, codec: Codec, length: int
    ) -> None:
        self.config = config
        self.process = process
        self.data = data
        self.codec = codec
        self.length = length

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        needs = [Requirement("process", "masks", "to speak with a model that knows [MASK] and no other noise")]
        if config.tokens == "checked":
            needs.append(Requirement("data", "text", "to compare tokenizers", "tokens"))
        return needs

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a model out of reach, and one that needs code of its own without the permission."""
        problem = hub_problem(config.path, "config.json", revision=config.revision)
        if problem:
            raise FieldError("path", problem)
        described = _described(config.path, config.revision)
        if "auto_map" in described and config.remote_code is None:
            from transformers import CONFIG_MAPPING

            if described.get("model_type") not in CONFIG_MAPPING:
                raise FieldError(
                    "remote_code",
                    f"{config.path!r} is no model of transformers but brings its own code; read it and, if you trust "
                    f"it, write remote_code: {config.words!r}",
                )

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`; the smoke data speak other tokens."""
        return type(config)(**{**vars(config), "tokens": "unchecked"})

    def denoiser(self) -> Denoiser:
        """See `Teacher.denoiser`.

        Raises:
            RunError: The model cannot be loaded, lacks weights, has no [MASK], speaks other tokens than the data, or
                does not give logits for them.
        """
        module, described = self._load()
        checked = self.config.tokens == "checked"
        has_tokenizer = hub_problem(self.config.path, "tokenizer_config.json", revision=self.config.revision) is None
        tokenizer = self._tokenizer() if checked or has_tokenizer else None
        mask_id = self._mask_id(described, tokenizer, module)
        if checked:
            self._compare(tokenizer)
            self._refuse_mask_in_data(mask_id)
        denoiser = MaskedLanguageModel(module, self.process, mask_id)
        probe = torch.full((1, self.length), self.process.vocab_size)
        try:
            with torch.no_grad():
                finite = bool(denoiser(probe, torch.ones(1)).log_probs().exp().isfinite().all())
        except (IndexError, RuntimeError, ValueError) as error:
            raise RunError(f"{self._name} cannot take {self.length} tokens ({_first_line(error)})") from error
        if not finite:
            raise RunError(f"{self._name} gives logits that are not finite")
        return denoiser

    @property
    def _name(self) -> str:
        return f"teacher {self.config.path!r}"

    def _load(self) -> tuple[nn.Module, Any]:
        import transformers

        config = self.config
        trusted = config.remote_code is not None
        name = _AUTO_CLASSES[0]
        try:
            described = transformers.AutoConfig.from_pretrained(
                config.path, revision=config.revision, trust_remote_code=trusted
            )
            if trusted:
                offered = getattr(described, "auto_map", None) or {}
                name = next((one for one in _AUTO_CLASSES if one in offered), name)
            module, told = getattr(transformers, name).from_pretrained(
                config.path,
                revision=config.revision,
                trust_remote_code=trusted,
                use_safetensors=True,
                dtype=getattr(torch, config.dtype),
                output_loading_info=True,
            )
        except Exception as error:  # the library raises whatever its network and file layers raise
            raise RunError(f"{self._name} cannot be loaded ({_first_line(error)})") from error
        missing = sorted(told["missing_keys"]) + sorted(str(key) for key in told["mismatched_keys"])
        if missing:
            raise RunError(
                f"{self._name} lacks weights that a masked language model needs: {', '.join(missing[:4])}; give one "
                "that was saved with its head"
            )
        return module.eval().requires_grad_(False), described

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.config.path,
                revision=self.config.revision,
                trust_remote_code=self.config.remote_code is not None,
            )
        except Exception as error:  # as above
            raise RunError(
                f"the tokenizer of {self._name} cannot be loaded ({_first_line(error)}); where it has none, and the "
                "data's tokens are its own, set tokens: unchecked"
            ) from error

    def _mask_id(self, described: Any, tokenizer: Any, module: Any) -> int:
        own = None if tokenizer is None else tokenizer.mask_token_id
        if own is None:
            own = getattr(described, "mask_token_id", None)
        chosen = own if self.config.mask_id is None else self.config.mask_id
        if chosen is None:
            raise RunError(f"{self._name} names no [MASK]; set mask_id")
        if own is not None and chosen != own:
            raise RunError(f"{self._name} has [MASK] {own}, but mask_id is {chosen}; leave mask_id out")
        known = module.get_input_embeddings().num_embeddings
        if chosen >= known:
            raise RunError(f"{self._name} knows {known} input ids, [MASK] {chosen} is none of them; set mask_id")
        return int(chosen)

    def _compare(self, tokenizer: Any) -> None:
        assert isinstance(self.codec, TextCodec)  # refused by `requires`
        if len(tokenizer) != self.codec.vocab_size:
            raise RunError(
                f"{self._name} speaks {len(tokenizer)} tokens, the data {self.codec.vocab_size}; give the data the "
                f"model's tokenizer: name: pretrained, path: {self.config.path}, vocab_size: {len(tokenizer)}"
            )
        rows = torch.arange(min(_COMPARED, self.data.size("train")))
        texts = [*_PROBES, *self.codec.decode(self.data.take("train", rows).tokens)]
        for text, ours in zip(texts, self.codec.encode_texts(texts), strict=True):
            theirs = tokenizer(text, add_special_tokens=False)["input_ids"]
            if list(ours) != list(theirs):
                raise RunError(
                    f"{self._name} speaks other tokens than the data: {text[:40]!r} begins with {list(theirs)[:6]} in "
                    f"the model's tokens and with {[int(token) for token in ours[:6]]} in the data's; give the data "
                    "the model's tokenizer"
                )

    def _refuse_mask_in_data(self, mask_id: int) -> None:
        rows = torch.arange(min(1000, self.data.size("train")))
        if bool((self.data.take("train", rows).tokens == mask_id).any()):
            raise RunError(f"the data contain the model's [MASK], token {mask_id}, which must stand for noise alone")


def _described(path: str, revision: str | None) -> dict[str, Any]:
    """The model's config.json, where it is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    file: Any = Path(path) / "config.json"
    if not file.is_file():
        file = try_to_load_from_cache(path, "config.json", revision=revision)
    if not isinstance(file, str | Path):
        return {}
    try:
        content: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError:
        return {}  # whoever loads it will say what is wrong
    return content


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
