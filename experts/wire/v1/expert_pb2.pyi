from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT8_E4M3: _ClassVar[DType]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT16: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT8_E4M3: DType

class SharedMemory(_message.Message):
    __slots__ = ("segment", "offset")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    segment: str
    offset: int
    def __init__(self, segment: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "scales", "shared", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    scales: bytes
    shared: SharedMemory
    data: bytes
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., scales: _Optional[bytes] = ..., shared: _Optional[_Union[SharedMemory, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class NodeShare(_message.Message):
    __slots__ = ("group", "address", "tokens", "expert_ids", "offsets", "token_rows", "weights")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ROWS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    group: int
    address: str
    tokens: bytes
    expert_ids: bytes
    offsets: bytes
    token_rows: bytes
    weights: bytes
    def __init__(self, group: _Optional[int] = ..., address: _Optional[str] = ..., tokens: _Optional[bytes] = ..., expert_ids: _Optional[bytes] = ..., offsets: _Optional[bytes] = ..., token_rows: _Optional[bytes] = ..., weights: _Optional[bytes] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("call_id", "layer", "expert_ids", "offsets", "token_rows", "weights", "reply_dtype", "shares", "reply_place", "hidden")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ROWS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    REPLY_DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    REPLY_PLACE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    layer: int
    expert_ids: bytes
    offsets: bytes
    token_rows: bytes
    weights: bytes
    reply_dtype: DType
    shares: _containers.RepeatedCompositeFieldContainer[NodeShare]
    reply_place: SharedMemory
    hidden: Tensor
    def __init__(self, call_id: _Optional[int] = ..., layer: _Optional[int] = ..., expert_ids: _Optional[bytes] = ..., offsets: _Optional[bytes] = ..., token_rows: _Optional[bytes] = ..., weights: _Optional[bytes] = ..., reply_dtype: _Optional[_Union[DType, str]] = ..., shares: _Optional[_Iterable[_Union[NodeShare, _Mapping]]] = ..., reply_place: _Optional[_Union[SharedMemory, _Mapping]] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class ForwardReply(_message.Message):
    __slots__ = ("call_id", "failure", "partial")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    failure: Failure
    partial: Tensor
    def __init__(self, call_id: _Optional[int] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., partial: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("call_ids",)
    CALL_IDS_FIELD_NUMBER: _ClassVar[int]
    call_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, call_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("group", "device", "hidden_size", "intermediate_size", "slots")
    class Slot(_message.Message):
        __slots__ = ("layer", "expert", "checksum")
        LAYER_FIELD_NUMBER: _ClassVar[int]
        EXPERT_FIELD_NUMBER: _ClassVar[int]
        CHECKSUM_FIELD_NUMBER: _ClassVar[int]
        layer: int
        expert: int
        checksum: int
        def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...
    GROUP_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    INTERMEDIATE_SIZE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    group: int
    device: str
    hidden_size: int
    intermediate_size: int
    slots: _containers.RepeatedCompositeFieldContainer[DescribeReply.Slot]
    def __init__(self, group: _Optional[int] = ..., device: _Optional[str] = ..., hidden_size: _Optional[int] = ..., intermediate_size: _Optional[int] = ..., slots: _Optional[_Iterable[_Union[DescribeReply.Slot, _Mapping]]] = ...) -> None: ...
