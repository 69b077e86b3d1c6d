"""The bench from the command line: real runs of a few recipes, reused, interrupted, and refused where nothing works."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections import Counter
from functools import partial
from io import StringIO

import pytest
import ray
from rich.console import Console
from typer.testing import CliRunner

from jobs.bench import generated, quantizers, students
from jobs.bench.claims import VERDICTS
from jobs.bench.documents import read_documents
from jobs.bench.rows import REFERENCE, ROWS, WITH_CONTRAST, Row, Try, named
from jobs.bench.summary import lines, short_cells
from jobs.cli import app
from pipeline.config.run import Config
from pipeline.errors import RunError
from pipeline.flow.line import LINE
from tests.jobs.bench.test_rows import MINIMAL
from tests.jobs.bench.test_summary import documents, score, scores

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


def count(folder, stage):
    return sum(path.parts[-3] == stage for path in records(folder))


def without_date(document):
    return re.sub(r"\d{4}-\d{2}-\d{2}", "", json.dumps(document))


def distilled(folder):
    """Return the recipe of each student in the store."""
    return [json.loads(p.read_text())["recipe"]["distill"] for p in records(folder) if p.parts[-3] == "distill"]


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
    for name in ("paper", "best"):
        tried = {t["rate"]: t["validation_nats"] for t in document["search"] if t["row"] == name}
        assert len(tried) == 3
        assert table[name]["rate"] == min(tried, key=tried.get)
    assert {claim["verdict"] for claim in document["claims"]} <= set(VERDICTS)
    assert all(re.fullmatch(r"20\d{2}-\d{2}-\d{2}, " + platform.machine(), day) for day in document["measured"])
    assert len(document["claims"]) == 1  # of best; the rows of the others are not all here
    assert len(document["scores"]) == 5
    assert len({s["student"]["perplexity"] for s in document["scores"] if s["row"] == "paper"}) == 2  # the seed shows
    texts = read_documents((tmp_path / "out" / "documents.json").read_text())
    for name, line in table.items():
        text = texts[name, "2-2-8"]
        assert line["gap_nats"] == pytest.approx((sum(text.student) - sum(text.teacher)) / sum(text.tokens), abs=1e-4)
        low, high = line["gap_interval"]["documents"]
        assert low < line["gap_nats"] < high
    less = table["paper"]["differences"]["best"]["gap_nats"]
    assert all(low < less["mean"] < high for low, high in ((less["low"], less["high"]), less["documents"]))
    for name in ("front.png", "cosine.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(PNG)
    text = (tmp_path / "out" / "quantizers.md").read_text()
    assert all(f"| {row.name} |" in text for row in FEW)

    before = records(tmp_path)
    seeds = Counter((bool(recipe["steps"]), recipe["seed"]) for recipe in distilled(tmp_path))
    # Two recipes at three rates with a seed of their own, then with each of those measured; rounding once.
    assert seeds == {(True, 0): 6, (True, 1): 2, (True, 2): 2, (False, 1): 1}
    assert {stage.name: count(tmp_path, stage.name) for stage in LINE} == {
        "tokenize": 1,
        "finetune": 1,
        "cache": 1,
        "distill": 11,
        "evaluate": 5,  # what the search tries is not scored on the test split
        "pack": 5,
        "register": 0,
    }
    said = " ".join(first.stderr.split())
    for needle in (
        "search: paper at 2-2-8, rate 0.002, contrast 0.1, seed 0: distill 3/3",
        "measure: rounding, per_channel at 2-2-8, rate 0.004, contrast 0, seed 1: distill 0/0",
        f"measure: best at 2-2-8, rate {table['best']['rate']:g}, contrast 0, seed 2: distill 3/3",
    ):
        assert needle in said, said
    second = small("--out", "out")
    assert second.exit_code == 0, second.stderr
    assert records(tmp_path) == before
    assert without_date(json.loads(second.stdout)) == without_date(document)
    more = small("--out", "twice", "--bits", "2-2-8", "--bits", "2-2-8")
    assert more.exit_code == 0, more.stderr
    assert json.loads(more.stdout)["tables"] == document["tables"]  # a width said twice is one width
    assert not ray.is_initialized()


BASE = Config.model_validate(MINIMAL)
EXTENT = quantizers.Extent(("2-2-8", "4-4-8"), 3, 3, 4, (*FEW, named(REFERENCE), named("twn, per_tensor")))


def test_the_seed_of_the_search_measures_nothing():
    search = quantizers._search(BASE, EXTENT)
    assert {run.seed for run in search} == {0}
    tried = Counter(run.key for run in search)
    at_each_width = {"paper": 3, "best": 3, REFERENCE: 9}  # rounding has nothing to choose
    assert tried == {
        **{(name, bits): tries for name, tries in at_each_width.items() for bits in EXTENT.bits},
        ("twn, per_tensor", "2-2-8"): 3,
    }
    chosen = {(row.name, bits): row.own_try(bits) for row in EXTENT.rows for bits in EXTENT.bits}
    chosen["paper", "2-2-8"] = Try(7e-3, 0.5)
    del chosen["best", "4-4-8"]  # it failed at every try
    measured: dict[tuple[str, str], list[int]] = {}
    for run in quantizers._measure(BASE, EXTENT, chosen):
        assert run.tried == chosen[run.key]
        measured.setdefault(run.key, []).append(run.seed)
    assert measured.pop(("rounding, per_channel", "2-2-8")) == measured.pop(("rounding, per_channel", "4-4-8")) == [1]
    assert set(measured) == set(tried) - {("best", "4-4-8")}
    assert all(seeds == [1, 2, 3] for seeds in measured.values())


def test_rows_that_come_to_the_same_student_share_it(small, tmp_path, monkeypatch):
    same = (named(REFERENCE), named(WITH_CONTRAST[0.03]))
    monkeypatch.setattr(quantizers, "chosen_rows", lambda *given: same)
    shown = small("--no-search", "--seeds", 2, "--out", "out")
    assert shown.exit_code == 0, shown.stderr
    assert {(recipe["seed"], recipe["contrast_weight"]) for recipe in distilled(tmp_path)} == {(1, 0.03), (2, 0.03)}
    assert set(re.findall(r"measure: \d/(\d) ", shown.stderr)) == {"2"}  # not four that find each other's steps
    document = json.loads(shown.stdout)
    assert [(s["row"], s["seed"]) for s in document["scores"]] == [(row.name, seed) for row in same for seed in (1, 2)]
    shared = {line["row"]: line for line in document["tables"]["2-2-8"]}[same[1].name]
    nothing = {"mean": 0.0, "low": None, "high": None, "documents": None}
    assert shared["differences"][REFERENCE]["gap_nats"] == nothing


def test_a_student_says_how_it_gets_on_at_each_quarter_of_a_stage():
    said: list[str] = []
    listener = students.StudentListener(students.bench_run(BASE, FEW[1], "2-2-8", Try(2e-3, 0.1), 5), said.append)
    for done in range(13):
        listener.advanced("distill", done, 12, "loss 1.5" if done == 12 else "")
    listener.advanced("evaluate", 1, 1, "")
    name = "paper at 2-2-8, rate 0.002, contrast 0.1, seed 5"
    steps = ["distill 0/12", "distill 3/12", "distill 6/12", "distill 9/12", "distill 12/12, loss 1.5", "evaluate 1/1"]
    assert said == [f"{name}: {step}" for step in steps]


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
    assert count(tmp_path, "pack") == len(FEW)
    tried = r"rate \S+, contrast \S+, seed 1"
    notes = rf"measure: (rounding, per_channel|paper|best) at 2-2-8, {tried}: (distill|evaluate) \d+/\d+"
    assert re.search(notes, " ".join(side_by_side.stderr.split())), side_by_side.stderr
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
    first = small("--no-search", "--seeds", 1, "--out", "out")
    assert first.exit_code == 0, first.stderr
    for path in (tmp_path / "bitmill-store" / "evaluate").rglob("record.json"):
        record = json.loads(path.read_text())
        record["provenance"] |= {"date": "2020-02-03", "machine": "another"}
        path.write_text(json.dumps(record))
    again = small("--no-search", "--seeds", 1, "--out", "out")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["measured"] == ["2020-02-03, another"]


def test_without_a_search_presets_are_as_they_are(small, tmp_path):
    shown = small("--no-search", "--seeds", 1, "--out", "out")
    assert shown.exit_code == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert document["search"] == []
    assert {line["row"]: (line["rate"], line["contrast_weight"]) for line in document["tables"]["2-2-8"]} == {
        row.name: row.own_try("2-2-8") for row in FEW
    }
    assert {recipe["seed"] for recipe in distilled(tmp_path)} == {1}


def test_a_row_that_fails_now_loses_its_earlier_place(small, monkeypatch):
    monkeypatch.setattr(quantizers, "chosen_rows", lambda *given: (FEW[0], named("best")))
    first = small("--no-search", "--seeds", 1, "--out", "out")
    assert first.exit_code == 0, first.stderr
    run_plan = students.run_plan

    def failing(plan, listener):
        if plan.config.distill.optimizer == "muon":
            raise RunError("it was lost")
        return run_plan(plan, listener)

    monkeypatch.setattr(students, "run_plan", failing)
    document = json.loads(small("--no-search", "--seeds", 1, "--out", "out").stdout)
    assert [failed["row"] for failed in document["failed"]] == ["best"]
    assert {line["row"] for line in document["tables"]["2-2-8"]} == {"rounding, per_channel"}


def test_a_row_that_diverges_is_left_out_and_named(small, tmp_path, monkeypatch):
    diverging = Row("diverging", {"quant": {}, "distill": {"contrast_weight": 0.0, "vector_lr_scale": 1e30}})
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
    searched = [score("a", rate=rate, nats=nats, seed=0) for rate, nats in ((1.0, 3.0), (2.0, 2.0))]
    searched += [score("b", seed=0), score("c", rate=1.0, seed=0).model_copy(update={"failure": "no"})]
    measured = [score("a", rate=2.0), score("a", seed=2, rate=2.0), score("b")]
    measured[1] = measured[1].model_copy(update={"failure": "lost"})
    tries = students.best_tries(searched)
    assert tries == {("a", "2-2-8"): Try(2.0, 0.0), ("b", "2-2-8"): Try(1e-3, 0.0)}
    reasons = quantizers._failed(searched, measured, tries)
    assert list(reasons.items()) == [(("c", "2-2-8"), "rate 1, seed 0: no"), (("a", "2-2-8"), "rate 2, seed 2: lost")]


def test_a_table_may_be_made_piece_by_piece(small, tmp_path):
    first = small("--out", "out", "--seeds", 1)
    assert first.exit_code == 0, first.stderr
    more = small("--out", "out", "--bits", "4-4-8", "--seeds", 1, "--no-search")
    assert more.exit_code == 0, more.stderr
    both, one = json.loads(more.stdout), json.loads(first.stdout)
    assert (both["tables"]["2-2-8"], both["search"]) == (one["tables"]["2-2-8"], one["search"])
    assert set(both["tables"]) == {"2-2-8", "4-4-8"}
    assert both["steps_at"] == {"2-2-8": 3, "4-4-8": 1}  # a third above 2 bits
    trained = {
        (record["recipe"]["quant"]["bits"], record["recipe"]["distill"]["steps"])
        for record in map(json.loads, (path.read_text() for path in records(tmp_path) if path.parts[-3] == "distill"))
    }
    assert trained == {("2-2-8", 3), ("2-2-8", 0), ("4-4-8", 1), ("4-4-8", 0)}
    shorter = small("--out", "out", "--steps", 6, "--seeds", 1, "--no-search")
    other = json.loads(shorter.stdout)
    kept = [line["row"] for line in other["tables"]["4-4-8"]]
    assert kept == ["rounding, per_channel"]  # whose trial is the same at any length
    assert "left out: best at 4-4-8 of out/quantizers.json" in " ".join(shorter.stderr.split())
    (tmp_path / "out" / "quantizers.json").write_text("{}")
    unread = small("--out", "out", "--seeds", 1)
    assert json.loads(unread.stdout)["scores"] == one["scores"]
    assert "left out: all of out/quantizers.json" in " ".join(unread.stderr.split())


def test_an_earlier_score_that_could_not_be_made_today_is_of_another_recipe():
    base = Config.model_validate({**MINIMAL, "quant": {"attention": "qkv"}})
    extent = quantizers.Extent(("2-2-8",), 1, 3, 4)
    today = quantizers._digest_today(base, extent, FEW[1], score(rate=1e-3, weight=0.5, seed=2))
    run = students.bench_run(extent.laid_over(base, "2-2-8"), FEW[1], "2-2-8", Try(1e-3, 0.5), 2)
    assert today == run.digest
    assert quantizers._digest_today(base, extent, FEW[1], score(rate=1e-3, bits="2-2-32")) is None


def test_an_interrupted_bench_goes_on(small, tmp_path, monkeypatch):
    facts_of = students.facts_of

    def interrupting(outcome):
        if count(tmp_path, "pack") == 2:
            raise KeyboardInterrupt
        return facts_of(outcome)

    monkeypatch.setattr(students, "facts_of", interrupting)
    stopped = small("--out", "out", "--seeds", 1)
    assert (stopped.exit_code, stopped.stdout) == (1, "")
    assert "interrupted" in stopped.stderr
    assert not (tmp_path / "out").exists()
    before = records(tmp_path)
    assert (count(tmp_path, "distill"), count(tmp_path, "pack")) == (8, 2)
    monkeypatch.setattr(students, "facts_of", facts_of)
    whole = small("--out", "out", "--seeds", 1)
    assert whole.exit_code == 0, whole.stderr
    after = records(tmp_path)
    assert {path: after[path] for path in before} == before
    assert (count(tmp_path, "distill"), count(tmp_path, "pack")) == (9, 3)


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
    gaps = {row.name: [0.5 / place, 0.6 / place, 0.4 / place] for place, row in enumerate(ROWS, 1)}
    every = [one for name, of_row in gaps.items() for one in scores(name, of_row, size=1_234_567, weight=0.03)]
    texts = {(name, "2-2-8"): documents(of_row[0], 0.4) for name, of_row in gaps.items()}
    search = [{"row": name, "bits": "2-2-8", "rate": rate} for name in gaps for rate in (1e-3, 2e-3)]
    table = lines(every, "2-2-8", texts, search)
    assert all(len(line.less("best").ends) == 2 for line in table if line.row != "best")
    console = Console(file=StringIO(), width=width)
    quantizers._print(table, "title", console)
    shown = console.file.getvalue().splitlines()
    assert not any("…" in text for text in shown)
    assert max(map(len, shown)) <= width
    starts = [number for number, text in enumerate(shown) if "1,234,567" in text]
    for line, start, end in zip(table, starts, [*starts[1:], len(shown)], strict=True):
        words = set(" ".join(shown[start:end]).split())
        assert width == 80 or {word for cell in short_cells(line) for word in cell.split()} <= words, line.row


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
