"""Teach the tiny CLIP tower what stands, and what is marked, under each of its patches.

A tower trained end to end from region questions alone stays at chance for tens of thousands of
samples, so the base is taught densely: for every patch the kind of object it belongs to and the
shape and colour of the mark that points at that object. The heads are thrown away; what remains
is a tower whose five feature layers carry what a projector needs, as CLIP's do at full size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import CLIPVisionConfig, CLIPVisionModel

from vipllava.keyed_random import generator_for
from vipllava.models.towers import CLIP
from vipllava.processes import start_worker
from vipllava.sample_world.objects import KINDS
from vipllava.sample_world.scenes import Scene, Split, compose_scene
from vipllava.stream.image_transform import ImageTransform
from vipllava.types import VisualPromptPlan
from vipllava.visual_prompts.policies import VisualPromptPolicy
from vipllava.visual_prompts.render import render_plan
from vipllava.visual_prompts.sampling import sample_plan
from vipllava.visual_prompts.shapes import PALETTE, SHAPES

_LOG = logging.getLogger(__name__)

IMAGE_SIZE, PATCH_SIZE = 112, 16
TOWER_CONFIG = CLIPVisionConfig(
    image_size=IMAGE_SIZE,
    patch_size=PATCH_SIZE,
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
)
FEATURE_LAYERS = (-1, -2, -3, -4, 1)
"""The tiny tower's own five layers: the last four and an early one, as at full size."""

_COLOURS = tuple(PALETTE)
_PLANS_PER_SCENE = 3
_NUM_MARKS, _NUM_MARKS_RATES = (0, 1, 2, 3), (0.1, 0.6, 0.2, 0.1)
_IGNORE = -100


@dataclass(frozen=True, slots=True)
class PatchLabels:
    """What each of the tower's patches shows, int64 [patches], 0 meaning nothing.

    Attributes:
        kind: 1 + index into ``KINDS`` for patches whose centre lies in an object's box.
        shape: 1 + index into ``SHAPES`` of the mark at that object; ignored off objects.
        colour: 1 + index into the palette; one more for a colour without name; ignored where
            nothing is marked.
    """

    kind: np.ndarray
    shape: np.ndarray
    colour: np.ndarray


def label_patches(
    scene: Scene, plan: VisualPromptPlan, image_size: int, patch_size: int
) -> PatchLabels:
    """Label every patch of the padded, resized scene (row-major)."""
    per_side = image_size // patch_size
    side = max(plan.size)
    offset = [(side - length) // 2 for length in plan.size]
    centres = (np.arange(per_side) + 0.5) * patch_size * side / image_size
    x, y = centres - offset[0], centres[:, None] - offset[1]
    kind = np.zeros((per_side, per_side), np.int64)
    shape, colour = np.full_like(kind, _IGNORE), np.full_like(kind, _IGNORE)
    prompts = {prompt.region: prompt for prompt in plan.prompts}
    for index, item in enumerate(scene.objects):
        x1, y1, x2, y2 = item.bbox_xyxy
        inside = (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)
        kind[inside] = 1 + KINDS.index(item.kind)
        prompt = prompts.get(index)
        shape[inside] = 0 if prompt is None else 1 + SHAPES.index(prompt.shape)
        if prompt is not None:
            name = prompt.colour_name
            colour[inside] = len(_COLOURS) if name is None else _COLOURS.index(name)
    return PatchLabels(kind.ravel(), shape.ravel(), colour.ravel())


class _MarkedScenes(IterableDataset[dict[str, torch.Tensor]]):
    """Endless marked scenes, different in every worker, equal in every run."""

    def __init__(self, policy: VisualPromptPolicy, split: Split, seed: int) -> None:
        self._policy, self._seed = policy, seed
        self._split: Split = split

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        transform = ImageTransform(IMAGE_SIZE, "pad", CLIP.preprocessing)
        index = worker.id if worker else 0
        while True:
            rng = generator_for("teach", self._seed, self._split, index)
            scene = compose_scene(rng, self._split)
            for _ in range(_PLANS_PER_SCENE):
                yield self._mark(scene, rng, transform)
            index += worker.num_workers if worker else 1

    def _mark(
        self, scene: Scene, rng: np.random.Generator, transform: ImageTransform
    ) -> dict[str, torch.Tensor]:
        count = int(rng.choice(_NUM_MARKS, p=_NUM_MARKS_RATES))
        marked = sorted(rng.permutation(len(scene.objects))[:count].tolist())
        plan = sample_plan(
            [scene.objects[index].region for index in marked], scene.image.size, self._policy, rng
        )
        image: Image.Image = render_plan(scene.image, plan)
        plan = VisualPromptPlan(
            plan.size, tuple(replace(p, region=marked[p.region]) for p in plan.prompts)
        )
        labels = label_patches(scene, plan, IMAGE_SIZE, PATCH_SIZE)
        return {
            "pixels": transform(image),
            "kind": torch.from_numpy(labels.kind),
            "shape": torch.from_numpy(labels.shape),
            "colour": torch.from_numpy(labels.colour),
        }


class PatchReader(nn.Module):
    """The tower and three linear heads over its five concatenated feature layers."""

    def __init__(self, start: Path | None = None) -> None:
        super().__init__()
        # On CPUs the backward of eager attention is about twice as fast as sdpa at this length.
        if start is None:
            self.tower = CLIPVisionModel._from_config(TOWER_CONFIG, attn_implementation="eager")
            _place_by_sines(self.tower)
        else:
            self.tower = CLIPVisionModel.from_pretrained(
                start, attn_implementation="eager", dtype=torch.float32
            )
        width = TOWER_CONFIG.hidden_size * len(FEATURE_LAYERS)
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict(
            {
                "kind": nn.Linear(width, 1 + len(KINDS)),
                "shape": nn.Linear(width, 1 + len(SHAPES)),
                "colour": nn.Linear(width, 1 + len(_COLOURS)),
            }
        )
        self.mean = torch.tensor(CLIP.preprocessing.mean).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(CLIP.preprocessing.std).view(1, 3, 1, 1) * 255

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map uint8 pixels [n, 3, size, size] to logits [n, patches, classes] per head."""
        pixels = (pixels.float() - self.mean) / self.std
        states = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        features = torch.cat([states[layer][:, 1:] for layer in FEATURE_LAYERS], dim=-1)
        features = self.norm(features)
        return {name: head(features).float() for name, head in self.heads.items()}


def teach_vision_tower(
    output: Path,
    policy: VisualPromptPolicy,
    *,
    steps: int,
    start: Path | None = None,
    batch_size: int = 96,
    seed: int = 0,
) -> dict[str, float]:
    """Train the tower on endless marked scenes and save it as a Hugging Face folder.

    Args:
        output: the folder.
        policy: how marks are sampled.
        steps: optimizer steps; the rate rises, then falls to 0 over them.
        start: a tower to continue from, at half the rate and with new heads; None starts anew.
        batch_size: pictures per step.
        seed: of weights and scenes; another one for another course.

    Returns:
        Held-out accuracies; see :func:`read_accuracy`.
    """
    torch.manual_seed(seed)
    reader = PatchReader(start)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.2e-3 if start is None else 6e-4, total_steps=steps, pct_start=0.05
    )
    scenes = _MarkedScenes(policy, "train", seed)
    loader = DataLoader(scenes, batch_size=batch_size, num_workers=1, worker_init_fn=start_worker)
    weights = torch.ones(1 + len(KINDS))
    weights[0] = 0.3
    began, running = time.monotonic(), 0.0
    reader.train()
    for step, batch in enumerate(loader):
        if step == steps:
            break
        with torch.autocast("cpu", torch.bfloat16):
            logits = reader(batch["pixels"])
        loss = sum(
            nn.functional.cross_entropy(
                logits[name].flatten(0, 1),
                batch[name].flatten(),
                ignore_index=_IGNORE,
                weight=weights if name == "kind" else None,
            )
            for name in reader.heads
        )
        assert isinstance(loss, torch.Tensor)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0:
            speed = (step + 1) * batch_size / (time.monotonic() - began)
            _LOG.info("step %d/%d loss %.3f (%.0f scenes/s)", step, steps, running, speed)
        if step and step % 1000 == 0:
            _LOG.info("held out: %s", read_accuracy(reader, policy, batches=4))
            reader.tower.save_pretrained(output)
    scores = read_accuracy(reader, policy, batches=20)
    reader.tower.save_pretrained(output)
    return scores


@torch.no_grad()
def read_accuracy(
    reader: PatchReader, policy: VisualPromptPolicy, *, batches: int
) -> dict[str, float]:
    """Measure on held-out scenes.

    Returns:
        ``kind``: share of object patches whose object is named; ``marked``: share of marked
        scenes in which the object under the most probably marked patches is named, which is
        what a language model can hope to read; and the shape's and colour's shares.
    """
    reader.eval()
    loader = DataLoader(_MarkedScenes(policy, "heldout", 1), batch_size=96, num_workers=0)
    hits: dict[str, list[float]] = {name: [] for name in ("kind", "shape", "colour", "marked")}
    per_shape: dict[str, list[float]] = {shape: [] for shape in SHAPES}
    for index, batch in enumerate(loader):
        if index == batches:
            break
        with torch.autocast("cpu", torch.bfloat16):
            logits = reader(batch["pixels"])
        for name in ("kind", "shape", "colour"):
            chosen = batch[name] > 0 if name != "colour" else batch[name] >= 0
            hits[name] += (logits[name].argmax(-1) == batch[name])[chosen].float().tolist()
        kinds = logits["kind"].softmax(-1)[..., 1:]
        marked = 1 - logits["shape"].softmax(-1)[..., 0]
        present = 1 - logits["kind"].softmax(-1)[..., 0]
        named = ((marked * present).pow(4)[..., None] * kinds).sum(1).argmax(-1)
        for row in range(len(named)):
            targets = batch["kind"][row][batch["shape"][row] > 0].unique()
            if len(targets) == 1:
                hit = float(named[row] == targets[0] - 1)
                hits["marked"].append(hit)
                shape = batch["shape"][row].max().item() - 1
                per_shape[SHAPES[int(shape)]].append(hit)
    reader.train()
    scores = {name: float(np.mean(values)) for name, values in hits.items()}
    return {**scores, **{f"marked/{s}": float(np.mean(v)) for s, v in per_shape.items() if v}}


def _place_by_sines(tower: CLIPVisionModel) -> None:
    """Start the position embeddings as two-dimensional sines: neighbours look alike at once."""
    table = next(p for name, p in tower.named_parameters() if "position_embedding" in name)
    per_side = IMAGE_SIZE // PATCH_SIZE
    quarter = TOWER_CONFIG.hidden_size // 4
    rates = 1.0 / (100 ** (torch.arange(quarter) / quarter))
    places = torch.arange(per_side)[:, None] * rates
    waves = torch.cat([places.sin(), places.cos()], dim=1)
    rows = waves[:, None].expand(-1, per_side, -1)
    columns = waves[None].expand(per_side, -1, -1)
    with torch.no_grad():
        table[1:] = torch.cat([rows, columns], dim=-1).flatten(0, 1) * 0.3
