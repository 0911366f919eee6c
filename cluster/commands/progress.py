"""What a person sees while something takes long: a spinner on a terminal, log lines elsewhere, times either way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

_LOG_EVERY_S = 2.0


class Progress:
    """Phases in order; `update` says what is happening inside the current one."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._began = time.monotonic()
        self._status = self._console.status("")
        self._logged = 0.0
        self._name = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time `name` and print how long it took."""
        began = time.monotonic()
        self._name, self._logged = name, began
        if self._console.is_terminal:
            self._status.update(f"{name} ...")
            self._status.start()
        try:
            yield
        finally:
            self._status.stop()
        took, total = time.monotonic() - began, time.monotonic() - self._began
        self._console.print(f"[green]✓[/] {name:<18} {took:5.1f} s   (after {total:.1f} s)")

    def update(self, text: str) -> None:
        """Show `text` beside the phase's name."""
        now = time.monotonic()
        if self._console.is_terminal:
            self._status.update(f"{self._name}: {text}")
        elif now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            self._console.print(f"  {self._name}: {text}")

    def say(self, text: str) -> None:
        """Print `text` as it is."""
        self._status.stop()
        self._console.print(text, markup=False, soft_wrap=True)
