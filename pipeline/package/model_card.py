"""The model card of a package: its numbers, where it comes from, how to run it."""

from __future__ import annotations

from typing import Any

POSITIONS = {"fp32": "fp32", "fp16": "fp16", "int8": "8-bit codes with one scale a row", None: "as all other tensors"}


def model_card(manifest: dict[str, Any], fields: dict[str, Any], seq2seq: bool) -> str:
    """Return the README of a packed model; `fields` is its quantization_config."""
    size, metrics, quant = manifest["size"], manifest["metrics"], fields["quant"]
    scores = "\n".join(
        _row(name, metrics, metrics["validation"])
        for name in {**metrics["student"], **metrics["validation"]["student"]}
    )
    lineage = "\n".join(f"- {stage}: `{key}`" for stage, key in manifest["lineage"].items())
    auto = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    widths = ", ".join(str(bits) for bits in sorted({module["bits"] for module in fields["modules"].values()}))
    return f"""# {manifest["name"]}, {manifest["bits"]} bits

Packed by bitmill with the quantizer `{manifest["quantizer"]}`: {size["packed_bytes"]:,} bytes of weights, every scale
and header counted, {size["ratio"]:.1f} times smaller than the fp32 teacher ({size["teacher_bytes"]:,} bytes).

| | teacher, test | this model, test | teacher, validation | this model, validation |
|---|---|---|---|---|
{scores}

Protocol: {metrics["protocol"]}. Validation chose the checkpoint, and chooses among models; test is for the report.

## Run it

The weights are packed codes, so a plain `from_pretrained` refuses them. With bitmill installed, any of these:

    bitmill generate path/to/this/folder "Some text"

```python
import pipeline

model = pipeline.load("path/to/this/folder")  # every byte is checked against manifest.json
```

```python
import pipeline.plugin  # teaches transformers the format
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

`model.save_pretrained(folder)` writes the same packed tensors again. For other runtimes:

    bitmill export path/to/this/folder --format onnx --out folder

## What is stored

Codes of {widths or "no"} bits ({fields["encoding"]} encoding, {fields["levels"]} levels), scales as
{quant["scale_dtype"]}, position embeddings as {POSITIONS[quant["positions"]]}, all other tensors as
{quant["rest_dtype"]}. Digest of all tensors: `{manifest["digest"]}`.

Lineage, as step keys:

{lineage}
"""


def _row(name: str, *splits: dict[str, Any]) -> str:
    values = [split[who].get(name) for split in splits for who in ("teacher", "student")]
    return f"| {name} | {' | '.join('' if value is None else f'{value:.4f}' for value in values)} |"
