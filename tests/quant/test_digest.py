import dataclasses

import pytest
import torch

from pipeline.quant.frozen import FrozenTensors


@pytest.fixture
def frozen():
    return FrozenTensors(
        codes={"a": torch.tensor([[1, 0, -1], [0, 1, 1]]).to(torch.int8), "b": torch.ones(2, 2, dtype=torch.int8)},
        scales={"a": torch.tensor([[0.5], [0.25]]), "b": torch.tensor([[2.0]])},
        bits={"a": 2, "b": 4},
        rest={"norm": torch.ones(3), "bias": torch.zeros(2, 2).bfloat16(), "steps": torch.tensor(7)},
    )


def changed(frozen, group, name, tensor):
    return dataclasses.replace(frozen, **{group: getattr(frozen, group) | {name: tensor}})


def test_the_digest_sees_every_value_dtype_shape_name_and_width(frozen):
    variants = [frozen]
    for group in ("codes", "scales", "rest"):
        for name, tensor in getattr(frozen, group).items():
            for place in range(tensor.numel()):
                other = tensor.clone()
                other.view(-1)[place] += 1
                variants.append(changed(frozen, group, name, other))
            variants.append(changed(frozen, group, name, tensor.to(torch.float64)))
            variants.append(changed(frozen, group, name, tensor.unsqueeze(0)))
            others = {n: t for n, t in getattr(frozen, group).items() if n != name}
            variants.append(dataclasses.replace(frozen, **{group: others}))
            variants.append(dataclasses.replace(frozen, **{group: others | {name + "_": tensor}}))
    variants += [dataclasses.replace(frozen, bits=frozen.bits | {name: 8}) for name in frozen.bits]
    variants.append(changed(frozen, "rest", "bias", frozen.rest["bias"].view(torch.float16)))  # the same bytes
    variants += [dataclasses.replace(frozen, levels=levels) for levels in ("full", "midpoint")]
    swapped = {"a": frozen.scales["b"], "b": frozen.scales["a"]}
    variants.append(dataclasses.replace(frozen, scales=swapped))
    digests = [variant.digest() for variant in variants]
    assert len(set(digests)) == len(digests)


def test_the_digest_does_not_depend_on_insertion_order_or_memory_layout(frozen):
    groups = {name: getattr(frozen, name) for name in ("codes", "scales", "bits", "rest")}
    backwards = FrozenTensors(**{name: dict(reversed(group.items())) for name, group in groups.items()})
    strided = changed(frozen, "codes", "a", frozen.codes["a"].T.contiguous().T)
    copied = dataclasses.replace(frozen, rest={name: tensor.clone() for name, tensor in frozen.rest.items()})
    assert backwards.digest() == strided.digest() == copied.digest() == frozen.digest()


def test_the_digest_of_tensors_once_packed_stays_as_it_is(frozen):
    assert frozen.digest() == "89c6e0f19aeb1ebbd944c4223f2e611228f242c8703eb04668de0d0dd9327289"
