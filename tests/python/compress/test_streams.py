"""Hidden states between the layers of a walk."""

from __future__ import annotations

import pytest
import torch
from deltazip.compress.activations import Batch, MemoryStreams

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_streams_in_memory_hand_out_copies(device: str) -> None:
    streams = MemoryStreams(6, 2, torch.device(device))
    batch = Batch(2, 1, (2,))
    rows = torch.arange(6.0, device=device).reshape(3, 2)
    with streams as files:
        files.write(batch, (rows, rows + 10.0))
        ours, theirs = files.read(batch, torch.device(device))
        ours += 100.0  # as the walk adds what a layer gives
        torch.testing.assert_close(files.read(batch, torch.device(device), 1)[0], rows)
        torch.testing.assert_close(theirs, rows + 10.0)
        assert len(files.read(batch, torch.device(device), 1)) == 1
