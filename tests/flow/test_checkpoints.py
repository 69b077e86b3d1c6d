"""Checkpoints as people have them: each goes through, or is refused in the plan with what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jobs.generate import Request, generate
from pipeline.config.resources import Resources
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.flow.plan import RunPlan, plan_run
from pipeline.models import values
from pipeline.models.build import build, load_model, read_config
from pipeline.runtime import Runtime
from pipeline.tasks.tokenizers import train_bpe
from tests.conftest import ARCHITECTURES, Ran
from tests.packages import packed_logits

WEIGHTS = "model.safetensors"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved(**settings)`: a folder with a Llama of these settings and its tokenizer, made once."""
    words, made = train_bpe([corpus.read_text()], 300), dict[str, Path]()

    def save(**settings: Any) -> Path:
        name = json.dumps(settings)
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp("saved")
            source = {**ARCHITECTURES["llama"], **settings}
            build(read_config(source, vocab_size=len(words)), seed=0).save_pretrained(folder)
            words.save_pretrained(folder)
        return made[name]

    return save


@pytest.fixture
def plan(tiny_config: Callable[..., Config], tmp_path: Path) -> Callable[..., RunPlan]:
    def make(folder: Path, **model: Any) -> RunPlan:
        section = {"source": str(folder), "tokenizer": None, **model}
        return plan_run(tiny_config(tmp_path, model=section, finetune=None))

    return make


@pytest.fixture
def changed(saved: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`changed(tensors, **settings)`: a copy of the folder whose tensors went through a function, and whose config.json
    has these settings."""

    def change(through: Callable[[Tensors], Tensors] = lambda tensors: tensors, **settings: Any) -> Path:
        folder = shutil.copytree(saved(), tmp_path / "changed")
        save_file(through(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | settings))
        return folder

    return change


def command_in(message: str) -> str:
    """What follows `python -c` in a message."""
    found = re.search(r'python -c "(.+?)"', message)
    assert found is not None, message
    return found[1]


def with_a_bias(tensors: Tensors) -> Tensors:
    return tensors | {f"model.layers.{layer}.self_attn.q_proj.bias": torch.ones(32) for layer in range(2)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_half_precision_and_shards_are_read_as_fp32(
    changed: Callable[..., Path], plan: Callable[..., RunPlan], dtype: torch.dtype, shards: bool
) -> None:
    folder = changed(lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}, of_its_own={"a": 1})
    expected = load_file(folder / WEIGHTS)
    if shards:
        load_model(folder).to(dtype).save_pretrained(folder, max_shard_size="20KB")
        (folder / WEIGHTS).unlink(missing_ok=True)
        assert len([*folder.glob("*.safetensors")]) > 2
    assert plan(folder).warnings == []
    loaded = load_model(folder).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor.float())


def test_a_shard_that_is_not_there_is_named(changed: Callable[..., Path], plan: Callable[..., RunPlan]) -> None:
    folder = changed()
    load_model(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / WEIGHTS).unlink(missing_ok=True)
    missing = min(folder.glob("*.safetensors"))
    missing.unlink()
    with pytest.raises(ConfigError, match=rf"lacks 1 of the files that .*index\.json lists: {missing.name}\."):
        plan(folder)


def test_pickled_weights_are_refused_with_the_line_that_converts_them(
    changed: Callable[..., Path], plan: Callable[..., RunPlan]
) -> None:
    folder = changed()
    tensors = load_file(folder / WEIGHTS)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors.*pytorch_model\.bin.*may run code") as refused:
        plan(folder)
    exec(command_in(str(refused.value)), {})
    assert plan(folder).warnings == []
    assert torch.equal(load_file(folder / WEIGHTS)["model.norm.weight"], tensors["model.norm.weight"])


@pytest.mark.parametrize("whole", [False, True], ids=["adapter alone", "beside a model"])
def test_an_adapter_is_told_what_it_is(changed: Callable[..., Path], plan: Callable[..., RunPlan], whole: bool) -> None:
    folder = changed()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    if not whole:
        (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
        (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"a PEFT adapter of 'org/base'.*AutoPeftModelForCausalLM.*merge_and_unload"):
        plan(folder)


def test_tensors_of_an_adapter_are_told_what_they_are(
    changed: Callable[..., Path], plan: Callable[..., RunPlan]
) -> None:
    extra = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}
    with pytest.raises(ConfigError, match=r"1 tensors in .* of a LoRA adapter: .*lora_A\.weight\. .*merge_and_unload"):
        plan(changed(lambda tensors: tensors | extra))


@pytest.mark.parametrize(
    ("wrapped", "made_by"),
    [
        (lambda name: f"_orig_mod.{name}", r"torch\.compile"),
        (lambda name: name.replace("layers.0.", "layers.0._orig_mod."), r"torch\.compile"),
        (lambda name: f"module.{name}", "DistributedDataParallel"),
        (lambda name: name.replace("self_attn.", "_fsdp_wrapped_module.self_attn."), "FSDP"),
        (lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."), "activation checkpointing"),
    ],
)
def test_names_of_a_wrapper_are_refused_with_the_line_that_renames_them(
    changed: Callable[..., Path], plan: Callable[..., RunPlan], wrapped: Callable[[str], str], made_by: str
) -> None:
    folder = changed(lambda tensors: {wrapped(name): tensor for name, tensor in tensors.items()})
    with pytest.raises(ConfigError, match=rf"saved inside of what {made_by}.*rename") as refused:
        plan(folder)
    exec(command_in(str(refused.value)), {})
    assert plan(folder).warnings == []


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "bitmill"])
def test_a_quantized_checkpoint_is_refused_with_advice(
    changed: Callable[..., Path], plan: Callable[..., RunPlan], method: str
) -> None:
    advice = "export .*--format transformers" if method == "bitmill" else r"\.dequantize\(\)"
    with pytest.raises(ConfigError, match=rf"quantization_config of '{method}'.*quantized from, .*{advice}"):
        plan(changed(quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True}))


def test_a_quantized_folder_whose_library_is_not_installed_cannot_be_loaded(changed: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*(optimum|gptqmodel)"):
        load_model(changed(quantization_config={"quant_method": "gptq", "bits": 4}))


@pytest.mark.parametrize("lacks", ["adapter", "pickled"])
def test_a_repository_of_the_hub_is_told_what_it_is_as_a_folder_is(
    changed: Callable[..., Path], plan: Callable[..., RunPlan], monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    folder, asked = changed(), list[str]()
    if lacks == "adapter":
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    else:
        (folder / WEIGHTS).unlink()  # and of the hub no .bin is fetched

    def download(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    message = r"adapter of 'org/base'" if lacks == "adapter" else r"holds no \*\.safetensors\. Valid: a folder with"
    with pytest.raises(ConfigError, match=rf"model\.source: .*{message}"):
        plan(Path("org/name@" + "a" * 40))
    assert "adapter_config.json" in asked


def test_weights_under_another_name_are_refused(changed: Callable[..., Path], plan: Callable[..., RunPlan]) -> None:
    folder = changed()
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")
    with pytest.raises(
        ConfigError, match=r"holds consolidated\.safetensors, and transformers reads model\.safetensors"
    ):
        plan(folder)


@pytest.mark.parametrize(("number", "counted"), [(float("nan"), "3 NaN, 0 infinite"), (float("-inf"), "0 NaN, 3 inf")])
def test_a_tensor_that_holds_no_numbers_is_named_with_their_count(
    changed: Callable[..., Path], plan: Callable[..., RunPlan], number: float, counted: str
) -> None:
    def broken(tensors: Tensors) -> Tensors:
        tensors["model.layers.1.mlp.down_proj.weight"][5, :3] = number
        return tensors

    with pytest.raises(ConfigError, match=rf"1 tensors in .* hold NaN .*1\.mlp\.down_proj\.weight \({counted}"):
        plan(changed(broken))


def test_numbers_are_read_once_and_not_at_all_once_the_teacher_is_there(
    changed: Callable[..., Path],
    plan: Callable[..., RunPlan],
    run_flow: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, folder = [], changed()
    blocks = values.blocks_of
    monkeypatch.setattr(values, "blocks_of", lambda file, name: read.append(name) or blocks(file, name))
    first = plan(folder)
    assert sorted(read) == sorted(load_file(folder / WEIGHTS))
    plan(folder)
    assert len(read) == len({*read})
    run_flow(first.config, until="finetune")
    shutil.rmtree(Path(first.config.resources.local_cache_dir or ""))
    plan(folder)
    assert len(read) == len({*read})


def test_tensors_that_the_model_does_not_take_are_refused_or_dropped_and_named(
    changed: Callable[..., Path], plan: Callable[..., RunPlan], run_flow: Callable[..., Ran]
) -> None:
    folder = changed(with_a_bias)
    with pytest.raises(ConfigError, match=r"not take 2 tensors of .*0\.self_attn\.q_proj\.bias.*unused_tensors: drop"):
        plan(folder)
    with pytest.raises(ConfigError, match="not take 2 tensors"):  # where there is no plan
        load_model(folder)
    dropping = plan(folder, unused_tensors="drop")
    assert [note[:53] for note in dropping.warnings] == [
        "model.unused_tensors is drop: 2 tensors of " + str(folder)[:10]
    ]
    ran = run_flow(dropping.config, until="finetune")
    assert not [name for name in load_file(ran.folder("finetune") / "model" / WEIGHTS) if name.endswith("bias")]


def test_the_biases_that_config_json_says_are_taken(changed: Callable[..., Path], plan: Callable[..., RunPlan]) -> None:
    def biased(tensors: Tensors) -> Tensors:
        sizes = {"q": 32, "k": 16, "v": 16, "o": 32}
        return tensors | {
            f"model.layers.{layer}.self_attn.{x}_proj.bias": torch.ones(sizes[x]) for layer in range(2) for x in "qkvo"
        }

    assert plan(changed(biased, attention_bias=True)).warnings == []


def test_two_tables_that_config_json_ties_are_refused_unless_equal_or_dropped(
    changed: Callable[..., Path], plan: Callable[..., RunPlan], tmp_path: Path
) -> None:
    folder = changed(tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"1 tensors of .*: lm_head\.weight\..* tie_word_embeddings: true, .*differ"):
        plan(folder)
    assert plan(folder, unused_tensors="drop").warnings[0].endswith("are left out: lm_head.weight.")
    loaded = load_model(folder, unused="drop")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / WEIGHTS)
    assert plan(folder).warnings == []


def test_a_head_without_a_table_says_which_setting_is_at_odds(
    changed: Callable[..., Path], plan: Callable[..., RunPlan]
) -> None:
    folder = changed(lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    with pytest.raises(ConfigError, match=r"lacks 1 tensors .*lm_head\.weight\..*tie_word_embeddings: true there"):
        plan(folder)


def test_a_tensor_that_is_missing_is_named(changed: Callable[..., Path], plan: Callable[..., RunPlan]) -> None:
    folder = changed(lambda tensors: {name: tensor for name, tensor in tensors.items() if ".1.mlp." not in name})
    with pytest.raises(ConfigError, match=r"lacks 3 tensors .*1\.mlp\.down_proj\.weight.*random numbers"):
        plan(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"vocab_size": 320},
            r"lm_head\.weight is \(300, 32\), not \(320, 32\)\. Set vocab_size .*the table's 300 rows",
        ),
        ({"intermediate_size": 64}, r"6 tensors in .*another shape.*down_proj\.weight is \(32, 48\), not \(32, 64\)"),
    ],
)
def test_a_tensor_of_another_shape_is_named(
    changed: Callable[..., Path], plan: Callable[..., RunPlan], settings: dict[str, int], message: str
) -> None:
    folder = changed(lambda tensors: tensors, **settings)
    for look in (plan, load_model):
        with pytest.raises(ConfigError, match=message):
            look(folder)


def test_a_file_that_is_cut_is_refused_in_the_plan(changed: Callable[..., Path], plan: Callable[..., RunPlan]) -> None:
    folder = changed()
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-8])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged or not whole"):
        plan(folder)


@pytest.mark.parametrize("architecture", ["gemma2", "qwen3"])
def test_a_model_under_the_name_of_a_family_like_it_is_planned(
    saved: Callable[..., Path], plan: Callable[..., RunPlan], architecture: str
) -> None:
    folder = saved(architecture=architecture, head_dim=8, pad_token_id=0)
    assert plan(folder, family="llama").warnings == []


def test_a_model_that_does_not_work_under_the_name_of_another_family_is_refused(
    saved: Callable[..., Path], plan: Callable[..., RunPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(architecture="gemma2", head_dim=8, pad_token_id=0)
    monkeypatch.setattr("pipeline.quant.modules.embed_scale_of", lambda embedding: float(embedding.embed_scale))
    message = r"family is llama, and a gemma2 model does not work under that name: .*meta tensors\. Valid .* auto, bart"
    with pytest.raises(ConfigError, match=message):
        plan(folder, family="llama")


def _sentencepiece(text: str) -> PreTrainedTokenizerFast:
    """Pieces with ▁ and bytes for what they do not know, as Llama 2 has them: a begin and an end, and no padding."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    words = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *fallback]
    words.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _endless(text: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=train_bpe([text], 300).backend_tokenizer)


def _with_added(text: str) -> PreTrainedTokenizerBase:
    words = train_bpe([text], 300)
    words.add_tokens(["<tool>", text.split()[0]])
    return words


@pytest.mark.parametrize("made", [_sentencepiece, _endless, _with_added])
def test_tokenizers_of_any_kind_beside_a_padded_vocabulary_go_through_the_whole_line(
    corpus: Path,
    tmp_path: Path,
    tiny_config: Callable[..., Config],
    run_flow: Callable[..., Ran],
    made: Callable[[str], PreTrainedTokenizerBase],
) -> None:
    """With heads of their own size, fewer of keys than of queries, fp16 in shards, and a table of whole 64 rows."""
    words = made(corpus.read_text())
    rows = -(-len(words) // 64) * 64
    source = {**ARCHITECTURES["llama"], "head_dim": 16, "eos_token_id": words.eos_token_id}
    build(read_config(source, vocab_size=rows), 0).half().save_pretrained(tmp_path / "model", max_shard_size="30KB")
    words.save_pretrained(tmp_path / "model")
    few = {"steps": 2, "batch_size": 4, "eval_every": 2}
    model = {"source": str(tmp_path / "model"), "tokenizer": None}
    ran = run_flow(tiny_config(tmp_path, model=model, finetune=None, distill=few), until="pack")
    assert 1 < ran.record("evaluate").student["perplexity"] < 2 * rows
    text = f"{words.decode([260, 280, len(words) - 1])} Ünal <tool>"
    ids = words(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(ran.package)(text)["input_ids"] == ids
    logits = Runtime(ran.package, activations=32).logits(ids)
    assert logits.shape == (len(ids), rows)
    assert np.abs(logits - packed_logits(ran.package, ids, activations=32)).max() < 1e-4
    written = generate(str(ran.package), Request(text, 4, 0.0, 0), Resources(), Console(quiet=True), lambda piece: None)
    assert 0 < written["tokens"] <= 4
