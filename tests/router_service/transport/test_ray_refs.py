import pytest
import torch

from experts.errors import ExpertNotResident
from experts.node_call import NodeCall, NodeShare
from router_service.placement import GroupReplica
from router_service.transport.base import TransportError

ray = pytest.importorskip("ray")

from router_service.transport.ray_group import serve_calls  # noqa: E402
from router_service.transport.ray_refs import RayRefsTransport  # noqa: E402

pytestmark = pytest.mark.ray


def start_group(name, *, asynchronous):
    """An actor that serves a group in which an expert is worth weight * hidden."""

    class Group:
        def forward(self, call):
            if call.layer != 0:
                raise ExpertNotResident(f"layer {call.layer} is not here", "layer")
            return 2 * call.hidden_TH.float()

    class Plain:
        def __init__(self):
            serve_calls(name, Group())

        def ping(self):
            return True

    class Async(Plain):
        async def ping(self):
            return True

    actor_class = ray.remote(num_cpus=0)(Async if asynchronous else Plain)
    actor = actor_class.options(name=f"actor-{name}").remote()
    assert ray.get(actor.ping.remote())
    return actor, GroupReplica(group=0, replica=name, node="n0", address="", actor=f"actor-{name}")


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory):
    ray.init(
        num_cpus=2,
        namespace="mesh",
        include_dashboard=False,
        logging_level="ERROR",
        _temp_dir=str(tmp_path_factory.mktemp("ray")),
    )
    yield
    ray.shutdown()


def call_until_it_fails(transport, replica, call):
    """Ray kills by message: calls that overtake it are still answered."""
    while True:
        transport.send(replica, call).result(20)


@pytest.mark.usefixtures("local_ray")
def test_calls_reach_actors_of_both_kinds_and_failures_are_told_apart(make_call):
    transport = RayRefsTransport("mesh")
    for asynchronous in (False, True):
        actor, replica = start_group(f"g{asynchronous}", asynchronous=asynchronous)
        for dtype in (torch.float32, torch.bfloat16):
            for num_tokens in (1, 2048):
                hidden_TH = torch.randn(num_tokens, 64).to(dtype)
                partial_TH = transport.send(replica, make_call(hidden_TH)).result(20)
                assert torch.equal(partial_TH, 2 * hidden_TH.float())
        with pytest.raises(ExpertNotResident, match="layer 3 is not here"):
            transport.send(replica, make_call(torch.ones(1, 4), layer=3)).result(20)
        ray.kill(actor)
        with pytest.raises(TransportError, match=r"Died|Unavailable|no actor"):
            call_until_it_fails(transport, replica, make_call(torch.ones(1, 4)))
    with pytest.raises(TransportError, match="no actor 'nobody'"):
        transport.send(
            GroupReplica(group=1, replica="x", node="n", address="", actor="nobody"),
            make_call(torch.ones(1, 4)),
        )


@pytest.mark.usefixtures("local_ray")
def test_a_node_of_actors_answers_with_one_sum():
    """Two groups, each worth 2 * hidden for its tokens; the batch is large enough to travel as one object."""
    transport = RayRefsTransport("mesh")
    # An actor lives as long as its handle.
    started = [start_group(f"node-{asynchronous}", asynchronous=asynchronous) for asynchronous in (False, True)]
    replicas = [replica for _, replica in started]
    for num_tokens in (3, 2048):
        hidden_TH = torch.randn(num_tokens, 64)
        tokens_T = torch.arange(0, num_tokens, 2, dtype=torch.int32)
        shares = tuple(
            NodeShare(
                group=group,
                address=address,
                tokens_T=tokens,
                expert_ids_S=torch.zeros(1, dtype=torch.int32),
                offsets_S1=torch.tensor([0, 1], dtype=torch.int32),
                token_rows_R=torch.zeros(1, dtype=torch.int32),
                weights_R=torch.ones(1),
            )
            for group, (address, tokens) in enumerate([("", tokens_T), ("sibling", None)])
        )
        call = NodeCall(layer=0, hidden_TH=hidden_TH, shares=shares)
        expected = 2 * hidden_TH
        expected[tokens_T] += 2 * hidden_TH[tokens_T]
        assert torch.equal(transport.send_node(replicas, call).result(20), expected)
    refused = NodeCall(layer=5, hidden_TH=hidden_TH, shares=shares)
    with pytest.raises(ExpertNotResident, match="layer 5"):
        transport.send_node(replicas, refused).result(20)
