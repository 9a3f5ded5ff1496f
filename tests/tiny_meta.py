"""What the export of a tiny model says about itself."""

from vipllava.checkpoints.export_meta import ExportMeta

META = ExportMeta(
    stage="finetune",
    chat_template="llava_v1",
    image_aspect="pad",
    image_size=28,
    image_seq_length=4,
    feature_layers=(-1, -2, 1),
    vision_tower="tower",
    language_model="language",
)
