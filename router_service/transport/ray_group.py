"""What runs inside a group's actor: it answers the messages of ExpertService, which here come in Ray's tasks.

The actor may be of any kind, a Serve replica too: its class needs no method of ours. It has one thread for such tasks,
and a node's call waits in it for the node's other groups. So that none waits for each other in a circle, a node's call
goes to its lowest group, which waits for higher ones only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.exceptions import RayError

from experts.cancelled_calls import CancelledCalls
from experts.errors import MeshError
from experts.node_call import NodeCall
from experts.spec import ExpertCall, Forwards
from experts.wire.codec import WireCall, decode_call, decode_partial, encode_failure, encode_partial
from router_service.combine import Combiner
from router_service.transport.base import TransportError
from router_service.transport.ray_actors import RayActors

Message = bytes | npt.NDArray[np.uint8]
"""A ForwardRequest or ForwardReply; a long one as an array, whose memory Ray shares between a node's processes."""

LONG_BYTES = 1024 * 1024
"""From here on a message is an object of its own; Ray's own threshold should be the same (max_direct_call_object_size,
100 KiB unless told)."""

# A sibling that hangs must not keep our thread: an async actor with a few calls in its queue answers nothing else, and
# Serve would take it for dead after 30 s.
_SIBLING_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class _Served:
    group: Forwards
    cancelled: CancelledCalls
    siblings: RayActors


_served: list[_Served] = []


def serve_calls(group: Forwards, cancelled: CancelledCalls, namespace: str) -> None:
    """Let routers reach `group` in this actor's process.

    cancelled: what the group's ExpertServer was told to skip
    namespace: where all groups' actors have their names
    """
    _served[:] = [_Served(group, cancelled, RayActors(namespace))]


def to_message(data: bytes) -> Message:
    """`data` as it goes into a task, or comes out of one."""
    return data if len(data) < LONG_BYTES else np.frombuffer(data, np.uint8)


def from_message(message: Message) -> bytes | memoryview:
    """What the codec reads."""
    return message if isinstance(message, bytes) else message.data


def forward(_actor: object, request: Message) -> Message:
    """The answer to a call to this group, or to this node, whose share without an address is this group's."""

    def run(served: _Served, wire: WireCall) -> torch.Tensor:
        served.cancelled.check(wire.call_id)
        return _run(served, wire.call, request)

    return _answered(request, run, None)


def forward_share(_actor: object, request: Message, number: int) -> Message:
    """The answer to one share of a node's call, in float32; rows as the share's tokens."""

    def run(served: _Served, wire: WireCall) -> torch.Tensor:
        assert isinstance(wire.call, NodeCall)
        return served.group.forward(wire.call.shares[number].call(wire.call.layer, wire.call.hidden_TH))

    return _answered(request, run, torch.float32)


def _answered(
    request: Message, run: Callable[[_Served, WireCall], torch.Tensor], reply_dtype: torch.dtype | None
) -> Message:
    try:
        if not _served:
            raise MeshError("no group is served in this actor (yet)")
        wire = decode_call(from_message(request))
        partial_TH = run(_served[0], wire)
        return to_message(encode_partial(wire.call_id, partial_TH, reply_dtype or wire.reply_dtype))
    except Exception as error:  # as a value: Ray would wrap it, and the caller needs to tell the kinds apart
        return encode_failure(0, error)


def _run(served: _Served, call: ExpertCall | NodeCall, request: Message) -> torch.Tensor:
    if isinstance(call, ExpertCall):
        return served.group.forward(call)
    # The others read the request from the node's object store, and leave their partials there.
    is_object = len(call.shares) > 1 and len(request) >= LONG_BYTES
    given = ray.put(request) if is_object else request
    replies = [
        served.siblings.run(share.address, forward_share, given, number) if share.address else None
        for number, share in enumerate(call.shares)
    ]
    own_TH = [
        served.group.forward(share.call(call.layer, call.hidden_TH)) for share in call.shares if not share.address
    ]
    num_tokens, hidden_size = call.hidden_TH.shape
    combiner = Combiner(num_tokens, hidden_size, torch.device("cpu"))
    for share, reply in zip(call.shares, replies, strict=True):
        partial_TH = own_TH.pop() if reply is None else _sibling_answer(served.siblings, share.address, reply)
        combiner.add(None if share.tokens_T is None else share.tokens_T.numpy(), partial_TH)
    return combiner.result(torch.float32)


def _sibling_answer(siblings: RayActors, actor: str, reply: Future[Message]) -> torch.Tensor:
    where = f"actor {actor} on this node"
    try:
        wire = decode_partial(from_message(reply.result(_SIBLING_TIMEOUT_S)))
    except RayError as error:
        siblings.forget(actor)
        raise TransportError(f"{where}: {type(error).__name__}") from error
    except TimeoutError:
        raise TransportError(f"{where}: no reply within {_SIBLING_TIMEOUT_S:g} s") from None
    if wire.error is not None:
        raise wire.error
    assert wire.partial_TH is not None, "a reply holds an answer or an error"
    return wire.partial_TH
