"""What the engine costs beside the networks that it runs: one iteration, one sample, memory, a second process.

    OMP_NUM_THREADS=1 python benchmarks/engine.py iteration sampling mdlm scaling memory

Every part is a comparison within one run, its pieces timed in turn so that a machine that slows down slows all of
them:

iteration   a whole step of the training loop (data, noise, losses, gradients, clipping, optimizers, moving average)
            against the forward and backward passes that its turns cannot do without: 1F of teacher and of what needs
            no gradient, 1F + 2B of every player's network. ``joint`` is 7F in the usual count, ``alternate`` 5F a turn.
sampling    a student's k steps against k bare passes for features and the head on the rows that are drawn; and the
            head on all rows in every step.
mdlm        one step of the sampler against that of MDLM (Sahoo et al., arXiv:2406.07524), and against its cache, on
            the same network from the same states: 16 steps spread evenly over a run of 64 and over one of 256.
scaling     samples a second of 1 and of 2 processes (``torchrun``), one thread each.
memory      peak of a process that trains, with and without activation checkpointing, logits in chunks, shards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "text_quickstart.yaml"
SIZES = ["data.params.length=128", "backbone.params.width=384", "backbone.params.depth=6", "backbone.params.heads=6"]


def main() -> int:
    """Parse the command line, measure the parts asked for, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="what to measure; all parts by default")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions of every piece; medians count")
    parser.add_argument("--small", action="store_true", help="tiny networks: to see that it works, not to be quoted")
    parser.add_argument("--device", default="cpu", help="of iteration, sampling and mdlm")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engine.json")
    parser.add_argument("--peak-of", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        return _peak_of(options.peak_of)
    content = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts or PARTS:
        measured = {"command": " ".join(["python benchmarks/engine.py", *sys.argv[1:]]), "commit": _commit()}
        measured |= {"machine": _machine(options.device), "load_average_before": os.getloadavg()[0]}
        content[part] = measured | PARTS[part](options)
        print(part, json.dumps(content[part], indent=1), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def take_turns(
    pieces: dict[str, Callable[[], Any]], repeats: int, device: str, *, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of every piece, one after the other in every round; a first round does not count, unless `warm`."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in pieces}
    for number in range(warm, repeats + 1):
        for name, work in pieces.items():
            started = time.perf_counter()
            work()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


# ---- iteration ----------------------------------------------------------------------------------------------------


def iteration(options: argparse.Namespace) -> dict[str, Any]:
    """A step of distillation with both kinds of turns, and a step of teacher training, against bare passes."""
    batch = 4 if options.small else 16
    found: dict[str, Any] = {"settings": {"batch_size": batch, "sizes": [] if options.small else SIZES}}
    pieces: dict[str, Callable[[], Any]] = {}
    waits = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, turns in (("joint", "joint"), ("alternate", "alternate"), ("teacher", None)):
            trainer, bare = _trainer(Path(scratch) / name, turns, batch, options)
            waits[name] = trainer
            pieces[name] = _steps(trainer, 2 if turns == "alternate" else 1)
            if name == "joint":
                pieces |= bare
        seconds = take_turns(pieces, options.repeats, options.device)
        found["data_time_share"] = {
            name: trainer._data_s / sum(seconds[name]) * options.repeats / (options.repeats + 1)
            for name, trainer in waits.items()
        }
    found["seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
    forward, both = found["seconds"]["forward"], found["seconds"]["forward_and_backward"]
    limits = {"joint": forward + 2 * both, "alternate": 2 * (2 * forward + both), "teacher": both}
    found["backward_over_forward"] = both / forward - 1
    found["limit_seconds"] = limits
    found["over_limit"] = {name: found["seconds"][name] / limit for name, limit in limits.items()}
    return found


def _trainer(directory: Path, turns: str | None, batch: int, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """A stage's training loop, ready for its first step; and the bare passes of its networks."""
    import copy

    import torch

    from dmmd_core.api import prepare
    from dmmd_core.interfaces import Condition
    from dmmd_core.precision import autocast
    from dmmd_core.train import Trainer

    chosen = [] if options.small else SIZES
    chosen = [*chosen, f"distill.batch_size={batch}", f"teacher.train.batch_size={batch}"]
    chosen += [f"run.device={options.device}"]
    chosen += [] if turns is None else [f"objective.params.turns={turns}"]
    run = prepare(RECIPE, [*chosen, f"run.directory={directory}"], quiet=True)
    (directory / "cache").mkdir(parents=True)
    run.assembly.data.prepare()
    device = run.device
    network = run.assembly.network().to(device)
    _awake(network)
    recipe = run.plan.recipe
    if turns is None:
        part, section, model, teacher = run.plan.teacher_objective, recipe.teacher.train, network, None
    else:
        part, section, teacher = run.plan.objective, recipe.distill, network
        model = run.assembly.generator(copy.deepcopy(network.backbone)).to(device)
    assert part is not None
    assert section is not None
    objective = run.assembly.objective(
        part, network=model, teacher=teacher, copy_teacher=lambda: copy.deepcopy(network).requires_grad_(True),
        num_steps=recipe.distill.num_steps, training_steps=section.steps,
    )  # fmt: skip
    trainer = Trainer(run, "distill", objective, section, directory / "checkpoints")
    spec = run.assembly.spec
    assert spec is not None
    backbone = copy.deepcopy(network.backbone).requires_grad_(True)
    tokens = torch.randint(spec.vocab_size, (batch, spec.length), device=device)
    t = torch.rand(batch, device=device)
    weight = torch.randn(batch * spec.length, spec.vocab_size, device=device) / batch

    def logits() -> torch.Tensor:
        with autocast(device, run.precision):
            made: torch.Tensor = backbone.head(backbone.features(tokens, t, Condition()).flatten(0, 1))
        return made

    def both() -> None:
        backbone.zero_grad(set_to_none=True)
        (logits().float() * weight).sum().backward()

    return trainer, {"forward": torch.no_grad()(logits), "forward_and_backward": both}


def _steps(trainer: Any, count: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(count):
            trainer._one_step()
            trainer.step += 1

    return work


def _awake(module: Any) -> None:
    """Let a fresh network, whose gates and last layers start at zero, compute with numbers that are not."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if not bool(parameter.any()):
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(noise)


# ---- sampling -----------------------------------------------------------------------------------------------------


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """A student's k steps against k bare passes and the head on the rows that are drawn."""
    import torch

    from dmmd_core import Condition, Draws
    from dmmd_generators.noise_conditioned import NoiseConditioned
    from dmmd_samplers.ancestral import Ancestral

    found = {}
    for name, size in _worlds(options).items():
        process, backbone = _network(size, options.device)
        length, batch, k = size["length"], size["batch"], 8
        student = NoiseConditioned(
            NoiseConditioned.Config(), backbone=backbone, process=process, length=length, grid=None
        ).to(options.device)
        _awake(student)
        student.eval().requires_grad_(False)
        sampler = Ancestral(Ancestral.Config(chunk_rows=size["chunk_rows"]), process=process, length=length)
        draws = Draws.for_range(0, 0, 0, batch, options.device)
        z = torch.full((batch, length), process.vocab_size, device=options.device)
        t = torch.ones(batch, device=options.device)
        rows = torch.randperm(batch * length, device=options.device).chunk(k)
        everything = torch.arange(batch * length, device=options.device)
        latent = student.draw_latent(draws)

        @torch.no_grad()
        def bare(head_rows: Sequence[torch.Tensor]) -> None:
            for part in head_rows:
                prediction = student(z, t, Condition(), latent)  # noqa: B023
                for _ in prediction.chunks(part, size["chunk_rows"]):  # noqa: B023
                    pass

        seconds = take_turns(
            {
                "sampler": lambda: sampler.sample(student, draws, num_steps=k),  # noqa: B023
                "passes_and_rows": lambda: bare(rows),  # noqa: B023
                "passes_and_all_rows": lambda: bare([everything] * k),  # noqa: B023
            },
            options.repeats,
            options.device,
        )
        medians = {piece: statistics.median(values) for piece, values in seconds.items()}
        found[name] = {
            "settings": {**size, "num_steps": k},
            "seconds": medians,
            "over_bare": medians["sampler"] / medians["passes_and_rows"],
            "full_head_over_rows": medians["passes_and_all_rows"] / medians["passes_and_rows"],
        }
    return found


def _worlds(options: argparse.Namespace) -> dict[str, dict[str, int]]:
    if options.small:
        return {"tiny": {"vocab_size": 50, "length": 16, "width": 32, "depth": 2, "batch": 4, "chunk_rows": 8}}
    return {
        "characters": {"vocab_size": 96, "length": 128, "width": 384, "depth": 6, "batch": 16, "chunk_rows": 4096},
        "subwords": {"vocab_size": 50_257, "length": 1024, "width": 768, "depth": 12, "batch": 1, "chunk_rows": 128},
    }


def _network(size: dict[str, int], device: str) -> tuple[Any, Any]:
    """The masked process and a transformer of some size."""
    import torch

    from dmmd_backbones.transformer import Transformer
    from dmmd_processes.masked import Masked
    from dmmd_processes.schedules import Linear

    torch.manual_seed(0)
    process = Masked(Masked.Config(), vocab_size=size["vocab_size"], schedule=Linear(Linear.Config()))
    config = Transformer.Config(width=size["width"], depth=size["depth"], heads=max(1, size["width"] // 64))
    backbone = Transformer(
        config, num_inputs=process.num_inputs, vocab_size=process.vocab_size, length=size["length"], grid=None,
        num_classes=None,
    ).to(device)  # fmt: skip
    _awake(backbone)
    return process, backbone.eval().requires_grad_(False)


# ---- MDLM's sampler -----------------------------------------------------------------------------------------------


class MdlmSampler:
    """The published sampler's logic: logits at all positions in every step, float32 Gumbel noise over the vocabulary.

    Args:
        backbone: The network; its head gets one more output, for [MASK].
        mask: Input id of [MASK], the last.
    """

    def __init__(self, backbone: Any, mask: int) -> None:
        import torch

        self.backbone, self.mask = backbone, mask
        rows = backbone.logits.weight
        self.weight = torch.cat((rows, torch.zeros_like(rows[:1])))
        bias = backbone.logits.bias
        self.bias = None if bias is None else torch.cat((bias, torch.zeros_like(bias[:1])))

    def clean_probs(self, x: Any, t: float) -> Any:
        """Probabilities of the clean tokens, ``[batch, length, vocab + 1]``: none for [MASK], tokens carried over."""
        import torch

        from dmmd_core import Condition

        features = self.backbone.features(x, torch.full((len(x),), t, device=x.device), Condition())
        logits = torch.nn.functional.linear(features, self.weight, self.bias)
        logits[..., self.mask] = -1e6
        log_probs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        shown = x != self.mask
        log_probs[shown] = -1e6
        log_probs[shown, x[shown]] = 0
        return log_probs.exp()

    def step(self, x: Any, t: float, s: float, clean: Any = None) -> Any:
        """X at time s from x at time t; `clean` is what the cache holds."""
        import torch

        probs = (self.clean_probs(x, t) if clean is None else clean) * (t - s)  # linear schedule: 1 - alpha_t = t
        probs[..., self.mask] = s
        noise = 1e-10 - (torch.rand_like(probs) + 1e-10).log()
        drawn = (probs / noise).argmax(-1)
        return torch.where(x == self.mask, drawn, x)


def mdlm(options: argparse.Namespace) -> dict[str, Any]:
    """Steps of both samplers from the same states of a run."""
    import torch

    from dmmd_core import Condition, Draws, NetworkDenoiser
    from dmmd_samplers.ancestral import Ancestral

    size = list(_worlds(options).values())[-1]
    process, backbone = _network(size, options.device)
    ours = Ancestral(Ancestral.Config(chunk_rows=size["chunk_rows"]), process=process, length=size["length"])
    teacher = NetworkDenoiser(backbone, process).eval()
    theirs = MdlmSampler(backbone, process.vocab_size)
    found: dict[str, Any] = {"settings": size}
    measured = 4 if options.small else 16
    for num_steps in (64, 256):
        totals: dict[str, float] = {"ours": 0.0, "mdlm": 0.0, "mdlm_cache": 0.0}
        kept = 0
        for step in range(0, num_steps, num_steps // measured):
            t, s = 1 - step / num_steps, 1 - (step + 1) / num_steps
            draws = Draws.for_range(1, step, 0, size["batch"], options.device)
            z, cached = _state(process, size, step, num_steps, options.device)
            times = [torch.full((len(z),), time, dtype=torch.float64, device=z.device) for time in (s, t)]
            with torch.no_grad():
                clean = theirs.clean_probs(z, t) if cached else None
                kept += cached
                pieces = {
                    "ours": lambda: ours.step(teacher, z, *times, draws, Condition()),  # noqa: B023
                    "mdlm": lambda: theirs.step(z, t, s),  # noqa: B023
                    "mdlm_cache": lambda: theirs.step(z, t, s, clean),  # noqa: B023
                }
                for name, values in take_turns(pieces, 1, options.device, warm=step > 0).items():
                    totals[name] += values[0]
        found[f"run_of_{num_steps}"] = {
            "seconds": totals,
            "steps_served_by_the_cache": kept,
            "mdlm_over_ours": totals["mdlm"] / totals["ours"],
            "mdlm_cache_over_ours": totals["mdlm_cache"] / totals["ours"],
        }
    return found


def _state(process: Any, size: dict[str, int], step: int, num_steps: int, device: str) -> tuple[Any, bool]:
    """Tokens at a step of a run, and whether the step before left them as they were."""
    import torch

    generator = torch.Generator().manual_seed(step)
    shape = (size["batch"], size["length"])
    tokens = torch.randint(size["vocab_size"], shape, generator=generator)
    shown_at = torch.randint(num_steps, shape, generator=generator)  # linear schedule: any step with equal chance
    changed = bool((shown_at == step - 1).any()) or step == 0
    return torch.where(shown_at < step, tokens, process.vocab_size).to(device), not changed


# ---- processes ----------------------------------------------------------------------------------------------------


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Samples a second of teacher training and distillation with one process and with two."""
    found: dict[str, Any] = {}
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as scratch:
            _run(scratch, count, [*_short(options), "run.threads=1"])
            found[str(count)] = _speeds(Path(scratch) / "run" / "log.jsonl")
    found["speedup"] = {stage: found["2"][stage] / found["1"][stage] for stage in found["1"]}
    return found


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of the largest process, of a whole run that differs in one choice."""
    kinds: dict[str, tuple[int, list[str]]] = {
        "plain": (1, []),
        "activation_checkpointing": (1, ["run.activation_checkpointing=true"]),
        "chunked_logits": (1, ["objective.params.chunk_rows=64", "teacher.objective.params.chunk_rows=64"]),
        "two_processes": (2, []),
        "two_processes_sharded": (2, ["run.parallel=fsdp"]),
    }
    found: dict[str, Any] = {}
    for name, (count, chosen) in kinds.items():
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = _run(scratch, count, [*_short(options, batch=32), "run.threads=1", *chosen])
    return {"peak_bytes": found}


def _short(options: argparse.Namespace, batch: int = 16) -> list[str]:
    """Overrides for a run of a few steps that measures nothing of its samples."""
    steps = 4 if options.small else 12
    return [
        *([] if options.small else SIZES),
        f"teacher.train.steps={steps}", f"distill.steps={steps}", "teacher.train.log_every=1", "distill.log_every=1",
        f"teacher.train.batch_size={batch}", f"distill.batch_size={batch}", "teacher.train.optimizer.warmup_steps=0",
        "evaluate.teacher_steps=[1]", "evaluate.student_steps=[1]", "evaluate.num_samples=2",
        "evaluate.metrics=[{name: token_entropy}]",
    ]  # fmt: skip


def _run(scratch: str, count: int, overrides: list[str]) -> int:
    """Run the recipe with some processes; peak memory of the largest, in bytes."""
    module = ["-m", "dmmd_core"]
    if count > 1:
        module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *module]
    command = [sys.executable, *module, str(RECIPE), f"run.directory={scratch}/run", *overrides]
    done = subprocess.run(
        [sys.executable, __file__, "--peak-of", *command], check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout.splitlines()[-1])


def _peak_of(command: list[str]) -> int:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return done.returncode
    print(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return 0


def _speeds(log: Path) -> dict[str, float]:
    """Median samples a second of every stage that trains, the first two steps left out."""
    found: dict[str, list[float]] = {}
    for line in log.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "step" and "samples_per_second" in event["metrics"]:
            found.setdefault(event["stage"], []).append(event["metrics"]["samples_per_second"])
    return {stage: statistics.median(values[2:]) for stage, values in found.items()}


def _machine(device: str) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"
    return {
        "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.machine(),
        "python": platform.python_version(), "torch": torch.__version__, "device": name,
    }  # fmt: skip


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "iteration": iteration, "sampling": sampling, "mdlm": mdlm, "scaling": scaling, "memory": memory,
}  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
