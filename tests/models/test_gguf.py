"""A Llama in a GGUF file becomes a teacher like any other: loaded in fp32, and saved again."""

import gguf
import numpy as np
import pytest
import torch

from pipeline.models.build import load_model

HIDDEN, INNER, HEADS, VOCABULARY = 32, 64, 4, 40


@pytest.fixture
def written(tmp_path):
    """A folder with a one-layer Llama whose linears are Q8_0, as llama.cpp writes them."""
    random, tensors = np.random.default_rng(0), {}

    def matrix(name, rows, columns):
        tensors[name] = random.normal(size=(rows, columns)).astype(np.float32)

    matrix("token_embd", VOCABULARY, HIDDEN)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        matrix(f"blk.0.{name}", HIDDEN, HIDDEN)
    for name, rows, columns in (("ffn_gate", INNER, HIDDEN), ("ffn_up", INNER, HIDDEN), ("ffn_down", HIDDEN, INNER)):
        matrix(f"blk.0.{name}", rows, columns)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors[name] = np.ones(HIDDEN, np.float32)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, values in tensors.items():
        if values.ndim == 2:
            packed = gguf.quants.quantize(values, kind)
            tensors[name] = gguf.quants.dequantize(packed, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path, tensors


def test_a_gguf_model_is_read_in_fp32_and_saved_as_any_other(written):
    folder, tensors = written
    model = load_model(folder, "model.gguf")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, ours in (("blk.0.ffn_down", "mlp.down_proj"), ("blk.0.attn_v", "self_attn.v_proj")):
        weight = model.get_parameter(f"model.layers.0.{ours}.weight")
        np.testing.assert_allclose(weight.detach().numpy(), tensors[name], atol=1e-6)
    model.save_pretrained(folder / "saved")
    again = load_model(folder / "saved")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
