"""A replica that stops while its group is called: no call of a router without failover may fail."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.config.load import parse_mesh
from cluster.config.mesh import MeshConfig
from cluster.control.controller import Controller
from cluster.control.follow import follow_tables
from cluster.group_host import GroupHost, HostIdentity
from cluster.model_files import check_model
from router_service.router import Router
from router_service.transport.grpc_health import watch_health
from router_service.transport.grpc_stream import GrpcTransport

CALLERS = 3


@pytest.fixture
def config(tiny_checkpoint: Callable[[str], Path]) -> MeshConfig:
    document = {"model": {"source": str(tiny_checkpoint("mixtral"))}, "experts": {"groups": 2}}
    return parse_mesh(document, origin="test")


class Callers:
    """Threads that call layer 0 without a break and compare every answer with the first."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._hidden_TH = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
        self._ids_TK = torch.tensor([[0, 3], [1, 2], [2, 3], [0, 1], [3, 0], [1, 3]])
        self._expected_TH = self._call()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(CALLERS)]
        self.calls = 0
        self.errors: list[Exception] = []
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> torch.Tensor:
        weights_TK = torch.full(self._ids_TK.shape, 0.5)
        return self._router.dispatch(0, self._hidden_TH, self._ids_TK, weights_TK).result()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                torch.testing.assert_close(self._call(), self._expected_TH)
                self.calls += 1
        except Exception as error:
            self.errors.append(error)


def test_a_stopping_replica_answers_what_it_was_asked(config: MeshConfig) -> None:
    async def scenario() -> None:
        controller = Controller(
            experts_per_layer=check_model(config).experts_per_layer, num_groups=2, watch_health=watch_health
        )
        hosts = [
            GroupHost(
                group=group,
                config=config,
                controller=controller,
                identity=HostIdentity(replica=name, node="here", host="127.0.0.1"),
            )
            for group, name in ((0, "g0a"), (1, "g1"), (0, "g0b"))
        ]
        await asyncio.gather(*(host.start() for host in hosts))
        router = Router(GrpcTransport(), {}, recovery_timeout_s=10, on_expert_loss="fail")
        following = asyncio.create_task(follow_tables(controller, router.update))
        callers = await asyncio.to_thread(Callers, router)
        first, _, second = hosts
        try:
            await _until(lambda: first.meter.stats()["tokens_per_s"] > 0 and second.meter.stats()["tokens_per_s"] > 0)
            await first.stop()
            calls = callers.calls
            await _until(lambda: callers.calls > calls + 20 or callers.errors)
        finally:
            await asyncio.to_thread(callers.stop)
        assert not callers.errors
        assert [r.replica for r in router.table.replicas] == ["g0b", "g1"]  # type: ignore[union-attr]
        assert controller.status()["replicas_lost"] == 0
        following.cancel()
        router.close()
        await asyncio.gather(*(host.stop() for host in hosts[1:]))

    asyncio.run(asyncio.wait_for(scenario(), 60))


async def _until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)
