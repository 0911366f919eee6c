"""Follows the controller's tables for as long as the process lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cluster.control.client import ControllerClient
from router_service.placement import PlacementTable

log = logging.getLogger(__name__)
_RETRY_S = 0.5


async def follow_tables(controller: ControllerClient, on_table: Callable[[PlacementTable], None]) -> None:
    """Hand every new table to `on_table`; when the controller is gone, keep the last table and ask again."""
    version = 0
    while True:
        try:
            async for table in controller.watch(version):
                version = table.version
                on_table(table)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever Ray raises for a controller that died
            log.warning("lost the controller (%s); asking again", type(error).__name__)
        await asyncio.sleep(_RETRY_S)
