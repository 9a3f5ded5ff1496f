"""Teaching the tiny base: labels per patch, the tokenizer, and that both parts come out whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from tools.teach_base.__main__ import LANGUAGE_MODEL, VISION_TOWER, main, store_half
from tools.teach_base.language_model import SpeltScenes
from tools.teach_base.vision_tower import label_patches
from vipllava.sample_world import TINY_POLICIES
from vipllava.sample_world.objects import KINDS
from vipllava.sample_world.scenes import Scene, SceneObject
from vipllava.types import Stroke, VipLlavaError, VisualPrompt, VisualPromptPlan


def test_patches_are_labelled_by_the_box_their_centre_lies_in():
    star = SceneObject("star", (0.0, 0.0, 50.0, 50.0), ())
    seven = SceneObject("7", (100.0, 50.0, 160.0, 100.0), ())
    scene = Scene(Image.new("RGB", (168, 112)), (star, seven))
    mark = VisualPrompt(1, "arrow", (255, 0, 0), "red", 255, (Stroke("line", ((0, 0), (9, 9)), 1),))
    labels = label_patches(scene, VisualPromptPlan((168, 112), (mark,)), 112, 16)
    # 24 stored pixels a patch; the picture is padded by 28 above and below.
    kind = np.zeros((7, 7), int)
    kind[1:3, 0:2] = 1 + KINDS.index("star")
    kind[3:5, 4:7] = 1 + KINDS.index("7")
    kind[1, 0:2] = 1 + KINDS.index("star")
    kind[3, 4:7] = np.where(np.array([108, 132, 156]) <= 160, 1 + KINDS.index("7"), 0)
    assert labels.kind.reshape(7, 7).tolist() == kind.tolist()
    shape = labels.shape.reshape(7, 7)
    assert shape[3, 4] == 1 + 6  # arrow
    assert shape[1, 0] == 0  # an object without mark
    assert shape[6, 6] == -100
    assert labels.colour.reshape(7, 7)[3, 4] == 0  # red
    assert labels.colour.reshape(7, 7)[1, 0] == -100


def test_spelt_scenes_are_reproducible_and_name_the_marks():
    first, second = (SpeltScenes(TINY_POLICIES) for _ in range(2))
    texts = [first.conversation(number)[0].text for number in range(40)]
    assert texts == [second.conversation(number)[0].text for number in range(40)]
    assert sum(" arrow" in text for text in texts) > 0
    assert first.caption(3) == second.caption(3)


@pytest.mark.slow
def test_a_short_course_gives_folders_that_transformers_opens(tmp_path):
    main(["--output", str(tmp_path), "--tower-steps", "2", "--language-steps", "2"])
    tower = CLIPVisionModel.from_pretrained(tmp_path / VISION_TOWER)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / LANGUAGE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / LANGUAGE_MODEL)
    assert tower.config.image_size == 112
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("star").input_ids[0] == tokenizer.bos_token_id


def test_weights_that_do_not_fit_half_precision_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.tensor([1e6])}, tmp_path / "model.safetensors")
    with pytest.raises(VipLlavaError, match=r"\['w'\] do not fit float16"):
        store_half(tmp_path)
