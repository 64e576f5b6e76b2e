"""What is printed and written: results, with the machine and the settings they belong to."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import deltazip
from deltazip.bench.modes import Plan
from deltazip.bench.setup import Setup, num_cores

__all__ = ["make_report", "print_tables"]

_CONFIG_FIELDS = (
    "device", "num_threads", "kv_dtype", "kv_cache_bytes", "memory_budget_bytes",
    "delta_budget_bytes", "host_budget_bytes", "num_delta_slots", "block_size", "max_batch_tokens",
    "max_batch_sequences", "prefill_chunk_tokens", "max_variants_per_batch", "max_model_len",
    "prefix_caching",
)  # fmt: skip


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpu_driver() -> str | None:
    """Version of the NVIDIA kernel module; None: none is loaded."""
    path = Path("/proc/driver/nvidia/version")
    if not path.exists():
        return None
    found = re.search(r"Kernel Module\D*([\d.]+)", path.read_text(encoding="utf-8"))
    return found[1] if found else None


def make_report(setup: Setup, plan: Plan, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything, fit for JSON."""
    engine = setup.session.engine
    config = engine.config()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "deltazip": deltazip.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": engine.device_description(),
        "driver": _gpu_driver() if config.device.startswith("cuda") else None,
        "host": {"processor": _processor(), "cores": num_cores(), "memory_bytes": memory},
        "subject": setup.facts,
        "setup_seconds": setup.seconds,
        "plan": dataclasses.asdict(plan),
        "config": {name: getattr(config, name) for name in _CONFIG_FIELDS},
        "capacity": [
            {"what": row.what, "bytes": row.bytes, "detail": row.detail}
            for row in engine.capacity()
        ],
        "results": results,
    }


def _show(value: Any) -> str:
    if isinstance(value, dict):
        least, most = value["min"], value["max"]
        return f"{value['median']:,.6g}" + (f" ({least:,.6g} to {most:,.6g})" if most else "")
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def print_tables(report: dict[str, Any], console: Console) -> None:
    """One table a mode: settings that vary first, then numbers: median (least to most)."""
    subject, host = report["subject"], report["host"]
    driver = f", driver {report['driver']}" if report["driver"] else ""
    console.print(
        f"{report['device']}{driver}; {host['processor']}, {host['cores']} cores\n"
        f"{subject['base']}, {subject['base_bytes'] / 1e9:.2f} GB on the device; "
        f"{subject['variants']} variants of {subject['delta_device_bytes'] / 1e9:.3f} GB, "
        f"{subject['variants_resident']} in slots, {subject['distinct_files']} distinct files",
        highlight=False,
    )
    for what in ("plan", "config"):
        options = ", ".join(f"{k}={v}" for k, v in report[what].items())
        console.print(f"{what}: {options}", highlight=False)
    stages = ", ".join(f"{k.replace('_', ' ')} {v} s" for k, v in report["setup_seconds"].items())
    console.print(f"set-up: {stages}", highlight=False)
    for mode in dict.fromkeys(result["mode"] for result in report["results"]):
        rows = [result for result in report["results"] if result["mode"] == mode]
        columns = [key for key in rows[0] if key != "mode"]
        table = Table(*(c.replace("_", " ") for c in columns), title=mode)
        for row in rows:
            table.add_row(*(_show(row[key]) for key in columns))
        console.print(table)
