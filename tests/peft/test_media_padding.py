"""Padding of models whose input is not tokens, such as sounds and pictures: its mask does not fit the hidden states."""

import pytest
import torch
import transformers as hf

from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_kernels.peft.cache import find_past
from mixlora_kernels.peft.forward_pass import ForwardPass
from mixlora_kernels.peft.model_inputs import ModelInputs

from .models import adapt


def sound_model(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    convolutions = {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 2], "num_feat_extract_layers": 2}
    config = hf.Wav2Vec2Config(
        vocab_size=32, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        do_stable_layer_norm=True, **sizes, **convolutions,
    )  # fmt: skip
    return adapt(hf.Wav2Vec2ForCTC(config), task_type=None, **settings)


def test_padding_of_sounds():
    """The mask is of samples, the hidden states are of frames."""
    sounds, mask = torch.randn(2, 400), torch.ones(2, 400, dtype=torch.long)
    model = sound_model()
    together = model(input_values=sounds, attention_mask=mask).logits
    alone = model(input_values=sounds[:1]).logits
    assert torch.allclose(together[:1], alone, atol=1e-5)
    mask[0, 200:] = 0
    with pytest.raises(ValueError, match="attention_mask marks padding in an input that is not tokens"):
        model(input_values=sounds, attention_mask=mask)
    sound_model(pool="all")(input_values=sounds, attention_mask=mask)


def test_padding_of_pictures():
    """Pictures of several sizes in one batch: the mask is of patches, under a name of its own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = adapt(hf.Siglip2VisionModel(hf.Siglip2VisionConfig(patch_size=2, num_patches=16, **sizes)), task_type=None)
    patches, shapes = torch.randn(2, 16, 12), torch.tensor([[4, 4], [4, 4]])
    mask = torch.ones(2, 16, dtype=torch.long)
    together = model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state
    alone = model(pixel_values=patches[:1], pixel_attention_mask=mask[:1], spatial_shapes=shapes[:1]).last_hidden_state
    assert torch.allclose(together[:1], alone, atol=1e-5)
    mask[0, 8:], shapes[0] = 0, torch.tensor([2, 4])
    with pytest.raises(ValueError, match="pixel_attention_mask marks padding in an input that is not tokens"):
        model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes)


@pytest.mark.parametrize("name", ["attention_mask", "pixel_attention_mask", "padding_mask"])
def test_every_name_of_a_mask_beside_an_input_without_tokens(name):
    for mask in (torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)):
        forward_pass = ForwardPass(None, {name: mask}, ModelInputs(), False, find_past({}, None))
        forward_pass.prepare(["layers.0.q"], "default", ConditionalMixLoRAConfig(), torch.zeros(2, 3, 4))
        mask[1, 3] = 0
        forward_pass = ForwardPass(None, {name: mask}, ModelInputs(), False, find_past({}, None))
        with pytest.raises(ValueError, match=f"^{name} marks padding"):
            forward_pass.prepare(["layers.0.q"], "default", ConditionalMixLoRAConfig(), torch.zeros(2, 3, 4))
