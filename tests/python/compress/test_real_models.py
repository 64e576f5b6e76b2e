"""A real fine-tune, compressed small: needs DELTAZIP_TEST_MODELS. Full scores are `evaluate`'s."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from deltazip.compress import calibration
from deltazip.compress.pipeline import compress
from deltazip.compress.plan import Settings
from deltazip.compress.scoring.closeness import Reference, closeness, load_model

QUESTIONS = [
    "Nina has 40 marbles and gives 15 away. How many are left?",
    "A shelf holds 12 rows of 9 books, and 20 more lie on the floor. How many books are there?",
    "Omar makes 6 candles every day for 7 days and sells 10. How many are left?",
    "What is 7 times 8?",
    "A train travels 3 hours at 80 km per hour, then 55 km more. How far does it go?",
    "Split 50 pens into bags of 8. How many are left over?",
]


@pytest.mark.slow
def test_ternary_stays_close_to_a_real_fine_tune(tmp_path: Path, test_models: Path) -> None:
    """Calibrated on what the fine-tune itself says, since its training data is not at hand."""
    base, tuned = test_models / "base", test_models / "math"
    tokenizer = calibration.load_tokenizer(tuned)
    reference = load_model(tuned, None)
    rows = []
    with torch.inference_mode():
        for start in QUESTIONS:
            sample = calibration.Sample(({"role": "user", "content": start},), "")
            ids = torch.tensor([calibration.prompt_ids(tokenizer, sample)])
            out = reference.generate(ids, max_new_tokens=60, do_sample=False)
            answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)  # type: ignore[attr-defined]
            rows.append({"prompt": start, "completion": answer})
    path = tmp_path / "calibration.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = compress(base, tuned, tmp_path / "out", path, Settings(format="ternary"))
    assert result.ratio > 7.5
    assert result.peak_rss_bytes < 3 << 30
    samples = calibration.load_samples(path)
    close = closeness(
        load_model(base, tmp_path / "out"),
        tokenizer,
        samples,
        Reference(reference, tokenizer, samples),
    )
    assert close.top1 is not None
    assert close.top1 > 0.97
