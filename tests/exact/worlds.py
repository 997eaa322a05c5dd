"""Small worlds and naive implementations to hold the code against; everything in float64 and by plain loops."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from dmmd_core import Condition, Denoiser, Prediction, Process, Schedule, TablePrediction, per_position
from dmmd_processes.masked import Masked
from dmmd_processes.schedules import Cosine, Linear, MaskGITCosine, Polynomial
from dmmd_processes.uniform import Uniform

SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(Linear.Config()),
    "cosine": Cosine(Cosine.Config()),
    "maskgit_cosine": MaskGITCosine(MaskGITCosine.Config()),
    "polynomial": Polynomial(Polynomial.Config(power=1.5)),
}


class Skewed(Process):
    """A prior that treats every input id differently, [MASK] among them: what the base class does for any pi."""

    def __init__(self, config: Process.Config, *, vocab_size: int, schedule: Schedule) -> None:
        self.config = config
        super().__init__(vocab_size=vocab_size, schedule=schedule)

    def prior(self) -> Tensor:
        weights = torch.arange(1, self.vocab_size + 2, dtype=torch.float64)
        return weights / weights.sum()


def make_process(name: str, vocab_size: int = 3, schedule: str = "linear", **params: object) -> Process:
    """Build a process by hand."""
    cls = {"masked": Masked, "uniform": Uniform, "skewed": Skewed}[name]
    return cls(cls.Config(**params), vocab_size=vocab_size, schedule=SCHEDULES[schedule])  # type: ignore[arg-type]


def forward_matrix(process: Process, s: float, t: float) -> Tensor:
    """q(z_t | z_s) as a matrix over input ids, from the definition: keep with alpha_t / alpha_s, else draw from pi."""
    prior = process.prior()
    alpha_s, alpha_t = (float(process.alpha(torch.tensor(time, dtype=torch.float64))) for time in (s, t))
    keep = alpha_t / alpha_s
    return keep * torch.eye(len(prior), dtype=torch.float64) + (1 - keep) * prior.expand(len(prior), -1)


def bayes_posterior(process: Process, x: int, z_t: int, s: float, t: float) -> Tensor:
    """q(z_s | z_t, x) = q(z_t | z_s) q(z_s | x) / q(z_t | x), by Bayes' rule."""
    joint = forward_matrix(process, 0.0, s)[x] * forward_matrix(process, s, t)[:, z_t]
    return joint / joint.sum()


def naive_mean(process: Process, probabilities: Tensor, length: int, z: Tensor, t: float) -> Tensor:
    """E[x | z_t] by summing over all sequences, ``[length, vocab]``."""
    forward = forward_matrix(process, 0.0, t)
    mean = torch.zeros(length, process.vocab_size, dtype=torch.float64)
    sequences = itertools.product(range(process.vocab_size), repeat=length)
    for probability, sequence in zip(probabilities, sequences, strict=True):
        weight = probability
        for position, token in enumerate(sequence):
            weight = weight * forward[token, z[position]]
        for position, token in enumerate(sequence):
            mean[position, token] += weight
    return mean / mean.sum(-1, keepdim=True)


def naive_leave_one_out(process: Process, probabilities: Tensor, length: int, z: Tensor, t: float) -> Tensor:
    """E[x_l | z_t without position l] by summing over all sequences, ``[length, vocab]``."""
    forward = forward_matrix(process, 0.0, t)
    mean = torch.zeros(length, process.vocab_size, dtype=torch.float64)
    sequences = itertools.product(range(process.vocab_size), repeat=length)
    for probability, sequence in zip(probabilities, sequences, strict=True):
        for left_out in range(length):
            weight = probability
            for position, token in enumerate(sequence):
                if position != left_out:
                    weight = weight * forward[token, z[position]]
            mean[left_out, sequence[left_out]] += weight
    return mean / mean.sum(-1, keepdim=True)


class Watched(TablePrediction):
    """A table that notes whether gradients were on whenever it was read."""

    def __init__(self, log_probs: Tensor, gradients: set[bool]) -> None:
        super().__init__(log_probs)
        self._gradients = gradients

    def log_probs(self, rows: Tensor | None = None) -> Tensor:
        self._gradients.add(torch.is_grad_enabled())
        return super().log_probs(rows)


class Free(Denoiser):
    """A denoiser with one free row of logits for every position and input id; it notes how it was called."""

    def __init__(self, process: Process, length: int, seed: int) -> None:
        super().__init__()
        self.process = process
        source = torch.Generator().manual_seed(seed)
        shape = (length, process.num_inputs, process.vocab_size)
        self.logits = nn.Parameter(torch.randn(shape, generator=source, dtype=torch.float64))
        self.calls: list[tuple[Tensor, Tensor, Condition | None]] = []
        self.gradients: set[bool] = set()

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        self.calls.append((z_t, t, condition))
        self.gradients.add(torch.is_grad_enabled())
        rows = self.logits[torch.arange(z_t.shape[1]), z_t].flatten(0, 1)
        times = per_position(t, z_t).flatten()
        log_probs = self.process.clean_log_probs(rows, z_t.flatten(), times)
        return Watched(log_probs.unflatten(0, z_t.shape), self.gradients)
