from experts.wire.v1 import expert_pb2 as _expert_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RouteRequest(_message.Message):
    __slots__ = ("call_id", "layer", "hidden")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    layer: int
    hidden: _expert_pb2.Tensor
    def __init__(self, call_id: _Optional[int] = ..., layer: _Optional[int] = ..., hidden: _Optional[_Union[_expert_pb2.Tensor, _Mapping]] = ...) -> None: ...

class DispatchRequest(_message.Message):
    __slots__ = ("call_id", "layer", "experts_per_token", "expert_ids", "weights", "hidden")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    layer: int
    experts_per_token: int
    expert_ids: bytes
    weights: bytes
    hidden: _expert_pb2.Tensor
    def __init__(self, call_id: _Optional[int] = ..., layer: _Optional[int] = ..., experts_per_token: _Optional[int] = ..., expert_ids: _Optional[bytes] = ..., weights: _Optional[bytes] = ..., hidden: _Optional[_Union[_expert_pb2.Tensor, _Mapping]] = ...) -> None: ...

class CombinedReply(_message.Message):
    __slots__ = ("call_id", "failure", "combined")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    COMBINED_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    failure: _expert_pb2.Failure
    combined: _expert_pb2.Tensor
    def __init__(self, call_id: _Optional[int] = ..., failure: _Optional[_Union[_expert_pb2.Failure, _Mapping]] = ..., combined: _Optional[_Union[_expert_pb2.Tensor, _Mapping]] = ...) -> None: ...

class StreamRequest(_message.Message):
    __slots__ = ("route", "dispatch")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_FIELD_NUMBER: _ClassVar[int]
    route: RouteRequest
    dispatch: DispatchRequest
    def __init__(self, route: _Optional[_Union[RouteRequest, _Mapping]] = ..., dispatch: _Optional[_Union[DispatchRequest, _Mapping]] = ...) -> None: ...

class GetPlacementRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Placement(_message.Message):
    __slots__ = ("version", "replicas", "experts")
    class Replica(_message.Message):
        __slots__ = ("group", "replica", "node", "address")
        GROUP_FIELD_NUMBER: _ClassVar[int]
        REPLICA_FIELD_NUMBER: _ClassVar[int]
        NODE_FIELD_NUMBER: _ClassVar[int]
        ADDRESS_FIELD_NUMBER: _ClassVar[int]
        group: int
        replica: str
        node: str
        address: str
        def __init__(self, group: _Optional[int] = ..., replica: _Optional[str] = ..., node: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...
    class Expert(_message.Message):
        __slots__ = ("layer", "expert", "groups")
        LAYER_FIELD_NUMBER: _ClassVar[int]
        EXPERT_FIELD_NUMBER: _ClassVar[int]
        GROUPS_FIELD_NUMBER: _ClassVar[int]
        layer: int
        expert: int
        groups: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., groups: _Optional[_Iterable[int]] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    version: int
    replicas: _containers.RepeatedCompositeFieldContainer[Placement.Replica]
    experts: _containers.RepeatedCompositeFieldContainer[Placement.Expert]
    def __init__(self, version: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[Placement.Replica, _Mapping]]] = ..., experts: _Optional[_Iterable[_Union[Placement.Expert, _Mapping]]] = ...) -> None: ...
