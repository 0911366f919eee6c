"""Where the API server is, and as whom we speak to it."""

from __future__ import annotations

from pathlib import Path

import urllib3
import yaml
from kubernetes import client, config
from kubernetes.config.config_exception import ConfigException

from experts.errors import ConfigError

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def connect(kubeconfig: Path | None = None, context: str | None = None) -> client.ApiClient:
    """A client for the pod's own cluster inside of one, else for the kubeconfig's (KUBECONFIG, ~/.kube/config).

    Raises ConfigError where there is neither.
    """
    configuration = client.Configuration()
    try:
        if kubeconfig is None and context is None and NAMESPACE_FILE.exists():
            config.load_incluster_config(client_configuration=configuration)
        else:
            config.load_kube_config(
                config_file=None if kubeconfig is None else str(kubeconfig),
                context=context,
                client_configuration=configuration,
            )
    except (ConfigException, OSError, ValueError) as error:
        raise ConfigError(f"no Kubernetes cluster to talk to: {error}; set KUBECONFIG or give --kubeconfig") from error
    except (yaml.YAMLError, AttributeError, TypeError) as error:  # the client takes for granted what a file holds
        where = kubeconfig or "the kubeconfig"
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where} is not a kubeconfig: {reason}; set KUBECONFIG or give --kubeconfig") from error
    # An API server that is away should be an error soon, not after the client's ten silent attempts.
    configuration.retries = urllib3.Retry(total=2, backoff_factor=0.2, status=0)
    return client.ApiClient(configuration)


def own_namespace(default: str = "expertmesh") -> str:
    """The pod's namespace inside a cluster, else `default`."""
    return NAMESPACE_FILE.read_text(encoding="utf-8").strip() if NAMESPACE_FILE.exists() else default
