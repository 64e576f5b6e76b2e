"""The rows of the table: each method with its settings and its paper."""

from __future__ import annotations

from functools import partial

from baselines import (
    GROUP_SIZE,
    Method,
    awq,
    bit_delta,
    dare,
    delta_come,
    gptq,
    magnitude,
    rtn,
    sparse_gpt,
    svd,
)

_DELTAZIP = "Yao et al., DeltaZip (2025), section 4: 2:4 and b bits, max-abs scale a row"
_ABLATION = _DELTAZIP.replace("a row", "for 64 columns")
_SPARSE_GPT = "Frantar & Alistarh, SparseGPT (2023)"
_GPTQ = "Frantar et al., GPTQ (2022); groups of 64, searched ranges, large inputs first"
_AWQ = "Lin et al., AWQ (2023); inputs' root mean squares for their mean magnitudes"
_BIT_DELTA = "Liu et al., BitDelta (2024)"
_DELTA_COME = "Ping et al., Delta-CoMe (2024), the triple mix"
_DARE = "Yu et al., Language models are super Mario (2023)"
_MAGNITUDE = "the largest of the delta in fp16"
_RTN = "the delta, 2:4 by magnitude, rounded to nearest; groups of 64, searched ranges"
_SVD = "Eckart & Young (1936): truncated SVD of the delta, fp16 factors"


def _all_methods() -> list[Method]:
    paper = partial(sparse_gpt, group_size=None, search=False)
    methods = [
        Method(f"deltazip-paper-{b}", _DELTAZIP, partial(paper, bits=b), needs_hessian=True)
        for b in (4, 2)
    ]
    # What groups, and then searched ranges, change in the paper's recipe.
    grouped = partial(sparse_gpt, group_size=GROUP_SIZE)
    for extra, search in (("groups", False), ("groups-search", True)):
        methods += [
            Method(
                f"deltazip-paper-{b}-{extra}",
                _ABLATION + (", searched" if search else ""),
                partial(grouped, bits=b, search=search),
                needs_hessian=True,
            )
            for b in (4, 2)
        ]
    methods += [Method(f"rtn-{b}", _RTN, partial(rtn, bits=b)) for b in (4, 2)]
    methods += [
        Method("bitdelta", _BIT_DELTA, bit_delta, trains_scales=True),
        Method("bitdelta-untrained", _BIT_DELTA, bit_delta),
    ]
    methods += [
        Method(f"delta-come-{b}", _DELTA_COME, partial(delta_come, bits=b), needs_hessian=True)
        for b in (2, 1)
    ]
    methods += [Method(f"svd-{rank}", _SVD, partial(svd, rank=rank)) for rank in (64, 16)]
    methods += [Method(f"dare-{p}", _DARE, partial(dare, keep=p)) for p in (0.25, 0.1)]
    methods += [
        Method(f"magnitude-{p}", _MAGNITUDE, partial(magnitude, keep=p)) for p in (0.25, 0.1)
    ]
    whole = partial(Method, on_delta=False, needs_hessian=True)
    methods += [whole(f"gptq-{b}", _GPTQ, partial(gptq, bits=b)) for b in (4, 3, 2)]
    methods += [whole(f"awq-{b}", _AWQ, partial(awq, bits=b)) for b in (4, 3)]
    joint = partial(grouped, search=True)
    methods += [
        whole("sparsegpt-4", _SPARSE_GPT + ", joint with 4 bits", partial(joint, bits=4)),
        whole("sparsegpt-fp16", _SPARSE_GPT, partial(joint, bits=None)),
    ]
    return methods


METHODS = {method.name: method for method in _all_methods()}
