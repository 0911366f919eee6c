"""Built-in kinds against the schema of one Kubernetes version, and what that schema misses."""

import re

import kubernetes_validate
import pytest

KUBERNETES = "1.34"
BUILT_IN = re.compile(r"v1|(apps|policy|rbac\.authorization\.k8s\.io|networking\.k8s\.io)/v1")
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def amount(quantity: str | int) -> float:
    match = re.fullmatch(r"([\d.]+)([a-zA-Z]*)", str(quantity))
    assert match, quantity
    return float(match[1]) * UNITS[match[2]]


def of_kind(objects, kind):
    return {o["metadata"]["name"]: o for o in objects if o["kind"] == kind}


def test_objects_match_the_schema_of_their_kind(objects):
    for item in objects:
        if BUILT_IN.fullmatch(item["apiVersion"]):
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
        else:
            assert item["apiVersion"].split("/")[0] in ("ray.io", "monitoring.coreos.com"), item["apiVersion"]


def test_pod_templates_match_the_schema_of_pods(pod_templates):
    for template in pod_templates.values():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_names_are_names_and_every_object_has_its_namespace(objects):
    for item in objects:
        assert NAME.fullmatch(item["metadata"]["name"])
        cluster_wide = item["kind"] in ("Namespace", "ClusterRole", "ClusterRoleBinding")
        assert item["metadata"].get("namespace") == (None if cluster_wide else "expertmesh")
    keys = [(o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(keys) == len(set(keys))


def test_every_selector_selects_a_pod_of_ours(objects, pod_templates):
    pods = [template["metadata"]["labels"] for template in pod_templates.values()]
    selectors = [o["spec"]["selector"] for o in objects if o["kind"] == "Service"]
    selectors += [o["spec"]["selector"]["matchLabels"] for o in objects if o["kind"] == "PodDisruptionBudget"]
    selectors += [o["spec"]["podSelector"]["matchLabels"] for o in objects if o["kind"] == "NetworkPolicy"]
    for template in pod_templates.values():
        spread = template["spec"].get("topologySpreadConstraints", [])
        selectors += [constraint["labelSelector"]["matchLabels"] for constraint in spread]
    assert selectors
    for selector in selectors:
        ours = {key: value for key, value in selector.items() if not key.startswith("ray.io/")}  # KubeRay adds those
        assert any(ours.items() <= labels.items() for labels in pods), selector


def test_service_monitors_select_a_service_and_its_port(objects):
    services = of_kind(objects, "Service").values()
    for monitor in of_kind(objects, "ServiceMonitor").values():
        wanted = monitor["spec"]["selector"]["matchLabels"]
        selected = [s for s in services if wanted.items() <= s["metadata"].get("labels", {}).items()]
        ports = {port["name"] for service in selected for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports


def test_services_lead_to_ports_that_a_container_of_theirs_opens(objects, pod_templates):
    for service in of_kind(objects, "Service").values():
        ours = {k: v for k, v in service["spec"]["selector"].items() if not k.startswith("ray.io/")}
        for port in service["spec"]["ports"]:
            for template in pod_templates.values():
                if ours.items() <= template["metadata"]["labels"].items():
                    opened = {p["containerPort"] for c in template["spec"]["containers"] for p in c.get("ports", [])}
                    assert port["targetPort"] in opened


def test_every_worker_group_has_one_disruption_budget(objects, pod_templates):
    budgets = of_kind(objects, "PodDisruptionBudget").values()
    for budget in budgets:
        assert len({"minAvailable", "maxUnavailable"} & set(budget["spec"])) == 1
    for name in set(pod_templates) - {"head"}:
        labels = pod_templates[name]["metadata"]["labels"]
        covering = [b for b in budgets if b["spec"]["selector"]["matchLabels"].items() <= labels.items()]
        assert len(covering) == 1, name


def test_network_policy_names_its_types_ports_and_dns(objects):
    (policy,) = of_kind(objects, "NetworkPolicy").values()
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    rules = policy["spec"]["ingress"] + policy["spec"]["egress"]
    ports = [port for rule in rules for port in rule.get("ports", [])]
    assert {port["protocol"] for port in ports} <= {"TCP", "UDP", "SCTP"}
    outgoing = [port for rule in policy["spec"]["egress"] for port in rule.get("ports", [])]
    assert {"port": 53, "protocol": "UDP"} in outgoing


def test_bindings_lead_to_roles_and_accounts(objects, pod_templates):
    accounts = of_kind(objects, "ServiceAccount")
    for kind in ("RoleBinding", "ClusterRoleBinding"):
        for binding in of_kind(objects, kind).values():
            assert binding["roleRef"]["name"] in of_kind(objects, binding["roleRef"]["kind"])
            assert all(s["name"] in accounts and s["namespace"] == "expertmesh" for s in binding["subjects"])
    assert {template["spec"]["serviceAccountName"] for template in pod_templates.values()} <= set(accounts)


def test_no_role_reaches_further_than_needed(objects):
    roles = [*of_kind(objects, "Role").values(), *of_kind(objects, "ClusterRole").values()]
    for rule in (rule for role in roles for rule in role["rules"]):
        assert set(rule["verbs"]) <= {"get", "list", "watch", "patch"}
        assert not {"*", "secrets"} & {*rule["resources"], *rule["apiGroups"]}
    for role in of_kind(objects, "ClusterRole").values():
        assert all(rule["resources"] == ["nodes"] and "patch" not in rule["verbs"] for rule in role["rules"])


def test_pods_run_without_rights(pod_templates):
    for template in pod_templates.values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"] + spec.get("initContainers", []):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}


def test_containers_name_what_they_use(pod_templates):
    for template in pod_templates.values():
        for container in template["spec"]["containers"] + template["spec"].get("initContainers", []):
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory", "ephemeral-storage"} <= set(requests) & set(limits)
            for name, quantity in [*requests.items(), *limits.items()]:
                assert QUANTITY.fullmatch(str(quantity)), (name, quantity)
            for name in requests:
                assert amount(requests[name]) <= amount(limits[name]), name
            assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu"), "GPUs cannot be overcommitted"
            assert container.get("imagePullPolicy") in (None, "IfNotPresent", "Always", "Never")


def test_mounts_and_volumes_fit(objects, pod_templates):
    claims = of_kind(objects, "PersistentVolumeClaim")
    for template in pod_templates.values():
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert len(volumes) == len(spec["volumes"])
        containers = spec["containers"] + spec.get("initContainers", [])
        mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
        assert mounted == set(volumes)
        for container in containers:
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(paths) == len(set(paths))
            names = [variable["name"] for variable in container.get("env", [])]
            assert len(names) == len(set(names))
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        shm = volumes["shm"]["emptyDir"]
        assert shm["medium"] == "Memory"
        assert amount(shm["sizeLimit"]) < amount(spec["containers"][0]["resources"]["limits"]["memory"])


def test_images_are_pinned_outside_the_base(kustomization, pod_templates):
    if kustomization.name == "base":
        pytest.skip("the base names images without a tag; overlays choose")
    for template in pod_templates.values():
        for container in template["spec"]["containers"] + template["spec"].get("initContainers", []):
            name, _, tag = container["image"].partition(":")
            assert name
            assert re.match(r"\d+\.\d+\.\d+", tag), container["image"]


def test_secrets_are_only_referred_to(objects, pod_templates):
    assert not of_kind(objects, "Secret")
    for template in pod_templates.values():
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                secret = re.search(r"TOKEN|KEY|PASSWORD|SECRET", variable["name"])
                assert not secret or "secretKeyRef" in variable.get("valueFrom", {}), variable["name"]
