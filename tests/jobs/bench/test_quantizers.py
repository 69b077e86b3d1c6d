"""The bench from the command line: real runs of a few recipes, reused, interrupted, and refused where nothing works."""

from __future__ import annotations

import json
import platform
import re
import shutil
from functools import partial
from io import StringIO

import pytest
import ray
from rich.console import Console
from typer.testing import CliRunner

from jobs.bench import generated, quantizers, students
from jobs.bench.rows import ROWS, Row
from jobs.bench.summary import lines
from jobs.cli import app
from pipeline.config.run import Config
from pipeline.flow.line import LINE
from tests.conftest import ROOT
from tests.jobs.bench.test_summary import score

PNG = b"\x89PNG\r\n\x1a\n"
FEW = [row for row in ROWS if row.name in ("rounding, per_channel", "paper", "best")]
SMALL = ("--steps", 3, "--seeds", 2, "--batch-size", 4, "--workers", 0)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """`bench(...)`: `bitmill bench quantizers` in an empty directory, of three recipes."""
    monkeypatch.chdir(tmp_path)
    command = ["bench", "quantizers", "--json", *(part for row in FEW for part in ("--only", row.name))]
    return lambda *arguments: CliRunner().invoke(app, [*command, *(str(argument) for argument in arguments)])


@pytest.fixture
def small(bench, checkpoint, corpus):
    return partial(bench, "--teacher", checkpoint, "--data", corpus, *SMALL, "--set", "distill.eval_rows=4")


def records(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "bitmill-store").rglob("record.json")}


def without_date(document):
    return re.sub(r"\d{4}-\d{2}-\d{2}", "", json.dumps(document))


def test_a_bench_makes_its_table_and_the_same_command_reuses_it(small, tmp_path):
    first = small("--out", "out")
    assert first.exit_code == 0, first.stderr
    document = json.loads(first.stdout)
    assert document == json.loads((tmp_path / "out" / "quantizers.json").read_text())
    assert (document["steps"], document["batch_size"]) == (3, 4)
    (table,) = document["tables"].values()
    table = {line["row"]: line for line in table}
    assert {name: line["seeds"] for name, line in table.items()} == {"rounding, per_channel": 1, "paper": 2, "best": 2}
    assert table["paper"]["packed_bytes"] < table["best"]["packed_bytes"]  # five ternary codes a byte against four
    for name, line in table.items():
        tried = {t["rate"]: t["validation_nats"] for t in document["search"] if t["row"] == name}
        assert len(tried) == (1 if name == "rounding, per_channel" else 3)
        assert line["rate"] == min(tried, key=tried.get)
    assert {claim["met"] for claim in document["claims"]} <= {True, False, None}
    assert all(re.fullmatch(r"20\d{2}-\d{2}-\d{2}, " + platform.machine(), day) for day in document["measured"])
    assert len(document["claims"]) == 2  # of best; the rows of the others are not all here
    assert len(document["scores"]) == 5
    for name in ("paper", "best"):
        gaps = [s["student"]["perplexity"] / s["teacher"]["perplexity"] for s in document["scores"] if s["row"] == name]
        assert len(set(gaps)) == 2  # the seed shows
    for metric in ("gap_nats", "kl_nats", "top1_agreement"):
        less = table["best"]["differences"]["paper"][metric]
        assert less["low"] <= less["mean"] <= less["high"]
    for name in ("front.png", "cosine.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(PNG)
    text = (tmp_path / "out" / "quantizers.md").read_text()
    assert all(f"| {row.name} |" in text for row in FEW)

    before = records(tmp_path)
    students = 1 + 2 * 3 + 2  # rounding; two recipes at three rates; two more seeds
    assert {stage.name: sum(path.parts[-3] == stage.name for path in before) for stage in LINE} == {
        "tokenize": 1,
        "finetune": 1,
        "cache": 1,
        "distill": students,
        "evaluate": students,
        "pack": students,
        "register": 0,
    }
    second = small("--out", "out")
    assert second.exit_code == 0, second.stderr
    assert records(tmp_path) == before
    assert without_date(json.loads(second.stdout)) == without_date(document)
    more = small("--out", "twice", "--bits", "2-2-8", "--bits", "2-2-8")
    assert more.exit_code == 0, more.stderr
    assert json.loads(more.stdout)["tables"] == document["tables"]  # a width said twice is one width
    assert not ray.is_initialized()


@pytest.fixture
def ray_elsewhere(tmp_path, monkeypatch):
    """A Ray whose workers start in another directory than the command."""
    (tmp_path / "elsewhere").mkdir()
    with monkeypatch.context() as there:
        there.chdir(tmp_path / "elsewhere")
        ray.init(address="local", num_cpus=2, namespace="bitmill", log_to_driver=False, dashboard_host="127.0.0.1")
    yield tmp_path / "elsewhere"
    ray.shutdown()


def test_students_side_by_side_on_ray_share_the_store_of_the_command(ray_elsewhere, small, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "teacher")
    arguments = ("--teacher", "teacher", "--no-search", "--seeds", 1)
    side_by_side = small(*arguments, "--workers", 2, "--out", "out")
    assert side_by_side.exit_code == 0, side_by_side.stderr
    assert list(ray_elsewhere.iterdir()) == []
    assert sum(path.parts[-3] == "pack" for path in records(tmp_path)) == len(FEW)
    before = records(tmp_path)
    one_by_one = small(*arguments, "--out", "alone")  # the same steps: nothing is left to do
    assert one_by_one.exit_code == 0, one_by_one.stderr
    assert records(tmp_path) == before
    assert json.loads(one_by_one.stdout) == json.loads(side_by_side.stdout)


def test_every_student_learns_from_the_cache_that_was_made_for_all(small, tmp_path):
    shown = small("--set", "cache.mode=auto", "--no-search", "--seeds", 1, "--out", "out")
    assert shown.exit_code == 0, shown.stderr
    (cache,) = (json.loads(path.read_text()) for path in (tmp_path / "bitmill-store" / "cache").rglob("record.json"))
    students = [json.loads(p.read_text()) for p in (tmp_path / "bitmill-store" / "distill").rglob("record.json")]
    assert [student["inputs"]["cache"] for student in students] == [cache["key"]] * len(FEW)


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (("--bits", "2-2-32", "--set", "quant.attention=qkv"), "The row 'rounding, per_channel' cannot be at 2-2-32."),
        (("--set", 'quant.overrides={"no.such.layer": 8}'), "'no.such.layer' matches no module"),
        (("--set", "task.block_length=64"), "block_length"),
        (("--out", "corpus/file/out"), "corpus/file is no directory that you may write to"),
        (("--out", "corpus/file"), "--out corpus/file: "),
    ],
)
@pytest.mark.parametrize("generated", [False, True])
def test_rows_that_cannot_be_are_refused_before_anything_runs(
    bench, checkpoint, corpus, tmp_path, arguments, needle, generated
):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "file").write_text("of the user")
    shown = bench(
        "--teacher", checkpoint, *([] if generated else ["--data", corpus]), *SMALL, "--out", "out", *arguments
    )
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert needle in " ".join(shown.stderr.split())
    assert not (tmp_path / "bitmill-store" / "tokenize").exists()
    assert not list(tmp_path.rglob("generat*"))


def test_scores_keep_the_day_they_were_measured_on(small, tmp_path):
    first = small("--out", "out")
    assert first.exit_code == 0, first.stderr
    for path in (tmp_path / "bitmill-store" / "evaluate").rglob("record.json"):
        record = json.loads(path.read_text())
        record["provenance"] |= {"date": "2020-02-03", "machine": "another"}
        path.write_text(json.dumps(record))
    again = small("--out", "out")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["measured"] == ["2020-02-03, another"]


def test_without_a_search_presets_are_as_they_are(small, tmp_path):
    shown = small("--no-search", "--seeds", 1, "--out", "out")
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    rates = {tried["row"]: tried["rate"] for tried in document["search"]}
    assert rates == {"rounding, per_channel": 4e-3, "paper": 4e-3, "best": 0.03}
    assert {line["row"]: line["rate"] for line in document["tables"]["2-2-8"]} == rates


def test_a_row_that_diverges_is_left_out_and_named(small, tmp_path, monkeypatch):
    diverging = Row("diverging", {"quant": {}, "distill": {"vector_lr_scale": 1e30}})
    monkeypatch.setattr(quantizers, "chosen_rows", lambda *given: (FEW[1], diverging))
    shown = small("--out", "out")
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert [line["row"] for line in document["tables"]["2-2-8"]] == [FEW[1].name]
    (failed,) = document["failed"]
    assert (failed["row"], failed["bits"]) == ("diverging", "2-2-8")
    assert re.search("loss is (nan|inf)", failed["failure"])
    for said in (" ".join(shown.stderr.split()), (tmp_path / "out" / "quantizers.md").read_text()):
        assert "left out: diverging at 2-2-8 failed at rate 0.002, seed 0: " in said
    monkeypatch.setattr(quantizers, "chosen_rows", lambda *given: (FEW[0],))
    more = small("--out", "out", "--bits", "4-4-8")
    assert json.loads(more.stdout)["failed"] == [failed]  # of the earlier piece
    monkeypatch.setattr(quantizers, "chosen_rows", lambda *given: (diverging,))
    shown = small("--out", "none")
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert "Every row failed" in shown.stderr
    assert not (tmp_path / "none").exists()


def test_a_row_that_fails_with_one_seed_is_left_out():
    searched = [score("a", rate=rate, nats=nats) for rate, nats in ((1.0, 3.0), (2.0, 2.0))]
    searched += [score("b"), score("c", rate=1.0).model_copy(update={"failure": "no", "validation_nats": None})]
    repeated = [score("a", seed=1, rate=2.0), score("a", seed=2, rate=2.0), score("b", seed=1)]
    repeated[1] = repeated[1].model_copy(update={"failure": "lost"})
    rates = students.best_rates(searched)
    assert rates == {("a", "2-2-8"): 2.0, ("b", "2-2-8"): 1e-3}
    found = quantizers._failed(searched, repeated, rates)
    assert list(found.items()) == [(("c", "2-2-8"), "rate 1, seed 0: no"), (("a", "2-2-8"), "rate 2, seed 2: lost")]


def test_a_table_may_be_made_piece_by_piece(small, tmp_path):
    first = small("--out", "out")
    assert first.exit_code == 0, first.stderr
    more = small("--out", "out", "--bits", "4-4-8", "--seeds", 1)
    assert more.exit_code == 0, more.stderr
    both, one = json.loads(more.stdout), json.loads(first.stdout)
    assert both["tables"]["2-2-8"] == one["tables"]["2-2-8"]
    assert set(both["tables"]) == {"2-2-8", "4-4-8"}
    assert both["steps_at"] == {"2-2-8": 3, "4-4-8": 1}  # a third above 2 bits
    trained = {
        (record["recipe"]["quant"]["bits"], record["recipe"]["distill"]["steps"])
        for record in map(json.loads, (path.read_text() for path in records(tmp_path) if path.parts[-3] == "distill"))
    }
    assert trained == {("2-2-8", 3), ("2-2-8", 0), ("4-4-8", 1), ("4-4-8", 0)}
    shorter = small("--out", "out", "--steps", 6, "--seeds", 1)
    other = json.loads(shorter.stdout)
    kept = [line["row"] for line in other["tables"]["4-4-8"]]
    assert kept == ["rounding, per_channel"]  # whose trial is the same at any length
    assert "left out: best at 4-4-8 of out/quantizers.json" in " ".join(shorter.stderr.split())
    (tmp_path / "out" / "quantizers.json").write_text("{}")
    unread = small("--out", "out")
    assert json.loads(unread.stdout)["scores"] == one["scores"]
    assert "left out: all of out/quantizers.json" in " ".join(unread.stderr.split())


def test_an_earlier_score_that_could_not_be_made_today_is_of_another_recipe():
    fields = {"name": "tiny", "model": {"source": "a/b"}, "data": {"source": "*.txt"}, "distill": {"steps": 3}}
    base = Config.model_validate({**fields, "quant": {"attention": "qkv"}})
    extent = quantizers.Extent(("2-2-8",), 1, 3, 4)
    today = quantizers._digest_today(base, extent, FEW[1], score(rate=1e-3))
    assert today == students.bench_run(extent.laid_over(base, "2-2-8"), FEW[1], "2-2-8", 1e-3, 0).digest
    assert quantizers._digest_today(base, extent, FEW[1], score(rate=1e-3, bits="2-2-32")) is None


def test_an_interrupted_bench_goes_on(small, tmp_path, monkeypatch):
    scored, done = students.score, []

    def interrupting(run, outcome):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(run)
        return scored(run, outcome)

    monkeypatch.setattr(students, "score", interrupting)
    stopped = small("--out", "out")
    assert (stopped.exit_code, stopped.stdout) == (1, "")
    assert "interrupted" in stopped.stderr
    assert not (tmp_path / "out").exists()
    before = records(tmp_path)
    assert sum(path.parts[-3] == "pack" for path in before) == 5
    monkeypatch.setattr(students, "score", scored)
    whole = small("--out", "out")
    assert whole.exit_code == 0, whole.stderr
    after = records(tmp_path)
    assert {path: after[path] for path in before} == before
    assert sum(path.parts[-3] == "pack" for path in after) == 9


def test_a_teacher_generates_plain_text_alone(bench, checkpoint, tmp_path):
    shown = bench("--teacher", checkpoint, *SMALL, "--set", "task.name=next_utterance", "--set", "cache.mode=auto")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert "generates plain text, and task.name is next_utterance; give --data" in " ".join(shown.stderr.split())
    assert not list(tmp_path.rglob("generat*"))


def test_an_interrupted_generation_leaves_nothing(bench, checkpoint, tmp_path, monkeypatch):
    def interrupting(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(generated, "_sample", interrupting)
    assert bench("--teacher", checkpoint, *SMALL).exit_code == 1
    assert not list(tmp_path.rglob("generat*"))


@pytest.mark.parametrize("width", [80, 120])
def test_what_is_printed_is_whole(width):
    """Where there is little room, names and intervals are folded."""
    document = json.loads((ROOT / "jobs" / "bench" / "results" / "stories260K" / "quantizers.json").read_text())
    table = lines([students.Score.model_validate(s) for s in document["scores"]], "2-2-8", document["search"])
    console = Console(file=StringIO(), width=width)
    quantizers._print(table, "title", console)
    shown = console.file.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    for line in table if width == 120 else ():
        less = line.less("paper")
        (row,) = [row for row in shown.splitlines() if row.strip().startswith(f"{line.row}  ")]
        cells = [f"{line.packed_bytes:,}", f"{line.gap_nats:.4f}", "" if less is None else str(less)]
        assert all(cell in row for cell in [*cells, f"{line.kl_nats:.4f}", f"{line.top1_agreement:.1%}"]), row


def test_a_teacher_without_text_generates_some(bench, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizers, "chosen_rows", lambda *given: tuple(FEW[:1]))
    shown = bench("--teacher", checkpoint, *SMALL[:2], "--batch-size", 4, "--workers", 0, "--out", "out")
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert document["name"] == f"bench-{checkpoint.name}"
    assert document["block_length"] == 32
    assert [line["row"] for line in document["tables"]["2-2-8"]] == ["rounding, per_channel"]
    (text,) = tmp_path.rglob("generated-*.jsonl")
    assert len(text.read_text().splitlines()) > 300


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--bits", "3-2-8"], ["--bits 3-2-8", "2, 4, 8, 32"]),
        (["--bits", "two"], ["--bits 'two'", "2-2-8"]),
        (["--bits", "2-2-8", "--bits", "2-2-4"], ["--bits 2-2-4", "8, 32"]),
        (["--bits", "32-32-32"], ["--bits 32-32-32", "nothing is quantized"]),
        (["--only", "besst"], ["--only 'besst'", "smallest"]),
        (["--seeds", "0"], ["--seeds"]),
        (["--steps", "0"], ["--steps"]),
        (["--workers", "-1"], ["--workers"]),
        (["--teacher", "nowhere"], ["--teacher nowhere", "no such directory", "*.safetensors"]),
        (["--teacher", "empty"], ["empty", "config.json"]),
        (["nowhere.yaml"], ["nowhere.yaml", "cannot be read", "configs/"]),
        (["--set", "distil.steps=3"], ["distil"]),
        (["--set", "distill.lr=3e-3"], ["distill.lr has no effect", "each row", "distill.warmup_steps"]),
        (["--set", "distill.seed=3"], ["distill.seed has no effect", "--seeds decides distill.seed"]),
        (["--set", "preset=best"], ["preset has no effect", "each row"]),
        (["--set", "distill.steps=3"], ["distill.steps has no effect", "--steps decides distill.steps"]),
        (["--set", "resources.workers=3"], ["resources.workers has no effect", "--workers decides resources.workers"]),
        (["--set", "data.source=own.jsonl"], ["data.source has no effect", "--data decides data.source"]),
        (["--set", "model.source=gpt2"], ["model.source has no effect", "--teacher decides model.source"]),
        (["--set", "model={source: elsewhere}"], ["model has no effect", "--teacher decides model.source"]),
        (["--set", "data={source: own.jsonl}"], ["data has no effect", "--data decides data.source"]),
        (["configs/quickstart.yaml"], ["configs/quickstart.yaml and --teacher", "give one"]),
        (["--set", "quant.quantizer=lsq"], ["quant.quantizer has no effect", "quant.attention"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("generated", [False, True])
def test_what_cannot_work_is_said_before_anything_runs(
    bench, checkpoint, corpus, tmp_path, arguments, needles, generated
):
    (tmp_path / "empty").mkdir()
    sound = [] if {"--teacher", "nowhere.yaml"} & set(arguments) else ["--teacher", checkpoint]
    sound += [] if generated or not sound else ["--data", corpus]
    shown = bench(*arguments, *sound, "--out", "out")
    assert isinstance(shown.exception, SystemExit), repr(shown.exception)
    assert (shown.exit_code, shown.stdout) == (2, ""), shown.stderr
    assert "Traceback" not in shown.stderr
    said = " ".join(shown.stderr.split())
    assert all(needle in said for needle in needles), said
    assert not list(tmp_path.rglob("record.json"))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("generated-*"))
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    "arguments",
    [("--bits", "4-4-8"), ("--bits", "2-4-8", "--bits", "4-2-8"), ("--set", 'quant.overrides={".*fc": 4}')],
    ids=str,
)
def test_rows_that_no_width_offers_are_refused_before_text_is_generated(checkpoint, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    command = ["bench", "quantizers", "--teacher", str(checkpoint), "--only", "smallest", "--only", "twn, per_channel"]
    shown = CliRunner().invoke(app, [*command, *arguments, "--workers", "0"])
    assert (shown.exit_code, shown.stdout) == (2, "")
    said = " ".join(shown.stderr.split())
    assert "--only smallest; twn, per_channel: ternary recipes need 2 bits" in said
    assert not list(tmp_path.iterdir())


def test_data_that_is_not_there(bench, checkpoint, tmp_path):
    shown = bench("--teacher", checkpoint, "--data", "nowhere.txt", *SMALL)
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert "nowhere.txt" in shown.stderr
    assert not list(tmp_path.rglob("record.json"))
