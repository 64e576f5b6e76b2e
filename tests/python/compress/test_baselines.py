"""Each baseline keeps what its paper promises, and its artifact weighs what it says."""

from __future__ import annotations

import json
from pathlib import Path

import artifact
import assemble
import baselines
import pytest
import torch
from artifact import Artifact, Codes
from baselines import Context
from deltazip.compress.checkpoint import Checkpoint
from deltazip.compress.scoring.candidates import find_candidate, is_linear
from deltazip.compress.scoring.closeness import load_model
from methods import METHODS
from torch import Tensor

ROWS, COLUMNS = 24, 128


def context(hessian: Tensor | None = None, seed: int = 0) -> Context:
    generator = torch.Generator().manual_seed(seed)
    hessian = torch.empty(0, 0) if hessian is None else hessian
    return Context(hessian, generator, 0.01)


@pytest.fixture
def delta() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn((ROWS, COLUMNS), generator=generator) * 1e-3


@pytest.fixture
def hessian() -> Tensor:
    """Of inputs that go together, the later ones larger."""
    generator = torch.Generator().manual_seed(6)
    mix = torch.randn((24, COLUMNS), generator=generator)
    inputs = torch.randn((4 * COLUMNS, 24), generator=generator) @ mix
    inputs += 0.3 * torch.randn(inputs.shape, generator=generator)
    inputs *= torch.logspace(-0.5, 0.5, COLUMNS)
    return inputs.mT @ inputs / (2 * COLUMNS)


def lost(weight: Tensor, coded: artifact.Coded, hessian: Tensor) -> float:
    difference = coded.dense() - weight
    return float(((difference @ hessian) * difference).sum())


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (7, 13), generator=torch.Generator().manual_seed(bits))
    packed = artifact.pack_bits(codes, bits)
    assert packed.numel() == -(-7 * 13 * bits // 8)
    assert torch.equal(artifact.unpack_bits(packed, bits, 91).reshape(7, 13).long(), codes)


@pytest.mark.parametrize("name", METHODS)
def test_artifacts_weigh_and_stand_for_what_was_encoded(
    name: str, delta: Tensor, hessian: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "artifact.safetensors"
    coded = METHODS[name].encode([delta, delta[:4]], context(hessian))
    named = {"a": coded[0], "b": coded[1]}
    num_bytes, saved = artifact.write_artifact(path, named, {"a": True, "b": False})
    assert 0 <= saved < sum(num_bytes.values())
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert sum(num_bytes.values()) + 8 + header == path.stat().st_size
    base = torch.ones(ROWS, COLUMNS)
    read = Artifact(path)
    assert torch.equal(read.apply("a", base), base + coded[0].dense())
    assert torch.equal(read.apply("b", base[:4]), coded[1].dense())
    assert torch.equal(read.apply("c", base), base)


def test_svd_loses_the_tail_of_the_singular_values(delta: Tensor) -> None:
    sizes = torch.linalg.svdvals(delta.double())
    for rank in (1, 5, 20):
        for matrix in (delta, delta.mT):
            (low_rank,) = baselines.svd([matrix], context(), rank=rank)
            error = (low_rank.dense() - matrix).square().sum()
            assert float(error) == pytest.approx(float(sizes[rank:].square().sum()), rel=2e-3)
            values = sum(a.numel() for a in low_rank.arrays().values())
            assert values == rank * (ROWS + COLUMNS)


def test_mixed_rank_keeps_its_budget_and_beats_fp16_factors(hessian: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn((192, 60), generator=generator), torch.randn(60, COLUMNS)
    weight = (left * torch.logspace(0, -2, 60)) @ right * 1e-3
    for bits in (0.75, 1.5, 3.0):
        (coded,) = baselines.delta_come([weight], context(hessian), bits=bits)
        stored = 8 * sum(a.numel() * a.element_size() for a in coded.arrays().values())
        assert 0.8 * bits * weight.numel() < stored <= bits * weight.numel() + 64
        equal = int(bits * weight.numel() / (16 * (192 + COLUMNS)))
        (plain,) = baselines.svd([weight], context(), rank=equal)
        assert lost(weight, coded, hessian) < lost(weight, plain, hessian)
    assert [width for width, _ in baselines.mixed_ranks(192, COLUMNS, 3.0)] == [8, 3, 2]
    with pytest.raises(ValueError, match=r"no singular vector of a \[4, 4\] matrix fits 1 bits"):
        baselines.mixed_ranks(4, 4, 1)


def test_dropping_at_random_is_unbiased(delta: Tensor) -> None:
    seeds = 600
    total, shares = torch.zeros_like(delta), []
    for seed in range(seeds):
        (sparse,) = baselines.dare([delta], context(seed=seed), keep=0.25)
        total += sparse.dense()
        shares.append(float(sparse.kept.float().mean()))
    # A kept weight is four times itself: its variance is 3 w^2.
    wrong = (total / seeds - delta).abs() / (delta.abs() * (3 / seeds) ** 0.5)
    assert float(wrong.mean()) == pytest.approx((2 / torch.pi) ** 0.5, rel=0.05)
    assert sum(shares) / seeds == pytest.approx(0.25, abs=0.002)


def test_magnitude_keeps_the_largest(delta: Tensor) -> None:
    (sparse,) = baselines.magnitude([delta], context(), keep=0.25)
    assert int(sparse.kept.sum()) == ROWS * COLUMNS // 4
    assert delta[sparse.kept].abs().min() >= delta[~sparse.kept].abs().max()
    assert set(sparse.arrays()) == {"values", "kept"}
    (few,) = baselines.magnitude([delta], context(), keep=1 / 32)
    assert set(few.arrays()) == {"values", "places", "counts"}  # smaller than a bitmap
    assert torch.equal(artifact.Sparse.read(few.arrays(), few.meta()).values, few.values)


def test_bit_delta_starts_at_the_mean_magnitude(delta: Tensor) -> None:
    (codes,) = baselines.bit_delta([delta], context())
    scale = delta.abs().mean()
    assert torch.equal(codes.dense(), torch.where(delta >= 0, scale, -scale))
    error = (codes.dense() - delta).square().sum()
    for other in (0.98, 1.02):  # the best scale in L2
        assert (codes.dense() * other - delta).square().sum() > error
    assert sum(a.numel() for a in codes.arrays().values()) == ROWS * COLUMNS // 8 + 1


@pytest.mark.parametrize(("bits", "low", "high"), [(2, -2, 1), (4, -8, 7)])
def test_the_papers_levels_and_scales(
    bits: int, low: int, high: int, delta: Tensor, hessian: Tensor
) -> None:
    method = METHODS[f"deltazip-paper-{bits}"]
    (codes,) = method.encode([delta], context(hessian))
    assert isinstance(codes, Codes)
    scales = 2 * delta.abs().amax(dim=1, keepdim=True) / (2**bits - 1)
    assert torch.equal(codes.scales, scales.half())
    values = (codes.dense() / codes.scales.float()).round()
    assert set(values.unique().tolist()) <= set(range(low, high + 1))
    assert codes.kept is not None
    assert torch.equal(codes.kept.reshape(ROWS, -1, 4).sum(dim=2), torch.full((ROWS, 32), 2))
    assert not values[~codes.kept].any()
    # values, a bitmap of places and a scale a row: 1 or 2 bits, 1 bit, 16 / columns
    stored = 8 * sum(a.numel() * a.element_size() for a in codes.arrays().values())
    assert stored == ROWS * COLUMNS * (bits / 2 + 1) + 16 * ROWS


@pytest.mark.parametrize("name", ["gptq-4", "gptq-2", "deltazip-paper-4", "sparsegpt-fp16"])
def test_error_feedback(name: str, delta: Tensor, hessian: Tensor) -> None:
    """It loses less on inputs that go together; on independent ones there is nothing to feed."""
    method = METHODS[name]
    (blind,) = method.encode([delta], context(torch.eye(COLUMNS)))
    (seeing,) = method.encode([delta], context(hessian))
    assert lost(delta, seeing, hessian) < 0.8 * lost(delta, blind, hessian)
    kept = getattr(blind, "kept", None)
    if kept is not None:
        assert torch.equal(kept, baselines.two_of_four(delta.abs()))
    if name.startswith("gptq"):
        bits = int(name[-1])
        grid = baselines.fit_grid(delta, bits, 64, symmetric=False, search=True)
        codes = baselines.nearest(delta, *grid.expanded(64, COLUMNS), 2**bits - 1)
        assert torch.equal(blind.dense(), grid.codes(codes).dense())


def test_a_searched_range_loses_no_more(delta: Tensor) -> None:
    for symmetric in (True, False):
        errors = []
        for search in (False, True):
            grid = baselines.fit_grid(delta, 2, 64, symmetric=symmetric, search=search)
            codes = baselines.nearest(delta, *grid.expanded(64, COLUMNS), 3)
            errors.append(float((grid.codes(codes).dense() - delta).square().sum()))
        assert errors[1] < errors[0]


def test_awq_scales_a_few_large_inputs_up(delta: Tensor) -> None:
    hessian = torch.ones(COLUMNS)
    hessian[[3, 70]] = 900.0
    (codes,) = baselines.awq([delta], context(hessian.diag()), bits=3)
    grid = baselines.fit_grid(delta, 3, 64, symmetric=False, search=True)
    plain = grid.codes(baselines.nearest(delta, *grid.expanded(64, COLUMNS), 7))
    assert lost(delta, codes, hessian.diag()) < 0.7 * lost(delta, plain, hessian.diag())
    assert codes.columns is not None
    assert codes.columns[3] == codes.columns[70] < 0.5 * codes.columns[4]


@pytest.mark.parametrize(
    ("name", "embeddings"), [(name, "int4") for name in METHODS] + [("deltazip-paper-4", "exact")]
)
def test_built_folders(
    name: str, embeddings: str, pair: tuple[Path, Path], samples: Path, tmp_path: Path
) -> None:
    """The whole model is base + delta or the weights; its declared bytes are the file's."""
    options = assemble.Options(embeddings, num_samples=30, training_steps=2)
    made = assemble.Pair(*pair, samples, options)
    folder = assemble.build(made, METHODS[name], tmp_path / name)
    candidate = find_candidate(folder)
    declared = json.loads((folder / "size.json").read_text())
    assert candidate.sizes.plain_bytes == (folder / assemble.ARTIFACT).stat().st_size
    assert 0 < candidate.sizes.total_bytes <= candidate.sizes.plain_bytes
    assert declared["embedding_bytes"] == (131 * (24 + 2) if embeddings == "int4" else 131 * 48 * 4)
    assert not list(folder.glob("*.partial"))
    base, whole, tuned = Checkpoint(pair[0]), Checkpoint(folder), Checkpoint(pair[1])
    stored = Artifact(folder / assemble.ARTIFACT)
    assert set(stored.matrices) == set(made.names)
    moved = gone = 0.0
    for tensor in made.names:
        ours, wanted, before = (c.read(tensor).float() for c in (whole, tuned, base))
        assert torch.equal(ours, stored.apply(tensor, before))
        if is_linear(tensor):
            moved += float((wanted - before).square().sum())
            gone += float((wanted - ours).square().sum())
        elif "norm" in tensor or embeddings == "exact":
            assert torch.equal(ours, wanted)
    if METHODS[name].on_delta and "dare" not in name:
        assert 0.0 < gone < moved
    assert load_model(folder, None).lm_head.weight.shape == (131, 48)


def test_trained_scales_come_closer(pair: tuple[Path, Path], samples: Path, tmp_path: Path) -> None:
    def distance(folder: Path, made: assemble.Pair) -> float:
        models = [load_model(path, None) for path in (folder, pair[1])]
        with torch.inference_mode():
            logits = [
                torch.cat([m(torch.tensor([s])).logits[0] for s in made.sequences]) for m in models
            ]
        return float((logits[0] - logits[1]).square().mean())

    def made(steps: int) -> float:
        options = assemble.Options(num_samples=30, training_steps=steps)
        pair_ = assemble.Pair(*pair, samples, options)
        return distance(assemble.build(pair_, METHODS["bitdelta"], tmp_path / str(steps)), pair_)

    assert made(40) < 0.98 * made(0)
