"""Clauses for processes: everything by enumeration in float64, or by counting with a stated bound."""

from __future__ import annotations

import itertools

import torch
from einops import einsum
from torch import Tensor

from dmmd_core.draws import Draws
from dmmd_core.interfaces import Process
from dmmd_core.testing import schedule as schedules
from dmmd_core.testing.report import Clause, Skip, clause, expect, expect_close, expect_frequencies
from dmmd_core.testing.subject import GENERAL, Case, needs
from dmmd_core.testing.worlds import all_rows, bayes, forward_matrix, spec_for

TIMES = (0.0, 0.13, 0.5, 0.77, 1.0)
PAIRS = tuple(itertools.combinations(TIMES, 2))
_COUNT = 20_000


class ProcessCase(Case):
    """A process over the kit's letters."""

    def prepare(self) -> None:
        """See `Case.prepare`."""
        self.offers = vars(spec_for(needs(self.part, "data")))

    @property
    def process(self) -> Process:
        """The process."""
        component: Process = self.component
        return component


def _full(like: Tensor, time: float) -> Tensor:
    return torch.full(like.shape[:1], time, dtype=torch.float64)


def _rows(process: Process, t: float) -> tuple[Tensor, Tensor]:
    """Every x with every z_t that noise can make of it at t."""
    x, z = all_rows(process.vocab_size, process.num_inputs)
    possible = forward_matrix(process, 0.0, t)[x, z] > 0
    return x[possible], z[possible]


def _random_probs(rows: int, size: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.rand(rows, size, generator=source, dtype=torch.float64).add(0.1).log().softmax(-1)


@clause("prior", remedy="return a float64 tensor [num_inputs] that sums to 1, with at least vocab_size entries")
def prior(case: ProcessCase) -> None:
    """`prior` is a distribution over all clean tokens, and perhaps more input ids."""
    process = case.process
    pi = process.prior()
    expect(pi.dtype == torch.float64, f"prior() is {pi.dtype}, expected float64")
    expect(pi.ndim == 1 and len(pi) >= process.vocab_size, f"prior() has shape {list(pi.shape)}")
    expect(process.num_inputs == len(pi), f"num_inputs is {process.num_inputs}, prior() has {len(pi)} entries")
    expect(bool((pi >= 0).all()), f"prior() has the entry {float(pi.min())}")
    expect(abs(float(pi.sum()) - 1) < 1e-12, f"prior() sums to {float(pi.sum())!r}")
    expect(torch.equal(pi, process.prior()), "prior() gives something else when asked again")


@clause("signal_level", remedy="see check_schedule; alpha of a process is that of its schedule, in float64")
def signal_level(case: ProcessCase) -> None:
    """The signal level goes from exactly 1 to exactly 0, falls, and is float64 whatever the times are."""
    inner = Case(case.part, case.offers, case.params, case.registry, {0: case.process.schedule})
    for one in (schedules.ends, schedules.falls, schedules.slope):
        one.check(inner)
    got = case.process.alpha(torch.tensor([0.25], dtype=torch.float32))
    expect(got.dtype == torch.float64, f"alpha of float32 times is {got.dtype}, expected float64")


@clause("corrupt", remedy="keep x with probability alpha_t, else draw from the prior, by the streams of the Draws")
def corrupt(case: ProcessCase) -> None:
    """`corrupt` draws from alpha_t x + (1 - alpha_t) pi."""
    process, draws = case.process, Draws.for_range(0, 0, 0, _COUNT)
    for t, x in itertools.product(TIMES, range(process.vocab_size)):
        z = process.corrupt(torch.full((_COUNT, 1), x), torch.full((_COUNT,), t), draws)
        expect(z.dtype == torch.int64, f"corrupt gives {z.dtype}, expected int64")
        expect(z.shape == (_COUNT, 1), f"corrupt of [{_COUNT}, 1] gives {list(z.shape)}")
        expect_frequencies(z, forward_matrix(process, 0.0, t)[x], f"corrupt of x = {x} at t = {t}")


@clause("prior_sample", remedy="draw every position from the prior, by the streams of the Draws")
def prior_sample(case: ProcessCase) -> None:
    """`prior_sample` draws every position from the prior."""
    z = case.process.prior_sample(3, Draws.for_range(0, 0, 0, _COUNT))
    expect(z.shape == (_COUNT, 3) and z.dtype == torch.int64, f"it gives {z.dtype} {list(z.shape)}")
    for place in range(3):
        expect_frequencies(z[:, place], case.process.prior(), f"position {place}")


@clause("times_per_position", remedy="use per_position(t, x), which serves both forms of times")
def times_per_position(case: ProcessCase) -> None:
    """Times may differ by position: t = 0 keeps a token as it is, beside one at t = 1."""
    process, draws = case.process, Draws.for_range(0, 0, 0, 200)
    x = draws.integers("tokens", process.vocab_size, (2,))
    t = torch.tensor([0.0, 1.0]).expand(200, 2)
    z = process.corrupt(x, t, draws)
    expect(torch.equal(z[:, 0], x[:, 0]), "corrupt changed a token whose time is 0")
    whole = process.corrupt(x, torch.ones(200), draws)
    expect(torch.equal(z[:, 1], whole[:, 1]), "at t = 1 a position depends on the time of its neighbour")
    s = torch.tensor([0.0, 0.5]).expand(200, 2)
    drawn = process.posterior_sample(x, z, s, t, draws)
    expect(torch.equal(drawn[:, 0], x[:, 0]), "posterior_sample changed a token whose time is 0")


@clause("bayes", remedy="derive the posterior from q(z_t | z_s) q(z_s | x) again; the base class has it for any prior")
def posterior_by_enumeration(case: ProcessCase) -> None:
    """`posterior_probs` is Bayes' rule, by enumeration in float64."""
    process = case.process
    for s, t in PAIRS:
        x, z = _rows(process, t)
        table = bayes(process, s, t)[x, z]
        one_hot = torch.nn.functional.one_hot(x, process.vocab_size).double().unsqueeze(1)
        got = process.posterior_probs(one_hot, z.unsqueeze(1), _full(x, s), _full(x, t))
        expect(got.dtype == torch.float64, f"posterior_probs is {got.dtype}, expected float64")
        for row in range(len(x)):
            what = f"posterior_probs at x = {int(x[row])}, z_t = {int(z[row])}, s = {s}, t = {t}"
            expect_close(got[row, 0], table[row], what, tolerance=1e-10)


@clause("averages", remedy="posterior_probs of an average is an average: sum over x of x_probs(x) q(z_s | z_t, x)")
def posterior_is_linear(case: ProcessCase) -> None:
    """`posterior_probs` of a distribution is the average of its tokens' posteriors."""
    process = case.process
    for s, t in PAIRS:
        pi = process.prior()
        z = (pi > 0).nonzero().flatten() if t == 1 else torch.arange(process.num_inputs)
        p = _random_probs(len(z), process.vocab_size)
        certain = bayes(process, s, t)[:, z]  # [vocab, rows, inputs]
        p = torch.where(certain.isnan().any(-1).T, 0.0, p)  # tokens that z_t rules out
        p = p / p.sum(-1, keepdim=True)
        wanted = einsum(p, certain.nan_to_num(), "row token, token row next -> row next")
        got = process.posterior_probs(p.unsqueeze(1), z.unsqueeze(1), _full(z, s), _full(z, t))[:, 0]
        expect_close(got, wanted, f"posterior_probs [z_t, z_s] at s = {s}, t = {t}", tolerance=1e-10)


@clause("posterior_sample", remedy="draw by the four weights of the base class, or by posterior_probs itself")
def posterior_sample(case: ProcessCase) -> None:
    """`posterior_sample` draws from the posterior."""
    process, draws = case.process, Draws.for_range(1, 0, 0, _COUNT)
    for s, t in ((0.2, 0.7), (0.0, 0.5), (0.6, 1.0)):
        x, z = _rows(process, t)
        for clean, noisy in zip(x.tolist(), z.tolist(), strict=True):
            x_all, z_all = torch.full((_COUNT, 1), clean), torch.full((_COUNT, 1), noisy)
            got = process.posterior_sample(x_all, z_all, _full(x_all, s), _full(x_all, t), draws)
            what = f"posterior_sample at x = {clean}, z_t = {noisy}, s = {s}, t = {t}"
            expect_frequencies(got, bayes(process, s, t)[clean, noisy], what)


@clause("equal_times", remedy="treat s == t as a case of its own; rounding makes it happen")
def equal_times(case: ProcessCase) -> None:
    """Equal times give z_t back, and s = 0 gives x."""
    process, draws = case.process, Draws.for_range(0, 0, 0, 300)
    x = draws.integers("tokens", process.vocab_size, (3,))
    for time in (0.0, 1e-9, 0.4, 1 - 1e-12, 1.0):
        t = torch.full((300,), time, dtype=torch.float64)
        z = process.corrupt(x, t, draws)
        same = process.posterior_sample(x, z, t, t, draws)
        expect(torch.equal(same, z), f"posterior_sample with s = t = {time} changes {int((same != z).sum())} of 900")
        clean = process.posterior_sample(x, z, torch.zeros_like(t), t, draws)
        missed = int((clean != x).sum())
        expect(not missed, f"posterior_sample from t = {time} to s = 0 misses x {missed} times of 900")


@clause("rows_to_draw", remedy="name every position whose x posterior_sample looks at, given the same draws")
def rows_to_draw(case: ProcessCase) -> None:
    """Where `rows_to_draw` says no, `posterior_sample` ignores x."""
    process, draws = case.process, Draws.for_range(2, 0, 0, 400)
    for s, t in ((0.2, 0.7), (0.0, 1.0), (0.9, 1.0)):
        x = draws.integers("tokens", process.vocab_size, (4,))
        times = (torch.full((400,), time, dtype=torch.float64) for time in (s, t))
        s_all, t_all = times
        z = process.corrupt(x, t_all, draws)
        needed = process.rows_to_draw(z, s_all, t_all, draws)
        expect(needed.dtype == torch.bool and needed.shape == z.shape, f"it gives {needed.dtype} {list(needed.shape)}")
        first = process.posterior_sample(x, z, s_all, t_all, draws)
        other = torch.where(needed, x, (x + 1) % process.vocab_size)
        moved = (process.posterior_sample(other, z, s_all, t_all, draws) != first) & ~needed
        # A token that z_t shows may still be x itself; what is known is carried over whatever x says.
        expect(not bool(moved.any()), f"at s = {s}, t = {t}, {int(moved.sum())} positions not to be drawn follow x")


@clause("known", remedy="known(z_t, t) is true where one clean token alone can have led to z_t")
def known(case: ProcessCase) -> None:
    """`known` is true exactly where z_t leaves one clean token possible."""
    process = case.process
    for t in TIMES:
        z = torch.arange(process.num_inputs)
        column = forward_matrix(process, 0.0, t)[: process.vocab_size]
        wanted = ((column > 0).sum(0) == 1) & (z < process.vocab_size)
        reachable = (column > 0).any(0)
        got = process.known(z.unsqueeze(1), _full(z, t))[:, 0]
        wrong = ((got != wanted) & reachable).nonzero().flatten().tolist()
        expect(not wrong, f"known is wrong at z_t = {wrong}, t = {t}")


@clause("clean_mean", remedy="normalise over clean tokens, carry known ones over, add evidence to leave-one-out logits")
def clean_mean(case: ProcessCase) -> None:
    """`clean_log_probs` is the log of E[x | z_t]: normalised, known tokens carried over, evidence counted once."""
    process = case.process
    for t in TIMES:
        _, z = _rows(process, t)
        z = z.unique()
        p = _random_probs(len(z), process.vocab_size)
        got = process.clean_log_probs(p.log(), z, _full(z, t))
        likelihood = forward_matrix(process, 0.0, t)[: process.vocab_size, z].T
        sure = process.known(z.unsqueeze(1), _full(z, t))
        joint = p * likelihood if process.parametrization == "leave_one_out" else p
        wanted = torch.where(sure, likelihood, joint)
        wanted = wanted / wanted.sum(-1, keepdim=True)
        expect_close(got.exp(), wanted, f"exp(clean_log_probs) [z_t, x] at t = {t}", tolerance=1e-10)
        carried = got[sure.flatten()]
        sharp = bool((carried.isneginf() | (carried == 0)).all())
        expect(sharp, "a known token is carried over by large logits instead of 0 and minus infinity")


@clause("evidence", remedy="evidence(z, t) is log q(z | x = z) - log q(z | x != z), and 0 for ids that are no token")
def evidence(case: ProcessCase) -> None:
    """`evidence` is the log ratio of likelihoods."""
    process = case.process
    pi = process.prior()
    for t in (0.01, 0.5, 0.99):
        z = torch.arange(process.num_inputs)
        forward = forward_matrix(process, 0.0, t)
        other = torch.where(z == 0, 1, 0)
        wanted = (forward[z.clamp(max=process.vocab_size - 1), z] / forward[other, z]).log()
        wanted = torch.where(z < process.vocab_size, wanted, 0.0)
        chosen = pi > 0
        expect_close(process.evidence(z, _full(z, t))[chosen], wanted[chosen], f"evidence at t = {t}", tolerance=1e-9)


@clause("news", remedy="multiply p(x) by q(z_s | z_t, x) and normalise")
def news(case: ProcessCase) -> None:
    """`clean_posterior` updates p(x) by q(z_s | z_t, x)."""
    process = case.process
    for s, t in ((0.2, 0.7), (0.5, 1.0)):
        table = bayes(process, s, t).nan_to_num()
        p = _random_probs(1, process.vocab_size)[0]
        joint = p.view(-1, 1, 1) * table
        possible = joint.sum(0) > 0
        z_t, z_s = possible.nonzero().unbind(-1)
        # Tokens that z_t itself rules out have no part in p.
        fair = ~process.known(z_t.unsqueeze(1), _full(z_t, t)).flatten()
        z_t, z_s = z_t[fair], z_s[fair]
        wanted = (joint / joint.sum(0))[:, z_t, z_s].T
        got = process.clean_posterior(p.log().expand(len(z_t), -1), z_t, z_s, _full(z_t, s), _full(z_t, t)).exp()
        expect_close(got, wanted, f"clean_posterior [row, x] at s = {s}, t = {t}", tolerance=1e-9)


@clause("loss_rows", remedy="score at least every position that is not known")
def loss_rows(case: ProcessCase) -> None:
    """Every position that is not known carries a loss, so that no prediction goes untrained."""
    process, draws = case.process, Draws.for_range(0, 0, 0, 200)
    x = draws.integers("tokens", process.vocab_size, (3,))
    for time in (0.3, 1.0):
        t = torch.full((200,), time, dtype=torch.float64)
        z = process.corrupt(x, t, draws)
        rows = process.rows_with_loss(z, t)
        expect(rows.dtype == torch.bool and rows.shape == z.shape, f"it gives {rows.dtype} {list(rows.shape)}")
        missed = int((~rows & ~process.known(z, t)).sum())
        expect(not missed, f"at t = {time}, {missed} of {z.numel()} positions are unknown and carry no loss")


@clause("loss_is_linear", remedy="compute candidate_losses for all targets and let row_losses average them")
def loss_is_linear(case: ProcessCase) -> None:
    """A soft target's loss is the average of hard targets' losses, and all are finite."""
    process = case.process
    s = 0.4
    _, z = _rows(process, s)
    z = z.unique()
    log_probs = _random_probs(len(z), process.vocab_size, 1).log()
    target = _random_probs(len(z), process.vocab_size, 2)
    times = _full(z, s)
    hard = torch.stack(
        [process.row_losses(torch.full_like(z, token), log_probs, z, times) for token in range(process.vocab_size)], -1
    )
    expect(hard.shape == log_probs.shape, f"row_losses of hard targets have shape {list(hard.shape[:-1])}")
    expect(bool(hard.isfinite().all()), "a loss of a prediction without zeros is not finite")
    expect_close(process.candidate_losses(log_probs, z, times), hard, "candidate_losses [z, x]", tolerance=1e-9)
    soft = process.row_losses(target, log_probs, z, times)
    expect_close(soft, (target * hard).sum(-1), "row_losses of a soft target", tolerance=1e-9)


@clause("loss_is_proper", remedy="a loss must be least, on average, where the prediction is the mean of its targets")
def loss_is_proper(case: ProcessCase) -> None:
    """The loss averaged over x ~ p is least where the prediction is p."""
    process, s = case.process, 0.4
    _, z = _rows(process, s)
    z = z.unique()
    z = z[~process.known(z.unsqueeze(1), _full(z, s)).flatten()]
    times = _full(z, s)
    p = _random_probs(len(z), process.vocab_size)
    logits = p.log().requires_grad_(True)
    with torch.enable_grad():
        least = process.row_losses(p, logits.log_softmax(-1), z, times)
        (gradient,) = torch.autograd.grad(least.sum(), logits)
    expect_close(gradient, torch.zeros_like(p), "the gradient in the logits [z, x] at prediction = p", tolerance=1e-8)
    for seed in range(1, 6):
        other = process.row_losses(p, _random_probs(len(z), process.vocab_size, seed).log(), z, times)
        expect(bool((other > least.detach()).all()), "another prediction than p has no greater loss")


@clause("loss_weight", remedy="bound s away from where the weight grows without limit")
def loss_weight(case: ProcessCase) -> None:
    """`loss_weight` is finite and not negative at all times, the ends among them."""
    s = torch.tensor([0.0, 1e-7, 0.3, 0.9, 1.0], dtype=torch.float64)
    got = case.process.loss_weight(s)
    expect(got.shape == s.shape, f"loss_weight of [{len(s)}] times has shape {list(got.shape)}")
    for time, weight in zip(s.tolist(), got.tolist(), strict=True):
        expect(0 <= weight < float("inf"), f"loss_weight at s = {time:g} is {weight}")


@clause("repeatable", remedy="take every random number from the Draws, by stream name, for the given sample indices")
def repeatable(case: ProcessCase) -> None:
    """Draws alone decide: the same give the same, other seeds other tokens, and a part of a batch its own part."""
    process, draws = case.process, Draws.for_range(5, 3, 100, 64)
    x = draws.integers("tokens", process.vocab_size, (6,))
    t, s = torch.full((64,), 0.6, dtype=torch.float64), torch.full((64,), 0.2, dtype=torch.float64)

    def drawn(of: Draws, part: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        z = process.corrupt(x[part], t[part], of)
        return process.prior_sample(6, of), z, process.posterior_sample(x[part], z, s[part], t[part], of)

    names = ("prior_sample", "corrupt", "posterior_sample")
    rest = drawn(draws.select(slice(20, None)), slice(20, None))
    for name, first, again, part in zip(names, drawn(draws), drawn(draws), rest, strict=True):
        expect(torch.equal(first, again), f"{name} differs when called again with the same Draws")
        expect(torch.equal(first[20:], part), f"{name} of a part of the batch differs from the whole batch's")
    other = process.corrupt(x, t, Draws.for_range(6, 3, 100, 64))
    expect(not torch.equal(drawn(draws)[1], other), "corrupt gives the same for another seed")


@clause("dtypes", remedy="compute in the dtype of the logits; do not cast down")
def dtypes(case: ProcessCase) -> None:
    """`clean_log_probs` and `candidate_losses` keep float32 and float64, and agree within rounding."""
    process = case.process
    _, z = _rows(process, 0.5)
    logits = _random_probs(len(z), process.vocab_size).log()
    times = _full(z, 0.5)
    wanted = process.clean_log_probs(logits, z, times)
    for dtype in (torch.float32, torch.float64):
        got = process.clean_log_probs(logits.to(dtype), z, times.to(dtype))
        expect(got.dtype == dtype, f"clean_log_probs of {dtype} logits is {got.dtype}")
        expect_close(got.exp(), wanted.exp(), f"exp(clean_log_probs) in {dtype}", tolerance=1e-5)
        losses = process.candidate_losses(got, z, times.to(dtype))
        expect(losses.dtype == dtype, f"candidate_losses of {dtype} is {losses.dtype}")


@clause("devices", remedy="make tensors on the device of the tokens; move buffers there when they are used")
def devices(case: ProcessCase) -> None:
    """On a CUDA device the process draws the same tokens as on the CPU."""
    if not torch.cuda.is_available():
        raise Skip("there is no CUDA device here")
    process = case.fresh()
    results = []
    for device in ("cpu", "cuda"):
        draws = Draws.for_range(0, 0, 0, 500, device)
        x = draws.integers("tokens", process.vocab_size, (4,))
        t = torch.full((500,), 0.6, dtype=torch.float64, device=device)
        z = process.corrupt(x, t, draws)
        moved = process.posterior_sample(x, z, t / 2, t, draws)
        expect(moved.device.type == device, f"posterior_sample on {device} gives a tensor on {moved.device}")
        results.append(torch.stack([z, moved]).cpu())
    expect(torch.equal(*results), "CPU and CUDA draw different tokens from the same Draws")


CLAUSES: tuple[Clause, ...] = (
    *GENERAL, prior, signal_level, corrupt, prior_sample, times_per_position, posterior_by_enumeration,
    posterior_is_linear, posterior_sample, equal_times, rows_to_draw, known, clean_mean, evidence, news, loss_rows,
    loss_is_linear, loss_is_proper, loss_weight, repeatable, dtypes, devices,
)  # fmt: skip
