"""Decode steps as one call: what the layers one by one give, to the bit, and whatever goes wrong on the way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from numba import njit
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config

from cluster.bench.overlap_peer import build_group
from cluster.serving.attention_batch import Chunk
from cluster.serving.compiled_decode import CompiledDecode
from cluster.serving.kv_cache import KVCache
from cluster.serving.model_runner import ModelRunner, OverlapThresholds
from cluster.serving.request import SamplingParams
from cluster.serving.sequence import RunningSequence
from cluster.serving.skeleton import ModelSkeleton, load_skeleton
from experts.ops._numba.tickets import take_ticket
from experts.server import ExpertServer
from experts.spec import ExpertCall
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import describe_experts
from router_service.lane_run import LaneRun
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.router import Router
from router_service.transport.grpc_stream import GrpcTransport

GROUPS = 2
_LATENT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 96,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 24,
    "v_head_dim": 32,
    "max_position_embeddings": 512,
}
# Of whole panels, which those of other tests are not.
LATENT = {
    "deepseek_v2": DeepseekV2Config(**_LATENT, q_lora_rank=None, topk_method="group_limited_greedy"),
    "deepseek_v3": DeepseekV3Config(**_LATENT, q_lora_rank=48),
}
FAMILIES = ["mixtral", "qwen3_moe", *LATENT]
Ran = list[int | None]


class Mesh:
    """A skeleton whose experts are in groups behind sockets, all in this process."""

    def __init__(self, directory: Path, num_threads: int) -> None:
        checkpoint = Checkpoint(directory)
        layout = describe_experts(checkpoint, checkpoint.config())
        self.groups = [build_group(directory, group, GROUPS) for group in range(GROUPS)]
        self.servers = [ExpertServer(group) for group in self.groups]
        replicas = []
        for group, server in enumerate(self.servers):
            server.start()
            replicas.append(GroupReplica(group=group, replica=f"g{group}", node="n", address=server.address))
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            self.skeleton: ModelSkeleton = load_skeleton(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
        finally:
            torch.set_num_threads(before)
        self.router = Router(GrpcTransport(), self.skeleton.gates, recovery_timeout_s=1000.0, node="n")
        holders = balanced(layout.experts_per_layer, GROUPS)
        self.table = PlacementTable(version=1, num_groups=GROUPS, holders=holders, replicas=tuple(replicas))
        self.router.update(self.table)
        self.skeleton.connect(self.router)

    def close(self) -> None:
        self.router.close()
        for server in self.servers:
            server.stop(0)

    def decode_step(self, lengths: tuple[int, ...]) -> list[tuple[RunningSequence, Chunk]]:
        """Sequences of so many tokens, all but the last of each computed. It may be run again and again."""
        cache = KVCache(self.skeleton.kv_layout, memory=1 << 26, max_num_seqs=len(lengths), max_model_len=512)
        generator = torch.Generator().manual_seed(len(lengths))
        step = []
        for index, length in enumerate(lengths):
            tokens = torch.randint(0, 256, (length,), generator=generator).tolist()
            sequence = RunningSequence(
                index,
                tokens,
                SamplingParams(max_tokens=1),
                lambda _: None,
                max_model_len=512,
                eos_token_ids=frozenset(),
            )
            slot = cache.allocate(length + 1)
            assert slot is not None
            step.append((sequence, Chunk(slot=slot, num_tokens=length)))
        behind = [(s, Chunk(slot=c.slot, num_tokens=c.num_tokens - 1)) for s, c in step if c.num_tokens > 1]
        if behind:
            self.run(behind)
        for _, chunk in step:
            chunk.slot.length = chunk.num_tokens - 1
        return [(sequence, Chunk(slot=chunk.slot, num_tokens=1)) for sequence, chunk in step]

    @torch.inference_mode()
    def run(self, step: Any, overlap: OverlapThresholds | None = None) -> torch.Tensor:
        return ModelRunner(self.skeleton, overlap).run(step).logits

    def one_by_one(self, step: Any) -> torch.Tensor:
        decode, self.skeleton._decode = self.skeleton._decode, None
        try:
            return self.run(step)
        finally:
            self.skeleton._decode = decode


@pytest.fixture(scope="module")
def checkpoint(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    @cache
    def build(family: str) -> Path:
        if family not in LATENT:
            return tiny_checkpoint(family)
        directory = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LATENT[family], dtype=torch.float32).save_pretrained(directory)
        return directory

    return build


@pytest.fixture
def make_mesh(checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., Mesh]]:
    made: list[Mesh] = []

    def make(family: str = "mixtral", num_threads: int = 2) -> Mesh:
        made.append(Mesh(checkpoint(family), num_threads))
        return made[-1]

    yield make
    for mesh in made:
        mesh.close()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Of each time that a step could have been one call: at which layer it went on, None where it was not."""
    seen: Ran = []
    run = CompiledDecode.run

    def spy(self: CompiledDecode, *arguments: Any) -> Any:
        result = run(self, *arguments)
        seen.append(None if result is None else result[1])
        return result

    monkeypatch.setattr(CompiledDecode, "run", spy)
    return seen


def counted(mesh: Mesh) -> dict[str, Any]:
    """What of the router's counters does not depend on time."""
    counters = mesh.router.counters
    names = ("batches", "tokens", "calls", "rows", "token_nodes", "token_copies", "bytes_sent", "bytes_received")
    experts = {layer: counts.tolist() for layer, counts in counters.expert_tokens.items()}
    return {name: getattr(counters, name) for name in names} | {"combined": sum(counters.latency_counts), **experts}


def difference(before: dict[Any, Any], after: dict[Any, Any]) -> dict[Any, Any]:
    return {
        key: [b - a for a, b in zip(before[key], value, strict=True)]
        if isinstance(value, list)
        else value - before[key]
        for key, value in after.items()
    }


@pytest.mark.parametrize("lengths", [(1,), (60, 3), (1, 2, 70, 140, 300, 301, 40), tuple(range(1, 65))])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_counters_are_those_of_the_layers_one_by_one(
    family: str, lengths: tuple[int, ...], make_mesh: Callable[..., Mesh], ran: Ran
) -> None:
    mesh = make_mesh(family)
    step = mesh.decode_step(lengths)
    expected = mesh.one_by_one(step)
    counts = [counted(mesh)]
    assert torch.equal(mesh.one_by_one(step), expected)
    counts.append(counted(mesh))
    ran.clear()
    assert torch.equal(mesh.run(step), expected)
    counts.append(counted(mesh))
    assert ran == [mesh.skeleton.model.config.num_hidden_layers]
    assert difference(counts[0], counts[1]) == difference(counts[1], counts[2])
    latency_s = mesh.router.counters.latency_s
    mesh.run(step)
    assert 0 < mesh.router.counters.latency_s - latency_s < 60


@pytest.mark.parametrize("num_threads", [1, 3, 12])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_threads_change_nothing(family: str, num_threads: int, make_mesh: Callable[..., Mesh], ran: Ran) -> None:
    alone, together = make_mesh(family, 2), make_mesh(family, num_threads)
    for lengths in (4, 5, 6, 7), (30, 31, 1, 2, 90, 300, 7, 8, 9, 10, 11):
        steps = alone.decode_step(lengths), together.decode_step(lengths)
        expected = alone.run(steps[0])
        ran.clear()
        for _ in range(10):
            assert torch.equal(together.run(steps[1]), expected)
            assert torch.equal(together.one_by_one(steps[1]), expected)
        assert ran == [alone.skeleton.model.config.num_hidden_layers] * 10


@njit
def take(address: int) -> int:
    number: int = take_ticket(address)
    return number


@pytest.mark.parametrize("takes", [False, True])
def test_a_helper_that_fails_fails_the_step(
    takes: bool, make_mesh: Callable[..., Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be it before the caller has begun, or with a part of the attention that the caller then waits for."""
    mesh = make_mesh("mixtral", 3)
    step = mesh.decode_step(tuple([500] * 12))
    expected = mesh.run(step)
    decode = mesh.skeleton._decode
    assert decode is not None
    compiled, helping = decode._compiled, threading.Event()

    def run(*arguments: Any) -> int:
        assert helping.wait(60)
        return compiled.run(*arguments)

    def fail(_: Any, socket: int, tickets: Any, parts: Any, *rest: Any) -> None:
        helping.set()
        while takes and os.read(socket, 1):
            if take(tickets.ctypes.data) & 0xFFFFFFFF < parts.shape[1]:
                raise MemoryError("no memory for scores")
        if not takes:
            raise MemoryError("no memory for scores")

    def run_until_it_fails() -> None:
        for _ in range(200):  # the caller may take all parts
            mesh.run(step)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "_compiled", compiled._replace(run=run, help=fail))
        with pytest.raises(MemoryError, match="no memory for scores"):
            run_until_it_fails()
    assert torch.equal(mesh.run(step), expected)


def test_what_is_no_decode_step_is_left_to_the_layers(make_mesh: Callable[..., Mesh], ran: Ran) -> None:
    mesh = make_mesh()
    step = mesh.decode_step((5, 6))
    ran.clear()
    both = [step[0], (step[1][0], Chunk(slot=step[1][1].slot, num_tokens=2, offset=-1))]
    mesh.run(both)
    mesh.run(step, OverlapThresholds(decode_tokens=2, prefill_tokens=2))
    mesh.run(mesh.decode_step(tuple([1] * 65)))
    assert ran == [None] * 4
    expected = mesh.run(step)
    assert ran[-1] is not None
    other = Router(GrpcTransport(wire_dtype="bf16"), mesh.skeleton.gates, recovery_timeout_s=20.0, node="n")
    other.update(mesh.table)
    with closing(other):
        mesh.skeleton.connect(other)
        assert not torch.equal(mesh.run(step), expected)
    assert ran[-1] is None


def middle_layer(mesh: Mesh) -> int:
    return max(mesh.skeleton.gates) - 1


class Disturbed:
    """A group that does something else first, once, when it is asked for a layer."""

    def __init__(self, group: Any, layer: int, disturb: Callable[[], None]) -> None:
        self.forward_undisturbed, self.layer, self.disturb = group.forward, layer, disturb
        self.times = 0

    def forward(self, call: ExpertCall) -> torch.Tensor:
        if call.layer == self.layer and not self.times:
            self.times += 1
            self.disturb()
        result: torch.Tensor = self.forward_undisturbed(call)
        return result


def disturb(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, what: Callable[[], None]) -> Disturbed:
    group = mesh.groups[1]
    disturbed = Disturbed(group, middle_layer(mesh), what)
    monkeypatch.setattr(group, "answer", lambda _: None)  # every call is for `forward`
    monkeypatch.setattr(group, "forward", disturbed.forward)
    return disturbed


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_an_answer_that_is_late_is_waited_for(
    family: str, make_mesh: Callable[..., Mesh], ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = make_mesh(family)
    step = mesh.decode_step((9, 70, 3, 4, 5))
    expected = mesh.run(step)
    monkeypatch.setattr("router_service.small_batches.SmallBatches.patience_s", 0.01)
    monkeypatch.setattr(mesh.router._small, "again", lambda *_: pytest.fail("it is asked again"))
    waited = threading.Event()
    disturbed = disturb(mesh, monkeypatch, lambda: (waited.wait(0.1), None)[1])
    before = counted(mesh)
    assert torch.equal(mesh.run(step), expected)
    assert disturbed.times == 1
    assert ran[-1] == middle_layer(mesh) + 1
    after = counted(mesh)
    assert torch.equal(mesh.run(step), expected)
    assert difference(before, after) == difference(after, counted(mesh))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_an_answer_that_is_none_is_asked_for_again(
    family: str, make_mesh: Callable[..., Mesh], ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = make_mesh(family)
    step = mesh.decode_step((9, 70, 3, 4, 5))
    expected = mesh.run(step)

    def fail() -> None:
        raise RuntimeError("disturbed")

    disturbed = disturb(mesh, monkeypatch, fail)
    assert torch.equal(mesh.run(step), expected)
    assert disturbed.times == 1
    assert ran[-1] == middle_layer(mesh) + 1
    assert torch.equal(mesh.run(step), expected)
    assert ran[-1] == mesh.skeleton.model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_group_that_cannot_be_asked_is_asked_in_the_ordinary_way(
    family: str, make_mesh: Callable[..., Mesh], ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = make_mesh(family)
    step = mesh.decode_step((9, 70, 3, 4, 5))
    expected = mesh.run(step)
    whole = LaneRun.arguments.fget
    assert whole is not None

    def torn(self: LaneRun) -> Any:
        *before, lane = whole(self)
        sockets_G = lane[0].copy()
        sockets_G[-1] = -1
        return (*before, (sockets_G, *lane[1:]))

    with monkeypatch.context() as patch:
        patch.setattr(LaneRun, "arguments", property(torn))
        assert torch.equal(mesh.run(step), expected)
    assert ran[-1] == min(mesh.skeleton.gates) + 1
    assert torch.equal(mesh.run(step), expected)
    assert ran[-1] == mesh.skeleton.model.config.num_hidden_layers


def test_a_server_that_dies_on_the_way_is_replaced_and_the_logits_are_the_same(
    make_mesh: Callable[..., Mesh], ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = make_mesh("deepseek_v3")
    step = mesh.decode_step((9, 70, 3, 4, 5))
    expected = mesh.run(step)

    def replace() -> None:
        old, new = mesh.servers[1], ExpertServer(mesh.groups[1])
        new.start()
        mesh.servers[1] = new
        replicas = (mesh.table.replicas[0], GroupReplica(group=1, replica="new", node="n", address=new.address))
        threading.Thread(target=old.stop, args=(0,)).start()
        mesh.router.update(PlacementTable(version=2, num_groups=2, holders=mesh.table.holders, replicas=replicas))

    disturb(mesh, monkeypatch, replace)
    for _ in range(3):
        assert torch.equal(mesh.run(step), expected)
    assert ran[-1] == mesh.skeleton.model.config.num_hidden_layers
    assert not mesh.router.replicas.rows_in_flight
