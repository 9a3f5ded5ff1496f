"""The image and the Compose file: valid, pinned, without secrets, and of commands that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from vipllava import __version__, cli

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"
BIN = Path(sys.executable).parent
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE.read_text("utf-8"))["services"]
OURS = [name for name, service in SERVICES.items() if "build" in service]
SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


def by_specification(path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_compose_file_is_as_specified(tmp_path: Path):
    done = by_specification(COMPOSE)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text("utf-8").replace("read_only: true", "readonly: true"))
    assert by_specification(wrong).returncode == 1


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "hadolint"), "--failure-threshold", "style", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_dockerfile_is_linted(tmp_path: Path):
    done = hadolint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.read_text("utf-8").replace("WORKDIR /src", "RUN cd /src"))
    assert hadolint(wrong).returncode == 1


@pytest.mark.parametrize("name", OURS)
def test_our_commands_are_understood(name: str):
    """Parsed, every value converted and checked, but not run."""
    word, *options = SERVICES[name]["command"]
    command = typer.main.get_command(cli.app).commands[word]  # type: ignore[attr-defined]
    context = command.make_context(word, list(options))
    given = {option.partition("=")[0] for option in options if option.startswith("--")}
    known = {name for parameter in command.params for name in parameter.opts}
    assert given <= known
    assert context.params["host"] == "0.0.0.0"


def test_the_server_asks_the_other_service_by_its_names():
    server, vllm = SERVICES["server"], SERVICES["vllm"]
    options = dict(option.split("=", 1) for option in server["command"] if "=" in option)
    others = dict(option.split("=", 1) for option in vllm["command"] if "=" in option)
    assert options["--engine"] == f"http://vllm:{others['--port']}/v1"
    assert options["--name"] == others["--served-model-name"]
    assert server["depends_on"] == {"vllm": {"condition": "service_healthy"}}
    assert set(vllm["networks"]) < set(server["networks"])
    assert str(server["ports"][0]["target"]) == options["--port"]


def test_models_are_only_read_and_gpus_are_asked_for():
    (mount,) = SERVICES["vllm"]["volumes"]
    assert (mount["type"], mount["read_only"]) == ("bind", True)
    assert mount["source"].startswith("${VIPLLAVA_EXPORT:?")
    assert SERVICES["vllm"]["command"][0] == mount["target"]
    (devices,) = SERVICES["vllm"]["deploy"]["resources"]["reservations"]["devices"]
    assert (devices["driver"], devices["capabilities"]) == ("nvidia", ["gpu"])


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_pinned_watched_and_without_secrets(name: str):
    service = SERVICES[name]
    assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert "no-new-privileges:true" in service["security_opt"]
    assert not service.get("privileged")
    for variable, value in service["environment"].items():
        if SECRET.search(variable):
            assert re.fullmatch(rf"\$\{{{variable}:\?[^}}]+\}}", value), variable


@pytest.mark.parametrize("name", OURS)
def test_our_services_can_do_little(name: str):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["image"] == f"vipllava-lightning:{__version__}"
    assert all(port["host_ip"] == "127.0.0.1" for port in service["ports"])
    # The server finishes what runs before it is killed.
    from vipllava.serve.settings import ServerSettings

    assert int(service["stop_grace_period"].removesuffix("s")) > ServerSettings().grace_s


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text("utf-8")).replace("\\\n", " ")
    lines = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, _, rest in lines]


def test_the_image_is_pinned_and_not_root_s():
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases[0])
    last = [rest for word, rest in instructions() if word == "USER"][-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last)
    assert 'ENTRYPOINT ["vipllava"]' in DOCKERFILE.read_text("utf-8")


def test_what_is_copied_is_sent_and_enough():
    """By the ignore file nothing else is sent; tests/test_wheel.py builds from the same files."""
    copied = [
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in shlex.split(rest)[:-1]
    ]
    files = {"constraints.txt", "pyproject.toml", "setup.py", "README.md", "LICENSE"}
    assert set(copied) == files | {"vipllava", "conf", "data_manifests"}
    lines = Path(f"{DOCKERFILE}.dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    sent = {
        path.name
        for path in ROOT.iterdir()
        if any(rule.startswith("!") and fnmatch(path.name, rule[1:]) for rule in rules)
    }
    assert sent == set(copied)
