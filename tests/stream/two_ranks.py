"""Trains one epoch on two gloo ranks; each writes what it was given. Run by the test beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.stream.test_datamodule import Recorder, make_module, make_trainer
from tests.toy_stream import make_encoder
from vipllava.visual_prompts.policies import VisualPromptPolicy


def main(root: Path) -> None:
    torch.set_num_threads(1)
    module = make_module(
        root,
        make_encoder(),
        {"regions": VisualPromptPolicy()},
        micro_batch_size=1,
        num_workers=1,
    )
    model = Recorder()
    trainer = make_trainer(root, strategy="ddp", devices=2, max_epochs=1, callbacks=[])
    trainer.fit(model, datamodule=module)
    (root / f"rank{trainer.global_rank}.json").write_text(json.dumps(model.seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
