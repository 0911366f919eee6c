"""The text that the demo model never saw: a fixed twentieth of this interpreter's standard library.

The rule of deploy/demo-model/training/corpus.py, which is not installed with the package.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__", "pydoc_data"}
)
_EXCLUDED_FILES = ("_sysconfigdata", "html/entities.py", "msilib/schema.py")


def held_out_texts() -> list[str]:
    """Whole source files, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if _EXCLUDED_FOLDERS & set(relative.parts) or name.startswith(_EXCLUDED_FILES):
            continue
        if int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 20:
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    return texts
