"""mesh.yaml: pydantic at the edge, frozen dataclasses inside."""
