"""What a new machine is told, from made-up facts; and once of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import time
from email.message import Message
from pathlib import Path

import pytest

from vipllava import cli
from vipllava.commands import doctor as sections
from vipllava.commands import doctor_facts
from vipllava.commands.doctor import Row
from vipllava.commands.doctor_facts import Devices, Facts, Network, Packages, Place
from vipllava.commands.doctor_facts import Surroundings as Environment
from vipllava.commands.network_probe import Probe, probe_network
from vipllava.config.hardware import CudaDevice, Hardware

GIB = 2**30
A100 = CudaDevice("A100", 79.2, (8, 0))
PACKAGES = Packages("3.11.7", "Linux", "0.1.0 (abc)", {"torch": "2.13.0", "peft": "0.21.2"})
FACTS = Facts(
    PACKAGES,
    Devices(Hardware(num_cpus=8)),
    Network(("gloo",), probe=Probe("gloo", 1.5)),
    (Place("runs", "/r", 50 * GIB, writable=True),),
    8 * GIB,
    Environment(),
)


def changed(value, **changes):
    names = type(value).__dataclass_fields__
    return type(value)(**{name: changes.get(name, getattr(value, name)) for name in names})


def bad(section: list[Row]) -> list[tuple[str, str]]:
    return [(row.name, row.status) for row in section if row.status != "ok"]


def values(section: list[Row]) -> dict[str, str]:
    return {row.name: row.value for row in section}


def test_versions():
    section = sections.versions(PACKAGES)
    assert [(row.name, row.value) for row in section] == [
        ("python", "3.11.7"),
        ("platform", "Linux"),
        ("vipllava", "0.1.0 (abc)"),
        ("torch", "2.13.0 (CPU build)"),
        ("peft", "0.21.2"),
    ]
    assert bad(section) == []
    cuda = sections.versions(changed(PACKAGES, torch_cuda="12.8"))
    assert values(cuda)["torch"] == "2.13.0 (CUDA 12.8)"


def test_what_is_too_old_or_broken_is_a_problem():
    section = sections.versions(
        changed(
            PACKAGES,
            unfit={"omegaconf<2.4,>=2.3": "2.4.1", "rich>=14": None},
            import_errors={"torch": "OSError: libcudart.so.12: cannot open"},
        )
    )
    found = [row for row in section if row.status == "problem"]
    assert [(row.name, row.value) for row in found] == [
        ("torch", "2.13.0 (CPU build): cannot be imported: OSError: libcudart.so.12: cannot open"),
        ("omegaconf<2.4,>=2.3", "2.4.1 is installed"),
        ("rich>=14", "not installed"),
    ]
    assert found[1].remedy == 'pip install "omegaconf<2.4,>=2.3"'


def test_devices():
    machine = Hardware((A100, CudaDevice("T4", 14.6, (7, 5))), num_cpus=96, cpu_bf16=True)
    section = sections.devices(Devices(machine, (78.7, 5.0), driver=True), PACKAGES)
    assert values(section) == {
        "cuda:0": "A100, 78.7 of 79.2 GiB free, compute capability 8.0, bf16",
        "cuda:1": "T4, 5.0 of 14.6 GiB free, compute capability 7.5, fp16, no bf16",
        "cpu": "96 cores, bf16 in hardware",
    }
    assert bad(section) == [("cuda:1", "warning")]
    mac = sections.devices(Devices(Hardware(mps=True, num_cpus=8)), PACKAGES)
    assert list(values(mac)) == ["cuda", "mps", "cpu"]
    assert bad(mac) == []


@pytest.mark.parametrize(
    ("torch_cuda", "value"),
    [
        (None, "an NVIDIA driver is installed, and torch is a CPU build"),
        ("12.8", "an NVIDIA driver is installed, and torch for CUDA 12.8 sees no device"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_a_problem(torch_cuda, value):
    found = Devices(Hardware(), driver=True)
    section = sections.devices(found, changed(PACKAGES, torch_cuda=torch_cuda))
    assert (values(section)["cuda"], bad(section)) == (value, [("cuda", "problem")])


def test_attention_marks_what_would_be_chosen():
    installed = frozenset({"torch_varlen", "flash_attn_4"})
    section = sections.attention(Hardware((A100,), installed=installed))
    assert values(section) == {
        "flash_attention_4": "devices of compute capability 8.0 cannot run it, it needs 9.0 or "
        "more",
        "flash_attention_3": "needs flash-attn-3, which is not installed; devices of compute "
        "capability 8.0 cannot run it, it needs 9.0",
        "flash_attention_2": "needs flash_attn, which is not installed",
        "torch_varlen": "chosen",
        "sdpa": "usable",
    }
    assert bad(section) == []


def test_a_device_that_could_do_better_than_sdpa_is_a_warning():
    section = sections.attention(Hardware((A100,)))
    assert (values(section)["sdpa"], bad(section)) == ("chosen", [("sdpa", "warning")])
    assert section[-1].remedy == 'pip install "vipllava-lightning[flash]"'
    assert bad(sections.attention(Hardware())) == []


@pytest.mark.parametrize(
    ("found", "num_cuda", "expected"),
    [
        (Network(("nccl", "gloo"), "2.27.3", {}, Probe("nccl", 4.2)), 8, []),
        (
            Network(("nccl", "gloo"), "2.27.3", {}, Probe("nccl", 60.0, "no answer")),
            8,
            [("all-reduce", "problem")],
        ),
        (Network(("gloo",)), 2, [("backends", "problem")]),
        (Network(("gloo",)), 1, []),
        (
            Network(("gloo",), probe=Probe("gloo", 1.0, "cannot resolve host")),
            0,
            [("all-reduce", "warning")],
        ),
    ],
)
def test_network(found, num_cuda, expected):
    assert bad(sections.network(found, num_cuda)) == expected


def test_network_shows_versions_and_variables():
    variables = {"MASTER_ADDR": "node0", "NCCL_IB_DISABLE": "1"}
    found = Network(("nccl", "gloo"), "2.27.3", variables, Probe("nccl", 4.2))
    assert values(sections.network(found, 2)) == {
        "backends": "nccl, gloo",
        "nccl": "2.27.3",
        "all-reduce": "two processes, nccl: 4.2 s",
        **variables,
    }


@pytest.mark.parametrize(
    ("place", "status"),
    [
        (Place("runs", "/r", 30 * GIB, writable=True), "ok"),
        (Place("runs", "/r", 5 * GIB, writable=True), "warning"),
        (Place("runs", "/r", GIB // 2, writable=True), "problem"),
        (Place("runs", "/r", 30 * GIB, writable=False), "problem"),
        (Place("data", "/d", 30 * GIB, writable=False), "warning"),
        (Place("temporary", "/tmp", 5 * GIB, writable=True), "ok"),
        (Place("hub cache", "/h", 30 * GIB, writable=False), "warning"),
        (Place("hub cache", "/h", GIB // 2, writable=True), "problem"),
    ],
)
def test_disk(place, status):
    (row,) = sections.disk((place,), None)
    assert (row.name, row.status, bool(row.remedy)) == (place.name, status, status != "ok")


def test_small_shared_memory_is_a_warning():
    section = sections.disk((), 64 * 2**20)
    assert (values(section), bad(section)) == (
        {"/dev/shm": "0.06 GiB"},
        [("/dev/shm", "warning")],
    )
    assert "--shm-size" in section[0].remedy


def test_environment():
    found = Environment({"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}, wandb_key=True)
    assert values(sections.surroundings(found, Hardware())) == {
        "HF_HOME": "not set",
        "HF_HUB_OFFLINE": "not set",
        "WANDB_MODE": "offline",
        "TORCH_EXTENSIONS_DIR": "not set",
        "DS_ACCELERATOR": "not set",
        "OMP_NUM_THREADS": "1",
        "home": "/home/you",
        "encoding": "terminal utf-8, file names utf-8",
        "W&B key": "there",
    }


@pytest.mark.parametrize(
    ("found", "expected", "remedy"),
    [
        (Environment(home=None, home_writable=False), ("home", "problem"), "set HOME to a folder"),
        (Environment(home="/", home_writable=False), ("home", "warning"), "set HOME to a folder"),
        (Environment(terminal="ascii"), ("encoding", "warning"), "set PYTHONUTF8=1"),
        (Environment(file_names="iso8859-1"), ("encoding", "warning"), "LC_ALL=C.UTF-8"),
    ],
)
def test_no_home_and_narrow_encodings_have_a_remedy(found, expected, remedy):
    section = sections.surroundings(found, Hardware())
    assert bad(section) == [expected]
    assert [remedy in row.remedy for row in section if row.status != "ok"] == [True]


def test_ranks_that_nobody_gave_are_a_problem():
    found = Network(("gloo",), left_over={"RANK": "3", "WORLD_SIZE": ""})
    section = sections.network(found, 0)
    assert bad(section) == [("RANK", "problem"), ("WORLD_SIZE", "problem")]
    assert values(section)["WORLD_SIZE"] == "empty"
    assert "`env -u RANK python train.py ...`" in section[-2].remedy


def test_a_master_elsewhere_is_a_warning():
    variables = {"MASTER_ADDR": "192.0.2.1"}
    found = Network(("gloo",), variables=variables, misplaced_master="192.0.2.1")
    assert bad(sections.network(found, 0)) == [("MASTER_ADDR", "warning")]


def test_this_machines_own_faults_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a user without an entry
    facts = doctor_facts.look(network=False)
    assert facts.network.left_over == {"RANK": "3"}
    assert facts.network.misplaced_master == "192.0.2.1"
    assert (facts.surroundings.home, facts.surroundings.home_writable) == (None, False)
    assert [p.path for p in facts.places if p.name == "hub cache"] == [str(tmp_path)]


def test_deepspeed_on_the_cpu_beside_gpus_and_old_locks_are_bad():
    found = Environment({"DS_ACCELERATOR": "cpu"}, locks={"/e/a/lock": 60.0, "/e/b/lock": 7200.0})
    section = sections.surroundings(found, Hardware((A100,)))
    assert bad(section) == [("DS_ACCELERATOR", "problem"), ("build lock", "warning")]
    assert [r.value for r in section if r.name == "build lock"] == [
        "/e/a/lock, 0.0 hours old",
        "/e/b/lock, 2.0 hours old",
    ]
    assert bad(sections.surroundings(changed(found, locks={}), Hardware())) == []


def test_extras_say_what_brings_them():
    extras = {"lora": (), "serve": ("fastapi>=0.115", "gradio<7,>=6")}
    assert sections.extras(changed(PACKAGES, extras=extras)) == [
        Row("lora", "installed"),
        Row(
            "serve",
            "lacks fastapi>=0.115, gradio<7,>=6",
            remedy='pip install "vipllava-lightning[serve]"',
        ),
    ]


def test_every_feature_of_the_project_is_among_the_extras():
    extras = doctor_facts.look_at_packages().extras
    assert {"deepspeed", "flash", "lora", "quant", "wandb", "slurm"} <= set(extras)
    assert not {"dev", "all", "browser"} & set(extras)


def test_an_extra_lacks_what_the_extras_it_names_lack(monkeypatch, tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\ndependencies = ["torch>=999", "rich"]\n[project.optional-dependencies]\n'
        'few = ["vipllava-lightning[other]", "not-there>=2"]\nother = ["also-not-there", "rich"]\n'
    )
    monkeypatch.setattr(doctor_facts, "_PYPROJECT", project)
    packages = doctor_facts.look_at_packages()
    assert packages.extras == {
        "few": ("also-not-there", "not-there>=2"),
        "other": ("also-not-there",),
    }
    assert packages.unfit == {"torch>=999": packages.versions["torch"]}


def test_an_installed_package_knows_its_extras(monkeypatch, tmp_path):
    metadata = Message()
    metadata["Provides-Extra"] = "lora"
    metadata["Provides-Extra"] = "quant"
    metadata["Requires-Dist"] = "torch>=2.11"
    metadata["Requires-Dist"] = 'peft>=0.18; extra == "lora"'
    metadata["Requires-Dist"] = 'vipllava-lightning[lora]; extra == "quant"'
    monkeypatch.setattr(doctor_facts, "_PYPROJECT", tmp_path / "none")
    monkeypatch.setattr(doctor_facts.importlib.metadata, "metadata", lambda name: metadata)
    found = doctor_facts.project_requirements()
    assert {name: [str(r) for r in group] for name, group in found.items()} == {
        "": ["torch>=2.11"],
        "lora": ["peft>=0.18"],
        "quant": ["vipllava-lightning[lora]"],
    }


def test_what_cannot_be_imported_is_told(monkeypatch):
    def refuse(name):
        raise OSError(f"{name}: libcudart is not there\nsecond line")

    monkeypatch.setattr(doctor_facts, "import_module", refuse)
    facts = doctor_facts.look(network=False)
    assert facts.packages.import_errors["torch"] == "OSError: torch: libcudart is not there"
    assert (facts.devices.hardware, facts.network) == (Hardware(), Network(()))
    assert bad(sections.sections(facts)["Versions"])[0] == ("torch", "problem")


def test_a_place_that_is_not_there_is_that_of_the_folder_above(tmp_path):
    place = doctor_facts.look_at_place("runs", tmp_path / "not" / "yet")
    assert (place.path, place.writable) == (str(tmp_path / "not" / "yet"), True)
    assert place.free > 0


def test_locks_are_found_with_their_age(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, time.time() - 7200))
    (found,) = doctor_facts.look_at_surroundings().locks.items()
    assert found[0] == str(lock)
    assert 7199 < found[1] < 7300


def test_two_processes_that_fail_or_hang_are_told_and_ended(monkeypatch, tmp_path):
    started: list[subprocess.Popen] = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr("vipllava.commands.network_probe.subprocess.Popen", Recorded)
    script = tmp_path / "script.py"
    sleep = "import sys, time\nif sys.argv[1] == {!r}: sys.exit('no route')\ntime.sleep(99)"
    script.write_text(sleep.format("1"))
    assert probe_network("gloo", 30.0, script=script).error == "no route"
    script.write_text(sleep.format("nobody"))
    assert probe_network("gloo", 0.2, script=script).error == "no answer within 0.2 s"
    assert [child.returncode for child in started] == [-9, 1, -9, -9]


@pytest.mark.parametrize(
    ("facts", "code", "last"),
    [
        (FACTS, 0, ["nothing is wrong"]),
        (
            changed(FACTS, places=(Place("runs", "/r", 5 * GIB, writable=True),), shm=None),
            0,
            [
                "warning: Disk, runs: /r: 5.0 GiB free",
                "  -> free some, or name another folder (paths.*, HF_HOME, TMPDIR); "
                "`preflight=true` says what a job writes",
            ],
        ),
        (
            changed(FACTS, packages=changed(PACKAGES, unfit={"rich>=14": None})),
            1,
            ["problem: Versions, rich>=14: not installed", '  -> pip install "rich>=14"'],
        ),
    ],
)
def test_the_end_names_what_is_bad_and_the_exit_code_follows(
    monkeypatch, capsys, facts, code, last
):
    monkeypatch.setattr(doctor_facts, "look", lambda *, network: facts)
    assert cli.main(["doctor"]) == code
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[-len(last) :] == last
    assert "\x1b" not in out
    assert [line for line in lines if line.startswith("Extras")]


def test_this_machine(capsys, monkeypatch, tmp_path):
    """The whole command for real: gloo between two processes where no two CUDA devices are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "a-key-nobody-may-see")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    code = cli.main(["doctor", "--json"])
    out = capsys.readouterr().out
    report = json.loads(out)
    assert code == (1 if report["status"] == "problem" else 0)
    assert list(report["sections"]) == [
        "Versions",
        "Devices",
        "Attention",
        "Processes",
        "Disk",
        "Environment",
        "Extras",
    ]
    found = {
        title: {row["name"]: row["value"] for row in rows}
        for title, rows in report["sections"].items()
    }
    assert [v for v in found["Attention"].values() if v == "chosen"] == ["chosen"]
    assert found["Processes"]["all-reduce"].startswith("two processes, ")
    assert found["Processes"]["all-reduce"].endswith(" s")
    assert found["Processes"]["NCCL_DEBUG"] == "WARN"
    assert found["Environment"]["W&B key"] == "there"
    assert found["Disk"]["runs"].startswith(str(Path.cwd() / "runs"))
    assert "a-key-nobody-may-see" not in out


def test_the_network_can_be_left_out(monkeypatch):
    monkeypatch.setattr("vipllava.commands.network_probe.probe_network", lambda *_: 1 / 0)
    assert doctor_facts.look(network=False).network.probe is None
