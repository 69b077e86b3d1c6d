import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.config.quant import Quant
from pipeline.errors import BitmillError, ConfigError, RunError
from pipeline.models.build import build, load_model, parameters, read_config, set_dropout, skeleton
from pipeline.models.family import WALKED, family_for, family_named
from pipeline.models.hidden_states import WithStates, head_of, last_states, refuse_other_head
from pipeline.models.student import (
    check_spec,
    freeze_student,
    load_frozen,
    load_parameters,
    make_student,
    quant_targets,
    restore_frozen,
    save_frozen,
)
from pipeline.package.size import layout
from pipeline.quant.frozen import freeze
from pipeline.quant.spec import BitWidths, QuantSpec
from tests.operations import Launches

GPT2 = {"architecture": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32}
LLAMA = {
    "architecture": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
MODELS = {
    f"{source['architecture']}, {'tied' if tied else 'untied'}": {**source, "tie_word_embeddings": tied}
    for source in (GPT2, LLAMA)
    for tied in (True, False)
}
GPT2_TARGETS = {"attn.c_attn": True, "attn.c_proj": True, "mlp.c_fc": True, "mlp.c_proj": False}
LLAMA_TARGETS = [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
each_model = pytest.mark.parametrize("source", MODELS.values(), ids=MODELS)
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(5))


def config_of(source):
    return read_config(source, vocab_size=64)


def built(source, seed=0):
    return build(config_of(source), seed).eval()


@each_model
def test_the_targets_of_a_family_are_complete(source):
    model = skeleton(config_of(source))
    family = family_for(model.config.model_type)
    found = quant_targets(model, family)
    if source["architecture"] == "gpt2":
        linears = {f"transformer.h.{i}.{name}": sym for i in range(2) for name, sym in GPT2_TARGETS.items()}
    else:
        linears = {f"model.layers.{i}.{name}": True for i in range(2) for name in LLAMA_TARGETS}
    assert {s.name: s.symmetric_input for s in found if s.role == "linear"} == linears
    assert {s.transposed for s in found if s.role == "linear"} == {source["architecture"] == "gpt2"}
    roles = [(s.name, s.role) for s in found if s.role != "linear"]
    head = "tied_head" if source["tie_word_embeddings"] else "head"
    assert sorted(roles) == sorted([(family.embedding, "embedding"), ("lm_head", head)])
    quantized = {f"{target.name}.weight" for target in found}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert name in quantized or name.removesuffix(".weight") in family.unquantized


def test_a_model_with_the_modules_of_a_family_is_taken_by_its_name():
    config = config_of({**LLAMA, "architecture": "stablelm"})
    family = family_for(config.model_type, "llama")
    assert len(quant_targets(skeleton(config), family)) == 2 * len(LLAMA_TARGETS) + 2


@pytest.mark.parametrize(
    ("source", "unquantized"),
    [({**LLAMA, "architecture": "stablelm"}, ()), ({**GPT2, "architecture": "gpt_bigcode"}, ("transformer.wpe",))],
    ids=["stablelm", "gpt_bigcode"],
)
def test_a_decoder_of_no_family_is_walked_over(source, unquantized):
    config, quant = config_of(source), Quant(bits="2-4-8", positions="int8")
    family = family_for(config.model_type)
    student, targets = built(source), quant_targets(skeleton(config), family)
    assert family == WALKED
    assert {(t.name, t.role) for t in targets if t.role != "linear"} == {
        (student.base_model_prefix + (".wte" if unquantized else ".embed_tokens"), "embedding"),
        ("lm_head", "tied_head" if config.tie_word_embeddings else "head"),
    }
    refuse_other_head(student)
    make_student(student, quant.spec(), family)
    frozen = freeze_student(student, quant, family)
    assert {name for name, bits in frozen.bits.items() if bits == 8} == {*unquantized}
    with torch.no_grad():
        assert student.eval()(IDS).logits.isfinite().all()
    assert layout(skeleton(config), family, quant).modules.keys() == frozen.codes.keys() - {*unquantized}


def test_a_model_of_no_family_that_cannot_be_walked_over_is_refused():
    with pytest.raises(ConfigError, match=r"layers of a 'mbart' model are not known; known families: bart, .*alone"):
        quant_targets(skeleton(config_of({**BART, "architecture": "mbart"})), WALKED)
    cohere = {name: value for name, value in LLAMA.items() if name != "max_position_embeddings"}
    with pytest.raises(ConfigError, match=r"no family knows a cohere model, and its logits are not the product"):
        refuse_other_head(built({**cohere, "architecture": "cohere", "pad_token_id": None}))


def test_an_unknown_layer_is_refused_by_name():
    crossed = skeleton(config_of({**GPT2, "add_cross_attention": True}))
    with pytest.raises(ConfigError, match=r"does not know the layer transformer\.h\.0\.crossattention\.\w+ \(Conv1D\)"):
        quant_targets(crossed, family_named("gpt2"))
    with pytest.raises(ConfigError, match=r"family llama does not know the layer transformer\.wte"):
        quant_targets(skeleton(config_of(GPT2)), family_named("llama"))


def test_matrices_that_are_no_layers_are_not_left_out_in_silence():
    # The experts of Mixtral are bare parameters; a family that skips them would leave most of the model as it is.
    mixtral = skeleton(config_of({**LLAMA, "architecture": "mixtral", "num_local_experts": 2}))
    with pytest.raises(ConfigError, match=r"experts|gate"):
        quant_targets(mixtral, family_named("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt9"}, r"architecture is 'gpt9'; valid: bart, .*llama"),
        ({"architecture": 2}, r"architecture is 2; valid"),
        ({"architecture": ["gpt2"]}, r"architecture is \['gpt2'\]; valid"),
        ({"layers": 3}, r"model\.source\.layers: gpt2 has no such setting; valid: .*n_layer"),
        ({"vocab_size": 99}, r"vocab_size"),
        ({"model_type": "llama"}, r"model_type"),
        ({"n_layer": "four"}, r"n_layer"),
        ({"n_layer": 2.5}, r"n_layer"),
        ({"n_head": 3}, r"divisible"),
        ({"activation_function": "zelu"}, r"zelu"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        skeleton(read_config({**GPT2, **changes}, vocab_size=64))


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert config_of({**GPT2, "initializer_range": "2e-2"}).initializer_range == 0.02
    assert config_of({**GPT2, "activation_function": "relu"}).activation_function == "relu"


def test_an_architecture_brings_no_special_tokens_of_its_own():
    config = config_of(LLAMA)
    assert (config.bos_token_id, config.eos_token_id, config.vocab_size) == (None, None, 64)


@pytest.mark.parametrize(
    "content", [None, "{", "[]", "{}", '{"model_type": "gpt9"}', '{"model_type": "gpt2", "n_layer": "x"}']
)
def test_a_folder_without_a_usable_configuration_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"no usable config\.json"):
        read_config(tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}')
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ConfigError):
        read_config(tmp_path)
    assert not (tmp_path / "ran").exists()


@each_model
def test_a_skeleton_has_the_shapes_and_no_memory(source):
    empty, model = skeleton(config_of(source)), built(source)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (empty, model)]
    assert shapes[0] == shapes[1]
    assert parameters(empty) == parameters(model) == sum(p.numel() for p in {*model.parameters()})


def test_building_is_a_function_of_the_seed():
    first, again, other = (built(GPT2, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}


@each_model
def test_a_model_survives_its_folder_and_is_read_as_fp32(tmp_path, source):
    model = built(source)
    model.bfloat16().save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.float())


def test_a_folder_that_lacks_a_tensor_is_not_filled_with_random_weights(tmp_path):
    built(GPT2).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BitmillError, match=r"c_fc\.weight"):
        load_model(tmp_path)


@each_model
def test_states_are_what_the_head_reads(source):
    model = built(source)
    with torch.no_grad():
        last, states = WithStates(model)(IDS)
        logits = head_of(model)(last)
        expected = model(IDS, output_hidden_states=True)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(states, expected.hidden_states[-1])
    assert torch.equal(states, last_states(model, IDS).detach())


def test_states_and_gradients_are_the_models_own_in_fewer_operations():
    def taken(states_of):
        model = built(GPT2)
        with Launches() as launched:
            states = states_of(model)
            states.square().sum().backward()
        return states, [parameter.grad for parameter in model.parameters()], launched.count

    expected, gradients, plain = taken(lambda model: model.base_model(IDS, use_cache=False)[0])
    states, ours, fewer = taken(lambda model: WithStates(model)(IDS)[0])
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(ours, gradients)
    assert fewer <= plain - 16 * GPT2["n_layer"]


@pytest.mark.parametrize("source", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_dropout_can_be_set_everywhere(source):
    model = built(source).train()
    set_dropout(model, 0.5)
    assert not torch.equal(last_states(model, IDS), last_states(model, IDS))
    set_dropout(model, 0.0)
    assert torch.equal(last_states(model, IDS), last_states(model, IDS))
    assert torch.equal(last_states(model, IDS), last_states(model.eval(), IDS))


def test_an_override_names_a_module_or_is_refused():
    model, family = skeleton(config_of(GPT2)), family_named("gpt2")
    check_spec(model, family, QuantSpec(BitWidths(2, 2, 8), overrides=((r".*\.1\.mlp\..*", 8), ("transformer.wte", 4))))
    for pattern in (r"h\.1", "lm_head"):  # not a full match; a tied head has no table of its own
        with pytest.raises(ConfigError, match=re.escape(repr(pattern)) + r" matches no module; .*transformer\.wte"):
            check_spec(model, family, QuantSpec(BitWidths(2, 2, 8), overrides=((pattern, 8),)))


@pytest.mark.parametrize(("source", "layer", "columns"), [(GPT2, "c_attn", 16), (LLAMA, "down_proj", 96)])
def test_rows_that_are_no_whole_groups_are_refused(source, layer, columns):
    wide = {"n_embd": 16} if source is GPT2 else {"hidden_size": 64, "intermediate_size": 96}
    model, family = skeleton(config_of({**source, **wide})), family_named(source["architecture"])
    size = 32 if source is GPT2 else 64
    with pytest.raises(ConfigError, match=rf"is per_group {size}, and the rows of .*{layer} have {columns} weights"):
        check_spec(model, family, Quant(granularity={"per_group": size}).spec())
    fits = {"n_embd": 32} if source is GPT2 else {"hidden_size": 64, "intermediate_size": 128}
    check_spec(skeleton(config_of({**source, **fits})), family, Quant(granularity={"per_group": 32}).spec())


def trained_student(folder, source, quant):
    """A student whose weights moved, its latent weights beside the teacher it started from."""
    built(source).save_pretrained(folder)
    student = load_model(folder)
    make_student(student, quant.spec(), family_named(source["architecture"]))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    save_file(dict(student.named_parameters()), folder / "weights.safetensors")
    return student


def saved(frozen, folder):
    """Frozen tensors as their file gives them back."""
    save_frozen(frozen, folder / "frozen.safetensors")
    return load_frozen(folder / "frozen.safetensors")


@each_model
def test_the_frozen_student_is_the_trained_student(tmp_path, source):
    family = family_named(source["architecture"])
    quant = Quant(bits="4-2-8", granularity="per_channel", attention="qkv", overrides={r".*1\.mlp\..*": 8})
    student = trained_student(tmp_path, source, quant)
    expected = freeze(student, quant.spec(), torch.float32, torch.float32)
    frozen = saved(freeze_student(student, quant, family), tmp_path)
    assert frozen.digest() == expected.digest()
    restored = restore_frozen(read_config(tmp_path), quant.spec(), family, frozen)
    with torch.no_grad():
        assert torch.equal(restored(IDS).logits, student.eval()(IDS).logits)


def of_all_groups(frozen):
    return {(group, n): t for group in ("codes", "scales", "rest") for n, t in getattr(frozen, group).items()}


@each_model
@pytest.mark.parametrize(
    "ships",
    [
        {"quantizer": "seq"},
        {"scale_dtype": "float16", "rest_dtype": "bfloat16", "quantizer": "lsq"},
        {"scale_dtype": "bfloat16", "positions": "int8"},
    ],
    ids=str,
)
def test_a_file_of_frozen_tensors_gives_back_each_in_its_own_dtype(tmp_path, source, ships):
    quant = Quant(bits="2-4-8", **ships)
    student = trained_student(tmp_path, source, quant)
    frozen = freeze_student(student, quant, family_named(source["architecture"]))
    again = saved(frozen, tmp_path)
    assert again.digest() == frozen.digest()
    assert (again.bits, again.levels) == (frozen.bits, frozen.levels)
    stored, given = of_all_groups(again), of_all_groups(frozen)
    assert stored.keys() == given.keys()
    for place, tensor in given.items():
        assert stored[place].dtype == tensor.dtype
        assert torch.equal(stored[place], tensor)
    assert {t.dtype for t in again.scales.values()} == {getattr(torch, quant.scale_dtype)}
    assert {t.dtype for t in again.rest.values()} == {getattr(torch, quant.rest_dtype)}


@each_model
@pytest.mark.parametrize("quantizer", ["quantgpt", "pact", "lsq", "laq", "seq"])
def test_a_student_frozen_from_its_latent_weights_is_the_same(tmp_path, source, quantizer):
    family, quant = family_named(source["architecture"]), Quant(bits="4-2-8", quantizer=quantizer)
    frozen = freeze_student(trained_student(tmp_path, source, quant), quant, family)
    student = load_model(tmp_path)
    make_student(student, quant.spec(), family)
    assert freeze_student(student, quant, family).digest() != frozen.digest()
    load_parameters(student, load_file(tmp_path / "weights.safetensors"))
    assert freeze_student(student, quant, family).digest() == frozen.digest()


def test_weights_of_another_model_are_refused():
    model = built(GPT2)
    given = {name: p.detach() + 1 for name, p in model.named_parameters()}
    load_parameters(model, given)
    assert torch.equal(model.transformer.wte.weight, given["transformer.wte.weight"])
    assert torch.equal(model.lm_head.weight, given["transformer.wte.weight"])
    narrow = given | {"transformer.wpe.weight": given["transformer.wpe.weight"][:1]}  # which would be spread out
    del given["transformer.wpe.weight"]
    for others in (narrow, given):
        with pytest.raises(RunError, match=r"transformer\.wpe\.weight"):
            load_parameters(model, others)


def test_the_reference_library_reads_what_was_built(tmp_path):
    model = built(MODELS["llama, untied"])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3_text"])
def test_a_scaled_embedding_is_scaled_by_what_ships_and_needs_no_memory(architecture):
    scaled = {**LLAMA, "architecture": architecture, "head_dim": 4, "pad_token_id": 0}
    family, quant = family_named("llama"), Quant(bits="2-4-8")
    student, config = built(scaled), config_of(scaled)
    make_student(student, quant.spec(), family)
    restored = restore_frozen(config, quant.spec(), family, freeze_student(student, quant, family))
    assert student.get_input_embeddings().embed_scale == pytest.approx(4.0)
    with torch.no_grad():
        assert torch.equal(restored(IDS).logits, student.eval()(IDS).logits)
    assert layout(skeleton(config), family, quant).modules["model.embed_tokens"] == (64, 16)


@pytest.mark.parametrize("architecture", ["marian", "pegasus", "mbart", "m2m_100"])
def test_a_table_with_several_names_is_found_by_each(architecture):
    named = {**BART, "architecture": architecture}
    student = built(named)
    make_student(student, Quant(bits="2-4-8").spec(), family_named("bart"))
    table = student.get_parameter("model.shared.weight")
    assert student.get_input_embeddings().weight is table
    assert all(student.get_submodule(name).weight is table for name in family_named("bart").tied_embeddings)
    assert [name for name in student.state_dict() if name.endswith("embed_tokens.weight")] == []
    assert WithStates(student)(IDS, IDS, torch.ones_like(IDS))[0].shape == (2, 9, 16)
