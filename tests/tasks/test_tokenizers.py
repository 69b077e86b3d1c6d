import json

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, T5Tokenizer

from pipeline.errors import ConfigError
from pipeline.tasks.tokenizers import END_OF_TEXT, encoded, read_tokenizer, save_tokenizer, token_bytes, train_bpe

CORPUS = ["Hello world, größe naïve über straße.\n" * 3, "日本語 text 🙂 and more text, the cat"] * 20
# Special tokens stand for no bytes; the metaspace sign itself and spelled-out byte tokens are ambiguous by design.
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<"))
some_text = settings(database=None, deadline=None, max_examples=150)


def bytes_in(tokenizer, table, text):
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    return int(table[ids].sum())


def sentencepiece_like(texts, scheme="never", size=600):
    """BPE over metaspaces that falls back to bytes, as Llama's tokenizers are."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *fallback]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] not in fallback]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(fields)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def byte_level():
    return train_bpe(CORPUS, 400)


@pytest.fixture(scope="module")
def metaspace():
    return sentencepiece_like(CORPUS)


def test_a_learned_vocabulary_keeps_to_its_size(byte_level):
    assert 257 < len(byte_level) <= 400
    assert len(train_bpe(CORPUS, 280)) == 280
    assert len(train_bpe([], 400)) == 257
    assert byte_level.eos_token == END_OF_TEXT
    assert byte_level.eos_token_id == byte_level.convert_tokens_to_ids(END_OF_TEXT)


@some_text
@given(text=any_text)
@example(text=" two  spaces ")
@example(text="\x00\u2028🙂\r\n")
def test_every_text_can_be_encoded_and_decoded(byte_level, text):
    ids = byte_level(text, add_special_tokens=False)["input_ids"]
    assert byte_level.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_same_text_gives_the_same_tokenizer(byte_level):
    assert byte_level.get_vocab() == train_bpe(iter(CORPUS), 400).get_vocab()


@some_text
@given(text=any_text)
@example(text="größe 🙂\u2028x")
def test_bytes_of_byte_level_tokens_add_up(byte_level, text):
    assert bytes_in(byte_level, token_bytes(byte_level), text) == len(text.encode())


@some_text
@given(text=any_text)
@example(text="größe 🙂\u2028x  Ġ")
def test_bytes_of_metaspace_tokens_and_fallback_add_up(metaspace, text):
    assert bytes_in(metaspace, token_bytes(metaspace), text) == len(text.encode())


def test_a_space_that_the_tokenizer_puts_before_the_text_counts_as_its_token():
    tokenizer = sentencepiece_like(CORPUS, scheme="always")
    assert bytes_in(tokenizer, token_bytes(tokenizer), "the cat") == len(" the cat")


def test_a_letter_of_the_text_does_not_make_a_vocabulary_byte_level():
    # Ġ, which byte-level vocabularies use for the space, is a letter of Maltese.
    text = "il-Ġurnata Ġdida: Ġ t'Ġunju, größe"
    tokenizer = sentencepiece_like([text] * 30)
    assert "Ġ" in tokenizer.get_vocab()
    assert bytes_in(tokenizer, token_bytes(tokenizer), text) == len(text.encode())


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_added_tokens_stand_for_their_own_text(request, tmp_path, kind):
    request.getfixturevalue(kind).save_pretrained(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    tokenizer.add_tokens(["größer🙂"])
    text = "eine größer🙂 als"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("größer🙂") in ids
    assert bytes_in(tokenizer, token_bytes(tokenizer), text) == len(text.encode())


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_special_tokens_stand_for_no_bytes(request, kind):
    tokenizer = request.getfixturevalue(kind)
    table = token_bytes(tokenizer)
    assert (table.dtype, table.shape) == (torch.int64, (len(tokenizer),))
    assert not table[tokenizer.all_special_ids].any()
    assert int((table == 0).sum()) == len(set(tokenizer.all_special_ids))


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_a_tokenizer_survives_its_folder(request, tmp_path, kind):
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save_pretrained(tmp_path)
    again = read_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.eos_token_id == tokenizer.eos_token_id
    assert torch.equal(token_bytes(again), token_bytes(tokenizer))
    text = "größe  and the\n🙂 cat"
    assert again(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tokens_that_stand_for_gaps_stay_tokens_of_their_own(tmp_path):
    """T5's `<extra_id_0>`, which its checkpoints have behind the pieces of their vocabulary."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("▁b", -3.0)]
    gaps = [(f"<extra_id_{number}>", 0.0) for number in (1, 0)]
    T5Tokenizer(vocab=[*pieces, *gaps], extra_ids=2).save_pretrained(tmp_path / "given")
    save_tokenizer(read_tokenizer(tmp_path / "given"), tmp_path / "kept")
    kept = read_tokenizer(tmp_path / "kept")
    assert encoded(kept, ["a<extra_id_0> b<extra_id_1>"], special_tokens=True) == [[3, 4, 7, 5, 6, 1]]
    assert token_bytes(kept).tolist() == [0, 0, 0, 1, 1, 2, 0, 0]


@pytest.mark.parametrize("content", [None, "", "{", "{}", "[]", '{"version": "1.0", "model": {"type": "None"}}'])
def test_a_folder_without_a_sound_tokenizer_is_refused(byte_level, tmp_path, content):
    if content is not None:
        byte_level.save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.tokenizer: .* holds no tokenizer"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("special_tokens", [False, True])
def test_texts_are_encoded_as_the_tokenizer_encodes_them(byte_level, metaspace, special_tokens):
    texts = [*CORPUS[:3], "", f"an end{END_OF_TEXT}", "<s> and </s>"]
    for tokenizer in (byte_level, metaspace):
        expected = tokenizer(texts, add_special_tokens=special_tokens)["input_ids"]
        tokenizer.backend_tokenizer.enable_padding(length=99)  # as a file may ask
        tokenizer.backend_tokenizer.enable_truncation(2)
        assert encoded(tokenizer, texts, special_tokens) == expected
    before = encoded(byte_level, texts)
    byte_level.split_special_tokens = True
    assert encoded(byte_level, texts) == byte_level(texts, add_special_tokens=False)["input_ids"] != before
    byte_level.split_special_tokens = False
