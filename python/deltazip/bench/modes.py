"""The measurements. Each returns plain numbers: median, least and most over its rounds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deltazip.bench.session import Session, Trace, percentile, spread
from deltazip.bench.workload import Ask, Mix, lognormal_lengths, random_prompt

__all__ = ["MODES", "Plan", "load_variants", "longest_request"]

# Variants that load mode has beyond those of the mixes; they take turns in one slot.
NUM_COLD = 3
_LOAD_OUTPUT = 640  # and so many more a round: tokens of those that decode meanwhile
_LOAD_OUTPUT_ROUND = 128
_SETTLE_TOKENS = 16
_QUIET_TOKENS = 32  # measured before each arrival, so that contexts are as long as during it
_MAX_TRIES = 4  # of a round: a busy host may hand over all tokens of a short run together

Result = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        batches: requests at once in latency mode; load mode takes the first.
        rounds: measured repetitions, after one that only warms up.
        prefill_chunks: limits of prompt tokens in a step that also decodes, 0 for none; load mode
            compares them, the others take the first.
    """

    batches: Sequence[int]
    prompt: int
    output: int
    prefill_batch: int
    prefill_prompt: int
    num_requests: int
    rounds: int
    seed: int
    prefill_chunks: Sequence[int] = (0,)


def longest_request(plan: Plan, modes: Sequence[str]) -> int:
    """Tokens of the longest sequence that the modes ask for."""
    need = {
        "latency": plan.prompt + plan.output,
        "prefill": plan.prefill_prompt + 1,
        "throughput": 1024 + 512,
        "load": plan.prompt + _load_output(plan),
    }
    return max(need[mode] for mode in modes)


def _load_output(plan: Plan) -> int:
    return _LOAD_OUTPUT + _LOAD_OUTPUT_ROUND * (plan.rounds + 1)


def load_variants(session: Session, names: Sequence[str], vocab: int) -> None:
    """One short request of each, so that all that fit are in their slots."""
    rng = random.Random(0)
    session.run([Ask(name, random_prompt(8, vocab, rng), 2) for name in names])


def latency(session: Session, plan: Plan, mix: Mix) -> list[Result]:
    """Time of a decode step by batch size: B equal requests, once all of them decode."""
    rng = random.Random(plan.seed)
    vocab = session.engine.vocab_size()
    results = []
    for batch in plan.batches:
        steps: list[float] = []
        medians: list[float] = []
        tails: list[float] = []
        first: list[float] = []
        is_warmed = False
        variants = mix.assign(session.names, batch, plan.seed)
        for _ in range(_MAX_TRIES * plan.rounds + 1):
            traces = session.run(
                [Ask(v, random_prompt(plan.prompt, vocab, rng), plan.output) for v in variants]
            )
            is_warm, gaps = is_warmed, _steady_gaps(traces)
            is_warmed = True
            if not is_warm or sum(gaps) <= 0.0:
                continue
            steps.append(1e3 * sum(gaps) / len(gaps))
            medians.append(1e3 * percentile(gaps, 0.5))
            tails.append(1e3 * percentile(gaps, 0.99))
            first.append(1e3 * max(t.first - t.submitted for t in traces))
            if len(steps) == plan.rounds:
                break
        else:
            raise ValueError(
                f"batch {batch}: of {plan.output} output tokens too few came while all requests "
                f"decoded; raise --output"
            )
        results.append(
            {
                "mode": "latency",
                "mix": mix.name,
                "batch": batch,
                "prompt": plan.prompt,
                "output": plan.output,
                "rounds": plan.rounds,
                "step_ms": spread(steps),
                "gap_p50_ms": spread(medians),
                "gap_p99_ms": spread(tails),
                "all_first_tokens_ms": spread(first),
                "tokens_per_s": spread([1e3 * batch / ms for ms in steps], 1),
            }
        )
    return results


def _steady_gaps(traces: Sequence[Trace]) -> list[float]:
    """Seconds between tokens of the last request to begin, until the first one ends: meanwhile
    every request decodes and none prefills. Tokens that came together are 0 apart."""
    last = max(traces, key=lambda t: t.first)
    begin, end = last.first, min(t.times[-1] for t in traces)
    later = [t for t in last.times if begin < t <= end]
    return [b - a for a, b in itertools.pairwise([begin, *later])]


def prefill(session: Session, plan: Plan, mix: Mix) -> list[Result]:
    """Prompt tokens a second, until each of some long prompts has its first token."""
    rng = random.Random(plan.seed)
    vocab = session.engine.vocab_size()
    rates = []
    for turn in range(plan.rounds + 1):
        variants = mix.assign(session.names, plan.prefill_batch, plan.seed)
        traces = session.run(
            [Ask(v, random_prompt(plan.prefill_prompt, vocab, rng), 1) for v in variants]
        )
        begin, end = min(t.submitted for t in traces), max(t.first for t in traces)
        if turn > 0:
            rates.append(plan.prefill_batch * plan.prefill_prompt / (end - begin))
    return [
        {
            "mode": "prefill",
            "mix": mix.name,
            "batch": plan.prefill_batch,
            "prompt": plan.prefill_prompt,
            "rounds": plan.rounds,
            "prompt_tokens_per_s": spread(rates, 1),
        }
    ]


def throughput(session: Session, plan: Plan, mix: Mix) -> list[Result]:
    """Output tokens a second of a lognormal mix of lengths, all submitted at once."""
    rng = random.Random(plan.seed)
    vocab = session.engine.vocab_size()
    prompts, outputs = lognormal_lengths(plan.num_requests)
    variants = mix.assign(session.names, plan.num_requests, plan.seed)
    rates, seconds, first = [], [], []
    preempted = session.engine.stats().num_preemptions
    # A short warm-up: the measured run itself lasts long.
    session.run([Ask(v, random_prompt(64, vocab, rng), 8) for v in variants[:64]])
    for _ in range(plan.rounds):
        asks = [
            Ask(v, random_prompt(p, vocab, rng), o)
            for v, p, o in zip(variants, prompts, outputs, strict=True)
        ]
        traces = session.run(asks)
        took = max(t.times[-1] for t in traces) - min(t.submitted for t in traces)
        seconds.append(took)
        rates.append(sum(outputs) / took)
        first.append(1e3 * percentile([t.first - t.submitted for t in traces], 0.5))
    shares = sorted((variants.count(v) / len(variants) for v in set(variants)), reverse=True)
    return [
        {
            "mode": "throughput",
            "mix": mix.name,
            "requests": plan.num_requests,
            "prompt_tokens": sum(prompts),
            "output_tokens": sum(outputs),
            "top_variant_share": round(shares[0], 4),
            "rounds": plan.rounds,
            "output_tokens_per_s": spread(rates, 1),
            "seconds": spread(seconds),
            "first_token_p50_ms": spread(first, 1),
            "preemptions": session.engine.stats().num_preemptions - preempted,
        }
    ]


def load(session: Session, plan: Plan, mix: Mix) -> list[Result]:
    """A variant that lies in host memory, to its first token, while others decode; and what the
    others feel: their gaps between tokens until then, beside those just before."""
    results = []
    for chunk in plan.prefill_chunks:
        session.engine.set_prefill_chunk_tokens(chunk)
        results.append(_load(session, plan, mix, chunk))
    session.engine.set_prefill_chunk_tokens(plan.prefill_chunks[0])
    return results


def _load(session: Session, plan: Plan, mix: Mix, chunk: int) -> Result:
    rng = random.Random(plan.seed)
    vocab = session.engine.vocab_size()
    batch = plan.batches[0]
    busy = mix.assign(session.names, batch, plan.seed)
    # More than there are slots left, so some lie in host memory at any time.
    idle = [name for name in [*session.cold, *session.names] if name not in busy]

    def ask(variant: str, num_output: int) -> Ask:
        return Ask(variant, random_prompt(plan.prompt, vocab, rng), num_output)

    def cold() -> str:
        """A variant of the host tier; short requests to others push one out of its slot."""
        for name in idle * 2:
            states = session.states()
            for candidate in idle:
                if states[candidate] == "host":
                    return candidate
            session.run([ask(name, 1)])
        raise ValueError(
            f"no variant is in host memory without a slot: {session.states()}; "
            f"expected fewer slots than variants, and host memory for a few"
        )

    others = [session.submit(ask(v, _load_output(plan))) for v in busy]

    def tokens_later(count: int) -> None:
        wanted = len(others[-1].times) + count
        session.wait(lambda: len(others[-1].times) >= wanted)

    session.wait(lambda: all(t.times for t in others))
    first: list[float] = []
    loads: list[float] = []
    quiet: list[float] = []
    loading: list[float] = []
    arrival: list[float] = []
    for turn in range(plan.rounds + 1):
        name = cold()
        tokens_later(_SETTLE_TOKENS)
        begin = others[-1].times[-1]
        tokens_later(_QUIET_TOKENS)
        trace = session.submit(ask(name, 4))
        session.wait(lambda trace=trace: trace.ended is not None)  # type: ignore[misc]
        if any(t.ended is not None for t in others):
            raise ValueError(f"the {batch} others ended before {plan.rounds} rounds were done")
        if turn == 0:
            continue
        info = next(i for i in session.engine.variants() if i.name == name)
        loaded = trace.submitted + info.load_seconds
        first.append(1e3 * (trace.first - trace.submitted))
        loads.append(1e3 * info.load_seconds)
        for other in others:
            last = max((x for x in other.times if x < trace.submitted), default=0.0)
            quiet += other.gaps(begin, last)
            arrival += other.gaps(last, trace.first)
            loading += other.gaps(last, loaded)
    session.cancel_all()
    if not quiet or not arrival:
        raise ValueError("the others made no token while a variant was loaded; lower --batch")
    return {
        "mode": "load",
        "mix": mix.name,
        "batch": batch,
        "prompt": plan.prompt,
        "prefill_chunk": chunk,
        "rounds": plan.rounds,
        "first_token_ms": spread(first),
        "load_ms": spread(loads),
        **_gap_percentiles("others_quiet", quiet),
        **_gap_percentiles("others_arrival", arrival),
        "p99_ratio": round(percentile(arrival, 0.99) / max(percentile(quiet, 0.99), 1e-9), 3),
        "others_loading_max_ms": round(1e3 * max(loading), 3) if loading else None,
    }


def _gap_percentiles(prefix: str, gaps: Sequence[float]) -> Result:
    """Milliseconds between tokens: median, 99th percentile and most."""
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {f"{prefix}_{k}_ms": round(1e3 * percentile(gaps, v), 3) for k, v in shares.items()}


MODES: dict[str, Callable[[Session, Plan, Mix], list[Result]]] = {
    "latency": latency,
    "prefill": prefill,
    "throughput": throughput,
    "load": load,
}
