import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.quant.frozen import freeze, thaw
from pipeline.quant.granularity import Granularity
from pipeline.quant.modules import QuantTarget, prepare, quantizers
from pipeline.quant.spec import BitWidths, QuantSpec

IDS = torch.randint(0, 64, (3, 11), generator=torch.Generator().manual_seed(1))


def spec(bits="2-2-8", granularity="per_tensor", **options):
    return QuantSpec(BitWidths.parse(bits), granularity=Granularity.parse(granularity), **options)


def gpt2(seed=0, layers=2):
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=layers, n_embd=24, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0)
    config.eos_token_id = 0
    return shaken(GPT2LMHeadModel(config))


def llama(seed=0, tied=True):
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
        vocab_size=64, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return shaken(LlamaForCausalLM(config))


@torch.no_grad()
def shaken(model):
    """Off the zeros and ones that biases and norms start at, so that each tensor shows in the output."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def targets_of(model):
    if isinstance(model, GPT2LMHeadModel):
        inner = [
            QuantTarget(f"transformer.h.{i}.{name}", "linear", symmetric_input=name != "mlp.c_proj", transposed=True)
            for i in range(model.config.n_layer)
            for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ]
        return [QuantTarget("transformer.wte", "embedding"), *inner, QuantTarget("lm_head", "tied_head")]
    attention = [f"self_attn.{x}_proj" for x in "qkvo"]
    feed_forward = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    inner = [QuantTarget(f"model.layers.{i}.{name}", "linear") for i in range(2) for name in attention + feed_forward]
    head = QuantTarget("lm_head", "tied_head" if model.config.tie_word_embeddings else "head")
    return [QuantTarget("model.embed_tokens", "embedding"), *inner, head]


def prepared(model, spec):
    prepare(model, targets_of(model), spec)
    return model


MODELS = {"gpt2": gpt2, "llama": llama, "untied": lambda seed=0: llama(seed, tied=False)}
each_model = pytest.mark.parametrize("name", MODELS)


def test_embedding_and_tied_head_share_one_gradient():
    model = prepared(gpt2(), spec("4-4-32"))
    embedding, head = model.transformer.wte, model.lm_head
    ids, target = IDS[0], torch.randn(11, 64)
    (head(embedding(ids).tanh()) * target).sum().backward()
    # The same two uses on two separate tables.
    below, above = (embedding.on_grid().detach().clone().requires_grad_() for _ in range(2))
    (F.linear(F.embedding(ids, below).tanh(), above) * target).sum().backward()
    quantizer = embedding.quantizer
    inside = embedding.weight.abs() < quantizer.scale_of(embedding.weight) * quantizer.grid.high
    assert below.grad.any()
    assert above.grad.any()
    torch.testing.assert_close(embedding.weight.grad, (below.grad + above.grad) * inside)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_tied_table_is_stored_once(name):
    model = prepared(MODELS[name](), spec("4-4-8"))
    table = targets_of(model)[0].name
    shape = model.get_submodule(table).weight.shape
    assert [n for n, p in model.named_parameters(remove_duplicate=False) if p.shape == shape] == [f"{table}.weight"]
    assert not [key for key in model.state_dict() if key.startswith("lm_head")]
    frozen = freeze(model, spec("4-4-8"), torch.float32, torch.float32)
    assert not [key for key in (*frozen.codes, *frozen.rest) if key.startswith("lm_head")]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_submodule(table).weight.zero_()
    assert not twin(IDS).logits.any()
    assert model(IDS).logits.any()


@each_model
def test_scales_follow_the_role(name):
    model = prepared(MODELS[name](), spec("2-4-8"))
    found = {n: (q.bits, tuple(q.gamma.shape)) for n, _, q in quantizers(model)}
    tables = [s.name for s in targets_of(model) if s.role in ("embedding", "head")]
    linears = [s.name for s in targets_of(model) if s.role == "linear"]
    assert found == dict.fromkeys(tables, (4, (64, 1))) | dict.fromkeys(linears, (2, (1, 1)))


def test_prepare_starts_gamma_at_one_for_ternary_modules_only():
    gammas = {q.bits: q.gamma for _, _, q in quantizers(prepared(gpt2(), spec("2-8-8")))}
    assert torch.equal(gammas[2], torch.ones(1, 1))
    assert (gammas[8] > 1.5).all()  # 8 bits with gamma = 1 would clip far inside the distribution


@each_model
@pytest.mark.parametrize(
    "options",
    [
        spec("2-2-8"),
        spec("4-4-8", granularity="per_channel", gamma_init="mse"),
        spec("8-8-8", activation_range="tensor"),
        spec("2-32-8"),
        spec("32-4-32", overrides=((r".*\.1\..*", 8),)),
        spec("2-2-8", quantizer="lsq"),
        spec("4-8-8", quantizer="lsq", granularity="per_channel"),
        spec("2-4-8", quantizer="seq"),
        spec("2-2-8", quantizer="twn"),
        spec("2-2-8", quantizer="statistics", granularity="per_channel"),
        spec("2-4-8", quantizer="pact", gamma_init="mse"),
        spec("2-8-8", quantizer="laq"),
    ],
    ids=lambda s: f"{s.quantizer}-{s.bits}",
)
def test_a_thawed_model_is_the_prepared_model_bit_for_bit(name, options):
    student = prepared(MODELS[name](seed=0), options)
    frozen = freeze(student, options, torch.float32, torch.float32)
    assert {n: q.bits for n, _, q in quantizers(student)} == frozen.bits
    thawed = MODELS[name](seed=7)
    thaw(thawed, targets_of(thawed), options, frozen)
    with torch.no_grad():
        assert torch.equal(thawed(IDS).logits, student(IDS).logits)


def test_freeze_casts_to_what_ships_and_thaw_reads_exactly_that():
    student = prepared(gpt2(), spec())
    frozen = freeze(student, spec(), torch.float16, torch.bfloat16)
    assert {t.dtype for t in frozen.codes.values()} == {torch.int8}
    assert {t.dtype for t in frozen.scales.values()} == {torch.float16}
    assert {t.dtype for t in frozen.rest.values()} == {torch.bfloat16}
    thawed = gpt2(seed=7)
    thaw(thawed, targets_of(thawed), spec(), frozen)
    state = thawed.state_dict()
    assert state.keys() == frozen.rest.keys() | {f"{n}.weight" for n in frozen.codes}
    for key, tensor in frozen.rest.items():
        assert torch.equal(state[key], tensor.float())
    for n, codes in frozen.codes.items():
        assert torch.equal(state[f"{n}.weight"], codes.float() * frozen.scales[n].float())


@pytest.mark.parametrize("quantizer", ["quantgpt", "lsq", "laq"])
def test_frozen_tensors_do_not_follow_further_training(quantizer):
    options = spec(quantizer=quantizer)
    student = prepared(gpt2(), options)
    frozen = freeze(student, options, torch.float32, torch.float32)
    before = frozen.digest()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
    assert frozen.digest() == before


def test_overrides_choose_the_width_by_module_name():
    overrides = ((r"transformer\.h\.0\.attn\..*", 32), (r".*c_proj", 8), (r"c_fc", 4))
    model = prepared(gpt2(), spec("2-4-8", overrides=overrides))
    bits = {name.removeprefix("transformer."): q.bits for name, _, q in quantizers(model)}
    block = {"h.1.attn.c_attn": 2, "h.1.attn.c_proj": 8, "h.1.mlp.c_fc": 2, "h.1.mlp.c_proj": 8}
    assert bits == {"wte": 4, "h.0.mlp.c_fc": 2, "h.0.mlp.c_proj": 8} | block


@each_model
def test_32_bits_leave_the_output_unchanged(name):
    with torch.no_grad():
        before = MODELS[name]()(IDS).logits
        model = prepared(MODELS[name](), spec("32-32-32"))
        assert not list(quantizers(model))
        if name == "gpt2":  # Conv1D multiplies by the transpose: the same sums in another order
            torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(model(IDS).logits, before)


def test_thaw_refuses_the_tensors_of_another_architecture():
    frozen = freeze(prepared(gpt2(), spec()), spec(), torch.float32, torch.float32)
    name, codes = next(iter(frozen.codes.items()))
    missing = {key: tensor for key, tensor in frozen.rest.items() if key != "transformer.ln_f.bias"}
    foreign = frozen.rest | {"transformer.h.9.bias": torch.zeros(3)}
    for model, tensors, mismatch in (
        (gpt2(layers=3), frozen, r"transformer\.h\.2\."),
        (llama(), frozen, "model"),
        (gpt2(), dataclasses.replace(frozen, rest=missing), r"transformer\.ln_f\.bias \(24,\)"),
        (gpt2(), dataclasses.replace(frozen, codes=frozen.codes | {name: codes[:, :-1]}), name),
        (gpt2(), dataclasses.replace(frozen, rest=foreign), r"transformer\.h\.9\.bias \(3,\)"),
    ):
        with pytest.raises(ValueError, match=f"do not fit the architecture; first mismatch: {mismatch}"):
            thaw(model, targets_of(model), spec(), tensors)
