import re
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.config.load import load_config
from pipeline.config.resources import Resources
from pipeline.config.run import Config
from pipeline.config.training import Distill
from pipeline.errors import ConfigError
from pipeline.store.keys import recipe_of

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.y*ml"))
MINIMAL = {"name": "tiny", "model": {"source": "org/name"}, "data": {"source": "*.txt"}, "distill": {"steps": 10}}


@pytest.fixture
def load(tmp_path):
    def load(*overrides, given=None, **sections):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **sections}))
        return load_config(path, list(overrides), given)

    return load


def test_there_are_configurations_to_start_from():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path):
    config = load_config(path)
    assert config == Config.model_validate(config.model_dump(by_alias=True))


@pytest.mark.parametrize(
    ("override", "path", "valid"),
    [
        ("colour=red", "colour", ["distill", "name", "register", "resources"]),
        ("distill.learning_rate=1", "distill.learning_rate", ["lr", "gamma_lr", "steps"]),
        ("finetune={steps: 1, momentum: 1}", "finetune.momentum", ["dropout", "epochs"]),
        ("register.gate.max_ppl=2", "register.gate.max_ppl", ["max_perplexity_ratio"]),
        ("model.tokenizer={train_bpe: 300, unigram: 1}", "unigram", ["train_bpe"]),
        ("resources.worker=1", "resources.worker", ["workers", "micro_batch"]),
        ("data.source={path: x, name: y}", "data.source.name", ["path", "config", "split", "weight"]),
        ("data.source=[x, {path: x, name: y}]", "data.source.1.name", ["path", "config", "split", "weight"]),
        ("register_={}", "register_", ["register"]),
    ],
)
def test_an_unknown_key_is_named_with_the_valid_ones(load, override, path, valid):
    with pytest.raises(ConfigError) as raised:
        load(override)
    (line,) = [line for line in str(raised.value).splitlines() if "unknown key" in line]
    assert f"{path}: unknown key" in line
    named = line.partition("Valid keys: ")[2].split(", ")
    assert set(valid) <= set(named)
    assert "register_" not in named


def test_everything_wrong_is_said_at_once(load):
    with pytest.raises(ConfigError) as raised:
        load("quant.bits=3-2-8", "distill.lr=-1", "nonsense=1")
    assert all(part in str(raised.value) for part in ("quant.bits", "distill.lr", "nonsense", "config.yaml"))


ARCHITECTURE = "model={source: {architecture: gpt2, n_layer: 2}, tokenizer: {train_bpe: 300}}"


def test_integer_products_enter_the_recipe_and_floating_point_ones_leave_it_as_it_was(load):
    integers = load("distill.products=int8", "resources={gpus_per_worker: 1, compile: false}").distill
    plain, said = load().distill, load("distill.products=float").distill
    assert "products" not in recipe_of(plain)
    assert recipe_of(said) == recipe_of(plain)
    assert recipe_of(integers) == {**recipe_of(plain), "products": "int8"}
    assert Distill.model_validate(recipe_of(integers)) == integers


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quant.bits=3-2-8"], r"quant\.bits: .*3 bits are not offered for weights; valid: 2, 4, 8, 32"),
        (["distill.start=tiny"], r"distill\.start: 'tiny' is no registered version; valid: name@alias or name/version"),
        (["distill.start=../tiny/1"], r"'\.\./tiny/1' is no registered version"),
        (
            ["distill.start=tiny/1", "distill.fade_in=0.2"],
            r"distill: fade_in is 0\.2, and start names .* leave fade_in",
        ),
        (["quant.bits=2-16-8"], r"16 bits are not offered for embedding"),
        (["quant.bits=2-2-4"], r"4 bits are not offered for activations; valid: 8, 32"),
        (["quant.bits=ternary"], r"'ternary' is not of the form W-E-A"),
        (["quant.overrides={'.*c_fc': 3}"], r"\.\*c_fc.*3 bits are not offered; valid: 2, 4, 8, 32"),
        (["pack.encoding=base3", "quant.bits=4-2-8"], r"base3 holds ternary codes only; quant.bits is 4-2-8"),
        (["pack.encoding=base3", "quant.overrides={a: 4}"], r"base3 holds ternary codes only"),
        (["pack.encoding=base3", "quant.quantizer=lsq"], r"base3 holds ternary .*quant\.quantizer is lsq"),
        (["pack.encoding=base3", "quant.quantizer=seq"], r"base3 holds ternary .*quant\.quantizer is seq"),
        (["pack.encoding=base3", "quant.quantizer=lsq", "quant.bits=32-2-8"], r"base3 holds ternary"),
        (["quant.quantizer=twn", "quant.bits=4-4-8"], r"quant: quantizer twn gives ternary .*bits are 4-4-8"),
        (["quant.quantizer=twn", "quant.bits=2-8-8"], r"quantizer twn gives ternary weights only"),
        (["quant.quantizer=statistics", "quant.bits=8-2-8"], r"quantizer statistics gives ternary .*bits are 8-2-8"),
        (["quant.quantizer=statistics", "quant.overrides={a: 4}"], r"ternary weights only.*overrides \{'a': 4\}"),
        (["quant.quantizer=twn", "quant.overrides={a: 32, b: 8}"], r"ternary weights only.*'b': 8"),
        (["quant.quantizer=apot"], r"quant\.quantizer: .*'seq'.*\(given: 'apot'\)"),
        (["model.source={architecture: gpt2}", "finetune.steps=1"], r"set model\.tokenizer to"),
        (["model.source={n_layer: 2}"], r"needs the key `architecture`"),
        ([ARCHITECTURE], r"an architecture without weights; add a finetune section"),
        (["model.tokenizer={train_bpe: 300}"], r"which the weights of model\.source do not know"),
        (["model.tokenizer={train_bpe: 256}"], r"greater than or equal to 257"),
        (["task.candidates=1"], r"task\.candidates: .*greater than or equal to 2"),
        (["task={name: next_utterance, candidates: 1}"], r"task\.candidates: .*greater than or equal to 2"),
        (["task={name: next_utterance, block_length: 4}"], r"a context with a reply needs at least 8 tokens"),
        (
            ["task.source_length=64"],
            r"source_length is 64, and the task language_modeling has no such.*valid: block_length",
        ),
        (["task={name: summarization, block_length: 64}"], r"valid: source_length, target_length"),
        (["task={name: translation}"], r"'language_modeling', 'chat', 'next_utterance' or 'summarization'"),
        (
            ["task.name=summarization", "data.unit=line", "data.validation=v", "data.test=t"],
            r"running text, which the task summarization cannot use",
        ),
        (["distill.epochs=2"], r"distill: give exactly one of steps and epochs"),
        (["distill.steps=null"], r"distill: give exactly one of steps and epochs"),
        (["finetune={lr: 1}"], r"finetune: give exactly one of steps and epochs"),
        (["distill.batch_size=2", "resources.workers=3"], r"distill\.batch_size is 2, fewer .*workers \(3\)"),
        (["finetune={steps: 1, batch_size: 1}", "resources.workers=2"], r"finetune\.batch_size is 1"),
        (
            ["distill.batch_size=9", "resources={workers: 2, strategy: fsdp}"],
            r"distill\.batch_size is 9, no multiple of resources\.workers \(2\)",
        ),
        (["quant.quantizer=laq", "resources.strategy=fsdp"], r"laq looks at whole matrices .* use another .* quantgpt"),
        (["resources={compile: true, strategy: fsdp}"], r"compile is true, .* leave compile out, or use strategy: ddp"),
        *(
            (
                ["distill.products=int8", f"resources={resources}"],
                r"distill\.products is int8, .* use products: float, or",
            )
            for resources in ("{strategy: fsdp}", "{compile: true}", "{gpus_per_worker: 1}")
        ),
        (["resources.strategy=zero"], r"resources\.strategy: .*'ddp' or 'fsdp'"),
        (["distill.lr=fast"], r"distill\.lr: .*\(given: 'fast'\)"),
        (["data.holdout=0.5"], r"data\.holdout: .*less than 0\.5"),
        (["register.gate.max_perplexity_ratio=1"], r"greater than 1"),
        (["name=a b"], r"name: .*'a b'"),
        *(
            ([f"{knob}={name}"], rf"{knob}: {re.escape(repr(name))} is no name; valid: letters")
            for knob in ("name", "resources.namespace", "register.name")
            for name in ("..", ".", "../elsewhere", "a/../..", "a/b", "/tmp", "a//b", ".hidden", "a\\b")
        ),
        (['resources.namespace=""'], r"namespace: '' is no name"),
    ],
)
def test_what_cannot_work_is_refused_with_its_knob(load, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(*overrides)


@pytest.mark.parametrize(
    ("quantizer", "bits", "encoding"),
    [
        *((name, "2-2-8", "base3") for name in ("quantgpt", "pact", "lsq_symmetric", "laq", "laq_uniform", "twn")),
        ("statistics", "2-2-8", "base3"),
        ("twn", "2-32-8", "base3"),
        ("statistics", "32-2-8", "dense"),
        *((name, bits, "dense") for name in ("lsq", "seq") for bits in ("2-2-8", "4-8-8", "8-4-32")),
        ("lsq", "32-32-8", "base3"),  # nothing to pack
    ],
)
def test_every_quantizer_goes_with_the_widths_and_encodings_that_hold_its_levels(load, quantizer, bits, encoding):
    config = load(f"quant.quantizer={quantizer}", f"quant.bits={bits}", f"pack.encoding={encoding}")
    assert (config.quant.spec().quantizer, config.pack.encoding) == (quantizer, encoding)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("knob", ["distill.lr", "distill.weight_decay", "distill.contrast_weight"])
def test_numbers_without_a_canonical_form_are_refused_at_the_door(load, knob, value):
    with pytest.raises(ConfigError, match=knob):
        load(f"{knob}={value}")


def test_an_override_that_is_no_regular_expression_is_refused_at_the_door(load):
    with pytest.raises(ConfigError, match=r"overrides"):
        load("quant.overrides={'(': 4}")


def test_a_missing_section_is_named(load, tmp_path):
    (tmp_path / "short.yaml").write_text("name: a\nmodel: {source: a/b}\ndata: {source: x.txt}\n")
    with pytest.raises(ConfigError, match="distill: Field required"):
        load_config(tmp_path / "short.yaml")


@pytest.mark.parametrize("text", [None, "", "- a\n- b\n", "a: [", "name: \x01", "just text"])
def test_a_file_that_is_no_configuration(tmp_path, text):
    path = tmp_path / "odd.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"odd\.yaml"):
        load_config(path)


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: gr\xfcn".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml"):
        load_config(tmp_path / "latin.yaml")


def test_set_reaches_nested_sections_and_values_are_yaml(load):
    config = load(
        "distill.lr=5e-4",
        "register.gate.max_perplexity_ratio=1.5",
        "quant.overrides={'.*c_fc': 8}",
        "finetune.steps=7",
        "finetune.clip_norm=null",
        "data.validation=a=b.txt",
        "resources.tracking_uri=",
    )
    assert config.distill.lr == 5e-4
    assert config.distill.steps == 10
    assert config.register_.gate.max_perplexity_ratio == 1.5
    assert config.quant.overrides == {".*c_fc": 8}
    assert config.finetune is not None
    assert (config.finetune.steps, config.finetune.clip_norm) == (7, None)
    assert config.data.validation == "a=b.txt"
    assert config.resources.tracking_uri is None


def test_the_last_set_wins(load):
    assert load("distill.lr=1", "distill.lr=2e-3").distill.lr == 2e-3


@pytest.mark.parametrize("override", ["distill.lr", "=3", "", "distill"])
def test_a_set_of_another_form_is_refused(load, override):
    with pytest.raises(ConfigError, match=r"not of the form section\.key=value"):
        load(override)


def test_a_set_below_a_value_is_refused(load):
    with pytest.raises(ConfigError, match="steps is a value, not a section"):
        load("distill.steps.fast=1")
    with pytest.raises(ConfigError, match="not YAML"):
        load("distill.lr=[1")


def test_given_resources_fill_what_the_file_and_set_leave_open(load):
    given = {"storage_uri": "/given", "tracking_uri": "given", "workers": "4"}
    config = load("resources.tracking_uri=set", given=given, resources={"storage_uri": "/file"})
    assert config.resources.storage_uri == "/file"
    assert config.resources.tracking_uri == "set"
    assert config.resources.workers == 4
    assert load().resources.storage_uri == "./bitmill-store"


@pytest.mark.parametrize(
    ("given", "on_a_gpu", "on_a_cpu"),
    [
        ({}, True, False),
        ({"strategy": "fsdp"}, False, False),
        ({"compile": True}, True, True),
        ({"compile": False}, False, False),
    ],
    ids=str,
)
def test_steps_are_compiled_on_gpus_unless_models_are_shared_out_or_it_is_said_otherwise(given, on_a_gpu, on_a_cpu):
    resources = Resources(**given)
    assert [resources.compiles(torch.device(kind)) for kind in ("cuda", "cpu")] == [on_a_gpu, on_a_cpu]


def test_a_configuration_is_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load().distill.lr = 1.0
