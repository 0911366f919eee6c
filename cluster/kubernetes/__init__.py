"""The one door to Kubernetes: `expertmesh k8s`, worker groups scaled ahead of Serve, node labels for the topology.

The official client is used, and only here. What the API server and KubeRay do that one would not expect is said where
the code meets it.
"""
