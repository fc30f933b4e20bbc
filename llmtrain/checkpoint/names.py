"""Names in a checkpoint folder. Free of torch."""

from __future__ import annotations

MANIFEST = "manifest.json"
