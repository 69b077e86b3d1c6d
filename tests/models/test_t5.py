"""T5 where it differs from all others: one table for words and head, or two that transformers takes for one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from pipeline.errors import ConfigError
from pipeline.models.build import build, load_model, read_config, skeleton
from pipeline.models.family import family_for
from pipeline.models.hidden_states import head_of, layer_states
from pipeline.models.student import quant_targets
from pipeline.tasks.summarization import summaries
from tests.family_models import ENCODER_DECODERS, T5_1_1

SOURCES = {"1.0": ENCODER_DECODERS["t5"], "1.1": T5_1_1}
IDS = torch.arange(4, 13)[None]


def config_of(version):
    special = {"pad_token_id": 0, "decoder_start_token_id": 0}
    return read_config({"architecture": "t5", **SOURCES[version], **special}, vocab_size=40)


@pytest.fixture(scope="module", params=SOURCES)
def saved(request, tmp_path_factory):
    """A folder of random weights, in which a head of its own is no copy of the words' table."""
    model, folder = build(config_of(request.param), seed=0), tmp_path_factory.mktemp("t5")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
        if request.param == "1.1":
            model.lm_head.weight.mul_(-1)
    model.save_pretrained(folder)
    return request.param, folder, model


@torch.no_grad()
def test_logits_are_those_of_transformers_after_a_folder_as_well(saved):
    version, folder, model = saved
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder)(IDS, decoder_input_ids=IDS[:, :6], output_hidden_states=True)
    for ours in (model.eval(), load_model(folder).eval()):
        states, before = layer_states(ours, -2, IDS[:, :6], IDS, torch.ones_like(IDS))
        torch.testing.assert_close(head_of(ours)(states), theirs.logits)
        torch.testing.assert_close(before, theirs.decoder_hidden_states[-2])
        assert (ours.lm_head.weight is ours.shared.weight) == (version == "1.0")
        ours.tie_weights()
        assert (ours.lm_head.weight is ours.shared.weight) == (version == "1.0")


def test_the_head_has_a_table_of_its_own_from_version_1_1_on():
    for version, role in (("1.0", "tied_head"), ("1.1", "head")):
        roles = {target.name: target.role for target in quant_targets(skeleton(config_of(version)), family_for("t5"))}
        assert roles["lm_head"] == role
        assert (roles["shared"], roles["decoder.embed_tokens"]) == ("embedding", "tied_embedding")


def test_a_summary_is_written_without_a_token_that_begins_texts_and_by_any_number_of_layers(saved):
    """As T5's config.json has it; transformers makes a cache of as many layers as the encoder has."""
    _, folder, _ = saved
    described = json.loads((folder / "config.json").read_text())
    described.pop("bos_token_id", None)
    (folder / "config.json").write_text(json.dumps(described))
    model = load_model(folder).eval()
    assert not hasattr(model.config, "bos_token_id")
    written = summaries(model, IDS, torch.ones_like(IDS), 5, beams=2)
    likeliest = summaries(model, IDS, torch.ones_like(IDS), 5, beams=1)[0].tolist()
    assert written.shape[1] <= 5
    logits = model(IDS, decoder_input_ids=torch.tensor([likeliest[:-1]])).logits[0]
    assert likeliest[1:3] == logits.argmax(-1)[:2].tolist()  # before a trigram could come twice


def test_a_second_table_that_config_json_does_not_know_is_refused(tmp_path):
    build(config_of("1.0"), seed=0).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["shared.weight"] + 1}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lm_head\.weight\..* tie_word_embeddings: true, .*differ: set it to false"):
        load_model(tmp_path)
