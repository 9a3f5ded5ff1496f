"""A VipLlava whose vision tower has another number of tokens before its patches than one.

``transformers.VipLlavaForConditionalGeneration`` drops the first position of every hidden state.
That is CLIP's class token; of a tower without one it would be the first patch.

An export with such a tower holds a copy of this file, which ``trust_remote_code=True`` runs: it
imports nothing of this package.
"""

from typing import Any

import torch
from torch import nn
from transformers import VipLlavaForConditionalGeneration, VipLlavaModel


class VipLlavaPatchesModel(VipLlavaModel):
    """Reads the last ``image_seq_length`` positions of a hidden state: the patches."""

    def get_image_features(
        self, pixel_values: torch.Tensor, vision_feature_layer: Any = None, **kwargs: Any
    ) -> Any:
        """Return the tower's outputs, projected features as ``pooler_output``.

        Feature layers not given, under their name of transformers 5.23 or before, are the config's.
        """
        layers = vision_feature_layer or kwargs.get("vision_feature_layers")
        if layers is None:
            layers = getattr(self.config, "vision_feature_layer", None)
            layers = self.config.vision_feature_layers if layers is None else layers
        outputs = self.vision_tower(pixel_values, output_hidden_states=True)
        count = self.config.image_seq_length
        patches = [outputs.hidden_states[layer][:, -count:] for layer in layers]
        outputs.pooler_output = self.multi_modal_projector(torch.cat(patches, dim=-1))
        return outputs


class VipLlavaPatchesForConditionalGeneration(VipLlavaForConditionalGeneration):
    """The same network with the features of all patches."""

    def __init__(self, config: Any) -> None:
        super(VipLlavaForConditionalGeneration, self).__init__(config)
        self.model = VipLlavaPatchesModel(config)
        self.lm_head = nn.Linear(
            config.text_config.hidden_size, config.text_config.vocab_size, bias=False
        )
        self.post_init()
