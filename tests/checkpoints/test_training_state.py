"""Weights out of training checkpoints; tests/training/test_sharded.py reads real sharded ones."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from vipllava.checkpoints.convert import convert
from vipllava.checkpoints.loading import build_model, open_source
from vipllava.checkpoints.plain_pickles import MetadataUnpickler, plain_values_only
from vipllava.checkpoints.training_state import (
    INDEX,
    Part,
    Shared,
    find_damage,
    read_training_state,
    write_index,
    write_part,
    write_shared,
)
from vipllava.models.tensor_files import dtype_of, read_tensor, shape_of
from vipllava.types import CheckpointError

PROJECTOR = "model.multi_modal_projector.linear_1.weight"


class _Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def ran(tmp_path) -> Path:
    """Is there if code in a pickle was run."""
    return tmp_path / "code_was_run"


def _save(path: Path, **state: torch.Tensor) -> Path:
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, path)
    return path


def test_what_trained_lies_over_what_training_began_with(make_spec, make_export, tmp_path):
    export = make_export()
    changed = torch.full((32, 96), 0.5)
    path = _save(tmp_path / "last.ckpt", **{PROJECTOR: changed})

    assert {n: tuple(t.shape) for n, t in read_training_state(path).items()} == {
        "multi_modal_projector.linear_1.weight": (32, 96)
    }
    done = convert(str(path), tmp_path / "hf", base=str(export))
    assert done.kind == "training_state"
    after, before = (open_source(str(f)).tensors for f in (tmp_path / "hf", export))
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        is_changed = name == "multi_modal_projector.linear_1.weight"
        expected = changed if is_changed else read_tensor(before[name])
        assert torch.equal(read_tensor(tensor), expected), name


def test_every_weight_of_a_network_has_its_name(make_spec, tmp_path):
    model = build_model(make_spec())
    path = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {f"model.{n}": t for n, t in model.state_dict().items()}}, path)
    assert len(read_training_state(path)) == len(model.state_dict())


def test_it_needs_what_the_run_started_from(tmp_path):
    path = _save(tmp_path / "last.ckpt", **{PROJECTOR: torch.ones(2)})
    with pytest.raises(CheckpointError, match="needs what the run started from under it: pass"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model.language_model.layers.0.lora_A.default.weight": torch.ones(2)}, "holds adapters"),
        ({"optimizer.weight": torch.ones(2)}, "which is no weight of a VipLlava"),
        ({}, "holds no weights"),
    ],
)
def test_other_states(tmp_path, state, message):
    with pytest.raises(CheckpointError, match=message):
        read_training_state(_save(tmp_path / "last.ckpt", **state))


def test_a_file_that_is_no_checkpoint(tmp_path):
    path = _save(tmp_path / "last.ckpt", **{PROJECTOR: torch.ones(200, 200)})
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="it is cut short, or holds code"):
        read_training_state(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(CheckpointError, match="has no state_dict"):
        read_training_state(path)


def test_code_in_lightnings_file_is_not_run(tmp_path, ran):
    torch.save({"state_dict": {}, "callbacks": _Code(ran)}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="holds code, which is not run"):
        read_training_state(tmp_path / "last.ckpt")
    assert not ran.exists()


def test_code_in_the_index_of_a_distributed_checkpoint_is_not_run(tmp_path, ran):
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / ".metadata").write_bytes(pickle.dumps(_Code(ran)))
    with pytest.raises(CheckpointError, match="cannot be read as a distributed checkpoint"):
        read_training_state(tmp_path / "step")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["mkdir", "os.mkdir"])
def test_code_by_way_of_an_allowed_module_is_not_run(tmp_path, name):
    """torch itself imports os: a pickle may ask for torch.os.mkdir."""
    (tmp_path / "step").mkdir()
    stolen = f"\x80\x04\x8c\x05torch\x8c{chr(len(name))}{name}\x93.".encode("latin-1")
    (tmp_path / "step" / ".metadata").write_bytes(stolen)
    with pytest.raises(CheckpointError, match="cannot be read as a distributed checkpoint"):
        read_training_state(tmp_path / "step")


class _AsEarlyReleasesDo:
    """Pickles as Python 3.11.2 pickles the member of an enum."""

    def __init__(self, owner: object, name: str) -> None:
        self.call = (owner, name)

    def __reduce__(self):
        return getattr, self.call


def test_getattr_reaches_members_of_enums_only(tmp_path):
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    pytest.importorskip("deepspeed")
    member = _AsEarlyReleasesDo(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT")
    read = MetadataUnpickler(io.BytesIO(pickle.dumps(member))).load()
    assert read is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    for owner, name in ((_MEM_FORMAT_ENCODING, "mro"), (torch.Size, "count")):
        stolen = pickle.dumps(_AsEarlyReleasesDo(owner, name))
        with pytest.raises(pickle.UnpicklingError, match="is no plain value"):
            MetadataUnpickler(io.BytesIO(stolen)).load()

    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save(_AsEarlyReleasesDo(ZeroStageEnum, "weights"), tmp_path / "stage.pt")
    with plain_values_only():
        assert torch.load(tmp_path / "stage.pt") is ZeroStageEnum.weights
    torch.save(_AsEarlyReleasesDo(torch.Size, "count"), tmp_path / "stolen.pt")
    with plain_values_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "stolen.pt")


def test_code_in_deepspeeds_files_is_not_run(tmp_path, ran):
    pytest.importorskip("deepspeed")
    folder = tmp_path / "step" / "checkpoint"
    folder.mkdir(parents=True)
    state = {"ds_version": "0.19.8", "buffer_names": [], "module": {}, "other": _Code(ran)}
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    torch.save({}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match="holds code, or something else that is no plain"):
        read_training_state(tmp_path / "step")
    assert not ran.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_folder_of_something_else(tmp_path):
    pytest.importorskip("deepspeed")
    (tmp_path / "step").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint of DeepSpeed"):
        read_training_state(tmp_path / "step")


def _cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def _distributed(folder: Path) -> Path:
    from torch.distributed.checkpoint.state_dict_saver import save

    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        save({PROJECTOR: torch.ones(200, 200)}, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 3}, folder / "meta.pt")
    return folder


def _parts(folder: Path) -> Path:
    """A weight of 96 x 100 on two processes, one of which has a third of it."""
    folder.mkdir()
    whole = torch.arange(9600.0)
    sizes = write_shared(folder, Shared({"global_step": 3}, {PROJECTOR: [96, 100]}, {}, {}))
    for rank, (start, stop) in enumerate([(0, 3200), (3200, 9600)]):
        part = Part(start, {"fp32": whole[start:stop], "exp_avg": whole[start:stop]})
        sizes |= write_part(folder, rank, {PROJECTOR: part})
    write_index(folder, sizes)
    return folder


def test_damage_of_a_file(tmp_path):
    path = _save(tmp_path / "000003.ckpt", **{PROJECTOR: torch.ones(200, 200)})
    assert find_damage(path) is None
    _cut(path, 5000)
    assert (find_damage(path) or "").startswith("000003.ckpt is empty or cut short")
    _cut(path, 0)
    assert (find_damage(path) or "").startswith("000003.ckpt is empty or cut short")
    path.unlink()
    assert find_damage(path) == "000003.ckpt is missing"


@pytest.mark.parametrize(
    ("make", "shards"), [(_distributed, "__0_0.distcp"), (_parts, "rank-00001.pt")]
)
def test_damage_of_a_folder(tmp_path, make, shards):
    path = make(tmp_path / "000003.ckpt")
    assert find_damage(path) is None
    size = (path / shards).stat().st_size
    meta = (path / "meta.pt").read_bytes()
    (path / "meta.pt").write_bytes(meta[:100])
    assert (find_damage(path) or "").startswith("meta.pt ")
    (path / "meta.pt").unlink()
    assert find_damage(path) == "meta.pt is missing"
    (path / "meta.pt").write_bytes(meta)
    _cut(path / shards, 5000)
    assert find_damage(path) == f"{shards} has 5000 bytes of {size}"
    (path / shards).unlink()
    assert find_damage(path) == f"{shards} is missing"


@pytest.mark.parametrize(("make", "index"), [(_distributed, ".metadata"), (_parts, INDEX)])
def test_damage_of_an_index(tmp_path, make, index):
    path = make(tmp_path / "000003.ckpt")
    _cut(path / index, 20)
    assert (find_damage(path) or "").startswith(f"its index {index} cannot be read")
    (path / index).unlink()
    assert (find_damage(path) or "").startswith("it has no index of its files")


def test_a_weight_is_put_together_from_its_parts(tmp_path):
    path = _parts(tmp_path / "000003.ckpt")
    (name, lazy), *others = read_training_state(path).items()
    assert others == []
    assert name == "multi_modal_projector.linear_1.weight"
    assert (shape_of(lazy), dtype_of(lazy)) == ((96, 100), torch.float32)
    assert torch.equal(read_tensor(lazy), torch.arange(9600.0).view(96, 100))


def test_parts_that_do_not_belong_together(tmp_path):
    path = _parts(tmp_path / "000003.ckpt")
    part = Part(3200, {"fp32": torch.ones(3200), "exp_avg": torch.ones(3200)})
    sizes = {file.name: 0 for file in path.iterdir() if file.suffix == ".pt"}
    write_index(path, sizes | write_part(path, 1, {PROJECTOR: part}))
    (lazy,) = read_training_state(path).values()
    with pytest.raises(CheckpointError, match=r"hold 6400 of 9600 elements of .*linear_1"):
        read_tensor(lazy)


@pytest.mark.parametrize("file", ["rank-00001.pt", "meta.pt"])
def test_a_folder_that_lacks_a_file_names_it(tmp_path, file):
    path = _parts(tmp_path / "000003.ckpt")
    _cut(path / file, 100)
    with pytest.raises(CheckpointError, match=rf"000003.ckpt .*{file} has 100 bytes of"):
        read_training_state(path)
    (path / file).unlink()
    with pytest.raises(CheckpointError, match=rf"000003.ckpt .*{file} is missing"):
        read_training_state(path)


@pytest.mark.parametrize("file", ["rank-00001.pt", "meta.pt"])
def test_code_in_parts_is_not_run(tmp_path, ran, file):
    path = _parts(tmp_path / "000003.ckpt")
    torch.save({"parts": _Code(ran)}, path / file)
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.suffix == ".pt"}
    write_index(path, sizes)
    with pytest.raises(CheckpointError, match=rf"{file} cannot be read .*code, which is not run"):
        read_training_state(path)
    assert not ran.exists()


def test_looking_for_damage_runs_no_code(tmp_path, ran):
    path = _distributed(tmp_path / "000003.ckpt")
    (path / ".metadata").write_bytes(pickle.dumps(_Code(ran)))
    assert "is no plain value" in (find_damage(path) or "")
    assert not ran.exists()


def test_a_shard_that_is_cut_short_is_a_readable_error(tmp_path):
    """PyTorch's own error of it is no Exception."""
    path = _distributed(tmp_path / "000003.ckpt")
    (shard,) = path.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="cannot be read as a distributed checkpoint"):
        read_training_state(path)
