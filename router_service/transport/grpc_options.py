"""Channel options of everyone who calls an expert group."""

from __future__ import annotations

from experts.wire.codec import MAX_MESSAGE_BYTES

ChannelOptions = tuple[tuple[str, int], ...]

# Pings find a peer whose machine is gone (a closed socket tells by itself). Reconnects are quick: the
# placement table, not the channel, decides for how long a replica is worth calling.
CHANNEL_OPTIONS: ChannelOptions = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
