"""What a user reads for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from vipllava.config.checks import check_config, find_problems
from vipllava.config.composing import compose_job
from vipllava.config.hardware import Hardware
from vipllava.types import ConfigError


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with manifests and the exports that stages start from."""
    monkeypatch.chdir(tmp_path)
    manifests = tmp_path / "data_manifests"
    manifests.mkdir()
    for name in ("sample_pretrain", "sample_finetune", "sample_regions", "llava_pretrain_558k"):
        (manifests / f"{name}.yaml").touch()
    (tmp_path / "runs" / "tiny-pretrain" / "export").mkdir(parents=True)
    return tmp_path


def problems(*overrides: str, machine: Hardware | None = None, name: str = "train") -> list[str]:
    return find_problems(compose_job(list(overrides), config_name=name), machine)


def test_default_job_has_none(machines: dict[str, Hardware]):
    for machine in machines.values():
        assert problems(machine=machine) == []
    check_config(compose_job(["stage=finetune"]))


def test_all_problems_come_at_once():
    cfg = compose_job(
        ["seed=-1", "stage.learning_rate=fast", "data.manifest=sample_pretrian", "trainer=8xa100"]
    )
    with pytest.raises(ConfigError) as error:
        check_config(cfg)
    assert str(error.value).splitlines() == [
        "this configuration cannot run: 4 problems",
        "  - seed=-1: expected a whole number of at least 0",
        "  - stage.learning_rate=fast: expected a number above 0",
        "  - data.manifest=sample_pretrian: unknown (did you mean sample_pretrain?); known: "
        "llava_pretrain_558k, sample_finetune, sample_pretrain, sample_regions",
        "  - trainer=8xa100 wants 8 CUDA devices with 80 GB; this machine has 0 CUDA devices; use "
        "trainer=auto, or another of conf/trainer",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+stage.learning_rte=1", "stage.learning_rte: no such key (did you mean learning_rate?)"),
        ("+stagee=1", "stagee: no such key (did you mean stage?)"),
        ("~stage.epochs", "stage.epochs is missing; expected a whole number of at least 1"),
        ("stage.epochs=0.5", "stage.epochs=0.5: expected a whole number of at least 1"),
        ("stage.learning_rate=nan", "stage.learning_rate=nan: expected a number above 0"),
        ("stage.learning_rate=true", "stage.learning_rate=true: expected a number above 0"),
        ("stage.learning_rate=null", "stage.learning_rate=null: expected a number above 0"),
        ("stage.gradient_clip=0", "stage.gradient_clip=0: expected a number above 0"),
        ("stage.warmup_ratio=3", "stage.warmup_ratio=3: expected a number from 0 to below 1"),
        ("stage.supervised_share=1.01", "=1.01: expected a number above 0 and up to 1"),
        ("machine.mfu=0", "machine.mfu=0: expected a number above 0 and up to 1"),
        ("stage.betas=[0.9]", "stage.betas=[0.9]: expected a list of 2 items"),
        ("stage.trainable=[]", "stage.trainable=[]: expected a list of at least one of"),
        ("stage.trainable=[projectr]", "stage.trainable=['projectr']: expected a list of"),
        ("stage.chat_template=vicuna", "expected one of plain, llava_v1, llama_3, phi_3"),
        ("stage.image_aspect=crop", "stage.image_aspect=crop: expected one of square, pad"),
        ("stage.schedule=linear", "stage.schedule=linear: expected one of cosine, constant"),
        ("trainer.precision=fp16", "trainer.precision=fp16: expected one of 32-true, bf16-mixed"),
        ("trainer.devices=0", "trainer.devices=0: expected a whole number of at least 1"),
        ("stage.name=null", "stage.name=null: expected a text"),
        ("name=${nothing}", "name: Interpolation key 'nothing' not found"),
    ],
)
def test_keys_and_values(override: str, message: str):
    found = problems(override)
    assert any(message in problem for problem in found), found


def test_the_greatest_number_is_allowed():
    allowed = ("stage.supervised_share=1", "machine.mfu=1.0", "data.max_fault_rate=1")
    assert problems(*allowed) == []


def test_experiment_files_with_misspelt_keys(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nstage:\n  learning_rte: 1.0\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    cfg = compose_job([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"])
    assert [p.split(";")[0] for p in find_problems(cfg)] == [
        "stage.learning_rte: no such key (did you mean learning_rate?)"
    ]


def test_global_batch_that_does_not_divide():
    assert problems("stage.global_batch_size=100", "machine.micro_batch_size=8") == [
        "stage.global_batch_size=100 is not a multiple of machine.micro_batch_size=8 x "
        "trainer.devices=1 x trainer.num_nodes=1 = 8; nearest global batch sizes that are: 96, "
        "104; or keep it with machine.micro_batch_size=5 or 10"
    ]


def test_accumulation_that_contradicts_the_global_batch():
    assert problems("trainer.accumulate_grad_batches=3") == [
        "machine.micro_batch_size=32 x trainer.accumulate_grad_batches=3 x trainer.devices=1 x "
        "trainer.num_nodes=1 = 96, not stage.global_batch_size=64; leave "
        "trainer.accumulate_grad_batches out, it is computed"
    ]


def test_task_without_data():
    (found,) = problems("stage=task", "model=7b", "trainer=cpu")
    assert found == (
        "data.manifest is not set: stage=task trains on data of your own; pass data.manifest=NAME "
        "(llava_pretrain_558k, sample_finetune, sample_pretrain, sample_regions) or the path of a "
        "manifest file"
    )


def test_manifest_files(project: Path):
    assert problems("data.manifest=mine.yaml") == ["data.manifest=mine.yaml: there is no such file"]
    (project / "mine.yaml").touch()
    assert problems("data.manifest=mine.yaml") == []
    assert "holds no manifests" in problems("paths.manifests=elsewhere")[0]


@pytest.mark.parametrize(
    "source", ["./nope", "/nope", "a/b/c", "runs/nope", "notes/nope", "last.ckpt", "~/nope"]
)
def test_a_checkpoint_that_is_nowhere(project: Path, source: str):
    (project / "notes").mkdir()
    job = "paths.runs=elsewhere", "stage=finetune", f"stage.checkpoint='{source}'"
    missing = f"{source}: no such file or folder in {project}"
    assert problems(*job) == [f"stage.checkpoint={missing}"]
    assert problems(f"checkpoint='{source}'", "paths.runs=elsewhere", name="evaluate") == [
        f"checkpoint={missing}"
    ]


def test_a_checkpoint_may_be_a_file_or_an_id(project: Path):
    file = project / "runs" / "tiny-pretrain" / "mm_projector.bin"
    file.touch()
    for source in (f"runs/tiny-pretrain/{file.name}", "llava-hf/vip-llava-7b-hf", "gpt2"):
        assert problems("stage=finetune", f"stage.checkpoint={source}") == []


def test_a_stage_before_its_predecessor():
    (found,) = problems("stage=gpt4v", "data.manifest=sample_finetune")
    assert found == (
        "stage=gpt4v starts from runs/tiny-finetune/export, which is not there; run the stage "
        "before it or pass stage.checkpoint=FOLDER"
    )
    assert problems("stage=gpt4v", "data.manifest=sample_finetune", "stage.checkpoint=a/b") == []


@pytest.mark.parametrize(
    ("job", "machine", "message"),
    [
        ("trainer=8xa100", "2xt4", "wants 8 CUDA devices with 80 GB; this machine has 2 CUDA"),
        ("trainer=8xa100", "8xa100_40g", "this machine has 8 CUDA devices (A100 39 GiB, A100"),
        ("trainer=1gpu", "laptop", "trainer=1gpu wants 1 CUDA device; this machine has 0"),
        ("trainer=1gpu", "mac", "0 CUDA devices (Apple MPS is there); use trainer=auto"),
        ("trainer.devices=4", "2xt4", "trainer=auto wants 4 CUDA devices; this machine has 2"),
        ("trainer.accelerator=mps", "laptop", "this machine has no Apple MPS"),
        (
            "trainer.accelerator=mps trainer.devices=2",
            "mac",
            "trainer.devices=2: Apple MPS is one device",
        ),
        ("trainer=multinode", "8xa100", "start the job on every node with torchrun, or with srun"),
        ("trainer=1gpu trainer.precision=bf16-mixed", "8xv100", "7.0 have no bf16"),
        ("trainer=8xv100 trainer.precision=bf16-mixed", "laptop", "7.0 have no bf16"),
        (
            "trainer=8xv100 stage=finetune tuning=qlora tuning.quantization.compute_dtype=bfloat16",
            "8xv100",
            "tuning.quantization.compute_dtype=bfloat16: devices of compute capability 7.0 have no",
        ),
        ("guard.spike_floor=-1", "laptop", "guard.spike_floor=-1: expected a number of at least 0"),
        ("trainer.precision=16-mixed", "laptop", "trainer.precision=16-mixed needs CUDA devices"),
        (
            "trainer=8xv100 strategy=fsdp2",
            "8xv100",
            "strategy=fsdp2 does not work with trainer.precision=16-mixed",
        ),
        ("strategy=zero2", "laptop", "strategy=zero2 needs CUDA devices; this machine has 0 CUDA"),
        (
            "trainer=cpu strategy=zero3",
            "8xa100",
            "strategy=zero3 needs CUDA devices; trainer.accelerator=cpu",
        ),
        (
            "strategy=zero2",
            "2xt4",
            'needs deepspeed, which is not installed: pip install "vipllava-lightning[deepspeed]"',
        ),
        (
            "strategy=zero2 trainer.precision=32-true",
            "8xa100",
            "trainer.precision=32-true is not that; use bf16-mixed or 16-mixed",
        ),
        (
            "trainer=1gpu machine.attn_implementation=flash_attention_2",
            "2xt4",
            'not installed: pip install "vipllava-lightning[flash]", or use sdpa',
        ),
        (
            "machine.attn_implementation=flash_attention_2",
            "8xv100",
            "7.0 cannot run it, it needs 8.0 or more; use sdpa",
        ),
        (
            "machine.attn_implementation=flash_attention_3",
            "8xa100",
            "8.0 cannot run it, it needs 9.0; use sdpa",
        ),
        (
            "machine.attn_implementation=flash_attention_4",
            "2xt4",
            "not installed: pip install --pre flash-attn-4, or use sdpa",
        ),
        (
            "machine.attn_implementation=torch_varlen trainer.precision=32-true",
            "8xa100",
            "torch_varlen: computes in bf16 or fp16 only, not in 32-true; use sdpa",
        ),
        (
            "trainer=cpu machine.attn_implementation=torch_varlen",
            "8xa100",
            "torch_varlen: needs CUDA devices; use sdpa",
        ),
        (
            "machine.attn_implementation=flash_attention_5",
            "8xa100",
            "machine.attn_implementation=flash_attention_5: expected one of sdpa, eager,",
        ),
        ("machine.attn_implementation=flash_attention_2", "laptop", "needs CUDA devices; use sdpa"),
        (
            "model.spec.attn_implementation=flash_attention_2",
            "8xv100",
            "model.spec.attn_implementation=flash_attention_2: devices of compute capability 7.0",
        ),
        (
            "machine.attn_implementation=flash_attention_2 trainer.precision=32-true",
            "8xa100",
            "computes in bf16 or fp16 only",
        ),
        (
            "stage=finetune tuning=lora stage.trainable=[projector,language_model,vision_tower]",
            "8xa100",
            "trains adapters and the projector only",
        ),
        (
            "stage=finetune tuning=qlora strategy=zero3",
            "8xa100",
            "weights in 4 bits cannot be sharded here; use strategy=ddp",
        ),
        ("stage=finetune tuning=lora", "laptop", "needs peft, which is not installed: pip install"),
        (
            "stage=finetune tuning=qlora",
            "laptop",
            'needs bitsandbytes, which is not installed: pip install "vipllava-lightning[quant]"',
        ),
        ("machine.compile=true", "8xa100", "pass data=packed, whose rows have one length"),
        (
            "machine.compile=true data=packed strategy=zero3",
            "8xa100",
            "use strategy=zero2, fsdp2 or ddp",
        ),
        (
            "machine.compile=true data=packed stage=finetune tuning=qlora",
            "8xa100",
            "torch.compile cannot follow; use tuning=lora",
        ),
        ("stage.gradient_checkpointing=some", "8xa100", "expected auto, true, false or how many"),
        ("tuning=lora", "8xa100", "which stage=pretrain leaves frozen; use tuning=full"),
        ("logger=wandb", "laptop", "logger=wandb needs wandb, which is not installed"),
        ("logger=tensorboard", "laptop", 'pip install "vipllava-lightning[tensorboard]"'),
    ],
)
def test_machine_and_combinations(
    job: str, machine: str, message: str, machines: dict[str, Hardware]
):
    found = problems(*job.split(), machine=machines[machine])
    assert any(message in problem for problem in found), found


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without any key of W&B's."""
    for name in (
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_BASE_URL",
        "NETRC",
        "RANK",
        "LOCAL_RANK",
        "NODE_RANK",
        "SLURM_PROCID",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


WITH_WANDB = Hardware(num_cpus=8, installed=frozenset({"wandb"}))


def test_wandb_without_a_key_is_said_before_anything_is_loaded(nobody: Path):
    assert problems("logger=wandb", machine=WITH_WANDB) == [
        "logger=wandb has no key for api.wandb.ai: run `wandb login`, set WANDB_API_KEY, or set "
        "WANDB_MODE=offline and upload later with `wandb sync`"
    ]
    assert problems("logger=csv", machine=WITH_WANDB) == []
    assert problems("logger=wandb", "logger.wandb=null", machine=WITH_WANDB) == []
    assert problems("logger=wandb", "logger.wandb.offline=true", machine=WITH_WANDB) == []


@pytest.mark.parametrize(
    ("variable", "value", "fine"),
    [
        ("WANDB_API_KEY", "x" * 40, True),
        ("WANDB_MODE", "offline", True),
        ("WANDB_MODE", "disabled", True),
        ("WANDB_MODE", "online", False),
        ("LOCAL_RANK", "1", True),
        ("LOCAL_RANK", "0", False),
    ],
)
def test_variables_of_wandb(
    nobody: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, fine: bool
):
    monkeypatch.setenv(variable, value)
    found = problems("logger=wandb", machine=WITH_WANDB)
    assert any("no key" in problem for problem in found) is not fine


@pytest.mark.parametrize("host", ["api.wandb.ai", "api.forge.coreweave.com"])
def test_a_netrc_entry_of_the_right_host_is_a_key(
    nobody: Path, monkeypatch: pytest.MonkeyPatch, host: str
):
    entry = nobody / ".netrc"
    secret = "login user\n  password secret\n"
    entry.write_text(f"machine {host}\n  {secret}")
    entry.chmod(0o600)
    assert problems("logger=wandb", machine=WITH_WANDB) == []
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    (found,) = problems("logger=wandb", machine=WITH_WANDB)
    assert found.startswith("logger=wandb has no key for wandb.example.org: ")
    for own in ("wandb.example.org", "wandb.example.org:8080"):  # by the client's version
        entry.write_text(f"machine {own}\n  {secret}")
        assert problems("logger=wandb", machine=WITH_WANDB) == []


@pytest.mark.parametrize("key", ["abc", "x" * 39, "x" * 39 + " "])
def test_a_key_of_wandb_that_is_none(nobody: Path, monkeypatch: pytest.MonkeyPatch, key: str):
    monkeypatch.setenv("WANDB_API_KEY", key)
    (found,) = problems("logger=wandb", machine=WITH_WANDB)
    assert found.startswith(f"WANDB_API_KEY has {len(key)} characters and is no key of W&B")
    assert "WANDB_MODE=offline" in found
    assert problems("logger=wandb", "logger.wandb.mode=offline", machine=WITH_WANDB) == []
    for whole in ("x" * 86, "local-" + "x" * 40, "head.pay-load.sig_n"):
        monkeypatch.setenv("WANDB_API_KEY", whole)
        assert problems("logger=wandb", machine=WITH_WANDB) == []


def test_checkpoints_are_not_uploaded_by_wandb(nobody: Path):
    job = "logger=wandb", "logger.wandb.offline=true", "logger.wandb.log_model=all"
    assert problems(*job, machine=WITH_WANDB) == [
        "logger.wandb.log_model: checkpoints are not uploaded during a run; do it afterwards with "
        "`wandb artifact put --type model RUN_DIR/export`"
    ]


def test_intervals_of_callbacks():
    assert problems("callbacks.samples.every_n_steps=0", "callbacks.throughput=null") == [
        "callbacks.samples.every_n_steps=0: expected a whole number of at least 1"
    ]
    assert problems("callbacks.samples=null") == []


def test_fsdp2_without_cuda_is_fine():
    assert problems("strategy=fsdp2", "trainer=cpu", "trainer.devices=2") == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "checkpoint=runs/nothing",
            "checkpoint=runs/nothing: no such file or folder; train first or",
        ),
        ("bench.manifest=sample_region", "unknown (did you mean sample_regions?); known:"),
        ("batch_size=0", "batch_size=0: expected a whole number of at least 1"),
        ("device=cuda:1", "device=cuda:1: this machine has 0 CUDA devices; use device=auto"),
        ("device=tpu", "device=tpu: expected auto, cpu, cuda, cuda:N or mps"),
        ("limit=0", "limit=0: expected a whole number of at least 1"),
        ("attn_implementation=flash_attention_2", "needs flash_attn, which is not installed"),
        ("attn_implementation=torch_varlen", "attn_implementation=torch_varlen: expected one of"),
    ],
)
def test_evaluation(override: str, message: str):
    found = problems("checkpoint=runs/tiny-pretrain/export", override, name="evaluate")
    assert [p for p in found if message in p], found


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_data_root_that_is_named_has_to_be_there(tmp_path, name):
    """Sample data would be made in a mistyped one."""
    job = {"train": ["stage=pretrain"], "evaluate": ["checkpoint=a/b"]}[name]
    for root in ("data", "s3://bucket/data", str(tmp_path)):
        assert problems(*job, f"paths.data_root={root}", name=name) == []
    assert problems(*job, f"paths.data_root={tmp_path}/dtaa", name=name) == [
        f"paths.data_root={tmp_path}/dtaa: no such folder; make it, or name the one that has the "
        "data"
    ]


def test_a_checkpoint_among_the_runs_may_be_a_file(tmp_path):
    runs = f"paths.runs={tmp_path}"
    (tmp_path / "mm_projector.bin").touch()
    file = tmp_path / "mm_projector.bin"
    assert problems("stage=finetune", runs, f"stage.checkpoint={file}") == []
    assert problems(runs, f"checkpoint={file}", name="evaluate") == []


def test_sound_evaluation(machines: dict[str, Hardware]):
    job = ("checkpoint=runs/tiny-pretrain/export", "marks=[kept,removed]", "device=cuda:7")
    assert problems(*job, name="evaluate", machine=machines["8xa100"]) == []
