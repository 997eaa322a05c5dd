"""Teacher training: the loss by plain loops, on denoisers whose logits are free parameters."""

from __future__ import annotations

import math

import pytest
import torch
from worlds import Free, make_process

from dmmd_core import Batch, Draws
from dmmd_objectives.denoising import Denoising

VOCAB, LENGTH, BATCH = 4, 3, 32


def _inputs(batch: int = BATCH) -> tuple[Batch, Draws]:
    draws = Draws.for_range(0, 0, 0, batch)
    return Batch(draws.integers("tokens", VOCAB, (LENGTH,))), draws


@pytest.mark.parametrize(("name", "params"), [("masked", {}), ("masked", {"weight": "elbo"}), ("uniform", {})], ids=str)
@pytest.mark.parametrize("target", ["data", "teacher"])
@pytest.mark.parametrize("chunk", [0, 7])
def test_loss_is_the_mean_cross_entropy_over_all_positions(
    name: str, params: dict[str, object], target: str, chunk: int
) -> None:
    process = make_process(name, VOCAB, **params)
    network, teacher = Free(process, LENGTH, 0), Free(process, LENGTH, 1)
    config = Denoising.Config(target=target, chunk_rows=chunk)  # type: ignore[arg-type]
    batch, draws = _inputs()
    loss = Denoising(config, process=process, network=network, teacher=teacher).loss(("network",), batch, draws)
    ((z_t, t, _),) = network.calls
    total = 0.0
    for b in range(BATCH):
        weight = 1 / float(t[b]) if params else 1.0  # linear schedule: -alpha' / (1 - alpha) = 1 / t
        for position in range(LENGTH):
            z = int(z_t[b, position])
            if name == "masked" and z != VOCAB:
                continue
            log_probs = network.logits[position, z].detach().log_softmax(-1)
            clean = torch.nn.functional.one_hot(batch.tokens[b, position], VOCAB)
            soft = clean if target == "data" else teacher.logits[position, z].detach().softmax(-1)
            total -= weight * float((soft * log_probs).sum())
    # The rows' weights are float32 numbers: 2^-24 each.
    assert float(loss.by_player["network"].detach()) == pytest.approx(total / (BATCH * LENGTH), rel=2**-23)
    assert float(loss.metrics["loss"]) == float(loss.by_player["network"].detach())
    loss.by_player["network"].backward()
    assert teacher.logits.grad is None
    assert len(teacher.calls) == (target == "teacher")
    assert teacher.gradients == ({False} if target == "teacher" else set())
    for z, time, _ in teacher.calls:
        assert torch.equal(z, z_t)
        assert torch.equal(time, t)


def test_times_are_uniform_and_the_tokens_are_corrupted_to_them() -> None:
    process = make_process("masked", VOCAB)
    network = Free(process, LENGTH, 0)
    count = 20_000
    Denoising(Denoising.Config(), process=process, network=network, teacher=None).loss(("network",), *_inputs(count))
    ((z_t, t, _),) = network.calls
    counts = torch.histc(t, 20, 0, 1)
    # Chi-square with 19 degrees of freedom: mean 19, standard deviation sqrt(38); six of them.
    assert abs(float(((counts - count / 20) ** 2 / (count / 20)).sum()) - 19) < 6 * math.sqrt(38)
    # Linear schedule: masked with probability t, of variance at most 1/4 a position.
    masked = (z_t == VOCAB).double() - t.unsqueeze(-1)
    for part in (t < 0.25, t > 0.75):
        assert abs(float(masked[part].sum())) < 6 * math.sqrt(masked[part].numel() / 4)
