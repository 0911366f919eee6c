"""Keys of a mesh.yaml that cannot be, or would do nothing, beside its other keys: refused rather than ignored."""

from __future__ import annotations

from cluster.config.mesh import MeshConfig


def contradictions(config: MeshConfig) -> list[tuple[tuple[str, str], str]]:
    """(section and key, what is wrong and what to do) of each."""
    experts, router, engine, http = config.experts, config.router, config.engine, config.http
    in_process = router.transport == "in_process"
    checks = [
        (
            in_process and engine.enable_dbo,
            ("engine", "enable_dbo"),
            "with `router.transport: in_process` experts are never waited for; leave one of the two out",
        ),
        (
            in_process and experts.num_redundant_experts > 0,
            ("experts", "num_redundant_experts"),
            "with `router.transport: in_process` an expert's second slot would be beside its first; leave one of the "
            "two out",
        ),
        (
            in_process and router.max_nodes_per_token is not None,
            ("router", "max_nodes_per_token"),
            "with `router.transport: in_process` all experts are on one node; leave one of the two out",
        ),
        (
            in_process and router.wire_dtype != "model",
            ("router", "wire_dtype"),
            "with `router.transport: in_process` no tensor travels; leave one of the two out",
        ),
        (
            router.node_limit_mode == "restrict" and router.max_nodes_per_token is None,
            ("router", "node_limit_mode"),
            "restrict needs a limit; give `router.max_nodes_per_token`, or leave it out",
        ),
        (
            router.overflow == "next_best" and router.capacity_factor is None,
            ("router", "overflow"),
            "without a capacity nothing overflows; give `router.capacity_factor`, or leave it out",
        ),
        (
            router.service_port not in (None, 0) and router.service_port == http.port,
            ("router", "service_port"),
            f"{http.port} is `http.port` too; give another, or 0 for any free one",
        ),
        (
            engine.max_num_batched_tokens < engine.max_num_seqs,
            ("engine", "max_num_batched_tokens"),
            f"{engine.max_num_batched_tokens} is less than `engine.max_num_seqs` ({engine.max_num_seqs}): a step must "
            "have room for a token of every sequence; raise the one or lower the other",
        ),
    ]
    return [(location, problem) for is_wrong, location, problem in checks if is_wrong]
