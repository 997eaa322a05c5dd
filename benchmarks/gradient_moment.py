"""Is the Gradient Moment to be trusted? Held-out halves, a repeated row, shuffled tokens, and a sweep of top-p.

    python benchmarks/gradient_moment.py runs/text_quickstart

Takes data, reference language model and teacher of a finished text run. Twenty random halvings of held-out text must
lie around zero; one row many times and shuffled tokens must not, whatever their perplexity; and where a sharper nucleus
keeps lowering the perplexity, the Gradient Moment must turn up again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmmd_core import Denoiser, Draws, Subject, load_model_weights, load_plugins, load_recipe
from dmmd_core.assemble import Assembly
from dmmd_core.resolve import resolve
from dmmd_metrics.entropy import TokenEntropy
from dmmd_metrics.text import GenerativePerplexity, GradientMoment
from dmmd_samplers.ancestral import Ancestral

ROOT = Path(__file__).resolve().parent.parent
SPLITS = 20


def main() -> int:
    """Parse the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a finished text run")
    parser.add_argument("--num", type=int, default=500, help="sequences per figure")
    parser.add_argument("--steps", type=int, default=64, help="the teacher's sampling steps")
    parser.add_argument("--top-p", type=float, nargs="+", default=[1.0, 0.95, 0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gradient_moment.json")
    options = parser.parse_args()
    judge = Judge(options.run)
    rows = [judge.halves(seed) for seed in range(SPLITS)]
    print_row(rows[0])
    inside = sum(abs(row["gradient_moment"]) < 3 * row["standard_error"] for row in rows)
    print(f"{inside} of {SPLITS} halvings within three standard errors of zero")
    rows += [print_row(row) for row in judge.broken(options.num)]
    for top_p in options.top_p:
        rows.append(print_row(judge.teacher(options.num, options.steps, top_p)))
    content = {
        "command": f"python benchmarks/gradient_moment.py RUN --num {options.num} --steps {options.steps}",
        "recipe": judge.recipe.name,
        "reference": judge.reference.reference_name,
        "machine": {"cpu_count": os.cpu_count(), "platform": platform.machine(), "python": platform.python_version()},
        "rows": rows,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


class Judge:
    """The metrics of a run, ready to judge any tokens.

    Args:
        run: Directory of a finished text run.
    """

    def __init__(self, run: Path) -> None:
        self.recipe = load_recipe(run / "recipe.yaml")
        self.assembly = Assembly(resolve(self.recipe, load_plugins(), outside=False), run / "cache")
        self.data = self.assembly.data
        self.data.prepare()
        (self.moment,) = (metric for metric in self.assembly.metrics() if isinstance(metric, GradientMoment))
        self.moment.prepare()
        self.reference = self.moment.reference
        self.perplexity = GenerativePerplexity(GenerativePerplexity.Config(), reference=self.reference)
        self.entropy = TokenEntropy(TokenEntropy.Config(), vocab_size=self.data.spec.vocab_size)
        if self.assembly.plan.teacher_load is not None:
            self.denoiser: Denoiser = self.assembly.teacher().eval()
        else:
            self.denoiser = self.assembly.network().eval()
            load_model_weights(run, "teacher", self.denoiser, self.data.codec)

    def figures(self, name: str, tokens: Tensor, model: str = "teacher") -> dict[str, Any]:
        """Gradient Moment with its standard error, perplexity and token entropy of some sequences."""
        subject = Subject(
            model=model, num_steps=0, tokens=tokens, labels=None, denoiser=None, sampler=None,
            process=self.assembly.process, draws=Draws.for_range(0, 0, 0, 1),
        )  # fmt: skip
        (moment,) = self.moment.evaluate(subject)
        return {
            "name": name,
            "gradient_moment": moment.value,
            "standard_error": moment.standard_error,
            "perplexity": self.perplexity.evaluate(subject)[0].value,
            "token_entropy": self.entropy.evaluate(subject)[0].value,
            "num": len(tokens),
        }

    def halves(self, seed: int) -> dict[str, Any]:
        """A random half of the held-out sequences against the other half."""
        size = self.data.size("test")
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        return self.figures(f"held-out halves {seed}", self.data.take("test", order).tokens, model="test")

    def broken(self, num: int) -> list[dict[str, Any]]:
        """One typical row many times, and rows whose tokens are shuffled."""
        order = torch.randperm(self.data.size("test"), generator=torch.Generator().manual_seed(0))[:num]
        real = self.data.take("test", order).tokens
        with torch.no_grad():
            losses, _ = self.reference.losses(real)
        typical = real[(losses - losses.median()).abs().argmin()].expand(num, -1)
        places = torch.rand(real.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
        return [
            self.figures("one typical row repeated", typical),
            self.figures("tokens shuffled within rows", real.gather(1, places)),
        ]

    def teacher(self, num: int, steps: int, top_p: float) -> dict[str, Any]:
        """Samples of the teacher with a nucleus."""
        assert self.assembly.spec is not None
        sampler = Ancestral(
            Ancestral.Config(top_p=top_p), process=self.assembly.process, length=self.assembly.spec.length
        )
        tokens = sampler.sample(self.denoiser, Draws.for_range(0, 0, 0, num), num_steps=steps).tokens
        return self.figures(f"teacher, {steps} steps, top-p {top_p:g}", tokens)


def print_row(row: dict[str, Any]) -> dict[str, Any]:
    """Print one row of figures and return it."""
    print(
        f"{row['name']:34} Gradient Moment {row['gradient_moment']:8.3f} +- {row['standard_error']:.3f}"
        f"  perplexity {row['perplexity']:7.2f}  token entropy {row['token_entropy']:.3f}",
        flush=True,
    )
    return row


if __name__ == "__main__":
    raise SystemExit(main())
