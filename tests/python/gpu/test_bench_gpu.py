"""The engine on the GPU from end to end: random checkpoints, mixed variants, loading a cold one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deltazip import _C
from deltazip.cli import make_app
from typer.testing import CliRunner


@pytest.mark.gpu
@pytest.mark.parametrize("format_", ["int4", "int2", "ternary"])
def test_bench_runs_on_the_device(gpu: str, tmp_path: Path, format_: str) -> None:
    out = tmp_path / "out.json"
    words = [
        "bench", "latency", "throughput", "load", "--shape", "smollm2-135m", "--device", gpu,
        "--variants", "4", "--format", format_, "--mix", "base,even,zipf", "--batch", "4,9",
        "--output", "40", "--requests", "48", "--rounds", "2", "--json", str(out),
    ]  # fmt: skip
    result = CliRunner().invoke(make_app(["bench"]), words)
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert "cuda" in report["device"].lower()
    assert report["subject"]["variants_resident"] == 5
    assert {row["mode"] for row in report["results"]} == {"latency", "throughput", "load"}


@pytest.mark.gpu
def test_a_device_that_is_not_there_is_named(gpu: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="99"):
        _C.Engine(_C.EngineConfig(base=str(tmp_path), device=f"{gpu}:99"))
