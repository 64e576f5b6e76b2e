"""deltazip bench: checkpoints that the engine takes, mixes that are what they say, numbers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from deltazip.bench.setup import work_folder
from deltazip.bench.shapes import SHAPES, base_tensors
from deltazip.bench.synthetic import DeltaOptions, delta_bytes, make_base, make_deltas
from deltazip.bench.workload import Mix, lognormal_lengths
from deltazip.cli import make_app
from typer.testing import CliRunner

APP = make_app(["bench"])
DIGEST = "0" * 64


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(APP, ["bench", *map(str, words)], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def test_every_mode_on_random_weights(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    status, text, errors = run(
        "latency", "prefill", "throughput", "load", "--shape", "tiny", "--variants", 5,
        "--format", "ternary", "--embedding-format", "int4", "--distinct", 2,
        "--mix", "base,even,zipf:4", "--batch", "2,3", "--prompt", 40, "--output", 64,
        "--prefill-prompt", 64, "--requests", 24, "--rounds", 2, "--json", out,
        "--workdir", tmp_path / "files", "--prefill-chunk", "16,0",
    )  # fmt: skip
    assert status == 0, errors
    for mode in ("latency", "prefill", "throughput", "load"):
        assert mode in text
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["device"].startswith("cpu")
    assert report["driver"] is None
    assert "plan: batches=[2, 3], prompt=40" in text
    assert "prefill_chunk_tokens=16" in text
    assert report["subject"]["variants"] == 8, "five, and three cold ones for load"
    assert report["subject"]["variants_resident"] == 6
    assert report["subject"]["distinct_files"] == 2
    counts = Counter(result["mode"] for result in report["results"])
    assert counts == {"latency": 6, "prefill": 3, "throughput": 3, "load": 6}
    loads = [result for result in report["results"] if result["mode"] == "load"]
    assert [result["prefill_chunk"] for result in loads] == [16, 0] * 3
    prompts, outputs = lognormal_lengths(24)
    for result in report["results"]:
        if result["mode"] == "latency":
            step, rate = result["step_ms"], result["tokens_per_s"]
            assert 0 < step["min"] <= step["median"] <= step["max"]
            assert rate["max"] == pytest.approx(1e3 * result["batch"] / step["min"], rel=0.02)
        if result["mode"] == "throughput":
            assert (result["prompt_tokens"], result["output_tokens"]) == (
                sum(prompts),
                sum(outputs),
            )
            rate = result["output_tokens_per_s"]["median"]
            assert 0 < result["seconds"]["min"] <= sum(outputs) / rate * 1.01
        if result["mode"] == "load":
            assert result["first_token_ms"]["median"] > result["load_ms"]["median"] >= 0
            for when in ("quiet", "arrival"):
                p50, p99, most = (result[f"others_{when}_{k}_ms"] for k in ("p50", "p99", "max"))
                assert 0 <= p50 <= p99 <= most
            quiet, arrival = result["others_quiet_p99_ms"], result["others_arrival_p99_ms"]
            assert result["p99_ratio"] == pytest.approx(arrival / quiet, rel=0.02)


@pytest.mark.parametrize("format_", ["int4", "int2", "ternary", "sign"])
def test_random_deltas_are_true_to_the_format(tmp_path: Path, format_: str) -> None:
    pytest.importorskip("torch")
    from deltazip.compress.delta_file import DeltaFile

    shape = SHAPES["tiny"]
    make_base(tmp_path / "base", shape, 2)
    base = base_tensors(tmp_path / "base")
    assert {name: dims for name, (_, dims) in base.items()} == shape.tensors()
    options = DeltaOptions(format=format_, group_size=64, embedding_format="int8", num_distinct=2)
    first, second, third = make_deltas(tmp_path, base, DIGEST, options, 3, 2)
    files = [DeltaFile(folder) for folder in (first, second, third)]
    for file in files:
        file.verify()
        stored = sum(info.num_bytes for info in file.stored.values())
        assert stored == delta_bytes(base, options)
    assert files[0].content_digest != files[1].content_digest
    assert (third / "delta.safetensors").samefile(first / "delta.safetensors")
    matrix = files[0].matrix("model.layers.1.mlp.down_proj.weight").dequantize()
    kept = (matrix != 0).reshape(-1, 4).sum(1)
    assert kept.max() == (1 if format_ == "sign" else 2)
    assert 1e-4 < abs(matrix).max() < 1e-1


def test_files_are_made_once(tmp_path: Path) -> None:
    make_base(tmp_path / "base", SHAPES["tiny"], 1)
    weights = tmp_path / "base" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    make_base(tmp_path / "base", SHAPES["tiny"], 1)
    assert weights.stat().st_mtime_ns == before
    make_base(tmp_path / "base", SHAPES["tiny"], 1, seed=5)
    assert weights.stat().st_mtime_ns != before


def test_the_mix_of_lengths_is_fixed() -> None:
    prompts, outputs = lognormal_lengths(512)
    assert (sum(prompts), sum(outputs)) == (95_841, 97_618)
    assert (min(prompts), max(prompts), max(outputs)) == (8, 1024, 512)


def test_zipf_makes_the_first_variant_the_most_popular() -> None:
    names = [f"v{i}" for i in range(16)]
    counts = Counter(Mix.parse("zipf", 16).assign(names, 10_000, seed=3))
    ordered = [counts[name] for name in names]
    assert ordered[0] / 10_000 == pytest.approx(1 / 3.38, abs=0.02)
    assert ordered[0] > ordered[1] > ordered[3] > ordered[15] > 0
    even = Counter(Mix.parse("even:4", 16).assign(names, 40, seed=3))
    assert even == {"v0": 10, "v1": 10, "v2": 10, "v3": 10}


def test_too_little_space_is_said() -> None:
    with (
        pytest.raises(ValueError, match=r"GB free, the files take 1000000\.0 GB; name another"),
        work_folder(None, 10**15),
    ):
        raise AssertionError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["load", "--shape", "tiny", "--prefill-chunk", "16,-1"],
            "--prefill-chunk: expected numbers from 0 on, as in 0,8,32, got '16,-1'",
        ),
        (["speed", "--shape", "tiny"], "mode must be one of latency, prefill, throughput, load"),
        (["latency"], "name either --base FOLDER or --shape NAME"),
        (["latency", "--shape", "llama-9"], "--shape: expected one of llama-2-7b"),
        (["latency", "--shape", "tiny", "--mix", "even"], "expected 1 to 0 variants, got 0"),
        (["latency", "--shape", "tiny", "--mix", "most"], "--mix: expected base, even, even:N"),
        (["latency", "--shape", "tiny", "--batch", "1,x"], "--batch: expected numbers from 1 on"),
        (["latency", "--shape", "tiny", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["latency", "--shape", "tiny", "--variant", "a"], "--variant: expected NAME=FOLDER"),
        (
            ["latency", "--shape", "tiny", "--engine", "speed=2"],
            "EngineConfig has no field 'speed'",
        ),
        (["latency", "--shape", "tiny", "--device", "tpu"], "unknown device 'tpu'"),
        (["latency", "--shape", "tiny", "--variants", "1", "--format", "int3"], "int3"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    status, text, errors = run(*words)
    assert status == 1, text
    assert message in " ".join(errors.split())
