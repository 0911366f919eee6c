"""Everything that runs the system on Ray. May import `router_service` and `experts`."""
