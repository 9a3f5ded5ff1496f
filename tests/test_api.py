"""``import vipllava as vl``: cheap, complete, and every example of docs/api.md as it stands there.

Only the published models are replaced, by tiny ones.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import griffe
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import vipllava as vl
from tests.tiny_model import tiny_spec
from tests.toy_data import encode_picture, lying_sample, make_manifest, said, toy_samples
from vipllava import records
from vipllava.checkpoints.export_meta import ExportMeta
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.evaluation import benches
from vipllava.report.inspected import RefusedSample
from vipllava.shards.tars import write_shards
from vipllava.types import ConfigError, RecordError, VipLlavaError
from vipllava.visual_prompts.mark_fields import parse_marks

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS: list[str] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
BOXES = [(20, 20, 120, 110), (150, 40, 300, 200)]
MANIFEST = {"schema_version": 2, "name": "my_data", "stage": "task", "licence": "mine"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image, ten samples and their manifest, in the current folder."""
    (tmp_path / "kitchen.jpg").write_bytes(encode_picture(320, 240))
    write_shards(toy_samples(10), tmp_path / "data" / "my_data", max_samples=4)
    manifest = MANIFEST | {"shards": "my_data/*.tar"}
    (tmp_path / "my_data.yaml").write_text(yaml.safe_dump(manifest))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(tiny_sources: Any) -> vl.ModelSpec:
    return tiny_spec(tiny_sources)


def test_nothing_heavy_is_imported_before_it_is_used():
    script = (
        "import sys, vipllava as vl\n"
        "assert not [name for name in sys.modules if name.startswith('vipllava.')]\n"
        "assert 'open_stream' in dir(vl) and 'draw' in vl.__all__\n"
        "vl.Request, vl.Region, vl.register_bench, vl.POLICIES, vl.draw, vl.Mask, vl.connect\n"
        "heavy = {'torch', 'lightning', 'transformers', 'hydra', 'openai'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_name_is_there_and_no_other():
    assert sorted(vl._HOMES) == sorted(vl.__all__)
    assert all(getattr(vl, name) is not None for name in vl.__all__)
    with pytest.raises(AttributeError, match="module `vipllava` has no attribute `open_datasets`"):
        _ = vl.open_datasets  # pyright: ignore[reportAttributeAccessIssue]


def test_the_examples_of_the_page(
    place: Path,
    model: vl.ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(benches, "BENCHES", dict(benches.BENCHES))
    known_kinds = set(records.KINDS)
    tokenizer = load_tokenizer(model)
    network = build_model(model, tokenizer, seed=1)
    meta = ExportMeta(
        stage="gpt4v", chat_template="llava_v1", image_aspect="pad", image_size=28,
        image_seq_length=4, feature_layers=model.feature_layers,
        vision_tower=model.vision_tower, language_model=model.language_model,
    )  # fmt: skip
    save_export(network, tokenizer, place / "export", meta)
    replaced = {
        "openai/clip-vit-large-patch14-336": model.vision_tower,
        "lmsys/vicuna-7b-v1.5": model.language_model,
        "(-2, -5, -8, -11, 6)": "(-1, -2, 1)",
        "image_size=336": "image_size=28",
        "mucai/vip-llava-7b": str(place / "export"),
        'device="auto"': 'device="cpu"',
    }
    session: dict[str, Any] = {"__name__": "session"}
    try:
        for block in BLOCKS:
            for published, tiny in replaced.items():
                block = block.replace(published, tiny)
            exec(compile(block, "docs/api.md", "exec"), session)
        assert records.KINDS["plates"].texts == ("plate",)
    finally:
        for name in set(records.KINDS) - known_kinds:
            del records.KINDS[name]
    with Image.open("seen.png") as seen:
        assert seen.size == (28, 28)
    assert len(session["drawn"].words) == 2
    assert len(session["data"]) == 10
    assert session["first"].keys != session["second"].keys
    assert (place / "models" / "vip-llava-7b" / "config.json").is_file()
    assert list(benches.BENCHES)[-1:] == ["sums"]
    printed = capsys.readouterr().out
    assert "learned ' yes</s>'" in printed
    assert "\nWhat is within the red rectangle?\n" in printed
    assert "\nWhat is pointed to by the blue arrow? -> " in printed
    assert "('within the red rectangle', 'within the red ellipse')" in printed
    assert len(session["chat"].turns) == 4
    for name in ("asked.png", "chat-overlay.png", "chat.json"):
        assert (place / name).is_file()


def test_the_examples_of_marks_are_the_same_in_python_and_json():
    page = (ROOT / "docs" / "marks.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (written,) = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    session: dict[str, Any] = {}
    exec(first, session)
    said = [eval(line, session) for line in first.splitlines() if line.startswith("vl.")]
    assert parse_marks(json.loads(written)) == said
    exec(second, session)


def test_the_stream_takes_ten_lines_at_most():
    (block,) = (block for block in BLOCKS if "vl.open_dataset" in block and "for batch" in block)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_drawing_and_words_are_of_one_plan():
    image = Image.new("RGB", (320, 240), "grey")
    drawn = vl.draw(image, BOXES, seed=3)
    again = vl.draw(image, [vl.Region(box) for box in BOXES], seed=3)
    assert (drawn.image.tobytes(), drawn.words) == (again.image.tobytes(), again.words)
    assert len(set(drawn.words)) == 2
    assert np.asarray(image).std() == 0  # left as it was
    other = vl.draw(image, BOXES, policy=vl.POLICIES["evaluation"]["v7w"], seed=3)
    assert all("rectangle" in words for words in other.words)
    with pytest.raises(VipLlavaError, match="unknown visual-prompt policy `v8w`; known: flickr30k"):
        vl.draw(image, BOXES, policy="v8w")
    for box in ((400, 10, 500, 20), (30, 10, 20, 20)):
        with pytest.raises(RecordError, match=r"region 1 is \(.*inside the image of 320 x 240 pix"):
            vl.draw(image, [BOXES[0], box])


def test_a_folder_is_a_data_set_of_its_name(place: Path):
    by_folder = vl.open_dataset(place / "data" / "my_data")
    by_manifest = vl.open_dataset("my_data.yaml", "data")
    assert by_folder.name == by_manifest.name == "my_data"
    assert [sample.key for sample in by_folder] == [f"s{number:03d}" for number in range(10)]
    assert by_folder[3] == by_manifest[3]
    with pytest.raises(IndexError, match="no sample 10 among 10"):
        by_folder[10]
    with pytest.raises(VipLlavaError, match="no manifest `my_dta`"):
        vl.open_dataset("my_dta")


def test_a_trace_is_what_the_stream_gives(place: Path, model: vl.ModelSpec):
    data = vl.open_dataset("my_data.yaml", seed=7)
    encoder = vl.sample_encoder(model, seed=1)
    stream = vl.open_stream(data, encoder, global_batch_size=1)
    for batch in stream:
        position = int(batch.keys[0].rpartition("/s")[2])
        seen = data.trace(position, encoder)
        ids = [i for stretch in seen.stretches for token in stretch.tokens for i in token.ids]
        assert ids == batch.input_ids[0].tolist()
        assert seen.num_supervised == batch.num_supervised_global
        if seen.image is None:
            assert len(batch.pixel_values) == 0
        else:
            pixels = np.asarray(seen.image).transpose(2, 0, 1)
            assert np.array_equal(pixels, batch.pixel_values[0].numpy())


def test_a_sample_that_training_would_refuse_is_shown_with_the_reason(
    place: Path, model: vl.ModelSpec
):
    record = {
        "id": "x",
        "bboxes": [[5, 5, 40, 30]],
        "conversations": said("<image>\n<bbox1>?", "a"),
    }
    write_shards([("x", record, encode_picture(), "jpg")], place / "faulty")
    seen = vl.open_dataset(place / "faulty").trace(0, vl.sample_encoder(model))
    assert isinstance(seen, RefusedSample)
    assert "bbox1" in seen.reason


@pytest.mark.parametrize("upright", [True, False])
def test_a_trace_turns_pictures_as_the_manifest_says(
    place: Path, model: vl.ModelSpec, upright: bool
):
    stored, size = lying_sample(upright)
    write_shards([stored], place / "lying")
    manifest = make_manifest("lying", shards="*.tar", apply_exif_orientation=upright)
    seen = vl.open_dataset(manifest, place / "lying").trace(0, vl.sample_encoder(model))
    assert seen.stored_size == size


@pytest.mark.parametrize("batching", ["shuffled", "length_grouped", "packed"])
def test_a_stream_goes_on_where_another_stopped(place: Path, model: vl.ModelSpec, batching: Any):
    data = vl.open_dataset("my_data.yaml")
    encoder = vl.sample_encoder(model, max_length=400)

    def stream():
        return vl.open_stream(
            data, encoder, global_batch_size=4, micro_batch_size=2, batching=batching,
            pack_length=400, mix={"my_data": {"epochs": 2}},
        )  # fmt: skip

    whole = list(stream())
    assert len({key for batch in whole for key in batch.keys if "#" not in key}) == 10
    stopped = stream()
    begun = iter(stopped)
    for _ in range(3):
        next(begun)
    resumed = stream()
    resumed.load_state_dict(stopped.state_dict())
    rest = list(resumed)
    assert [batch.keys for batch in rest] == [batch.keys for batch in whole[3:]]
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(rest, whole[3:], strict=True))


def test_what_does_not_fit_is_an_error(place: Path, model: vl.ModelSpec):
    data, encoder = vl.open_dataset("my_data.yaml"), vl.sample_encoder(model)
    with pytest.raises(ConfigError, match="global_batch_size=5 is not a multiple of micro_batch_s"):
        vl.open_stream(data, encoder, global_batch_size=5, micro_batch_size=2)
    with pytest.raises(ConfigError, match=r"mix=\['mine'\] and datasets=\['my_data'\] must name"):
        vl.open_stream(data, encoder, global_batch_size=5, mix={"mine": {"epochs": 1}})
    with pytest.raises(TypeError, match=r"position is slice.*\[data\[i\] for i in"):
        data[0:2]  # pyright: ignore[reportArgumentType]
    with pytest.raises(vl.VipLlavaError, match=r"image is 'mine\.jpg': open a file by"):
        vl.draw("mine.jpg", [(0, 0, 9, 9)])  # pyright: ignore[reportArgumentType]
    with pytest.raises(vl.VipLlavaError, match="expected a role of user, assistant"):
        vl.Turn("human", "What is it?")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="policies='publish' is not one of published, evaluation"):
        vl.sample_encoder(model, policies="publish")


def test_the_reference_shows_what_stands_beside_and_above_fields() -> None:
    extensions = griffe.load_extensions("docs/field_comments.py")
    batch = griffe.load("vipllava.types", extensions=extensions)["Batch"]
    assert "    segment_ids: ``PADDING_SEGMENT`` on padding" in batch.docstring.value
    assert "    num_supervised_global: Supervised tokens of the whole" in batch.docstring.value
