"""Where along the way does a student lose? Samples whose steps are in part the student's and in part the teacher's.

    python benchmarks/weak_steps.py runs/text_quickstart ssssssss ttttssss sttttttt

One letter a step from t = 1 to 0: ``s`` is one step of the student, ``t`` the same stretch of time in several small
steps of the teacher. A step is as good as the teacher's where ``s`` in place of ``t`` costs nothing. Takes data,
reference language model and both models of a finished text run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from gradient_moment import Judge, print_row
from torch import Tensor

from dmmd_core import Condition, Draws, load_model_weights
from dmmd_samplers.ancestral import Ancestral

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Parse the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a finished text run")
    parser.add_argument("steps", nargs="+", type=letters, help="who takes each step, for example ttttssss")
    parser.add_argument("--num", type=int, default=1500, help="sequences per figure")
    parser.add_argument("--parts", type=int, default=8, help="steps of the teacher in place of one of the student")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "weak_steps.json")
    options = parser.parse_args()
    judge = Mixed(options.run)
    rows = [print_row(judge.mixture(steps, options.num, options.parts)) for steps in options.steps]
    content = {
        "command": f"python benchmarks/weak_steps.py RUN {' '.join(options.steps)} --num {options.num}",
        "recipe": judge.recipe.name,
        "seed": judge.recipe.run.seed,
        "reference": judge.reference.reference_name,
        "rows": rows,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def letters(text: str) -> str:
    """A string of ``s`` and ``t``, as argparse wants its types."""
    if not text or set(text) - {"s", "t"}:
        raise argparse.ArgumentTypeError(f"'{text}' is not made of s (student) and t (teacher)")
    return text


class Mixed(Judge):
    """The judge of a run with its student beside its teacher."""

    def __init__(self, run: Path) -> None:
        super().__init__(run)
        self.student = self.assembly.generator(self.assembly.backbone()).eval()
        load_model_weights(run, "student", self.student, self.data.codec)

    def mixture(self, steps: str, num: int, parts: int) -> dict[str, Any]:
        """Figures of samples whose steps go as the letters say."""
        return self.figures(steps, self.tokens(steps, num, parts))

    def tokens(self, steps: str, num: int, parts: int) -> Tensor:
        """The samples themselves, int64 ``[num, length]``; `parts` steps of the teacher for one letter."""
        assert self.assembly.spec is not None
        process, length = self.assembly.process, self.assembly.spec.length
        sampler = self.assembly.sampler
        if not isinstance(sampler, Ancestral):
            raise SystemExit(
                f"the steps of {type(sampler).__name__} cannot be mixed; this is for the sampler 'ancestral'"
            )
        draws = Draws.for_range(0, 0, 0, num)
        z = process.prior_sample(length, draws.at_step(0))
        for number, letter in enumerate(steps):
            model, cuts = (self.student, 1) if letter == "s" else (self.denoiser, parts)
            for part in range(cuts):
                whole = len(steps) * cuts
                left = torch.tensor(
                    [1 - (number * cuts + part + after) / whole for after in (0, 1)], dtype=torch.float64
                )
                t, s = (time.expand(num) for time in sampler.step_times(left))
                z = sampler.step(model, z, s, t, draws.at_step(number * parts + part), Condition())
        return z


if __name__ == "__main__":
    raise SystemExit(main())
