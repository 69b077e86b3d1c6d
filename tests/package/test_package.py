"""The packed model on disk: what lies there, and that it is what was scored."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pipeline
from pipeline.config.quant import Quant
from pipeline.config.resources import Resources
from pipeline.export.dequantized import plain_model
from pipeline.flow.line import STAGES
from pipeline.models.build import build, read_config
from pipeline.models.family import family_named
from pipeline.models.student import load_frozen, load_parameters, make_student
from pipeline.package.package import read_package, write_package
from pipeline.quant.frozen import FrozenTensors, freeze
from pipeline.quant.packing import unpack
from pipeline.stages import pack
from pipeline.stages.scorer import batches
from pipeline.stages.stage import StepJob
from pipeline.store.records import Package, Student, Tokens
from pipeline.store.shards import Rows
from pipeline.store.step_store import StepDir, checksum
from pipeline.tasks.language_modeling import score
from pipeline.tasks.tokenizers import read_tokenizer, token_bytes
from tests.packages import NO_METRICS, WIDE, package, packed_logits

ROOT = Path(pipeline.__file__).parents[1]
FACTS = {"name": "x", "teacher_bytes": 1000, "lineage": {}, "metrics": NO_METRICS}

LOAD_ALL = """
import sys
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("loaded")
    except RuntimeError as error:
        print("refused" if "ignore_mismatched_sizes" in str(error) else error)
"""


def rows_of(ran, split="test"):
    return Rows(ran.plan.step(Tokens).dir, ran.record("tokenize").splits[split].shards)


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )


@pytest.fixture(scope="module")
def frozen(finished):
    return load_frozen(finished.folder("distill") / Student.FROZEN)


def packed(folder, frozen, config, quant, encoding="dense"):
    folder.mkdir()
    return write_package(folder, frozen, config, quant, encoding, config.model_type, FACTS)


def test_tensors_are_hashed_once_as_they_are_written_and_once_as_they_are_read(tmp_path, frozen, finished, monkeypatch):
    hashed, digest = [], FrozenTensors.digest
    monkeypatch.setattr(FrozenTensors, "digest", lambda tensors: hashed.append(tensors) or digest(tensors))
    job = StepJob(
        finished.record("pack").recipe,
        {name: finished.outcome.steps[name] for name in finished.plan.step(Package).inputs},
        StepDir(str(tmp_path), "pack", "0" * 32, str(tmp_path / "scratch")),
        Resources(),
        {},
    )
    with job.dir.hold(False, print) as held:
        manifest, _ = pack._pack(replace(job, dir=held))
    assert manifest["digest"] == finished.record("pack").digest
    assert len(hashed) == 2


def test_the_files_are_those_of_the_contract(finished):
    names = {path.name for path in finished.package.iterdir()}
    fixed = {"config.json", "model.safetensors", "generation_config.json", "README.md", "manifest.json"}
    assert fixed < names
    assert names - fixed == {path.name for path in (finished.folder("tokenize") / "tokenizer").iterdir()}
    assert "tokenizer.json" in names

    manifest = json.loads((finished.package / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert (manifest["bits"], manifest["quantizer"]) == ("2-2-8", "quantgpt")
    assert manifest["files"] == {
        name: checksum(finished.package / name).model_dump() for name in sorted(names - {"manifest.json"})
    }
    assert manifest["digest"] == finished.record("evaluate").digest == finished.record("pack").digest
    assert manifest["digest"] == finished.record("distill").digest
    scored = finished.record("evaluate")
    assert (manifest["metrics"]["teacher"], manifest["metrics"]["student"]) == (scored.teacher, scored.student)
    assert manifest["metrics"]["validation"] == scored.validation
    assert manifest["size"] == finished.record("pack").size.model_dump()
    stages = ("tokenize", "finetune", "distill", "evaluate", "pack")
    assert manifest["lineage"] == {stage: finished.plan.step(STAGES[stage].record).dir.key for stage in stages}


def test_sizes_are_what_lies_on_the_disk(finished):
    size = finished.record("pack").size
    assert size.packed_bytes == (finished.package / "model.safetensors").stat().st_size
    assert size.teacher_bytes == 4 * finished.record("finetune").parameters
    assert size.ratio == size.teacher_bytes / size.packed_bytes
    assert size.paper_ratio == size.teacher_bytes / size.paper_bytes


def test_the_card_holds_numbers_lineage_and_how_to_load(finished):
    card = (finished.package / "README.md").read_text()
    scored = finished.record("evaluate")
    columns = (scored.teacher, scored.student, scored.validation["teacher"], scored.validation["student"])
    perplexities = [f"{metrics['perplexity']:.4f}" for metrics in columns]
    assert f"| perplexity | {' | '.join(perplexities)} |" in card
    divergences = [f"{metrics['kl_nats']:.4f}" for metrics in columns[1::2]]  # a teacher has none from itself
    assert f"| kl_nats |  | {' |  | '.join(divergences)} |" in card
    assert finished.record("distill").key in card
    assert "pipeline.load(" in card
    assert f"{finished.record('pack').size.packed_bytes:,} bytes" in card


def test_two_bit_tensors_hold_three_levels_a_scale_and_nothing_else(finished):
    quantization = json.loads((finished.package / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "bitmill"
    tensors = load_file(finished.package / "model.safetensors")
    modules = dict(pipeline.load(finished.package).named_modules())
    assert len(quantization["modules"]) == 2 * 4 + 1
    for name, module in quantization["modules"].items():
        assert module["bits"] == 2
        rows, columns = module["shape"]
        stored, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert (stored.dtype, stored.numel()) == (torch.uint8, rows * math.ceil(columns / 4))
        assert tuple(scale.shape) == ((rows, 1) if name == "transformer.wte" else (1, 1))
        codes = unpack(stored.reshape(rows, -1), columns, 2)
        assert set(codes.unique().tolist()) == {-1, 0, 1}
        assert torch.equal(modules[name].weight, codes * scale)
    packed_names = {f"{name}.{leaf}" for name in quantization["modules"] for leaf in ("weight", "weight_scale")}
    for name in tensors.keys() - packed_names:  # positions, norms, biases: and the tied head is stored once
        assert name == "transformer.wpe.weight" or ".ln_" in name or name.endswith(".bias")


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_package_scores_what_was_reported_whatever_the_batch(finished, batch):
    model, bytes_of = pipeline.load(finished.package), token_bytes(read_tokenizer(finished.package))
    scores, _ = score(batches(rows_of(finished), batch), model, bytes_of)
    reported = finished.record("evaluate").student
    assert scores.metrics()["perplexity"] == pytest.approx(reported["perplexity"], rel=1e-5)
    assert scores.metrics()["bits_per_byte"] == pytest.approx(reported["bits_per_byte"], rel=1e-5)


@torch.no_grad()
def test_the_package_gives_the_logits_of_the_trained_student_bit_for_bit(finished):
    """Not of its frozen copy: of the model that training ran, with its latent weights quantized on the fly."""
    folder = finished.folder("finetune") / "model"
    student = build(read_config(folder), seed=1)
    spec = replace(finished.plan.config.quant.spec(), gamma_init="one")
    make_student(student, spec, family_named("gpt2"))
    load_parameters(student, load_file(finished.folder("distill") / Student.WEIGHTS))
    ids, _, _ = rows_of(finished).get(range(4))
    loaded = pipeline.load(finished.package)
    assert torch.equal(loaded(ids).logits, student.eval()(ids).logits)
    assert not loaded.training


def test_both_encodings_hold_the_same_tensors(finished, frozen, tmp_path):
    quant = Quant.model_validate(finished.plan.config.quant.model_dump())
    config = read_config(finished.folder("finetune") / "model")
    dense, base3 = (packed(tmp_path / e, frozen, config, quant, e) for e in ("dense", "base3"))
    assert dense["digest"] == base3["digest"] == finished.record("evaluate").digest
    assert base3["size"]["packed_bytes"] < dense["size"]["packed_bytes"]
    assert base3["size"]["paper_bytes"] == dense["size"]["paper_bytes"]
    ids, _, _ = rows_of(finished).get(range(2))
    logits = [pipeline.load(tmp_path / encoding)(ids).logits for encoding in ("dense", "base3")]
    assert torch.equal(*logits)


@pytest.mark.parametrize(("bits", "architecture"), [("8-8-8", "llama"), ("4-8-32", "llama"), ("32-2-8", "gpt2")])
def test_every_width_and_family_loads_as_it_was_frozen(tiny_config, tiny_llama, tmp_path, bits, architecture):
    made = {"llama": tiny_llama, "gpt2": tiny_config}[architecture](tmp_path, quant={"bits": bits})
    quant, family = made.quant, family_named(architecture)
    model = build(read_config(made.model.source, vocab_size=300), seed=0)
    make_student(model, quant.spec(), family)
    manifest = packed(
        tmp_path / "package", freeze(model, quant.spec(), torch.float16, torch.bfloat16), model.config, quant
    )
    frozen, _, _ = read_package(tmp_path / "package")
    assert frozen.digest() == manifest["digest"]
    assert {scale.dtype for scale in frozen.scales.values()} == {torch.float16}
    assert pipeline.load(tmp_path / "package")(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize(("quantizer", "levels"), [("lsq", "full"), ("seq", "midpoint")])
@pytest.mark.parametrize("bits", ["2-2-8", "4-8-8"])
@torch.no_grad()
def test_grids_with_all_patterns_load_as_they_were_frozen(tiny_config, tmp_path, quantizer, levels, bits):
    quant = Quant(bits=bits, quantizer=quantizer, granularity="per_channel")
    made = tiny_config(tmp_path)
    student = build(read_config(made.model.source, vocab_size=300), seed=0)
    config = read_config(made.model.source, vocab_size=300)
    make_student(student, quant.spec(), family_named("gpt2"))
    frozen = freeze(student, quant.spec(), torch.float32, torch.float32)
    assert min(int(codes.min()) for codes in frozen.codes.values()) < 1 - 2 ** (int(bits[0]) - 1)
    manifest = packed(tmp_path / "package", frozen, config, quant)
    read, _, quantization = read_package(tmp_path / "package")
    assert (manifest["quantizer"], quantization["levels"], read.levels) == (quantizer, levels, levels)
    assert read.digest() == manifest["digest"] == frozen.digest()
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(pipeline.load(tmp_path / "package")(ids).logits, student.eval()(ids).logits)
    if bits == "2-2-8":
        with pytest.raises(ValueError, match=f"base3 holds ternary codes, not {levels} ones"):
            packed(tmp_path / "base3", frozen, config, quant, "base3")


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("architecture", WIDE)
def test_every_group_of_a_row_has_its_own_scale_but_for_embedding_and_head(tmp_path, architecture, size):
    folder = package(tmp_path / "package", WIDE[architecture], quantizer="lsq", granularity={"per_group": size})
    frozen, config, quantization = read_package(folder)
    tensors, family = load_file(folder / "model.safetensors"), family_named(architecture)
    assert quantization["quant"]["granularity"] == {"per_group": size}
    for name, codes in frozen.codes.items():
        (rows, columns), scale = codes.shape, tensors[f"{name}.weight_scale"]
        assert tuple(scale.shape) == (rows, 1 if name in (family.embedding, family.head) else columns // size)
        levels = codes.float() * scale.repeat_interleave(columns // scale.shape[1], 1)
        assert torch.equal(frozen.weight(name), levels)
    ids, source = [5, 9, 2, 40, 7, 11], [3, 8, 30, 2]
    given = {"input_ids": torch.tensor([ids])}
    if architecture == "bart":
        given = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([ids])}
    with torch.inference_mode():
        wanted = plain_model(frozen, config, architecture)(**given).logits[0].numpy()
    found = packed_logits(folder, ids, source if architecture == "bart" else None, activations=32)
    assert np.abs(found - wanted).max() < 1e-5


def test_a_plain_transformers_load_fails_loudly(finished, tiny_llama, tmp_path, checkpoint):
    """8-bit codes have the very shape of the weights they stand for, so shapes alone do not give them away."""
    made = tiny_llama(tmp_path, quant={"bits": "8-8-8"})
    model = build(read_config(made.model.source, vocab_size=300), seed=0)
    make_student(model, made.quant.spec(), family_named("llama"))
    frozen = freeze(model, made.quant.spec(), torch.float32, torch.float32)
    packed(tmp_path / "package", frozen, model.config, made.quant)
    done = python(LOAD_ALL, checkpoint, finished.package, tmp_path / "package")
    assert done.stdout.split() == ["loaded", "refused", "refused"], done.stderr[-2000:]


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'ray', 'mlflow', 'pyarrow', 'boto3', 'numpy'}"
    done = python(f"import sys, pipeline; print(sorted({heavy} & set(sys.modules)))")
    assert (done.stdout, done.returncode) == ("[]\n", 0)


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = pipeline.lode
