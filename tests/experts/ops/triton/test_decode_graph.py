"""Calls of decode size through captured graphs. Where there is no card, a graph that runs what was captured again."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from experts.ops import triton_backend
from experts.ops.expert_mlp import expert_mlp_reference
from experts.ops.triton_backend import TritonBackend
from experts.spec import ExpertSpec, ExpertWeights


class FakeGraph:
    capturing = None

    def __init__(self):
        self.calls = []

    def replay(self):
        for run, arguments, out in self.calls:
            out.copy_(run(*arguments))


@pytest.fixture
def fake_graphs(monkeypatch, on_card):
    if on_card:
        return

    @contextmanager
    def capture(graph, pool):
        FakeGraph.capturing = graph
        yield
        FakeGraph.capturing = None

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    original = TritonBackend.run

    def recording(self, *arguments):
        graph, FakeGraph.capturing = FakeGraph.capturing, None
        out = original(self, *arguments)
        if graph is not None:
            graph.calls.append((lambda *a: original(self, *a), arguments, out))
        return out

    for name, value in {
        "CUDAGraph": FakeGraph,
        "graph": capture,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": lambda: None,
        "synchronize": lambda device=None: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(TritonBackend, "run", recording)


@pytest.fixture
def backend(device, fake_graphs, monkeypatch, tmp_path):
    monkeypatch.setenv("EXPERTMESH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_backend, "MAX_GRAPH_ROWS", 4)
    monkeypatch.setattr(triton_backend, "ROW_BUCKETS", (16,))
    spec = ExpertSpec(hidden_size=64, intermediate_size=32)
    built = TritonBackend(spec, device=device, dtype=torch.float16, quantization="none")
    generator = torch.Generator().manual_seed(0)
    built.experts = [
        ExpertWeights(
            up_2IH=torch.randn(64, 64, generator=generator).half() / 8,
            down_HI=torch.randn(64, 32, generator=generator).half() / 6,
        )
        for _ in range(3)
    ]
    for slot, weights in enumerate(built.experts):
        built.load(slot, weights)
    if device.type == "cpu":
        built.warm(0)
    return built


def test_every_decode_size_is_captured(backend):
    assert sorted(backend._graphs) == [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


# Rows an expert; 3 rows pad to 4, 3 experts to 4, and calls of one size follow each other with other routing.
@pytest.mark.parametrize("calls", [[[1, 0, 2], [2, 1, 0], [0, 0, 3]], [[1, 1, 1], [2, 1, 1]], [[1, 0, 0], [0, 0, 1]]])
def test_equals_float64(backend, error, calls):
    generator = torch.Generator().manual_seed(1)
    for counts in calls:
        hit = [slot for slot, count in enumerate(counts) if count]
        offsets = torch.tensor([0] + [counts[slot] for slot in hit]).cumsum(0).int()
        token_rows = torch.cat([torch.randperm(4, generator=generator)[: counts[slot]].sort()[0] for slot in hit]).int()
        hidden = torch.randn(4, 64, generator=generator).half()
        weights = torch.rand(len(token_rows), generator=generator)
        partial = backend.forward(hidden, torch.tensor(hit).int(), offsets, token_rows, weights)
        chosen = [backend.experts[slot] for slot in hit]
        expected = expert_mlp_reference(backend._spec, chosen, hidden, offsets, token_rows, weights)
        assert error(partial, expected) < 2e-3


def test_an_answer_outlives_the_next_call(backend):
    call = (torch.zeros(1).int(), torch.tensor([0, 1]).int(), torch.zeros(1).int(), torch.ones(1))
    hidden = torch.ones(1, 64).half()
    first = backend.forward(hidden, *call)
    kept = first.clone()
    backend.forward(-2 * hidden, *call)
    assert torch.equal(first, kept)


def test_larger_calls_run_without_a_graph(backend, error):
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(2)).half()
    call = (torch.tensor([0, 9]).int(), torch.arange(9).int(), torch.ones(9))
    partial = backend.forward(hidden, torch.ones(1).int(), *call)
    assert error(partial, expert_mlp_reference(backend._spec, backend.experts[1:2], hidden, *call)) < 2e-3
