"""Reports read back: what the records say, in a browser without network, on a phone, with hostile names."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.report import latency, write
from jobs.report.figures import paper_marks, speed
from jobs.report.figures import trade_off as figure_of
from jobs.report.files import table
from jobs.report.page import columns, page, row
from jobs.report.reader import Reader
from jobs.report.values import Content, Cost, Curve, Module, Shown, worker_hours
from pipeline.retrain.decisions import Decision
from pipeline.retrain.ticks import Ticks
from pipeline.store.pieces import Pieces
from pipeline.store.records import Student, SweepRecord, Trial, read_record
from pipeline.store.step_store import StepDir
from pipeline.sweep.queue import TRIALS

SWEEP = "5" * 32
HOSTILE = "</script><img src=x onerror=\"document.body.dataset.hacked='yes'\"><b>{{7*7}}</b>=cmd()"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REQUIRED = bool(os.environ.get("BITMILL_REQUIRE_BROWSER"))  # as in continuous integration, where nothing is skipped
browser = pytest.mark.skipif(
    CHROMIUM is None and not REQUIRED, reason="needs Debian's package chromium: apt-get install chromium"
)


def model(key, size, perplexity, **given):
    """Scored `perplexity` on validation; the test split says the opposite."""
    validation = {} if perplexity is None else {"perplexity": perplexity, "kl_nats": perplexity / 100}
    metrics = {name: 1 / value for name, value in validation.items()}
    fields = {
        "label": f"model {key}",
        "bits": "2-2-8",
        "recipe": {"bits": "2-2-8", "lr": 0.002},
        "status": "done",
        "ratio": 10.0,
        "version": f"chat/{key}",
        "curve": Curve(((1, 5.0), (2, 4.5)), ((0, 5.5), (2, 4.4))),
        "modules": (Module("transformer.h.0.mlp", 2, 4096, 1.1, 0.3), Module("transformer.wte", 4, 8192)),
        "costs": (Cost("distill", 30.0, 2), Cost("pack", None)),
    }
    return Shown(key=key, metrics=metrics, validation=validation, packed_bytes=size, **{**fields, **given})


@pytest.fixture
def trade_off():
    """Five models: three on the front (two of them equal), one beaten, one failed."""
    shown = (
        model("1", 100_000, 30.0),
        model("2", 100_000, 30.0),
        model("3", 300_000, 20.0),
        model("4", 1_000_000, 25.0),
        model("5", None, None, status="failed", version="", failure="the loss is not finite", costs=()),
    )
    return Content(
        title="chat",
        kind="sweep",
        key=SWEEP,
        measure="perplexity",
        protocol="block length 128",
        teacher_bytes=1_600_000,
        teacher_parameters=400_000,
        teacher={"perplexity": 1 / 19.0},
        teacher_validation={"perplexity": 19.0},
        shown=shown,
        shared_costs=(Cost("tokenize", 10.0), Cost("finetune", 90.0, 2)),
        provenance={"torch": "2.13.0"},
    )


def decided(day, outcome, version, perplexity, reason="better by 0.02"):
    scores = {"challenger": {"perplexity": perplexity}, **({"champion": {"perplexity": 30.0}} if version > 1 else {})}
    given = {"decision": outcome, "reason": reason, "challenger": version, "champion": 1, "measure": "perplexity"}
    return Decision(name="chat", at=f"2026-11-{day:02}T03:00:00+00:00", scores=scores, packed_bytes=100_000, **given)


def in_browser(path: Path, folder: Path, width: int = 1200, script: str = "") -> str:
    """The DOM after the page has drawn itself, and after `script`."""
    assert CHROMIUM, "BITMILL_REQUIRE_BROWSER is set, and there is no chromium"
    text = path.read_text(encoding="utf-8")
    probe = folder / "probe.html"
    probe.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [
        *(
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}",
        ),
        *(f"--window-size={width},900", "--virtual-time-budget=30000", "--dump-dom", probe.as_uri()),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


class Attributes(html.parser.HTMLParser):
    """All tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_front_keeps_ties_and_leaves_failures_out(trade_off):
    assert [one.key for one in trade_off.best] == ["1", "2", "3"]
    higher = replace(
        trade_off,
        measure="accuracy",
        shown=tuple(
            replace(one, validation={"accuracy": one.validation.get("perplexity", 0) / 100}) for one in trade_off.shown
        ),
    )
    assert [one.key for one in higher.best] == ["1", "2"]  # larger is better, so the smallest beat all


def test_validation_draws_and_the_test_split_is_in_the_table(trade_off):
    points = {(x, y) for trace in figure_of(trade_off)["data"] for x, y in zip(trace["x"], trace["y"], strict=True)}
    assert points >= {(model.packed_bytes, model.validation["perplexity"]) for model in trade_off.shown[:4]}
    assert (1_600_000, 19.0) in points
    assert figure_of(trade_off)["layout"]["yaxis"]["title"]["text"] == "perplexity on validation (lower is better)"
    cells = {
        one.key: dict(zip(columns(trade_off), row(one, trade_off)["cells"], strict=True)) for one in trade_off.shown
    }
    assert [cells[key]["perplexity"][1] for key in "134"] == [1 / 30, 1 / 20, 1 / 25]
    assert [cells[key]["perplexity on validation"][1] for key in "134"] == [30, 20, 25]
    assert cells["5"]["perplexity on validation"] == ("", None)
    assert "perplexity 0.03333 on test" in page(trade_off)


def test_the_page_asks_for_nothing_from_anywhere(trade_off):
    text = page(trade_off)
    for tag, attributes in Attributes(text).found:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert "default-src 'none'" in text
    assert len(text) < 2_500_000
    for shown in ("bitmill pull chat/1 chat-1", "the loss is not finite", "block length 128", "shared"):
        assert shown in text


def test_a_reference_of_the_paper_is_relative_to_this_teacher(trade_off):
    marks = {mark.label.split()[1]: mark for mark in paper_marks(trade_off)}
    assert marks["2-2-8"].value == pytest.approx(19.0 * 17.30 / 14.48)
    assert marks["2-2-8"].packed_bytes == pytest.approx(1_600_000 / 14.38, rel=0.01)
    assert paper_marks(replace(trade_off, measure="bits_per_byte")) == []


def test_hours_count_workers(trade_off):
    assert worker_hours(trade_off.shared_costs) == pytest.approx(190 / 3600)
    assert worker_hours([Cost("pack", None)]) == 0


def test_the_table_holds_everything_unrounded_and_runs_nothing(trade_off):
    hostile = replace(trade_off, shown=(model("9", 123, 1 / 3, label="=HYPERLINK(1)", recipe={"+x": "@y"}),))
    (row,) = csv.DictReader(io.StringIO(table(hostile)))
    assert row["model"] == "'=HYPERLINK(1)"
    assert row["'+x"] == "'@y"
    assert (float(row["perplexity"]), float(row["validation_perplexity"])) == (1 / (1 / 3), 1 / 3)
    assert (row["packed_bytes"], row["front"], row["version"]) == ("123", "True", "chat/9")
    assert len(table(trade_off).splitlines()) == 6


def test_hostile_names_stay_text(trade_off):
    shown = (
        model("1", 10, 1.0, label=HOSTILE, failure=HOSTILE, recipe={HOSTILE: HOSTILE}, version=HOSTILE),
        *trade_off.shown,
    )
    text = page(replace(trade_off, title=HOSTILE, protocol=HOSTILE, shown=shown))
    tags = Attributes(text).found
    assert not [tag for tag, attributes in tags if "onerror" in attributes]
    assert len([tag for tag, _ in tags if tag == "script"]) == 3
    assert "{{7*7}}" in text
    assert HOSTILE not in text


@browser
def test_a_browser_draws_it_and_sorts_it(trade_off, tmp_path):
    decisions = (decided(1, "promoted", 1, 30.0), decided(2, "rejected", 2, 31.0), decided(3, "rolled back", 2, 29.0))
    said = "the server is away"
    quiet = Ticks(outcome="failed", reason=said, count=4, at=decisions[1].at, last=decisions[2].at, after=2)
    write(replace(trade_off, decisions=decisions, ticks=(quiet,)), tmp_path / "report.html")
    press = (
        "const press = (n) => document.querySelectorAll('#models th button')[n].click();"
        "press([...document.querySelectorAll('#models th')].findIndex((h) => h.innerText.startsWith('perplexity')));"
    )
    dom = in_browser(tmp_path / "report.html", tmp_path, script=press)
    assert 'data-drawn="yes"' in dom
    assert dom.count('class="main-svg"') >= 9
    assert "challenger, rejected" in dom
    decided_rows = re.findall(r"<td>(promoted|rejected|rolled back|failed)</td>", dom)
    assert decided_rows == ["promoted", "rejected", "failed", "rolled back"]
    assert f"4 ticks, the last at {quiet.last}: the server is away" in dom
    body = dom[dom.index("<tbody>") : dom.index("</tbody>")]
    assert re.findall(r">model (\d)<", body) == ["1", "2", "4", "3", "5"]  # what has no perplexity comes last
    assert 'aria-sort="ascending"' in dom


def test_ticks_alone_are_a_table_without_a_picture(trade_off, tmp_path):
    quiet = Ticks(outcome="busy", reason=HOSTILE, count=1, at="2026-11-27", last="2026-11-27", after=0)
    write(replace(trade_off, ticks=(quiet,)), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "What was decided" in text
    assert 'id="history"' not in text
    assert "<td>busy</td>" in text
    assert HOSTILE not in text


@browser
def test_on_a_phone_nothing_is_wider_than_the_screen_and_hostile_names_do_nothing(trade_off, tmp_path):
    shown = (model("1", 10, 1.0, label=HOSTILE, recipe={HOSTILE: HOSTILE}), *trade_off.shown)
    decisions = (decided(1, "promoted", 1, 30.0), decided(2, "rejected", 2, 31.0, HOSTILE))
    write(replace(trade_off, title=HOSTILE, shown=shown, decisions=decisions), tmp_path / "report.html")
    measure = (
        "new MutationObserver(() => { document.body.dataset.widths = "
        "`${document.documentElement.scrollWidth}<=${window.innerWidth}`; })"
        ".observe(document.body, {attributes: true, attributeFilter: ['data-drawn']});"
    )
    dom = in_browser(tmp_path / "report.html", tmp_path, 400, measure)
    wide, screen = re.search(r'data-widths="(\d+)&lt;=(\d+)"', dom).groups()
    assert int(wide) <= int(screen) <= 500
    assert 'data-drawn="yes"' in dom
    assert "data-hacked" not in dom


def test_files_lie_side_by_side(trade_off, tmp_path):
    files = write(trade_off, tmp_path / "new" / "report.html")
    assert {Path(path).name for path in files.values()} == {"report.html", "report.png", "report.csv"}
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_report_of_nothing_finished_is_a_report(trade_off, tmp_path):
    nothing = replace(trade_off, shown=trade_off.shown[-1:], teacher={}, teacher_validation={}, shared_costs=())
    write(nothing, tmp_path / "report.html")
    assert "No model was finished" in (tmp_path / "report.html").read_text()


@pytest.fixture
def reader(finished):
    resources = finished.plan.config.resources
    return Reader(resources.storage_uri, resources.local_cache_dir)


def test_a_run_is_read_from_its_records(finished, reader):
    found = reader.content(finished.plan.run_key)
    (one,) = found.shown
    evaluation, package, student = (finished.record(stage) for stage in ("evaluate", "pack", "distill"))
    assert (found.kind, found.title, found.measure) == ("run", "tiny at 2-2-8", "perplexity")
    assert (found.teacher, one.metrics) == (evaluation.teacher, evaluation.student)
    assert {"teacher": found.teacher_validation, "student": one.validation} == evaluation.validation
    assert (one.packed_bytes, one.ratio) == (package.size.packed_bytes, package.size.ratio)
    assert (one.version, one.aliases, one.command) == ("tiny/1", ("champion",), "bitmill pull tiny/1 tiny-1")
    assert one.recipe["lr"] == student.recipe["distill"]["lr"]
    assert len(one.curve.train) == student.steps
    assert one.curve.validation[-1][0] == student.steps
    assert len(one.modules) == 9  # four matrices of two layers, and the embedding
    assert {module.bits for module in one.modules} == {2}
    assert all(module.gamma > 0 for module in one.modules)
    stages = [cost.stage for cost in (*found.shared_costs, *one.costs)]
    assert stages == ["tokenize", "finetune", "cache", "distill", "evaluate", "pack", "register"]
    assert worker_hours(found.shared_costs) > 0
    unregistered = reader.content(package.key)
    assert unregistered.shown[0].version == ""
    assert package.key in unregistered.shown[0].command


def sweep_of(finished, store: Path) -> SweepRecord:
    """A sweep of a finished trial, a stopped and a failed one, committed to a store that has the first one's steps."""
    evaluation, package = finished.record("evaluate"), finished.record("pack")
    step_keys = {step.name: step.key for step in finished.plan.steps}
    done = Trial(
        key=finished.plan.run_key,
        bits="2-2-8",
        values={"quant.bits": "2-2-8"},
        status="done",
        teacher=evaluation.teacher,
        student=evaluation.student,
        validation=evaluation.validation,
        size=package.size,
        version={"name": "tiny", "version": 1, "aliases": ["champion"]},
        step_keys=step_keys,
    )
    shared = {stage: step_keys[stage] for stage in ("tokenize", "finetune", "cache")}
    stopped = Trial(
        key="e" * 32, bits="4-4-8", values={"quant.bits": "4-4-8"}, status="stopped", seconds=36, step_keys=shared
    )
    failed = Trial(key="f" * 32, bits="8-8-8", values={"distill.lr": 1e9}, status="failed", failure="not finite")
    record = SweepRecord(
        key=SWEEP,
        stage_version=1,
        recipe={},
        inputs={},
        provenance={},
        name="tiny",
        objectives=("gap", "bytes"),
        trials=(failed, stopped, done),
        front=(done.key,),
    )
    folder = store / "sweep" / SWEEP
    folder.mkdir(parents=True)
    (folder / "record.json").write_bytes(record.to_json())
    return record


def test_a_sweep_is_read_with_its_stopped_and_failed_trials(finished, cloned):
    record = sweep_of(finished, cloned / "store")
    done = CliRunner().invoke(
        app,
        ["report", SWEEP, "--out", str(cloned / "out.html"), "--storage-uri", str(cloned / "store"), "--json"],
    )
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["front"] == list(record.front)
    text = (cloned / "out.html").read_text()
    for shown in ("1 of 3 models finished, 1 stopped, 1 failed", "not finite", "bitmill pull tiny/1 tiny-1"):
        assert shown in text
    rows = list(csv.DictReader((cloned / "out.csv").open()))
    assert [row["status"] for row in rows] == ["failed", "stopped", "done"]
    assert float(rows[1]["worker_hours"]) == pytest.approx(0.01)
    assert [row["front"] for row in rows] == ["False", "False", "True"]


def test_a_sweep_that_is_not_finished_is_read_as_far_as_it_came(finished, cloned):
    record = sweep_of(finished, cloned / "store")
    (cloned / "store" / "sweep" / SWEEP / "record.json").unlink()
    with StepDir(str(cloned / "store"), "sweep", SWEEP, str(cloned / "scratch")).hold(False, print) as step_dir:
        for index, trial in enumerate(record.trials):
            Pieces(step_dir, TRIALS).put(trial.key, {"index": index, "trial": trial.model_dump(mode="json")})
    found = Reader(str(cloned / "store"), str(cloned / "scratch")).content(SWEEP)
    assert found.title == "sweep, not finished"
    assert [one.status for one in found.shown] == ["failed", "stopped", "done"]
    assert [one.key for one in found.best] == list(record.front)


def test_the_picture_shows_the_objective_that_the_sweep_minimised(finished, cloned):
    record = sweep_of(finished, cloned / "store")
    path = cloned / "store" / "sweep" / SWEEP / "record.json"
    path.write_bytes(record.model_copy(update={"objectives": ("bytes", "kl_nats")}).to_json())
    found = Reader(str(cloned / "store"), str(cloned / "scratch")).content(SWEEP)
    assert found.measure == "kl_nats"
    assert [one.key for one in found.best] == list(record.front)
    assert "kl_nats" in page(found)


def test_the_front_of_a_sweep_is_the_one_that_it_recorded(trade_off):
    chosen = replace(trade_off, chosen=frozenset({"4", "3"}))
    assert [one.key for one in chosen.best] == ["3", "4"]
    assert "bitmill pull chat/4 chat-4" in page(chosen)
    assert "bitmill pull chat/1 chat-1" not in page(chosen)
    marked = next(trace for trace in figure_of(chosen)["data"] if trace["name"] == "on the front")
    assert list(marked["x"]) == [300_000, 1_000_000]


def test_every_teacher_of_a_sweep_is_paid_for(finished, cloned, run_flow, tiny_config):
    first = sweep_of(finished, cloned / "store").trials[-1]
    other = run_flow(tiny_config(cloned, finetune={"lr": 1e-3}), until="pack")
    step_keys = {step.name: step.key for step in other.plan.steps}
    evaluation, package = other.record("evaluate"), other.record("pack")
    metrics = {name: getattr(evaluation, name) for name in ("teacher", "student", "validation")}
    made = {"step_keys": step_keys, "version": None, "size": package.size, **metrics}
    second = first.model_copy(update={"key": "d" * 32, **made})
    path = cloned / "store" / "sweep" / SWEEP / "record.json"
    record = read_record(path.read_bytes(), SweepRecord, SWEEP)
    path.write_bytes(record.model_copy(update={"trials": (first, second)}).to_json())
    found = Reader(str(cloned / "store"), str(cloned / "scratch")).content(SWEEP)
    assert [cost.stage for cost in found.shared_costs] == ["tokenize", "finetune", "finetune", "cache", "cache"]
    assert (found.measure, found.teacher, found.teacher_validation) == ("gap", {}, {})
    for one, trial in zip(found.shown, (first, second), strict=True):
        ratio = trial.student["perplexity"] / trial.teacher["perplexity"]
        assert one.metrics["gap"] == pytest.approx(math.log(ratio))
        ratio = trial.validation["student"]["perplexity"] / trial.validation["teacher"]["perplexity"]
        assert one.validation["gap"] == pytest.approx(math.log(ratio))
    assert "finetune" in page(found)


def test_a_measured_latency_is_kept_and_drawn(finished, cloned, monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 2)
    out = cloned / "out.html"
    command = ["report", finished.plan.run_key, "--out", str(out), "--storage-uri", str(cloned / "store")]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert "What speed costs" not in out.read_text()
    done = CliRunner().invoke(app, [*command, "--latency"])
    assert done.exit_code == 0, done.stderr
    (one,) = Reader(str(cloned / "store"), str(cloned / "scratch")).content(finished.plan.run_key).shown
    assert 0 < one.latency.least_ms <= one.token_ms <= one.latency.most_ms
    assert one.latency.rounds == 2
    text = out.read_text()
    assert "What speed costs" in text
    assert f"{one.token_ms:.4g}" in text
    (row,) = csv.DictReader((cloned / "out.csv").open())
    assert float(row["token_ms"]) == one.token_ms


def test_the_front_of_speed_is_its_own(trade_off):
    def took(one, ms):
        each = latency.Latency(median_ms=ms, least_ms=ms, most_ms=ms, rounds=1, threads=1, machine="x86_64")
        return replace(one, latency=each)

    first, second, third, fourth, failed = trade_off.shown
    timed = replace(trade_off, shown=(took(first, 3.0), second, took(third, 2.0), took(fourth, 1.0), failed))
    assert [one.key for one in timed.pareto_front(lambda one: one.token_ms)] == ["4", "3"]
    figure = speed(timed)
    line = next(trace for trace in figure["data"] if trace["name"] == "front")
    assert list(line["x"]) == [1.0, 2.0]
    assert list(line["y"]) == [25.0, 20.0]
    assert speed(trade_off) is None


def test_a_damaged_history_costs_a_curve_and_not_the_report(finished, cloned):
    history = cloned / "store" / "distill" / finished.plan.step(Student).dir.key / "1" / "history.json"
    history.write_text("[")
    (one,) = Reader(str(cloned / "store"), str(cloned / "scratch")).content(finished.plan.run_key).shown
    assert one.curve == Curve()
    assert one.modules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0" * 32, "--out", "report.html"], "has no sweep or finished run of that key"),
        (["../evaluate", "--out", "report.html"], "has no sweep or finished run of that key"),
        (["KEY", "--out", "report.pdf"], "ends in .html"),
        (["KEY", "--out", "/proc/nowhere/report.html"], "cannot be written to"),
    ],
)
def test_what_cannot_be_shown_is_said_with_status_2(finished, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [finished.plan.run_key if argument == "KEY" else argument for argument in arguments]
    store = finished.plan.config.resources.storage_uri
    done = CliRunner().invoke(app, ["report", *arguments, "--storage-uri", store])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
