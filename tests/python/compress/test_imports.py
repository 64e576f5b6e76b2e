"""Adapters and BitDelta files as delta files: the same weights, and clear errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deltazip.cli import make_app
from deltazip.compress.checkpoint import CheckpointError
from deltazip.compress.delta_file import FILE_NAME, DeltaFile
from deltazip.compress.imports import convert
from deltazip.compress.imports.convert import import_variant
from deltazip.compress.pack import DeltaType
from deltazip.compress.plan import Settings
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from .conftest import make_pair

# BitDelta needs multiples of 32 inputs.
EVEN: dict[str, Any] = {
    "tie_word_embeddings": True, "intermediate_size": 96, "hidden_size": 64,
    "num_attention_heads": 4,
}  # fmt: skip
FINE = Settings(format="dense8", embedding_format="int8", group_size=32)
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.2.mlp.down_proj"
NORM = "model.norm"
EMBEDDING = "model.embed_tokens"


def make_adapter(folder: Path, base: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Writes an adapter and returns what the weights that it changes must become."""
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.2\..*": 6},
        "modules_to_save": ["norm"], "bias": "none",
    } | settings  # fmt: skip
    root = config.get("use_rslora", False)
    stored: dict[str, torch.Tensor] = {}
    want: dict[str, torch.Tensor] = {}
    for name, rank, alpha in ((Q, 4, 8.0), (DOWN, 2, 6.0)):
        rows, columns = weights[f"{name}.weight"].shape
        down = torch.randn(rank, columns, generator=generator)
        up = 0.01 * torch.randn(rows, rank, generator=generator)
        stored[f"base_model.model.{name}.lora_A.weight"] = down
        stored[f"base_model.model.{name}.lora_B.weight"] = up
        scaling = alpha / (rank**0.5 if root else rank)
        want[name] = weights[f"{name}.weight"].float() + scaling * up @ down
    vocab, hidden = weights[f"{EMBEDDING}.weight"].shape
    first = torch.randn(4, vocab, generator=generator)
    second = 0.01 * torch.randn(hidden, 4, generator=generator)
    stored[f"base_model.model.{EMBEDDING}.lora_embedding_A"] = first
    stored[f"base_model.model.{EMBEDDING}.lora_embedding_B"] = second
    scaling = 8.0 / (2.0 if root else 4.0)
    want[EMBEDDING] = weights[f"{EMBEDDING}.weight"].float() + scaling * (second @ first).T
    norm = torch.randn(hidden, generator=generator).bfloat16()
    stored[f"base_model.model.{NORM}.weight"] = norm
    want[NORM] = norm.float()
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(stored, folder / "adapter_model.safetensors")
    return want


def check(base: Path, delta: Path, want: dict[str, torch.Tensor], limit: float) -> DeltaFile:
    file = DeltaFile(delta)
    file.verify()
    weights = load_file(base / "model.safetensors")
    for name, entry in file.entries.items():
        before = weights[name]
        got = file.apply(name, before)
        wanted = want.get(name.removesuffix(".weight"))
        if wanted is None:
            assert entry.type is DeltaType.UNCHANGED, name
            assert torch.equal(got, before.float())
        else:
            moved = (wanted - before.float()).square().sum()
            assert (got - wanted).square().sum() <= limit * moved, name
    return file


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_an_adapter_becomes_its_delta(
    settings: dict[str, Any], tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    base = pair[0]
    want = make_adapter(tmp_path / "adapter", base, **settings)
    import_variant("lora", base, tmp_path / "adapter", tmp_path / "out", FINE)
    file = check(base, tmp_path / "out", want, 1e-3)
    assert file.manifest["compressor"]["report"]["imported"] == "lora"
    assert file.manifest["compressor"]["report"]["finetuned"] == "adapter"
    assert [p.name for p in (tmp_path / "out").iterdir()] == [FILE_NAME]
    assert not (tmp_path / "out.partial").exists()


def test_an_adapter_in_fewer_bits(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    base = pair[0]
    want = make_adapter(tmp_path / "adapter", base)
    limits = {"dense4": 0.02, "int4": 0.35}
    for format_, limit in limits.items():
        settings = Settings(format=format_, embedding_format="int8", group_size=32)
        out = tmp_path / format_
        import_variant("lora", base, tmp_path / "adapter", out, settings)
        file = check(base, out, want, limit)
        calibrated = tmp_path / f"{format_}-calibrated"
        import_variant(
            "lora", base, tmp_path / "adapter", calibrated, settings, calibration_file=samples
        )
        again = DeltaFile(calibrated)
        again.verify()
        assert {n: e.type for n, e in again.entries.items()} == {
            n: e.type for n, e in file.entries.items()
        }
        assert again.content_digest != file.content_digest


def test_an_interrupted_import_goes_on(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    make_adapter(tmp_path / "adapter", pair[0])
    arguments = ("lora", pair[0], tmp_path / "adapter", tmp_path / "out", FINE)

    def stop(what: str, share: float) -> None:
        if what == f"{DOWN}.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_variant(*arguments, progress=stop)
    assert not (tmp_path / "out").exists()
    seen: list[str] = []
    import_variant(*arguments, progress=lambda what, share: seen.append(what))
    assert f"{Q}.weight" not in seen
    import_variant("lora", pair[0], tmp_path / "adapter", tmp_path / "once", FINE)
    digests = {DeltaFile(tmp_path / name).content_digest for name in ("out", "once")}
    assert len(digests) == 1


def spoil_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return spoil


def spoil_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


A = f"base_model.model.{Q}.lora_A.weight"
B = f"base_model.model.{Q}.lora_B.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), r"no adapter_config\.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
        (spoil_config(peft_type="IA3"), "peft_type is IA3, expected LORA"),
        (spoil_config(use_dora=True), "use_dora is set"),
        (spoil_config(r=None), "'r' must be a number"),
        (spoil_config(r=8), r"_A.*is \[4, .*expected \[8, "),
        (spoil_weights(lambda t: t.pop(B)), "has lora_A, expected lora_A and lora_B"),
        (spoil_weights(lambda t: t.update({B: t[B].T.contiguous()})), r"lora_B.*expected \["),
        (spoil_weights(lambda t: t.update({A: t[A].int()})), "is I32, expected one of"),
        (spoil_weights(lambda t: t.update({A: t[A] * float("nan")})), "NaN or infinite"),
        (spoil_weights(lambda t: t.update({"base_model.model.other.lora_A.weight": t[A].clone()})),
         r"for 'other\.weight', which the base does not have"),
        (spoil_weights(lambda t: t.update({"base_model.model.lm_head.weight": t[A].clone()})),
         "lm_head, which this base ties to its embedding"),
        (spoil_weights(lambda t: t.update(
            {f"base_model.model.{EMBEDDING}.weight": torch.zeros(140, 64)})),
         "serves one vocabulary"),
        (spoil_weights(lambda t: t.clear()), "no LoRA weights"),
    ],
)  # fmt: skip
def test_bad_adapters_are_refused(
    spoil: Callable[[Path], Any], message: str, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    make_adapter(tmp_path / "adapter", pair[0])
    spoil(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=message):
        import_variant("lora", pair[0], tmp_path / "adapter", tmp_path / "out", FINE)
    assert not (tmp_path / "out" / FILE_NAME).exists()


def make_bitdelta(base: Path, tuned: Path, out: Path) -> dict[str, torch.Tensor]:
    """The file as BitDelta's code lays it out, bit by bit, and the weights that it means."""
    before, after = (load_file(f / "model.safetensors") for f in (base, tuned))
    content: dict[str, torch.Tensor] = {}
    want: dict[str, torch.Tensor] = {}
    for name, weight in before.items():
        if "proj" not in name or not name.endswith(".weight"):
            content[name] = after[name]
            want[name.removesuffix(".weight")] = after[name].float()
            continue
        delta = (after[name].float() - weight.float()).T  # [in, out]
        bits = (delta >= 0).to(torch.int64).reshape(delta.shape[0] // 32, 32, delta.shape[1])
        words = (bits << torch.arange(32)[:, None]).sum(dim=1)
        coeff = delta.abs().mean().half().float()
        module = name.removesuffix(".weight")
        content[f"{module}.mask"] = words.to(torch.int32)
        content[f"{module}.coeff"] = coeff
        signs = torch.where(delta >= 0, 1.0, -1.0).T
        want[module] = weight.float() + coeff * signs
    save_file(content, out)
    return want


@pytest.mark.parametrize("tied", [True, False])
def test_a_bitdelta_file_is_taken_as_it_is(tied: bool, tmp_path: Path) -> None:
    base, tuned = make_pair(tmp_path, **(EVEN | {"tie_word_embeddings": tied}))
    want = make_bitdelta(base, tuned, tmp_path / "diff.safetensors")
    exact = Settings(format="dense4", embedding_format="exact")
    import_variant("bitdelta", base, tmp_path / "diff.safetensors", tmp_path / "out", exact)
    file = check(base, tmp_path / "out", want, 1e-12)
    linears = [e for n, e in file.entries.items() if "proj" in n]
    assert {e.type for e in linears} == {DeltaType.DENSE_INT4}
    # Two signs in a byte of codes: packed, a bit for each, and nothing for equal scales.
    size = sum(file.stored_bytes(n) for n in file.entries if "gate_proj" in n)
    weights = sum(e.shape[0] * e.shape[1] for n, e in file.entries.items() if "gate_proj" in n)
    assert size * 8 < 1.3 * weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update({f"{Q}.mask": c[f"{Q}.mask"].T.contiguous()}), "expected I32"),
        (lambda c: c.update({f"{Q}.mask": c[f"{Q}.mask"].long()}), "expected I32"),
        (lambda c: c.pop(f"{Q}.coeff"), "must be one finite number"),
        (lambda c: c.update({f"{Q}.coeff": torch.tensor(float("nan"))}), "one finite number"),
        (
            lambda c: c.update({"x.mask": c[f"{Q}.mask"].clone()}),
            "'x.mask' is for a linear the base",
        ),
        (lambda c: c.update({"other.weight": torch.zeros(3)}), "the base does not have it"),
        (lambda c: c.update({f"{EMBEDDING}.weight": torch.zeros(140, 64)}), "the base has"),
        (lambda c: c.clear(), "no '.mask' in it"),
    ],
)
def test_bad_bitdelta_files_are_refused(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    pair = make_pair(tmp_path, **EVEN)
    make_bitdelta(*pair, tmp_path / "diff.safetensors")
    content = load_file(tmp_path / "diff.safetensors")
    change(content)
    save_file(content, tmp_path / "diff.safetensors")
    with pytest.raises(CheckpointError, match=message):
        import_variant("bitdelta", pair[0], tmp_path / "diff.safetensors", tmp_path / "out", FINE)


def test_mistakes_of_the_caller(
    tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(tmp_path, **EVEN)
    make_bitdelta(*pair, tmp_path / "diff.safetensors")
    with pytest.raises(ValueError, match="one of lora, bitdelta, got 'gguf'"):
        import_variant("gguf", pair[0], tmp_path, tmp_path / "out", FINE)
    with pytest.raises(CheckpointError, match="header"):
        import_variant("bitdelta", pair[0], samples, tmp_path / "out", FINE)
    with pytest.raises(CheckpointError, match="a pickle may run code"):
        import_variant("bitdelta", pair[0], tmp_path / "diff.pt", tmp_path / "out", FINE)
    with pytest.raises(ValueError, match="needs no calibration"):
        import_variant(
            "bitdelta", pair[0], tmp_path / "diff.safetensors", tmp_path / "out", FINE,
            calibration_file=samples,
        )  # fmt: skip
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert.pipeline.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match="0 MB are free"):
        import_variant("bitdelta", pair[0], tmp_path / "diff.safetensors", tmp_path / "out", FINE)


def test_the_command(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    make_adapter(tmp_path / "adapter", pair[0])
    words = ["import", "lora", str(pair[0]), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]
    app = make_app(["import", "inspect"])
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert "mean output error" in result.stdout
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "pass --overwrite" in result.stderr
