"""metrics.jsonl, the record of a run: one JSON object a line, of type step, evaluation, early, spike, plan
or final."""

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; [] if there is no such file. A line that a crash cut off is left out."""
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # a story may hold U+2028
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("type"), str):
                entries.append(entry)
    return entries
