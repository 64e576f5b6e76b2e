"""OUT.partial: what a run has finished, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltazip.compress.checkpoint import read_header
from deltazip.compress.delta_file import Entry
from deltazip.compress.pack import DeltaType
from deltazip.compress.stored import Stored, atomic_file, write_safetensors

_STATE = "state.json"


class Workspace:
    """A folder beside the output. Pieces are safetensors files, each whole or not there."""

    def __init__(self, out: Path, run_digest: str) -> None:
        self.folder = out.parent / f"{out.name}.partial"
        state = self._read_state()
        if state.get("run_digest") != run_digest:
            shutil.rmtree(self.folder, ignore_errors=True)
            state = {"run_digest": run_digest}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._state = state

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads((self.folder / _STATE).read_text())
        except (OSError, json.JSONDecodeError):
            return {}
        return state if isinstance(state, dict) else {}

    def get(self, key: str, default: Any = None) -> Any:
        return self._state.get(key, default)

    def put(self, **values: Any) -> None:
        """Records progress; what is recorded has reached the disk."""
        self._state |= values
        with atomic_file(self.folder / _STATE) as file:
            file.write(json.dumps(self._state).encode())

    def has_piece(self, piece: str) -> bool:
        return piece in self._state.get("pieces", {})

    def save_piece(
        self,
        piece: str,
        entries: Mapping[str, Entry],
        stored: Mapping[str, Stored],
        report: Mapping[str, Any],
        **values: Any,
    ) -> None:
        """One piece of the artifact: what some tensors become, and how well. `values`: see put."""
        write_safetensors(self.folder / f"{piece}.safetensors", stored, {})
        pieces = dict(self._state.get("pieces", {}))
        pieces[piece] = {
            "entries": {name: entry.to_json() for name, entry in entries.items()},
            "report": dict(report),
        }
        self.put(pieces=pieces, **values)

    def collect(self) -> tuple[dict[str, Entry], dict[str, Stored], dict[str, Any]]:
        """Entries, stored tensors and reports of all pieces."""
        entries: dict[str, Entry] = {}
        stored: dict[str, Stored] = {}
        report: dict[str, Any] = {}
        for piece, content in self._state.get("pieces", {}).items():
            for name, row in content["entries"].items():
                entries[name] = Entry(
                    DeltaType(row["type"]), tuple(row["shape"]), row.get("group_size", 0)
                )
            infos, _ = read_header(self.folder / f"{piece}.safetensors")
            stored |= {name: Stored.of_file(info) for name, info in infos.items()}
            report |= content["report"]
        return entries, stored, report

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
