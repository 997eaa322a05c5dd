"""Terminal, log, pictures and reports, from a run made by hand."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from dmmd_core import Batch
from dmmd_reporting import plugin
from dmmd_reporting.log import Log, loss_curves, read_log, time_shares
from dmmd_reporting.nearest import nearest_training_images
from dmmd_reporting.rate import Rate
from dmmd_reporting.summary import summarize
from dmmd_reporting.terminal import Terminal

EVIL = "<script>alert(1)</script> | [x](y) `z`"
VOID = {"meta", "img", "br", "hr", "link", "input"}
METRICS = {"frechet_distance": True, "token_entropy": None, "distinct_samples": False}


CIRCUMSTANCES = {
    "learning_rate": 1e-3, "samples_per_second": 50.0, "tokens_per_second": 3200.0, "student_forward_time_share": 0.25,
    "backward_time_share": 0.5, "data_time_share": 0.125, "peak_process_memory_gib": 0.75,
}  # fmt: skip


class FakeRun(SimpleNamespace):
    """What observers use of a run."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def fake_results() -> list[dict[str, Any]]:
    """Teacher and student at several numbers of steps; the student is best at 8, and for one metric at 1."""
    jobs = [("train", 0), ("test", 0), ("teacher", 1), ("teacher", 16), ("student", 1), ("student", 8)]
    rows = []
    for place, (model, steps) in enumerate(jobs):
        for metric, lower in METRICS.items():
            rows.append(
                {
                    "model": model, "num_steps": steps, "trained_num_steps": 8 if model == "student" else None,
                    "metric": metric, "value": 10.123 - place, "standard_error": 0.25 if lower else None,
                    "num_samples": 100, "seed": 0, "sampler": "ancestral" if steps else None, "dtype": "float32",
                    "ema": True, "reference": "digits/test" if lower else "", "lower_is_better": lower,
                }
            )  # fmt: skip
    return rows


class Digitlike:
    """A codec whose tokens are the grey values of 8x8 images."""

    media = "image"

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Turn tokens into images."""
        return tokens.reshape(-1, 1, 8, 8).to(torch.uint8)


class Lines:
    """A codec of text."""

    media = "text"

    def decode(self, tokens: torch.Tensor) -> list[str]:
        """Turn tokens into hostile lines."""
        return [f"</pre>```{row}" for row in range(len(tokens))]


def fake_run(directory: Path, name: str = "digits", codec: Any = None) -> FakeRun:
    """A run that has been evaluated, with the files that the core writes."""
    directory.mkdir(exist_ok=True)
    versions = {
        "packages": {"dmmd": "0.1.0"},
        "plugins": [{"plugin": "reporting", "package": "dmmd", "version": "0.1.0"}],
        "components": {"metric:frechet_distance": "metrics"},
    }
    (directory / "plugins.json").write_text(json.dumps(versions))
    (directory / "recipe.yaml").write_text(yaml.safe_dump({"schema": 1, "name": name}))
    tokens = torch.arange(40 * 64).reshape(40, 64) % 256
    codec = codec or Digitlike()
    images = tokens.reshape(-1, 1, 8, 8).to(torch.uint8)
    data = SimpleNamespace(
        codec=codec, size=lambda split: 40, take=lambda split, rows: Batch(tokens[rows]),
        take_originals=lambda split, rows: images[rows],
    )  # fmt: skip
    return FakeRun(
        directory=directory, device=torch.device("cpu"), precision=torch.float32, choices={"attention": "sdpa"},
        engine={"compile": "off"}, sizes={"teacher": 1234567, "student": 1300000}, stage="", stage_steps=0,
        stages={"distill": {"seconds": 61.0}, "evaluate": {"seconds": 2.0}},
        plan=SimpleNamespace(recipe=SimpleNamespace(name=name, distill=SimpleNamespace(num_steps=8))),
        metrics={
            "schema": 1, "facts": {"classifier_accuracy": 0.98765}, "results": fake_results(),
            "timing": {"distill": 61.0, "evaluate": 2.0, "sampling": {"student_8": 0.5}},
        },
        assembly=SimpleNamespace(data=data), samples=lambda model, steps: Batch(tokens), say=print, quiet=False,
    )  # fmt: skip


def play(run: FakeRun, error: BaseException | None = None) -> None:
    """Call the hooks as a run does."""
    plugin.dmmd_before_run(run=run)
    run.stage, run.stage_steps = "distill", 40
    for step in range(10, 41, 10):
        plugin.dmmd_after_step(run=run, step=step, metrics={"student_loss": 1 / step, **CIRCUMSTANCES})
    plugin.dmmd_after_checkpoint(run=run, step=40, path=run.directory / "checkpoints")
    plugin.dmmd_after_stage(run=run, stage="distill", results={})
    if error is None:
        run.stage, run.stage_steps = "evaluate", 6
        plugin.dmmd_after_step(run=run, step=6, metrics={"frechet_distance": float("nan")})
        plugin.dmmd_after_stage(run=run, stage="evaluate", results={})
    plugin.dmmd_after_run(run=run, error=error)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    """A run of a hostile name with its reports."""
    run = fake_run(tmp_path_factory.mktemp("run"), EVIL)
    play(run)
    return run


class Balance(HTMLParser):
    """Collects tags and notes what does not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_html_is_well_formed_and_embeds_every_picture(finished: FakeRun) -> None:
    text = (finished.directory / "report.html").read_text()
    parser = Balance()
    parser.feed(text)
    assert parser.wrong == []
    assert parser.open == []
    sources = re.findall(r'src="([^"]{0,22})', text)
    # Plots, one training curve, real data, five sample grids, and one beside its nearest training images.
    assert len(sources) == len(METRICS) + 1 + 7
    assert set(sources) == {"data:image/png;base64,"}


def test_html_refers_to_nothing_outside(finished: FakeRun) -> None:
    text = (finished.directory / "report.html").read_text()
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import|<link|<script", text)


def test_hostile_recipe_name_is_escaped_in_both_reports(finished: FakeRun) -> None:
    html = (finished.directory / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    markdown = (finished.directory / "report.md").read_text()
    assert markdown.splitlines()[0] == r"# &lt;script>alert(1)&lt;/script> \| \[x\](y) \`z\`"


def test_markdown_lists_every_result_with_its_provenance(finished: FakeRun) -> None:
    lines = (finished.directory / "report.md").read_text().splitlines()
    for row in finished.metrics["results"]:
        start = f"| {row['model']} | {row['num_steps'] or ''} | {row['metric'].replace('_', ' ')} | {row['value']:.4g}"
        line = next(line for line in lines if line.startswith(start))
        assert line.endswith(f"| {row['sampler'] or ''} | float32 | True | 0 |")
    rows = [line.count("|") for line in lines if re.match(r"\| (student|teacher|training data|held-out data) \|", line)]
    assert len(rows) == 6 + sum(row["num_steps"] > 0 for row in finished.metrics["results"])


def test_markdown_links_files_that_exist(finished: FakeRun) -> None:
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (finished.directory / "report.md").read_text())
    assert len(links) == len(METRICS) + 1 + 7
    for link in links:
        with Image.open(finished.directory / link) as image:
            assert min(image.size) > 200


def test_sample_grid_shows_whole_enlarged_tiles_set_apart(finished: FakeRun) -> None:
    with Image.open(finished.directory / "samples" / "student_8.png") as image:
        assert image.size == (6 * (48 + 6) + 6, 6 * (48 + 6) + 6)  # six by six tiles of 48 pixels, 6 between
        assert {image.getpixel((x, 3)) for x in range(image.size[0])} == {(255, 255, 255)}
        assert image.getpixel((6, 6)) == (0, 0, 0)


def test_samples_stand_beside_their_nearest_training_images(finished: FakeRun) -> None:
    markdown = (finished.directory / "report.md").read_text()
    assert "student, 8 steps, as trained: each sample, and on its right the nearest of 40 training images" in markdown
    with Image.open(finished.directory / "samples" / "student_8_nearest.png") as image:
        pixels = torch.from_numpy(np.array(image))
    step = 48 + 6  # the samples of this run are the training images themselves: left and right are equal
    for column in (0, 2, 4):
        left, right = (pixels[6:, 6 + step * (column + k) :][:48, :48] for k in (0, 1))
        assert torch.equal(left, right)
    assert not torch.equal(pixels[6:54, 6:54], pixels[6:54, 6 + 2 * step :][:, :48])


@pytest.mark.parametrize(("side", "bytes_allowed", "looked_at"), [(8, 2**28, 50), (40, 2**28, 50), (8, 8 * 8 * 7, 7)])
def test_nearest_images_are_nearest(
    monkeypatch: pytest.MonkeyPatch, side: int, bytes_allowed: int, looked_at: int
) -> None:
    monkeypatch.setattr("dmmd_reporting.nearest._POOL_BYTES", bytes_allowed)
    monkeypatch.setattr("dmmd_reporting.nearest._ROWS", 9)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 236, (50, 1, 4, 4), generator=generator)
    images = coarse.repeat_interleave(side // 4, -1).repeat_interleave(side // 4, -2).byte()
    rows = torch.linspace(0, 49, looked_at).long()
    wanted = rows[torch.tensor([3, 0, looked_at - 1])]
    samples = images[wanted] + torch.randint(0, 20, (3, 1, side, side), generator=generator).byte()
    for originals in (images, None):  # kept, or to be decoded
        data: Any = SimpleNamespace(
            codec=SimpleNamespace(decode=lambda tokens: images[tokens.flatten()]),
            size=lambda split: 50,
            take=lambda split, rows: Batch(rows.unsqueeze(1)),
            take_originals=lambda split, rows, kept=originals: None if kept is None else kept[rows],
        )
        found, count = nearest_training_images(data, samples)
        assert count == looked_at
        assert torch.equal(found, images[wanted])


def test_text_samples_are_shown_and_cannot_break_out(tmp_path: Path) -> None:
    run = fake_run(tmp_path, codec=Lines())
    play(run)
    assert len((tmp_path / "samples" / "teacher_16.txt").read_text().splitlines()) == 40
    assert "&lt;/pre&gt;```0" in (tmp_path / "report.html").read_text()
    assert "````text\n</pre>```0\n" in (tmp_path / "report.md").read_text()


def test_plots_leave_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    play(fake_run(tmp_path))
    assert dict(matplotlib.rcParams) == before


def test_log_lines_parse_and_tell_the_whole_run(finished: FakeRun) -> None:
    text = (finished.directory / "log.jsonl").read_text()
    events = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [event["event"] for event in events] == [
        "start", *["step"] * 4, "checkpoint", "stage", "step", "stage", "end"
    ]  # fmt: skip
    assert events[0]["versions"] == {"dmmd": "0.1.0"}
    assert events[0]["choices"] == {"attention": "sdpa"}
    assert events[-3]["metrics"] == {"frechet_distance": "nan"}
    assert events[-1]["error"] is None


def test_log_goes_on_after_a_torn_line_and_counts_a_step_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path)
    log.write("step", stage="distill", step=5, metrics={"loss": 2.0})
    log.close()
    with path.open("a") as file:
        file.write('{"event": "step", "st')
    log.write("step", stage="distill", step=5, metrics={"loss": 1.0})
    log.close()
    assert [event["step"] for event in read_log(path)] == [5, 5]
    assert loss_curves(path) == {"distill": {"loss": {5: 1.0}}}


def test_failed_run_logs_the_error_and_reports_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run(tmp_path)
    play(run, RuntimeError("out of luck"))
    assert list(read_log(tmp_path / "log.jsonl"))[-1]["error"] == "RuntimeError: out of luck"
    assert not (tmp_path / "report.html").exists()
    assert capsys.readouterr().out == ""


def test_missing_report_is_written_when_a_finished_run_is_run_again(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    plugin.dmmd_before_run(run=run)
    plugin.dmmd_after_run(run=run, error=None)
    assert (tmp_path / "report.html").exists()


def test_nothing_of_a_run_is_kept_after_its_end(tmp_path: Path) -> None:
    play(fake_run(tmp_path))
    assert len(plugin._reporting._reporters) == 0


def watched(run: FakeRun, *, interactive: bool) -> tuple[Terminal, io.StringIO, list[float]]:
    """A terminal on a string, and the clock it reads."""
    now = [0.0]
    output = io.StringIO()
    console = Console(file=output, force_terminal=interactive, force_interactive=interactive, width=140)
    return Terminal(run, console, seconds=lambda: now[0]), output, now


def test_plain_lines_have_rate_and_eta_and_come_seldom(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    terminal, output, now = watched(run, interactive=False)
    run.stage, run.stage_steps = "distill", 1000
    for step in range(50, 1001, 50):
        now[0] = step / 10
        terminal.step(run, step, {"student_loss": 0.5})
    lines = output.getvalue().splitlines()
    assert lines[0] == "distill: 50/1000  10.0 it/s  ETA 1:35  student_loss 0.5"
    assert lines[-1] == "distill: 1000/1000  10.0 it/s  ETA 0:00  student_loss 0.5"
    assert len(lines) == 8  # the first, the last, and one for every 15 of 100 seconds


def test_plain_lines_show_what_is_learned_and_not_how_fast(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    terminal, output, now = watched(run, interactive=False)
    run.stage, run.stage_steps, now[0] = "teacher", 100, 5.0
    terminal.step(run, 50, {"network_loss": 1.5, **CIRCUMSTANCES})
    assert output.getvalue() == "teacher: 50/100  10.0 it/s  ETA 0:05  network_loss 1.5\n"


def test_reports_tell_where_the_time_went_and_the_memory(finished: FakeRun) -> None:
    markdown = (finished.directory / "report.md").read_text()
    table = markdown.partition("## Where the time of training went\n\n")[2].split("\n\n")[0].splitlines()
    assert table == [
        "| part | distill |", "| --- | ---: |", "| student forward | 25.0% |", "| backward | 50.0% |",
        "| data | 12.5% |", "| rest | 12.5% |",
    ]  # fmt: skip
    assert "- peak process memory: 0.75 GiB\n" in markdown
    assert "- distill: tokens per second: 3200\n" in markdown
    html = (finished.directory / "report.html").read_text()
    assert '<td class="text">student forward</td><td>25.0%</td>' in html


def test_time_shares_are_weighted_by_the_time_between_log_lines() -> None:
    curves = {
        "distill": {
            "samples_per_second": {10: 100.0, 20: 25.0},  # the second line took four times as long
            "student_forward_time_share": {10: 0.5, 20: 0.25},
            "auxiliary_forward_time_share": {20: 0.5},
        },
        "teacher": {"network_loss": {10: 1.0}},
    }
    assert time_shares(curves) == {
        "distill": {
            "student forward": pytest.approx(0.3), "auxiliary forward": pytest.approx(0.4), "rest": pytest.approx(0.3)
        }
    }  # fmt: skip


def test_resumed_stage_does_not_count_the_steps_of_the_earlier_run(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    (tmp_path / "checkpoints" / "distill").mkdir(parents=True)
    terminal, output, now = watched(run, interactive=False)
    run.stage, run.stage_steps = "distill", 1000
    for now[0], step in ((1.0, 900), (21.0, 920)):
        terminal.step(run, step, {})
    first, second = output.getvalue().splitlines()
    assert first.split("  ")[1:3] == ["- it/s", "ETA -:--"]
    assert second.split("  ")[1:3] == ["1.0 it/s", "ETA 1:20"]


def test_slow_stages_show_seconds_per_step(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    terminal, output, now = watched(run, interactive=False)
    run.stage, run.stage_steps = "teacher", 3
    now[0] = 20.0
    terminal.step(run, 1, {})
    assert output.getvalue().split("  ")[1:3] == ["20.0 s/it", "ETA 0:40"]


def test_rate_forgets_a_slow_beginning() -> None:
    rate = Rate(1000)
    for step in range(100):
        rate.report(step, 100.0 * step if step < 50 else 5000.0 + step)
    assert rate.per_second == pytest.approx(1.0)


def test_bar_and_messages_share_one_console(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    terminal, output, now = watched(run, interactive=True)
    run.stage, run.stage_steps = "distill", 100
    now[0] = 5.0
    terminal.step(run, 50, {"student_loss": 0.5})
    run.say("[a message]")
    terminal.stop()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert re.search(r"distill .*50/100 +10\.0 it/s  ETA 0:05 .*student_loss 0\.5", text)
    assert "[a message]" in text


def test_hooks_keep_the_console_that_messages_go_to(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    plugin.dmmd_before_run(run=run)
    say = run.say
    run.stage, run.stage_steps = "distill", 2
    plugin.dmmd_after_step(run=run, step=1, metrics={})
    assert run.say == say
    plugin.dmmd_after_run(run=run, error=RuntimeError())


def test_closing_table_marks_the_best_student_and_names_the_report(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    terminal, _, _ = watched(run, interactive=False)
    output = io.StringIO()
    terminal.closing_table(run, Console(file=output, width=60))
    lines = output.getvalue().splitlines()
    (best,) = [line for line in lines if re.search(r"student +8 .*\*", line)]
    assert best.count("*") == 1  # the entropy has no direction, and more distinct samples came of one step
    assert any("5.123 ± 0.2 *" in line for line in lines)
    assert "time: distill 1:01, evaluate 0:02" in lines
    assert f"report: {tmp_path / 'report.html'}" in lines


def test_narrow_terminals_get_all_columns_below_each_other(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    terminal, _, _ = watched(run, interactive=False)
    output = io.StringIO()
    terminal.closing_table(run, Console(file=output, force_terminal=True, width=45, color_system=None))
    assert sum("model" in line for line in output.getvalue().splitlines()) == len(METRICS)


def test_summary_keeps_two_references_of_one_metric_apart() -> None:
    rows = fake_results()
    more = [{**row, "reference": "digits/train"} for row in rows if row["metric"] == "frechet_distance"]
    columns = summarize([*rows, *more]).columns
    assert {"frechet_distance (digits/test)", "frechet_distance (digits/train)"} <= set(columns)


def test_figure_that_is_not_a_number_is_never_the_best() -> None:
    rows = fake_results()
    for row in rows:
        if (row["model"], row["num_steps"]) == ("student", 8):
            row["value"] = float("nan")
    assert not any(cell.best for row in summarize(rows).rows if row.num_steps == 8 for cell in row.cells)
