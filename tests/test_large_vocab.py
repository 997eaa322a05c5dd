"""Large vocabularies: one chunk of logits at a time, and the memory that this leaves."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from exact.worlds import make_process
from helpers import ROOT
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmmd_backbones.mlp import MLP
from dmmd_core import (
    Batch,
    Draws,
    NetworkDenoiser,
    Prediction,
    Rows,
    ShapedDenoiser,
    rows_with_loss,
    sum_over_rows,
)
from dmmd_generators.noise_conditioned import NoiseConditioned
from dmmd_objectives.denoising import Denoising
from dmmd_objectives.moment_matching import MomentMatching
from dmmd_samplers.ancestral import Ancestral

VOCAB, LENGTH, WIDTH, CHUNK = 97, 10, 8, 5
ELBO = {"loss": "posterior_kl", "weight": "elbo", "parametrization": "leave_one_out"}
PROCESSES = {"masked": ("masked", {}), "uniform": ("uniform", {}), "uniform_elbo": ("uniform", ELBO)}


class Live(TorchDispatchMode):
    """Watches the memory of the results of all operations, by whoever holds them: Python, autograd or a cache."""

    def __init__(self, counts: Callable[[Tensor], bool] = lambda tensor: True) -> None:
        super().__init__()
        self._counts = counts
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for tensor in tree_leaves(result):
            # Views and what is written in place have been counted before, or are parameters.
            if isinstance(tensor, Tensor) and self._counts(tensor) and tensor.untyped_storage()._cdata not in given:
                storage = StorageWeakRef(tensor.untyped_storage())
                self._storages[storage.cdata] = (storage, tensor.untyped_storage().nbytes())
                self.largest = max(self.largest, tensor.numel())
        if self.bytes_alive() > self.peak_bytes:
            self.peak_bytes = self.bytes_alive()
        return result

    def bytes_alive(self) -> int:
        """Bytes of all results that are still held."""
        self._storages = {key: one for key, one in self._storages.items() if not one[0].expired()}
        return sum(size for _, size in self._storages.values())


def _is_logits(tensor: Tensor) -> bool:
    """Rows over the vocabulary, but not the head's weight, which has as many columns as the features."""
    return tensor.ndim == 2 and tensor.shape[1] == VOCAB and tensor.shape[0] != WIDTH


class Headed(MLP):
    """A small network that tells what is alive when its head is called."""

    def __init__(self, num_inputs: int) -> None:
        config = MLP.Config(width=16, depth=1, embedding_width=WIDTH)
        super().__init__(config, num_inputs=num_inputs, vocab_size=VOCAB, length=LENGTH)
        self.live: Live | None = None
        self.alive_at_head: list[int] = []

    def head(self, features: Tensor) -> Tensor:
        if self.live is not None:
            self.alive_at_head.append(self.live.bytes_alive())
        return super().head(features)


def _watch(live: Live, *networks: Headed) -> None:
    for network in networks:
        network.live = live


def _turn(name: str, chunk: int, batch: int, turn: tuple[str, ...], target: str) -> tuple[Live, Headed, Headed]:
    kind, params = PROCESSES[name]
    process = make_process(kind, VOCAB, **params)
    torch.manual_seed(0)
    student, teacher, auxiliary = (Headed(process.num_inputs) for _ in range(3))
    generator = NoiseConditioned(
        NoiseConditioned.Config(width=2), backbone=student, process=process, length=LENGTH, grid=None
    )
    game = MomentMatching(
        MomentMatching.Config(auxiliary_target=target, chunk_rows=chunk, top_p=0.9, temperature=0.8),  # type: ignore[arg-type]
        process=process, network=generator, teacher=NetworkDenoiser(teacher, process).requires_grad_(False),
        copy_teacher=lambda: NetworkDenoiser(auxiliary, process), num_steps=4,
    )  # fmt: skip
    # Enough rows to draw and enough with a loss, whatever the process.
    game.draw_times = lambda draws, shape=(): tuple(torch.full((batch,), time).double() for time in (0.6, 0.95))  # type: ignore[method-assign, assignment, return-value]
    draws = Draws.for_range(0, 0, 0, batch)
    tokens = draws.integers("tokens", VOCAB, (LENGTH,))
    with Live(_is_logits) as live:
        _watch(live, student, teacher, auxiliary)
        losses = game.loss(turn, Batch(tokens), draws).by_player
        torch.stack(list(losses.values())).sum().backward()
    return live, student, teacher


@pytest.mark.parametrize("turn", [("student",), ("auxiliary",), ("student", "auxiliary")], ids="-".join)
@pytest.mark.parametrize(
    ("name", "target"),
    [("masked", "hard"), ("masked", "soft"), ("masked", "posterior"), ("uniform", "hard"), ("uniform", "posterior"),
     ("uniform_elbo", "hard")],
)  # fmt: skip
def test_no_more_than_one_chunk_of_logits_is_ever_alive(name: str, target: str, turn: tuple[str, ...]) -> None:
    """Teacher's, auxiliary's and student's, in the draw, in the loss, while shaping and in the backward pass."""
    live, student, teacher = _turn(name, CHUNK, 4, turn, target)
    assert live.largest == CHUNK * VOCAB
    # The teacher's head is the first of a chunk: when it is called, nothing is left of the chunk before.
    assert len(teacher.alive_at_head) > 2
    assert set(teacher.alive_at_head) == {0}
    # So is the student's where x is drawn; in the loss it is the last.
    drawn = len(student.alive_at_head) - len(teacher.alive_at_head)
    assert drawn > 2
    assert set(student.alive_at_head[:drawn]) == {0}
    # And so twice as many rows need no more.
    assert _turn(name, CHUNK, 8, turn, target)[0].peak_bytes == live.peak_bytes
    plain, *_ = _turn(name, 0, 4, turn, target)
    assert plain.largest > 2 * CHUNK * VOCAB, "without chunks there is more, or this test sees nothing"
    assert plain.peak_bytes > 2 * live.peak_bytes


@pytest.mark.parametrize("target", ["data", "teacher"])
def test_denoising_keeps_one_chunk_of_logits(target: str) -> None:
    peaks = []
    for batch in (4, 8):
        process = make_process("uniform", VOCAB)
        network, teacher = (Headed(process.num_inputs) for _ in range(2))
        game = Denoising(
            Denoising.Config(target=target, chunk_rows=CHUNK),  # type: ignore[arg-type]
            process=process, network=NetworkDenoiser(network, process), teacher=NetworkDenoiser(teacher, process),
        )  # fmt: skip
        draws = Draws.for_range(0, 0, 0, batch)
        batch_of = Batch(draws.integers("tokens", VOCAB, (LENGTH,)))
        with Live(_is_logits) as live:
            _watch(live, network, teacher)
            game.loss(("network",), batch_of, draws).by_player["network"].backward()
        assert live.largest == CHUNK * VOCAB
        first = network if target == "data" else teacher
        assert first.alive_at_head == [0] * (batch * LENGTH // CHUNK)
        peaks.append(live.peak_bytes)
    assert peaks[0] == peaks[1]


def test_losses_that_share_a_graph_keep_one_chunk_of_logits() -> None:
    process = make_process("uniform", VOCAB)
    network = Headed(process.num_inputs)
    z, s = torch.zeros(4, LENGTH, dtype=torch.int64), torch.full((4,), 0.5)

    def row_loss(rows: Rows, part: Prediction) -> list[Tensor]:
        log_probs = part.log_probs()
        return [log_probs.exp().square().sum(-1), log_probs.square().sum(-1)]

    with Live(_is_logits) as live:
        prediction = NetworkDenoiser(network, process)(z, s)
        _watch(live, network)
        sum_over_rows(rows_with_loss(process, z, s), row_loss, CHUNK, [prediction]).sum().backward()
    assert network.alive_at_head == [0] * (4 * LENGTH // CHUNK)


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_sampling_keeps_one_chunk_of_logits(name: str) -> None:
    process = make_process(name, VOCAB)
    network = Headed(process.num_inputs)
    sampler = Ancestral(Ancestral.Config(chunk_rows=CHUNK, top_p=0.9), process=process, length=LENGTH)
    shaped = ShapedDenoiser(NetworkDenoiser(network, process), temperature=0.8, top_p=0.9)
    with Live(_is_logits) as live:
        _watch(live, network)
        sampler.sample(shaped, Draws.for_range(0, 0, 0, 6), num_steps=3)
    assert live.largest == CHUNK * VOCAB
    assert len(network.alive_at_head) > 6 * LENGTH // CHUNK
    assert set(network.alive_at_head) == {0}


# ---- memory of a whole turn ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("large_vocab", ROOT / "benchmarks" / "large_vocab.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The benchmark at a small size; the head's weight, whose gradient no chunk makes smaller, is half of all logits.
SMALL = {"vocab_size": 3000, "length": 64, "width": 32, "depth": 1, "chunk_rows": 2, "device": "cpu"}


def test_a_turn_in_chunks_needs_memory_for_the_heads_gradient_and_little_more(benchmark: ModuleType) -> None:
    peaks = {}
    for kind in ("features", "plain", "chunked"):
        turn = benchmark.make_turn(argparse.Namespace(**SMALL), kind)
        with Live() as live:
            turn(0)
            turn(1)
        peaks[kind] = live.peak_bytes
    above = {kind: peaks[kind] - peaks["features"] for kind in ("plain", "chunked")}
    row = 4 * 3000
    assert above["plain"] > 4 * 64 * row
    assert 0 < above["chunked"] <= (32 + 8 * 2) * row
    assert above["chunked"] <= above["plain"] / 6


@pytest.mark.gpu
def test_a_turn_in_chunks_needs_a_sixth_of_the_memory_on_a_gpu(benchmark: ModuleType) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    peaks = {}
    for kind in ("features", "plain", "chunked"):
        options = {**SMALL, "vocab_size": 12_000, "length": 512, "width": 64, "chunk_rows": 16, "device": "cuda"}
        turn = benchmark.make_turn(argparse.Namespace(**options), kind)
        turn(0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        turn(1)
        peaks[kind] = torch.cuda.max_memory_allocated() - before
    above = {kind: peaks[kind] - peaks["features"] for kind in ("plain", "chunked")}
    assert 0 < above["chunked"] <= above["plain"] / 6
