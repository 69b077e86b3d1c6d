"""From a budget to configurations that fit it: sensitivities of a tiny model, proposals, and what is refused."""

from __future__ import annotations

import math
import shutil

import pytest

from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.flow.plan import plan_run
from pipeline.flow.run import run_plan
from pipeline.stages.sensitivity import ROWS
from pipeline.store.records import Sensitivity, TeacherCache
from pipeline.store.shards import cached_name
from pipeline.sweep import bit_budget
from tests.conftest import Recorder

WIDTHS = (2, 4, 8)
EMBEDDING = "transformer.wte"


def laid_over(config, dotted):
    fields = config.model_dump(mode="json", by_alias=True, exclude={"preset"})
    for path, value in dotted.items():
        section, _, name = path.partition(".")
        fields[section][name] = value
    return Config.model_validate(fields)


def bytes_at(config, bits):
    shape = bit_budget.layout_of(config)
    return shape.packed_bytes(dict.fromkeys(shape.modules, bits))


def run(config):
    listener = Recorder()
    planned = bit_budget.plan_sensitivities(config)
    return planned, run_plan(planned, listener), listener


@pytest.fixture(scope="module")
def measured(finished, tiny_config, tmp_path_factory):
    """A store with the tokens, teacher and cache of `finished`, and the sensitivities. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("budget")
    store = finished.plan.config.resources.storage_uri
    for stage in ("tokenize", "finetune", "cache"):
        shutil.copytree(f"{store}/{stage}", folder / "store" / stage)
    config = tiny_config(folder)
    _, outcome, _ = run(config)
    return config, outcome


def test_a_sensitivity_is_measured_beside_the_line_for_each_module_and_width(measured):
    config, outcome = measured
    found = outcome.steps["sensitivity"].record
    assert outcome.status == {"tokenize": "reused", "finetune": "reused", "cache": "reused", "sensitivity": "done"}
    assert found.kl_nats.keys() == bit_budget.layout_of(config).modules.keys()
    assert 0 < found.tokens <= ROWS * 32
    sums = [sum(of[bits] for of in found.kl_nats.values()) for bits in WIDTHS]
    assert sums[0] > 4 * sums[1] > 16 * sums[2] >= 0
    for of in found.kl_nats.values():
        assert of[2] > of[8]


def test_a_sensitivity_is_measured_once_and_the_same_in_any_batches(measured, tiny_config, tmp_path):
    config, outcome = measured
    _, again, listener = run(config)
    assert set(again.status.values()) == {"reused"}
    assert ("started", "sensitivity") not in listener.events
    shutil.copytree(config.resources.storage_uri, tmp_path / "store", ignore=shutil.ignore_patterns("sensitivity"))
    found = []
    for batch in (16, 5):
        other = tiny_config(tmp_path, resources={"inference_batch": batch})
        planned, made, _ = run(other)
        record = made.steps["sensitivity"].record
        assert record.key == outcome.steps["sensitivity"].record.key
        found.append(record.kl_nats)
        shutil.rmtree(planned.step(Sensitivity).dir.uri)
    assert found[0] == outcome.steps["sensitivity"].record.kl_nats
    for name, of in found[1].items():
        assert of == pytest.approx(found[0][name], rel=1e-3, abs=1e-7)


def test_a_damaged_shard_of_the_cache_is_made_again(measured, tiny_config, tmp_path):
    config, outcome = measured
    shutil.copytree(config.resources.storage_uri, tmp_path / "store", ignore=shutil.ignore_patterns("sensitivity"))
    other = tiny_config(tmp_path)
    shards = outcome.steps["tokenize"].record.splits["train"].shards
    cache = bit_budget.plan_sensitivities(other).step(TeacherCache).dir
    path = tmp_path / "store" / "cache" / cache.key / "1" / cached_name(shards[0].name)
    path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    _, made, _ = run(other)
    assert made.steps["sensitivity"].record.kl_nats == outcome.steps["sensitivity"].record.kl_nats


def test_proposals_are_configurations_that_fit_the_budget(measured, run_flow):
    config, _ = measured
    limit = (bytes_at(config, 2) + bytes_at(config, 4)) // 2
    found = bit_budget.proposals(config, limit / 2**20, 3, Recorder())
    assert len(found) == 3
    assert found == bit_budget.proposals(config, limit / 2**20, 3, Recorder())
    trials = [laid_over(config, dotted) for dotted in found]
    keys = {plan_run(trial, "pack").run_key for trial in trials}
    assert len(keys) == 3
    shape, (_, outcome, _) = bit_budget.layout_of(config), run(config)
    record = outcome.finished(Sensitivity).record
    expected = bit_budget.best(config, shape, record, limit, 3)
    assert [e.dotted() for e in expected] == found
    assert all(e.packed_bytes <= limit for e in expected)
    assert [e.kl_nats for e in expected] == sorted(e.kl_nats for e in expected)
    assert expected[-1].overrides == {}  # the best uniform one, to compare with
    assert len({4, 2} & {trials[0].quant.spec().weight_bits(n, shape.roles[n]) for n in shape.modules}) == 2
    ran = run_flow(trials[0].model_copy(update={"distill": config.distill.model_copy(update={"steps": 0})}), "pack")
    assert ran.record("pack").size.packed_bytes == expected[0].packed_bytes


def test_with_all_the_room_there_is_everything_is_8_bits(measured):
    config, _ = measured
    assert bit_budget.proposals(config, 100, 1, Recorder()) == [{"quant.bits": "8-8-8", "quant.overrides": {}}]
    exact = bytes_at(config, 2)
    least = bit_budget.proposals(config, exact / 2**20, 5, Recorder())
    assert least == [{"quant.bits": "2-2-8", "quant.overrides": {}}]


def test_a_width_set_by_name_is_kept(measured):
    config, _ = measured
    fixed = laid_over(config, {"quant.overrides": {r".*\.wte": 32, r".*attn\.c_proj": 8}})
    for dotted in bit_budget.proposals(fixed, 100, 2, Recorder()):
        spec, shape = laid_over(config, dotted).quant.spec(), bit_budget.layout_of(config)
        assert spec.weight_bits(EMBEDDING, "embedding") == 32
        assert {spec.weight_bits(n, "linear") for n in shape.modules if n.endswith("attn.c_proj")} == {8}


def test_a_budget_below_the_smallest_model_names_it_before_anything_runs(tiny_config, tmp_path):
    config = tiny_config(tmp_path)
    least = bytes_at(config, 2)
    with pytest.raises(ConfigError, match=f"smallest possible model is {least:,} bytes") as caught:
        bit_budget.proposals(config, (least - 1) / 2**20, 1, Recorder())
    enough = float(str(caught.value).partition("Set sweep.budget_mib to ")[2].split()[0])
    bit_budget.check_budget(config, bit_budget.layout_of(config), enough)
    assert math.floor(enough * 2**20) - least < 110
    assert not list((tmp_path / "store").rglob("record.json"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"quant": {"quantizer": "twn"}}, "quant.quantizer twn"),
        ({"pack": {"encoding": "base3"}}, "pack.encoding base3"),
    ],
)
def test_what_leaves_no_choice_of_widths_is_refused(tiny_config, tmp_path, overrides, said):
    with pytest.raises(ConfigError, match=said):
        bit_budget.proposals(tiny_config(tmp_path, **overrides), 1, 1, Recorder())


def test_a_sensitivity_is_read_back_as_it_was(measured):
    _, outcome = measured
    done = outcome.steps["sensitivity"]
    assert done.dir.record(Sensitivity) == done.record
