"""Floods a server: many requests, a third dropped midway, variants loaded and unloaded meanwhile.

    python benchmarks/serving/stress.py --base DIR --variant name=DIR --variant name=DIR
    python benchmarks/serving/stress.py --url http://127.0.0.1:8000 --admin-key KEY --variant ...

The first form starts a server of its own. The last variant named is the one that comes and goes;
requests to it may be answered 404 (counted as stated). Fails, with exit code 1, on any other
failure, on blocks, sequences or requests that do not come back, and on memory that grows.
Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import json
import os
import platform
import random
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

TEXT = "the sum of two numbers is a short word for what one model says to another"
READY = "deltazip is ready at "


@dataclass
class Tally:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    num_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    num_loads: int = 0
    num_unloads: int = 0
    rss_mib: list[float] = field(default_factory=list)

    def fail(self, what: str) -> None:
        self.outcomes["failed"] += 1
        self.failures.append(what[:300])


@dataclass
class Plan:
    """One request, decided beforehand so that runs can be compared."""

    model: str
    is_chat: bool
    is_stream: bool
    drop_after: int | None  # chunks
    max_tokens: int
    prompt: str
    n: int
    stop: list[str] | None


def make_plans(args: argparse.Namespace, models: list[str]) -> list[Plan]:
    rng = random.Random(args.seed)
    plans = []
    for i in range(args.requests):
        is_dropped = i % 3 == 2
        start = " ".join(rng.choices(TEXT.split(), k=rng.randrange(2, args.prompt_words)))
        plans.append(
            Plan(
                model=rng.choice(models),
                is_chat=rng.random() < 0.5,
                is_stream=is_dropped or rng.random() < 0.5,
                drop_after=rng.randrange(0, 4) if is_dropped else None,
                max_tokens=rng.randrange(4, args.max_tokens + 1),
                prompt=start,
                n=2 if rng.random() < 0.1 else 1,
                stop=["the"] if rng.random() < 0.2 else None,
            )
        )
    return plans


async def run_one(client: httpx.AsyncClient, plan: Plan, transient: str, tally: Tally) -> None:
    path = "/v1/chat/completions" if plan.is_chat else "/v1/completions"
    body: dict[str, Any] = {"model": plan.model, "max_tokens": plan.max_tokens, "n": plan.n}
    body |= {"temperature": 0.7, "seed": 1, "stream": plan.is_stream, "stop": plan.stop}
    if plan.is_chat:
        body["messages"] = [{"role": "user", "content": plan.prompt}]
    else:
        body["prompt"] = plan.prompt
    if plan.drop_after is not None:
        # Long enough that it is still running when the client goes.
        body |= {"ignore_eos": True, "stop": None, "max_tokens": 200}
    started = time.monotonic()
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode("utf-8", "replace")
                if response.status_code == 404 and plan.model == transient:
                    tally.outcomes["404 while unloaded"] += 1
                else:
                    tally.fail(f"{response.status_code} {plan.model}: {text}")
                return
            if not plan.is_stream:
                answer = json.loads(await response.aread())
                tally.num_tokens += answer["usage"]["completion_tokens"]
                _count(tally, len(answer["choices"]) == plan.n, "whole", "choices are missing")
                return
            await _read_stream(response, plan, tally, started)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        tally.fail(f"{type(error).__name__} {error} ({plan.model})")


async def _read_stream(response: httpx.Response, plan: Plan, tally: Tally, started: float) -> None:
    num_chunks, finishes, is_done = 0, 0, False
    async for line in response.aiter_lines():
        if not line:
            continue
        if line == "data: [DONE]":
            is_done = True
            break
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            tally.fail(f"in the stream: {chunk['error']['message']}")
            return
        if not num_chunks:
            tally.first_token_s.append(time.monotonic() - started)
        num_chunks += 1
        finishes += sum(choice["finish_reason"] is not None for choice in chunk["choices"])
        if plan.drop_after is not None and num_chunks > plan.drop_after:
            tally.outcomes["cancelled"] += 1
            return  # leaving the block closes the connection
    tally.num_tokens += num_chunks
    _count(tally, is_done and finishes == plan.n, "streamed", "the stream broke off")


def _count(tally: Tally, is_good: bool, outcome: str, problem: str) -> None:
    if is_good:
        tally.outcomes[outcome] += 1
    else:
        tally.fail(problem)


async def come_and_go(
    client: httpx.AsyncClient, name: str, path: str, admin_key: str, tally: Tally, period_s: float
) -> None:
    """Unloads and loads one variant over and over, and leaves it loaded."""
    headers = {"Authorization": f"Bearer {admin_key}"}
    is_loaded = True
    try:
        while True:
            await asyncio.sleep(period_s)
            await _unload(client, name, headers, tally)
            is_loaded = False
            await asyncio.sleep(period_s / 2)
            await _load(client, name, path, headers, tally)
            is_loaded = True
    finally:
        if not is_loaded:
            await asyncio.shield(_load(client, name, path, headers, tally))


async def _unload(
    client: httpx.AsyncClient, name: str, headers: dict[str, str], tally: Tally
) -> None:
    body = {"name": name, "wait_s": 10}
    response = await client.post("/v1/unload_variant", json=body, headers=headers)
    tally.num_unloads += 1
    if response.status_code != 200:
        tally.fail(f"unload {name}: {response.status_code} {response.text}")


async def _load(
    client: httpx.AsyncClient, name: str, path: str, headers: dict[str, str], tally: Tally
) -> None:
    body = {"name": name, "path": path}
    while True:
        response = await client.post("/v1/load_variant", json=body, headers=headers)
        # A name that is still draining is free as soon as its last request has ended.
        if response.status_code != 409 or "draining" not in response.text:
            break
        await asyncio.sleep(0.2)
    tally.num_loads += 1
    if response.status_code != 200:
        tally.fail(f"load {name}: {response.status_code} {response.text}")


async def scrape(client: httpx.AsyncClient) -> dict[str, float]:
    """Metrics without labels: name -> value."""
    response = await client.get("/metrics")
    response.raise_for_status()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if not sample.labels
    }


async def settled(client: httpx.AsyncClient, timeout_s: float) -> dict[str, float]:
    """Metrics once nothing runs any more, or the last ones."""
    deadline = time.monotonic() + timeout_s
    while True:
        values = await scrape(client)
        idle = values["deltazip_engine_running"] == values["deltazip_engine_waiting"] == 0
        is_free = values["deltazip_engine_kv_free_blocks"] == values["deltazip_engine_kv_blocks"]
        # The scrape itself is the one request being answered.
        if idle and is_free and values["deltazip_http_active"] <= 1:
            return values
        if time.monotonic() > deadline:
            return values
        await asyncio.sleep(0.1)


def _real_path(variant: str) -> Path:
    """The folder of name=DIR."""
    return Path(variant.partition("=")[2]).resolve()


def find_server_process(url: str) -> psutil.Process | None:
    """Whoever listens on the port."""
    port = urlsplit(url).port
    for connection in psutil.net_connections("tcp"):
        is_it = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        if is_it and connection.pid:
            return psutil.Process(connection.pid)
    return None


@contextlib.asynccontextmanager
async def served(args: argparse.Namespace) -> AsyncIterator[str]:
    """The URL of the server: the one given, or one of our own."""
    if args.url:
        yield args.url
        return
    args.admin_key = args.admin_key or secrets.token_hex(16)
    root = _real_path(args.variant[-1]).parent if args.variant else None
    command = [sys.executable, "-m", "deltazip.server", "--base", args.base, "--port", "0"]
    for variant in args.variant:
        command += ["--variant", variant]
    if root is not None:
        command += ["--allow-load-root", str(root)]
    command += args.server_option
    environment = {**os.environ, "DELTAZIP_ADMIN_KEY": args.admin_key}
    with open(args.server_log, "wb") as log:  # noqa: ASYNC230, PTH123
        process = subprocess.Popen(  # noqa: ASYNC220
            command, stdout=subprocess.PIPE, stderr=log, env=environment
        )
        try:
            assert process.stdout is not None
            line = (await asyncio.to_thread(process.stdout.readline)).decode()
            if not line.startswith(READY):
                raise SystemExit(f"the server did not start; see {args.server_log}")
            yield line.removeprefix(READY).strip()
        finally:
            process.terminate()
            if await asyncio.to_thread(process.wait, 60) != 0:
                print(f"the server ended with {process.returncode}", file=sys.stderr)


async def flood(args: argparse.Namespace, url: str) -> dict[str, Any]:
    """Runs everything; returns the report."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=args.connections + 8)
    timeout = httpx.Timeout(args.timeout_s)
    tally = Tally()
    process = find_server_process(url)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=timeout
    ) as client:
        names = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        transient = args.variant[-1].partition("=")[0] if args.variant else ""
        plans = make_plans(args, names)
        switcher = None
        if transient and args.admin_key:
            real = str(_real_path(args.variant[-1]))
            switcher = asyncio.create_task(
                come_and_go(client, transient, real, args.admin_key, tally, args.switch_s)
            )
        before = await scrape(client)
        started = time.monotonic()
        await _run_all(args, client, plans, transient, tally, process)
        seconds = time.monotonic() - started
        if switcher is not None:
            switcher.cancel()
            await asyncio.gather(switcher, return_exceptions=True)
        after = await settled(client, 30)
        health = (await client.get("/health")).status_code
    return _report(args, tally, before, after, seconds, health, names)


async def _run_all(
    args: argparse.Namespace,
    client: httpx.AsyncClient,
    plans: list[Plan],
    transient: str,
    tally: Tally,
    process: psutil.Process | None,
) -> None:
    queue = list(reversed(plans))
    step = max(len(plans) // 20, 1)
    with Progress(disable=args.quiet) as progress:
        task = progress.add_task("requests", total=len(plans))

        async def worker() -> None:
            while queue:
                plan = queue.pop()
                await run_one(client, plan, transient, tally)
                progress.advance(task)
                if process is not None and len(queue) % step == 0:
                    tally.rss_mib.append(process.memory_info().rss / (1 << 20))

        await asyncio.gather(*(worker() for _ in range(args.connections)))


def _report(
    args: argparse.Namespace,
    tally: Tally,
    before: dict[str, float],
    after: dict[str, float],
    seconds: float,
    health: int,
    names: list[str],
) -> dict[str, Any]:
    rss = tally.rss_mib
    # The first third fills caches and pools; from then on memory must be flat.
    warm = rss[len(rss) // 3 :]
    growth = max(warm[-3:]) - max(warm[:3]) if len(warm) >= 6 else 0.0
    latencies = sorted(tally.first_token_s) or [0.0]
    checks = {
        "no failure": not tally.failures,
        "all answered": sum(tally.outcomes.values()) >= args.requests,
        "a third cancelled": tally.outcomes["cancelled"]
        >= 0.9 * (args.requests - tally.outcomes["404 while unloaded"]) / 3,
        "blocks returned": after["deltazip_engine_kv_free_blocks"]
        == after["deltazip_engine_kv_blocks"],
        "sequences returned": after["deltazip_engine_running"] == 0
        and after["deltazip_engine_waiting"] == 0,
        "requests returned": after["deltazip_http_active"] <= 1,
        "memory flat": growth <= args.max_growth_mib,
        "healthy": health == 200,
    }
    return {
        "checks": checks,
        "outcomes": dict(tally.outcomes),
        "failures": tally.failures[:20],
        "loads": tally.num_loads,
        "unloads": tally.num_unloads,
        "seconds": round(seconds, 2),
        "requests_per_second": round(args.requests / seconds, 2),
        "engine_output_tokens_per_second": round(
            (after["deltazip_engine_output_tokens_total"]
             - before["deltazip_engine_output_tokens_total"]) / seconds, 1
        ),
        "first_chunk_s": {
            "p50": round(latencies[len(latencies) // 2], 3),
            "p99": round(latencies[int(len(latencies) * 0.99)], 3),
        },
        "rss_mib": [round(value, 1) for value in rss],
        "rss_growth_mib": round(growth, 1),
        "preemptions": after["deltazip_engine_preemptions_total"],
        "models": names,
        "requests": args.requests,
        "connections": args.connections,
        "seed": args.seed,
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
    }  # fmt: skip


def show(report: dict[str, Any]) -> None:
    table = Table(title="stress", title_justify="left", show_header=False)
    for name, is_met in report["checks"].items():
        table.add_row(name, "[green]yes[/]" if is_met else "[red]NO[/]")
    for name, count in sorted(report["outcomes"].items()):
        table.add_row(f"requests {name}", str(count))
    for name in ("loads", "unloads", "seconds", "requests_per_second", "preemptions"):
        table.add_row(name.replace("_", " "), str(report[name]))
    table.add_row("output tokens/s", str(report["engine_output_tokens_per_second"]))
    table.add_row("first chunk p50 / p99", "{p50} / {p99} s".format(**report["first_chunk_s"]))
    if report["rss_mib"]:
        first, last = report["rss_mib"][0], report["rss_mib"][-1]
        table.add_row("memory, first and last", f"{first:.0f} / {last:.0f} MiB")
        table.add_row("growth once warm", f"{report['rss_growth_mib']} MiB")
    Console().print(table)
    for failure in report["failures"]:
        print("failure:", failure, file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a running server, on loopback")
    where.add_argument("--base", help="start a server over this base")
    parser.add_argument("--variant", action="append", default=[], help="name=DIR; repeatable")
    parser.add_argument("--api-key", default=os.environ.get("DELTAZIP_API_KEY", ""))
    parser.add_argument("--admin-key", default=os.environ.get("DELTAZIP_ADMIN_KEY", ""))
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--prompt-words", type=int, default=40)
    parser.add_argument("--switch-s", type=float, default=1.0, help="between unload and load")
    parser.add_argument("--timeout-s", type=float, default=300.0)
    parser.add_argument("--max-growth-mib", type=float, default=64.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-option", action="append", default=[], help="--name=value")
    parser.add_argument("--server-log", default="stress-server.log")
    parser.add_argument("--json", default="", help="write the report here")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if args.url:
        host = urlsplit(args.url).hostname or ""
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            parser.error(f"--url: expected a loopback address, got {host!r}")
    for name, low, high in (("requests", 1, 10**6), ("connections", 1, 4096)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name}: expected {low} to {high}")
    return args


async def run(args: argparse.Namespace) -> dict[str, Any]:
    async with served(args) as url:
        return await flood(args, url)


def main() -> int:
    args = parse_arguments()
    report = asyncio.run(run(args))
    show(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(report["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
