"""What the documents say: tables are what the committed results say, links lead somewhere, commands exist."""

from __future__ import annotations

import json
import math
import re
import shlex
from statistics import mean
from typing import Any

import pytest
import typer
import yaml

from jobs.bench.chaos.storm import FIRST
from jobs.bench.claims import Claim
from jobs.bench.inference import MEASURES
from jobs.bench.rows import REFERENCE
from jobs.bench.sizes import ENCODINGS, MIB, MODELS, packed_size
from jobs.bench.summary import UNTRAINED, Interval, interval
from jobs.bench.training.steps import INT8
from jobs.bench.training.train import read_floors, shortfalls
from jobs.cli import app
from pipeline.config.load import load_config, load_fields
from pipeline.config.resources import Resources
from pipeline.models.build import fp32_bytes, read_config, skeleton
from pipeline.models.device import CPU
from pipeline.models.family import family_named
from pipeline.package.size import layout
from pipeline.quant.spec import BitWidths
from tests.conftest import ROOT

RESULTS = ROOT / "jobs" / "bench" / "results"
DOCUMENTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "jobs/bench/README.md",
        "pipeline/sweep/README.md",
        "pipeline/export/README.md",
        "pipeline/package/README.md",
        "pipeline/retrain/README.md",
        "pipeline/store/README.md",
        "pipeline/tasks/README.md",
        "pipeline/models/README.md",
    )
}
README, BENCH = DOCUMENTS["README.md"], DOCUMENTS["jobs/bench/README.md"]
PRESETS = ("paper", "best", "smallest")
TEACHERS = {"quickstart": 4, "stories260K": 3, "wikitext2": 4}  # how many digits its gaps are given


def results(name: str, of: str = "quantizers") -> Any:
    return json.loads((RESULTS / name / f"{of}.json").read_text(encoding="utf-8"))


def recipe(row: str) -> str:
    return f"**`{row}`**" if row in (*PRESETS, REFERENCE) else f"`{row}`"


def rate(line: dict[str, Any]) -> str:
    if line["row"] in UNTRAINED:
        return ""
    end = {line["tried"][0]: " v", line["tried"][-1]: " ^"}.get(line["rate"], "")
    contrast = f", contrast {line['contrast_weight']:g}" if line["row"] == REFERENCE else ""
    return f"{line['rate']:g}{end}{contrast}"


def less(line: dict[str, Any], digits: int) -> str:
    found = line["differences"].get(REFERENCE)
    return "" if found is None else Interval(**found["gap_nats"]).shown(lambda nats: f"{nats:+.{digits}f}")


def compared(name: str) -> list[str]:
    digits = TEACHERS[name]
    lines = [
        f"| {recipe(line['row'])} | {rate(line)} | {line['packed_bytes']:,} | {line['gap_nats']:.{digits}f} "
        f"| {less(line, digits)} | {line['kl_nats']:.{digits}f} | {line['top1_agreement']:.1%} |"
        for line in results(name)["tables"]["2-2-8"]
    ]
    return [re.sub(r"\|  (?=\|)", "| ", line).replace("% |", " |") for line in lines]


def told(name: str) -> list[str]:
    """The claims of a teacher, each with its verdict and number, as the document lists them."""
    return [f"- {Claim(**claim)}" for claim in results(name)["claims"]]


def table(text: str, begins: str) -> list[str]:
    """The lines below the head of the first table after the paragraph that begins so."""
    _, found, after = text.partition(f"\n{begins}")
    assert found, begins
    return after.partition("\n\n")[2].partition("\n\n")[0].splitlines()[2:]


def test_steps_on_a_gpu_took_what_was_measured():
    document = json.loads((RESULTS / "train-h200.json").read_text(encoding="utf-8"))
    rows, teacher = document["rows"], document["teacher"]
    ratios = {name: row["of_baseline"] for name, row in rows.items()}
    assert table(BENCH, "One NVIDIA H200") == [
        f"| {name} | {row['ms']['median']:.1f} "
        f"| {ratios[name]['median']:.2f} ({ratios[name]['least']:.2f}-{ratios[name]['most']:.2f}) "
        f"| {row['tokens_per_s']:,.0f} | {row['launches']:,} | {row['waits']} | {row['busy_ms']:.1f} "
        f"| {row['peak_bytes'] / 2**30:.1f} |"
        for name, row in rows.items()
    ]
    again = json.loads((RESULTS / "train-h200-again.json").read_text(encoding="utf-8"))
    later = {name: row["of_baseline"]["median"] for run in again for name, row in run["rows"].items()}
    seconds, minutes = rows["paper, cached"]["checkpoint_s"], Resources().checkpoint_minutes
    assert f"took {seconds:.1f} s, written to the end: {seconds / (60 * minutes):.1%} of".replace("%", " %") in BENCH
    assert seconds / (60 * minutes) <= 0.02
    ours = [row for name, row in rows.items() if name != document["baseline"]]
    for measure, form in (("busy_ms", "busy for {:.0f} to {:.0f} ms"), ("first_step_s", "took {:.0f} to {:.0f} s")):
        assert form.format(*(of(row[measure] for row in ours) for of in (min, max))) in BENCH
    assert f"{teacher['cache_tokens_per_s'] / teacher['forward_tokens_per_s']:.2f} of the bare forward pass" in BENCH
    best, paper = (ratios[f"{preset}, cached"]["median"] for preset in ("best", "paper"))
    assert f"takes {best:.2f} (`best`) to {paper:.2f} times (`paper`) compiled" in README
    assert 0.4 <= rows["paper, cached"]["peak_bytes"] / rows[document["baseline"]]["peak_bytes"] <= 0.55  # half
    assert f"{later['best, cached']:.2f} and {later['paper, cached']:.2f} of the baseline" in BENCH


def test_what_a_cpu_took_is_what_was_measured_and_within_its_floors_but_for_what_is_said():
    document = json.loads((RESULTS / "train-cpu.json").read_text(encoding="utf-8"))
    said, rows, ratios = " ".join(BENCH.split()), document["rows"], document["ratios"]
    assert table(BENCH, "A step on two cores") == [
        f"| {name} | {row['ms']['median'] / 1e3:.1f} ({row['ms']['least'] / 1e3:.1f}-{row['ms']['most'] / 1e3:.1f}) "
        f"| {row['of_baseline']['median']:.2f} ({row['of_baseline']['least']:.2f}-{row['of_baseline']['most']:.2f}) "
        f"| {ratios.get(f'step before its optimizer: {name}', 1):.2f} | {row['peak_bytes'] / 2**30:.1f} |"
        for name, row in rows.items()
    ]
    cached, workers = shortfalls(document, read_floors(CPU))
    assert cached.startswith("cached of what it could be: paper is 0.94")
    assert workers.startswith("two workers, of the ideal is 0.81")
    assert "0.94 of the speed that it could, where 0.95 is asked" in said
    exchanged = f"{100 * document['two workers']['all_reduce']:.1f} %"
    assert f"have 0.81 of twice the speed of one, where 0.85 is asked, and spend {exchanged}" in said
    assert f"What contrast adds to a step, {100 * ratios['contrast, share of a step']:.1f} %" in said
    assert f"Muon takes 1.5 TFLOP a step, {rows['best, cached']['optimizer_ms'] / 1e3:.1f} s here" in said
    integers = json.loads((RESULTS / "train-cpu-int8.json").read_text(encoding="utf-8"))
    row, less = integers["rows"][INT8], integers["ratios"][f"step before its optimizer: {INT8}"]
    took = "`best` takes {median:.2f} ({least:.2f}-{most:.2f}) of the baseline".format(**row["of_baseline"])
    assert f"{took}, {less:.2f} before its optimizer, and {row['peak_bytes'] / 2**30:.1f} GiB" in said
    quickstart = json.loads((RESULTS / "quickstart" / "table.json").read_text(encoding="utf-8"))
    now = [seed["perplexity"] for seed in quickstart["2-2-8_again"]["seeds"].values()]
    before = [quickstart["students"]["2-2-8"], *quickstart["other_seeds_at_2-2-8"].values()]
    assert "perplexity of {:.2f}, {:.2f} and {:.2f} with".format(*now) in said
    assert "ended at {:.2f}, {:.2f} and {:.2f} with".format(*(seed["perplexity"] for seed in before)) in said
    stages = [document[stage]["speed"] for stage in ("tokenize", "evaluate", "pack")]
    assert "has {:.2f} of the speed of `encode_batch`, `evaluate` {:.2f} of that of plain".format(*stages[:2]) in said
    assert f"`pack` {stages[2]:.2f} of that of a copy" in said
    for measured, least in zip(stages, (0.85, 0.9, 1 / 3), strict=True):
        assert measured >= least
    muon = document["Newton-Schulz"]
    assert "takes {bf16_avx2_ms:.1f} ms in bf16 and {fp32_avx2_ms:.1f} ms in fp32 with AVX2".format(**muon) in said
    assert "and {bf16_ms:.1f} and {fp32_ms:.1f} ms with all".format(**muon) in said
    assert muon["of_fp32_avx2"] > 10  # which a CPU takes that lacks units for bf16
    assert f"costs {document['fake-quantization']['of_torchao']:.2f} times torchao's" in said


@pytest.mark.parametrize(
    ("begins", "name"),
    [("The GPT-2 at", "quickstart"), ("The Llama at", "stories260K"), ("The third teacher", "wikitext2")],
)
def test_tables(begins, name):
    lines = compared(name)
    assert len(lines) >= 4
    assert table(BENCH, begins) == lines


def test_scales_of_groups_gain_what_their_table_says():
    found, lines = results("groups"), []
    gaps = {
        row: [
            math.log(score["student"]["perplexity"] / score["teacher"]["perplexity"])
            for score in sorted(found["scores"], key=lambda score: score["seed"])
            if score["row"] == row
        ]
        for row in {score["row"] for score in found["scores"]}
    }
    for line in found["tables"]["2-2-8"]:
        other = line["row"].partition(",")[0] + ", per_channel"
        paired = [ours - its for ours, its in zip(gaps[line["row"]], gaps[other], strict=True)]
        less = "" if line["row"] == other else f"{interval(paired).shown(lambda nats: f'{nats:+.4f}')} "
        lines.append(
            f"| `{line['row']}` | {rate(line)} | {line['packed_bytes']:,} | {line['gap_nats']:.4f} | {less}"
            f"| {line['kl_nats']:.4f} | {100 * line['top1_agreement']:.1f} |"
        )
    assert table(BENCH, "    bitmill bench quantizers --steps 300 --seeds 5 --workers 2 --granularity") == lines


def test_rates_at_an_end_are_counted():
    counts = []
    for name in TEACHERS:
        searched = [line for line in results(name)["tables"]["2-2-8"] if line["row"] not in UNTRAINED]
        ends = sum(rate(line).partition(",")[0].endswith((" v", " ^")) for line in searched)
        counts.append(f"{ends} of {len(searched)}")
    assert f"{counts[0]} on the GPT-2, {counts[1]} on the Llama, {counts[2]} on the third" in " ".join(BENCH.split())


@pytest.mark.parametrize(
    ("begins", "name"), [("Of the GPT-2", "quickstart"), ("Of the Llama", "stories260K"), ("Of the third", "wikitext2")]
)
def test_claims_are_told_with_what_became_of_them(begins, name):
    claims = told(name)
    assert len(claims) >= 2
    _, found, after = BENCH.partition(f"\n{begins}")
    assert found
    said = after.partition("\n\n")[2].partition("\n\n")[0]
    assert " ".join(said.split()) == " ".join(" ".join(claims).split())


def test_sizes():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(BENCH, "`bitmill bench sizes`")]
    said = {}
    for encoding, *cells in lines:
        _, name, bits = encoding.split("`")
        said[name, bits.removeprefix(", ") or "2-2-8"] = dict(zip(MODELS, cells, strict=True))
    assert set(ENCODINGS) == {name for name, _ in said}
    assert said == {
        (name, bits): {
            model: f"{size.packed_bytes / MIB:.1f} ({size.ratio:.1f}x)"
            for model, source in MODELS.items()
            for size in [packed_size(source, bits, name)]
        }
        for name, bits in said
    }


def test_presets_are_as_far_from_their_teachers_as_the_readme_says():
    def share(name: str, preset: str) -> str:
        rows = {line["row"]: line for line in results(name)["tables"]["2-2-8"]}
        gap, size = (rows[preset][of] / rows[REFERENCE][of] for of in ("gap_nats", "packed_bytes"))
        return f"{gap:.2f} in {size:.2f}"

    said = " ".join(README.split())
    for preset in ("best", "smallest"):
        gpt2, llama, third = (share(name, preset) for name in TEACHERS)
        assert f"`{preset}` | {gpt2} | {llama} | {third} |" in said


def test_a_model_of_135m_parameters_has_the_quality_that_was_measured():
    document = json.loads((RESULTS / "smollm2-135m.json").read_text(encoding="utf-8"))
    rows = [
        f"| {name} | {s['perplexity']:,.1f} | {s['kl_nats']:.3f} | {s['top1_agreement']:.1%} "
        f"| {s['packed_bytes'] / MIB:.1f} | {s['ratio']:.1f}x |".replace("%", " %")
        for name, s in document["students"].items()
    ]
    fp32 = {s["teacher_bytes"] for s in document["students"].values()}.pop() / MIB
    teacher = f"| teacher, fp32 | {document['teacher']['perplexity']:.1f} | | | {fp32:.1f} | |"
    assert table(BENCH, "    bitmill compress configs/smollm2-135m.yaml") == [teacher, *rows]


def test_engines_are_as_fast_as_was_measured():
    document = json.loads((RESULTS / "inference.json").read_text(encoding="utf-8"))

    def line(engine: str, more: str, measures: dict[str, dict[str, float]]) -> str:
        cells = (
            f"{measures[key]['median']:{form}} ({measures[key]['least']:{form}}-{measures[key]['most']:{form}})"
            for key, (_, form) in MEASURES.items()
        )
        return f"| {engine}{more} | {' | '.join(cells)} |"

    three, four = (document[quantizer]["engines"] for quantizer in ("quantgpt", "seq"))
    lines = [line(engine, "", measures) for engine, measures in three.items()]
    lines += [line(engine, ", four levels", four[engine]) for engine in ("packed", "llama.cpp")]
    assert table(BENCH, "rounds (least-most)") == lines


# Lines of the table of what helped: recipe, what `levers.json` calls the change.
HELPED = {
    "`best` with Adam in place of Muon, at the best of three rates": (
        "best",
        "Adam in place of Muon, at the best of three rates",
    ),
    "`best` with `betas` of 0.9 and 0.999 in place of 0.8 and 0.98": ("best", "betas 0.9, 0.999"),
    "`best` with `muon_momentum` 0.9 in place of 0.6": ("best", "muon_momentum 0.9"),
    "`best` with norms, biases and positions at Adam's own rate (`vector_lr_scale` 1 in place of 8)": (
        "best",
        "vector_lr_scale 1",
    ),
    "`best` with the embedding at Adam's own rate (`embedding_lr_scale` 1 in place of 0.25)": (
        "best",
        "embedding_lr_scale 1",
    ),
    "`best` with `gamma_lr` 1e-3 in place of 2e-2": ("best", "gamma_lr 1e-3"),
    "`smallest` with Adam in place of Muon, at the best of three rates": (
        "smallest",
        "Adam in place of Muon, at the best of three rates",
    ),
    "`smallest` with a gradient that ends at the outermost levels": ("smallest", "ste clipped"),
    "`smallest` with `muon_momentum` 0.6 in place of 0.9": ("smallest", "muon_momentum 0.6"),
    "`best` with fp32 activations, what any better range of theirs could gain": ("best", "activations fp32"),
}
# Lines of the table of what did not help, on the GPT-2: what `levers.json` calls each of a line's values.
DID_NOT = {
    "100 of the 300 steps at 4 bits first": ["4 bits for 100 steps first"],
    "exponential mean of the weights, 0.95; 0.98": ["EMA 0.95", "EMA 0.98"],
    "relations between the last block's states (softmax of their products), weight 0.1": ["relations 0.1"],
    "the states of all layers as well, weight 0.1; 1": ["all layers 0.1", "all layers 1"],
    "linear schedule": ["linear"],
    "warm-up of 30 steps": ["warm-up 30"],
    "weight decay 0.01; 0.1": ["weight decay 0.01", "weight decay 0.1"],
    "quantized attention operands; with probabilities": ["attention qkv", "attention qkv_probabilities"],
    "one activation range a tensor": ["one range a tensor"],
}


def cells_of(before: str) -> dict[str, list[str]]:
    """The cells of a table by those of its first column."""
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table(BENCH, before))
    return {row[0]: row[1:] for row in rows}


def test_parts_of_presets_are_worth_what_was_measured():
    document = json.loads((RESULTS / "levers.json").read_text(encoding="utf-8"))
    digits = {"quickstart": 4, "stories260K": 3}
    nats = {
        name: {(line["row"], line["change"]): line["nats"] for line in document[name]["changed"] if line["seed"] == 0}
        for name in digits
    }
    assert cells_of("each line is a run with that one value changed") == {
        label: [f"{nats[name][row, change] - nats[name][row, 'as it is']:+.{digits[name]}f}" for name in digits]
        for label, (row, change) in HELPED.items()
    }
    told, former = cells_of("another seed alone moves them"), document["quickstart"]["former"]
    shown = {label: told[label][0] for label in DID_NOT}
    assert shown == {
        label: "; ".join(f"{former[f'best, {change}'] - former['best']:+.4f}" for change in changes)
        for label, changes in DID_NOT.items()
    }
    for place, name in enumerate(digits):
        more = results(name, "more-seeds")
        left, right = (
            {line["seed"]: line["validation_nats"] for line in more[key]}
            for key in ("without_fading_in", "best_with_clipped_gradient")
        )
        difference = interval([left[seed] - right[seed] for seed in left])
        form = f"{{:+.{digits[name]}f}}"
        assert told["no fading in, five and ten paired seeds"][place] == difference.shown(form.format)


def test_a_storm_is_told_as_it_was():
    document = json.loads((RESULTS / "chaos.json").read_text(encoding="utf-8"))
    failed = document["failed_requests"]

    def where(kind: str) -> str:
        return ", ".join(dict.fromkeys(one["stage"] for one in document["stages"] if one["strike"] == kind))

    assert table(BENCH, "struck least so far") == [
        f"| {kind} | {times} | {failed.get(kind, '')} | {where(kind)} |".replace("|  |", "| |").replace("|  |", "| |")
        for kind, times in document["strikes"].items()
    ]
    runs = document["runs"]
    assert all(run["digest"] == run["undisturbed"]["digest"] for run in runs)
    assert document["left"] == []
    again = [again for run in runs for again in run["again"]]
    assert all(begun["resumed"] >= begun["checkpoint"] for begun in again)
    assert any(begun["stage"] == "distill" and begun["checkpoint"] > 0 for begun in again)
    assert set(FIRST) <= set(document["strikes"])
    seconds, commands = sum(run["seconds"] for run in runs), sum(run["commands"] for run in runs)
    said = f"{seconds:.0f} s: the command was given {commands} times, and training began again {len(again)} times"
    assert said in " ".join(BENCH.split())


def test_summaries_score_what_was_measured():
    document = json.loads((RESULTS / "paper-table-3.json").read_text(encoding="utf-8"))
    names = {"full precision": "teacher", "quantgpt": "`paper`"}
    measured = {}
    for row in document["rows"]:
        (ours,) = row["ours"].values()
        name = names.get(row["method"], f"`{row['method']}`") + ("" if row["bits"] == "32" else f", {row['bits']}")
        measured[name] = [f"{ours[metric]:.1f}" for metric in ("rouge1", "rouge2", "rougeL")]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table(BENCH, "`bitmill bench paper --table 3`")
    ]
    assert len(rows) == 5
    assert {row[0]: row[1:] for row in rows}.items() <= measured.items()


def test_the_quickstart_has_the_quality_that_was_measured():
    measured = json.loads((RESULTS / "quickstart" / "table.json").read_text(encoding="utf-8"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(README, "The quickstart.")]
    quality = {row[0].removesuffix(" (ternary)"): row[1:4] for row in rows}
    assert quality.pop("teacher, fp32") == [f"{measured['teacher']['perplexity']:.2f}", "", ""]
    assert quality == {
        bits: [f"{m['perplexity']:.2f}", f"{m['kl_nats']:.4f}", f"{100 * m['top1_agreement']:.1f} %"]
        for bits, m in measured["students"].items()
    }
    others = [f"{seed['perplexity']:.2f}" for seed in measured["other_seeds_at_2-2-8"].values()]
    assert f"(two others at 2-2-8: {' and '.join(others)};" in README


def test_the_quickstart_has_the_tokens_and_bytes_that_the_readme_says():
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    distill, width = config.distill, config.task.block_length
    tokens = f"{distill.steps} steps of {distill.batch_size} x {width} tokens, "
    assert f"{tokens}{distill.steps * distill.batch_size * width / 1e6:.1f}M tokens" in " ".join(README.split())
    sizes = {}
    for bits in ("8-8-8", "4-4-8", "2-2-8"):
        shape = skeleton(read_config(config.model.source, vocab_size=config.model.tokenizer.train_bpe))
        teacher, widths = fp32_bytes(shape), BitWidths.parse(bits)
        packed = layout(shape, family_named("gpt2"), config.quant.model_copy(update={"bits": bits}))
        roles = {"linear": widths.weights, "embedding": widths.embedding}
        size = packed.packed_bytes({name: roles[role] for name, role in packed.roles.items()})
        sizes[bits] = [f"{size:,}", f"{teacher / size:.1f}x"]
        sizes["teacher, fp32"] = [f"{teacher:,}", ""]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(README, "The quickstart.")]
    assert {row[0].removesuffix(" (ternary)"): row[-2:] for row in rows} == sizes


def test_warm_starts_save_what_was_measured():
    students = json.loads((RESULTS / "warm-start.json").read_text(encoding="utf-8"))["students"]
    sides = [{s["steps"]: s for s in students if s["start"] == start} for start in (None, "champion")]
    assert table(DOCUMENTS["pipeline/retrain/README.md"], "What that saves") == [
        f"| {steps} | "
        + " | ".join(
            f"{s['last_validation_nats']:.4f} | {s['validation_gap_nats']:.4f} | {s['validation_kl_nats']:.3f}"
            for s in (side[steps] for side in sides)
        )
        + " |"
        for steps in (25, 50, 100, 150, 250)
    ]


def test_caches_cost_what_was_measured():
    document = json.loads((RESULTS / "cache-modes.json").read_text(encoding="utf-8"))
    caches: dict[str, list[dict[str, Any]]] = {}
    for student in document["students"]:
        name = "`states`, float16" if student["mode"] == "states" else f"`logits`, {student['draws']} draws"
        caches.setdefault(name, []).append(student)
    exact = [student["test"]["gap_nats"] for student in caches["`states`, float16"]]

    def line(name: str, students: list[dict[str, Any]]) -> str:
        gaps, kls, same = (
            [s["test"][metric] for s in students] for metric in ("gap_nats", "kl_nats", "top1_agreement")
        )
        apart = [gap - other for gap, other in zip(gaps, exact, strict=True)]
        more = f"{mean(apart):+.4f} ({min(apart):+.4f} to {max(apart):+.4f})" if any(apart) else ""
        size = students[0]["bytes_a_token"]
        return f"| {name} | {size} | {mean(gaps):.4f} | {more} | {mean(kls):.4f} | {mean(same):.1%} |".replace(
            "%", " %"
        )

    assert [s["seed"] for students in caches.values() for s in students] == [0, 1, 2] * len(caches)
    expected = [line(name, students).replace("|  |", "| |") for name, students in caches.items()]
    assert table(BENCH, "    bitmill compress configs/quickstart.yaml --preset best --set cache.mode") == expected
    many = document["shares"][-1]
    ratio = many["equal_distances"] / many["independent"]
    assert f"{ratio:.2f} of what independent draws would" in BENCH
    assert f"{many['distinct']:.0f} of 50 are distinct" in BENCH


@pytest.mark.parametrize("name", ["README.md", "pipeline/sweep/README.md", "pipeline/retrain/README.md"])
def test_configurations_are_valid(name):
    examples = re.findall(r"```yaml\n(.*?)```", DOCUMENTS[name], re.DOTALL)
    quickstart = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    for example in examples:
        fields = yaml.safe_load(example)
        load_fields(fields if "name" in fields else {**quickstart, **fields}, None, None, name)
    assert len(examples) == 1


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_that_are_there(name):
    links = re.findall(r"\]\(([^)#\s]+)\)", DOCUMENTS[name])
    assert [link for link in links if "://" not in link and not (ROOT / name).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_of_the_project_are_there(name):
    said = re.findall(r"(?:^|[`\s])((?:pipeline|jobs|tests|configs)/[\w./*-]*\w)", DOCUMENTS[name], re.MULTILINE)
    assert [path for path in said if not list(ROOT.glob(path))] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_have_the_options_that_are_given(name):
    lines = [line.strip().split("  ")[0] for line in DOCUMENTS[name].splitlines() if line.startswith("    bitmill ")]
    for line in [*lines, *re.findall(r"`(bitmill [a-z][^`]*)`", DOCUMENTS[name])]:
        command: Any = typer.main.get_command(app)
        _, *words = shlex.split(line)
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, line
