"""The whole compressor on tiny models: what it makes, refuses and leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deltazip import LLM, SamplingParams
from deltazip.compress import activations, calibration, llama, pipeline
from deltazip.compress.checkpoint import Checkpoint, CheckpointError
from deltazip.compress.delta_file import FILE_NAME, DeltaFile, DeltaFileError
from deltazip.compress.export import export
from deltazip.compress.pack import DeltaType, stored_bytes
from deltazip.compress.plan import Settings, linear_types
from reference import load
from safetensors.torch import load_file, save_file

from .conftest import make_pair, write_samples

SETTINGS = Settings(format="int2", group_size=32, num_samples=40, batch_tokens=128)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied, biases": {"attention_bias": True, "mlp_bias": True},
    "one KV head": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }
    },
}  # fmt: skip


def compress(pair: tuple[Path, Path], out: Path, samples: Path, **more: Any) -> pipeline.Result:
    settings = more.pop("settings", SETTINGS)
    return pipeline.compress(*pair, out, samples, settings, **more)


def edited(pair: tuple[Path, Path], folder: Path, change: Any) -> tuple[Path, Path]:
    """A copy of the fine-tune whose tensors went through `change`, beside the same base."""
    tuned = folder / "edited"
    shutil.copytree(pair[1], tuned)
    tensors = load_file(tuned / "model.safetensors")
    change(tensors)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    return pair[0], tuned


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_layers_in_pieces_are_transformers_layers(name: str, tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, **CONFIGURATIONS[name])
    model = load(base, torch.float32)
    shape = llama.LlamaShape(Checkpoint(base))
    sequences = [(1, 3, 5, *range(6, 6 + n)) for n in (2, 3, 7, 11)]
    prefix = calibration.common_prefix(sequences)
    (batch,) = activations.make_batches([len(s) for s in sequences], 1000, prefix)
    assert prefix == 4  # 1 3 5 6, and the shortest still has a token of its own
    rows = [*sequences[0][:prefix], *(t for s in sequences for t in s[prefix:])]
    forward = llama.LlamaForward(shape, 64, torch.device("cpu"))
    index = batch.padded_index(torch.device("cpu"))
    with torch.inference_mode():
        states = model.model.embed_tokens(torch.tensor(rows))
        for layer in range(shape.num_layers):
            prefix_name = llama.layer_prefix(layer)
            weights = {
                n.removeprefix(prefix_name): p
                for n, p in model.named_parameters()
                if n.startswith(prefix_name)
            }
            inputs = forward.norm(states, weights[llama.INPUT_NORM])
            mixed = forward.attention(inputs, weights, index)
            states = states + forward.attention_output(mixed, weights)
            inner = forward.mlp_inner(forward.norm(states, weights[llama.MLP_NORM]), weights)
            states = states + forward.mlp_output(inner, weights)
        states = forward.norm(states, model.model.norm.weight)
        for row, sequence in enumerate(sequences):
            want = model.model(torch.tensor([sequence])).last_hidden_state[0]
            torch.testing.assert_close(
                states[index[row, : len(sequence)]], want, rtol=2e-4, atol=2e-4
            )


def test_a_shared_prefix_counts_as_often_as_it_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    (batch,) = activations.make_batches([5, 6, 9], 100, prefix=4)
    rows = torch.randn(batch.num_rows, 8, generator=generator)
    index = batch.padded_index(torch.device("cpu"))
    tokens = rows[index[index >= 0]]
    assert tokens.shape[0] == 5 + 6 + 9
    drift, missing = (torch.randn(batch.num_rows, n, generator=generator) for n in (8, 3))
    sums = activations.HessianSum(8, torch.device("cpu"), residual_width=3)
    residual = torch.randn(batch.num_rows, 3, generator=generator)
    sums.add(batch, (rows, rows + drift), (residual, residual + missing))
    torch.testing.assert_close(sums.value(), 2.0 / 20 * tokens.mT @ tokens)
    weight = torch.randn(3, 8, generator=generator)
    lacking = (drift @ weight.mT + missing)[index[index >= 0]]
    torch.testing.assert_close(sums.missing_output(weight), 2.0 / 20 * lacking.mT @ tokens)


def test_batches_hold_every_sequence_once_and_stay_small() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        prefix = int(torch.randint(0, 5, (1,), generator=generator))
        lengths = sorted((torch.randint(1, 40, (30,), generator=generator) + prefix).tolist())
        batches = activations.make_batches(lengths, 120, prefix)
        assert [n + prefix for b in batches for n in b.lengths] == lengths
        begin = 0
        for batch in batches:
            assert batch.begin == begin
            begin = batch.end
            padded = (max(batch.lengths) + prefix) * len(batch.lengths)
            assert padded <= 120 or len(batch.lengths) == 1


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("format_", ["int4", "int2", "ternary", "sign"])
def test_a_delta_brings_the_base_to_its_fine_tune(
    name: str, format_: str, tmp_path: Path, samples: Path
) -> None:
    base, tuned = make_pair(tmp_path, **CONFIGURATIONS[name])
    settings = Settings(format=format_, group_size=32, num_samples=40)
    result = compress((base, tuned), tmp_path / "out", samples, settings=settings)
    file = DeltaFile(tmp_path / "out")
    file.verify()
    assert file.content_digest == result.content_digest
    assert set(file.entries) == set(llama.LlamaShape(Checkpoint(base)).tensors())
    for entry_name, entry in file.entries.items():
        is_linear = entry_name.startswith("model.layers") and len(entry.shape) == 2
        assert entry.type.is_sparse == is_linear
        assert (entry.type is DeltaType.REPLACED) == (len(entry.shape) == 1)
    export(base, tmp_path / "out", tmp_path / "whole", dtype="fp32")
    ids = torch.tensor([[1, 4, 6, 7, 2, 1, 5, 9, 11, 8, 10]])
    with torch.inference_mode():
        ours, theirs, nothing = (
            load(folder, torch.float32)(ids).logits for folder in (tmp_path / "whole", tuned, base)
        )
    limit = {"int4": 0.08, "int2": 0.15, "ternary": 0.25, "sign": 0.4}[format_]
    assert (ours - theirs).square().sum() < limit * (nothing - theirs).square().sum()


def test_later_layers_make_up_for_earlier_errors(
    tmp_path: Path, pair: tuple[Path, Path], samples: Path
) -> None:
    """Of the fine-tune's last hidden states, with every linear in ternary."""
    tokenizer = calibration.load_tokenizer(pair[1])
    encoded = [calibration.encode(tokenizer, s).ids for s in calibration.load_samples(samples)]
    tuned = load(pair[1], torch.float32).model
    lost = []
    for correction in (0.0, 1.0):
        settings = Settings(format="ternary", group_size=32, num_samples=40, correction=correction)
        out = tmp_path / f"correction {correction}"
        compress(pair, out, samples, settings=settings)
        export(pair[0], out, out / "whole", dtype="fp32")
        ours = load(out / "whole", torch.float32).model
        with torch.inference_mode():
            errors = [
                (ours(ids).last_hidden_state - tuned(ids).last_hidden_state).square().sum()
                for ids in (torch.tensor([ids]) for ids in encoded)
            ]
        lost.append(float(sum(errors)))
    assert lost[1] < 0.9 * lost[0]


def test_export_is_base_plus_delta(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    compress(pair, tmp_path / "out", samples)
    file = DeltaFile(tmp_path / "out")
    base = load_file(pair[0] / "model.safetensors")
    for dtype, torch_dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        whole = tmp_path / dtype
        export(pair[0], tmp_path / "out", whole, dtype=dtype)
        tensors = load_file(whole / "model.safetensors")
        assert set(tensors) == set(file.entries)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, file.apply(name, base[name]).to(torch_dtype))
        assert (whole / "tokenizer.json").is_file()
        assert load(whole, torch_dtype).dtype == torch_dtype
    with pytest.raises(ValueError, match="is there already"):
        export(pair[0], tmp_path / "out", tmp_path / "bf16")
    with pytest.raises(ValueError, match="dtype must be one of"):
        export(pair[0], tmp_path / "out", tmp_path / "other", dtype="int8")
    with pytest.raises(DeltaFileError, match="made from the base with digest"):
        export(pair[1], tmp_path / "out", tmp_path / "other")


def test_what_did_not_move_takes_no_bytes(
    tmp_path: Path, pair: tuple[Path, Path], samples: Path
) -> None:
    same = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    base = load_file(pair[0] / "model.safetensors")
    changed = edited(pair, tmp_path, lambda t: t.update({n: base[n] for n in same}))
    compress(changed, tmp_path / "out", samples)
    file = DeltaFile(tmp_path / "out")
    unchanged = {n for n, e in file.entries.items() if e.type is DeltaType.UNCHANGED}
    assert unchanged == set(same)


def test_a_delta_of_nothing_is_tiny_and_is_the_base(
    tmp_path: Path, pair: tuple[Path, Path], samples: Path
) -> None:
    result = compress((pair[0], pair[0]), tmp_path / "none", samples)
    file = DeltaFile(tmp_path / "none")
    assert not file.stored
    assert result.file_bytes < 250 * len(file.entries)  # a row of the manifest for each
    export(pair[0], tmp_path / "none", tmp_path / "whole")
    base = load_file(pair[0] / "model.safetensors")
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(tensor, base[name])
    ids = [1, 4, 6, 7, 2, 1, 5, 9]
    with LLM(pair[0], variants={"same": tmp_path / "none"}, num_threads=1) as llm:
        answers = [
            llm.generate([ids], SamplingParams(temperature=0, max_tokens=8), name)[0]
            .outputs[0]
            .token_ids
            for name in ("", "same")
        ]
    assert answers[0] == answers[1]


def test_same_input_same_file(tmp_path: Path, pair: tuple[Path, Path], samples: Path) -> None:
    for name in ("a", "b"):
        compress(pair, tmp_path / name, samples)
    files = [(tmp_path / name / FILE_NAME).read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_an_interrupted_run_goes_on_where_it_stopped(
    tmp_path: Path, pair: tuple[Path, Path], samples: Path
) -> None:
    def stop_in_layer_2(what: str, share: float) -> None:
        if what.startswith("layer 2/3: MLP output"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(pair, tmp_path / "out", samples, progress=stop_in_layer_2)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()
    seen: list[str] = []
    compress(pair, tmp_path / "out", samples, progress=lambda what, share: seen.append(what))
    assert not any(what.startswith(("embedding", "layer 1/3")) for what in seen)
    assert any(what.startswith("layer 2/3: attention inputs") for what in seen)
    assert not (tmp_path / "out.partial").exists()
    compress(pair, tmp_path / "at once", samples)
    assert (
        DeltaFile(tmp_path / "out").content_digest == DeltaFile(tmp_path / "at once").content_digest
    )


def test_other_settings_do_not_resume(
    tmp_path: Path, pair: tuple[Path, Path], samples: Path
) -> None:
    def stop_in_layer_3(what: str, share: float) -> None:
        if what.startswith("layer 3/3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(pair, tmp_path / "out", samples, progress=stop_in_layer_3)
    seen: list[str] = []
    other = Settings(format="ternary", group_size=32, num_samples=40)
    compress(
        pair, tmp_path / "out", samples, settings=other,
        progress=lambda what, share: seen.append(what),
    )  # fmt: skip
    assert any(what.startswith("layer 1/3") for what in seen)
    types = {entry.type for entry in DeltaFile(tmp_path / "out").entries.values()}
    assert DeltaType.SPARSE24_INT2 not in types


def test_a_failing_disk_leaves_no_delta(
    tmp_path: Path, pair: tuple[Path, Path], samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_delta", full)
        with pytest.raises(OSError, match="No space left"):
            compress(pair, tmp_path / "out", samples)
    assert not (tmp_path / "out" / FILE_NAME).exists()
    compress(pair, tmp_path / "out", samples)
    DeltaFile(tmp_path / "out").verify()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(pipeline.CompressError, match=r"MB are needed while compressing, 0 MB are"):
        compress(pair, tmp_path / "more", samples)


def test_an_existing_delta_is_not_replaced_unasked(
    tmp_path: Path, pair: tuple[Path, Path], samples: Path
) -> None:
    compress(pair, tmp_path / "out", samples)
    with pytest.raises(pipeline.CompressError, match="is there already"):
        compress(pair, tmp_path / "out", samples)
    compress(pair, tmp_path / "out", samples, overwrite=True)


def test_tokenizer_files_travel_only_when_they_differ(
    tmp_path: Path, pair: tuple[Path, Path], samples: Path
) -> None:
    compress(pair, tmp_path / "out", samples)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [FILE_NAME]
    changed = edited(pair, tmp_path, lambda tensors: None)
    (changed[1] / "chat_template.jinja").write_text("{{ messages[0]['content'] }} ")
    compress(changed, tmp_path / "changed", samples)
    names = {p.name for p in (tmp_path / "changed").iterdir()}
    assert names == {FILE_NAME, "chat_template.jinja"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"'model\.layers\.1.*is missing"),
        (lambda t: t.update(extra=torch.zeros(3)), "'extra' is not in the base"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
            r"'model\.norm\.weight' is \[7\], config\.json calls for \[48\]",
        ),
        (
            lambda t: t["model.layers.2.mlp.down_proj.weight"].view(-1)[:2].fill_(torch.nan),
            r"'model\.layers\.2\.mlp\.down_proj\.weight' holds 2 values that are NaN",
        ),
        (
            lambda t: t["model.embed_tokens.weight"][3].fill_(torch.inf),
            r"'model\.embed_tokens\.weight' holds 48 values",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}),
            r"'model\.norm\.weight' is I8, expected one of F32, F16, BF16",
        ),
    ],
)
def test_unfit_weights_are_refused(
    change: Any, message: str, tmp_path: Path, pair: tuple[Path, Path], samples: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        compress(edited(pair, tmp_path, change), tmp_path / "out", samples)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architectures", ["MistralForCausalLM"], "MistralForCausalLM"),
        ("vocab_size", 99, "vocab_size is 99, the base has 131: an engine serves one vocabulary"),
        ("num_hidden_layers", 2, "num_hidden_layers is 2, the base has 3"),
        ("tie_word_embeddings", False, "tie_word_embeddings is False, the base has True"),
        ("rms_norm_eps", 0.5, "rms_norm_eps is 0.5"),
        ("quantization_config", {"quant_method": "gptq"}, r"quantised \(gptq\)"),
    ],
)
def test_another_model_is_refused(
    key: str, value: Any, message: str, tmp_path: Path, pair: tuple[Path, Path], samples: Path
) -> None:
    changed = edited(pair, tmp_path, lambda tensors: None)
    config = json.loads((changed[1] / "config.json").read_text())
    (changed[1] / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=message):
        compress(changed, tmp_path / "out", samples)


def test_too_little_calibration_is_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    few = write_samples(tmp_path / "few.jsonl", count=3)
    with pytest.raises(calibration.CalibrationError, match="needs at least 256 tokens"):
        compress(pair, tmp_path / "out", few)


def test_settings_are_checked() -> None:
    for wrong, message in (
        ({"format": "int3"}, "one of int4, int2, ternary, sign, dense4, dense8, got 'int3'"),
        ({"group_size": 50}, "multiple of 32, got 50"),
        ({"format": "int4", "bits": 1.0}, "bits are for format sign, got 'int4'"),
        ({"format": "sign", "bits": -1.0}, "bits must be from 0 to 16, got -1"),
        ({"embedding_format": "ternary"}, "one of int4, int8, exact"),
        ({"damping": 0.0}, "damping must be in"),
        ({"correction": 1.5}, r"correction must be in \[0, 1\], got 1.5"),
        ({"lengthening": -0.5}, r"lengthening must be in \[0, 2\], got -0.5"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [0.0, 1.65, 1.8, 2.0, 3.0])
def test_bits_pay_for_ternary_where_most_is_lost(bits: float, pair: tuple[Path, Path]) -> None:
    shape = llama.LlamaShape(Checkpoint(pair[0]))
    types = linear_types(shape, Settings(format="sign", group_size=32, bits=bits))
    sizes = {name: size for name, size in shape.tensors().items() if name in types}
    assert len(sizes) == len(llama.LINEARS) * shape.num_layers
    taken = sum(8 * stored_bytes(types[n], (s[0], s[1]), 32) for n, s in sizes.items())
    weights = sum(s[0] * s[1] for s in sizes.values())
    alone = sum(8 * stored_bytes(DeltaType.SPARSE14_SIGN, (s[0], s[1]), 32) for s in sizes.values())
    fine = {name for name, type_ in types.items() if type_ is DeltaType.SPARSE24_TERNARY}
    if bits == 0.0:  # sign alone takes more than one bit in groups as short as these
        assert not fine
        assert taken == alone > weights
        return
    assert taken <= bits * weights
    assert (len(fine) == len(types)) == (bits == 3.0)
    assert bits < 2.0 or fine >= {name for name in sizes if "down_proj" in name}
    for name in types.keys() - fine:  # nothing is left that would pay for one more
        rows, columns = sizes[name]
        assert taken + rows * -(-columns // 32) * 8 * 2 > bits * weights


def test_too_few_bits_are_refused(pair: tuple[Path, Path]) -> None:
    shape = llama.LlamaShape(Checkpoint(pair[0]))
    with pytest.raises(ValueError, match=r"0\.9 bits a weight are too few: sign with groups of 32"):
        linear_types(shape, Settings(format="sign", group_size=32, bits=0.9))


def test_sign_and_ternary_in_one_delta(
    tmp_path: Path, pair: tuple[Path, Path], samples: Path
) -> None:
    settings = Settings(format="sign", group_size=32, bits=1.8, num_samples=40)
    compress(pair, tmp_path / "out", samples, settings=settings)
    file = DeltaFile(tmp_path / "out")
    file.verify()
    types = linear_types(llama.LlamaShape(Checkpoint(pair[0])), settings)
    assert len(set(types.values())) == 2
    assert {name: file.entries[name].type for name in types} == types
    # A single matrix in more bits loses less of its own.
    errors = file.manifest["compressor"]["report"]["tensors"]
    of = {t: [errors[n]["error"] for n in types if types[n] is t] for t in set(types.values())}
    coarse, fine = of[DeltaType.SPARSE14_SIGN], of[DeltaType.SPARSE24_TERNARY]
    assert sum(fine) / len(fine) < sum(coarse) / len(coarse)


@pytest.mark.parametrize("format_", ["int4", "int8", "exact"])
def test_embedding_formats(
    format_: str, tmp_path: Path, pair: tuple[Path, Path], samples: Path
) -> None:
    settings = Settings(format="int4", group_size=32, embedding_format=format_, num_samples=40)
    compress(pair, tmp_path / "out", samples, settings=settings)
    base, tuned = (Checkpoint(folder).read(llama.EMBEDDING) for folder in pair)
    got = DeltaFile(tmp_path / "out").apply(llama.EMBEDDING, base)
    error = (got - tuned).norm() / (tuned - base).norm()
    assert error <= {"int4": 0.12, "int8": 0.01, "exact": 0.0}[format_]
