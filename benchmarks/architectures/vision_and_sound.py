"""Models of images and sound of transformers, tiny and with random weights."""

from collections.abc import Callable
from typing import Any

import torch

from architectures.architecture import Architecture, Data, batches
from architectures.language_models import case, of

_USUAL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}


def pixels(size: int = 32, name: str = "pixel_values", **more: Any) -> Callable[[], Data]:
    return batches(lambda: {name: torch.randn(2, 3, size, size), **more})


def sound() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 20, 60), "decoder_input_ids": torch.randint(9, (2, 6))}


def image_and_text() -> dict[str, Any]:
    return {
        "input_ids": torch.randint(3, 90, (3, 8)),
        "pixel_values": torch.randn(3, 3, 32, 32),
        "attention_mask": torch.ones(3, 8, dtype=torch.long),
    }


_CLIP_TEXT = {
    "vocab_size": 100,
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}

ARCHITECTURES: tuple[Architecture, ...] = (
    case("ViT", of("ViTForImageClassification", "ViTConfig", **_USUAL), pixels()),
    case("DeiT", of("DeiTForImageClassification", "DeiTConfig", **_USUAL), pixels()),
    case("DINOv2", of("Dinov2ForImageClassification", "Dinov2Config", **_USUAL), pixels()),
    case(
        "Masked autoencoder",
        of(
            "ViTMAEModel",
            "ViTMAEConfig",
            **_USUAL,
            mask_ratio=0.5,
            decoder_hidden_size=32,
        ),
        batches(lambda: {"pixel_values": torch.randn(2, 3, 32, 32), "noise": torch.rand(2, 16)}),
    ),
    case(
        "Swin",
        of(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=2,
            embed_dim=32,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        pixels(),
    ),
    case(
        "ConvNeXt",
        of(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[32, 48],
            depths=[1, 2],
            num_stages=2,
            layer_scale_init_value=0.5,
        ),
        pixels(),
    ),
    case(
        "ResNet",
        of(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=32,
            hidden_sizes=[32, 64],
            depths=[1, 2],
            layer_type="bottleneck",
        ),
        pixels(),
    ),
    case(
        "SegFormer",
        of(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[32, 48],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
            decoder_hidden_size=48,
        ),
        pixels(64),
    ),
    case(
        "DETR",
        of(
            "DetrForObjectDetection",
            "DetrConfig",
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config={
                "model_type": "resnet",
                "embedding_size": 16,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
            d_model=48,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            num_queries=8,
            num_labels=5,
        ),
        pixels(64),
    ),
    case(
        "YOLOS",
        of(
            "YolosForObjectDetection",
            "YolosConfig",
            **{**_USUAL, "image_size": [32, 32]},
            num_detection_tokens=5,
        ),
        pixels(),
    ),
    case(
        "CLIP",
        of(
            "CLIPModel",
            "CLIPConfig",
            text_config=_CLIP_TEXT,
            vision_config={**_USUAL, "hidden_size": 48, "num_hidden_layers": 1},
            projection_dim=32,
        ),
        batches(image_and_text),
    ),
    case(
        "Whisper",
        of(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=100,
            num_mel_bins=20,
            d_model=48,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_source_positions=30,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            use_cache=False,
        ),
        batches(sound),
    ),
    case(
        "Wav2Vec2",
        of(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            vocab_size=30,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            conv_dim=[32, 32],
            conv_kernel=[10, 3],
            conv_stride=[5, 2],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            apply_spec_augment=False,
        ),
        batches(lambda: {"input_values": torch.randn(2, 600)}),
    ),
    case(
        "Audio spectrogram transformer",
        of(
            "ASTForAudioClassification",
            "ASTConfig",
            **{k: v for k, v in _USUAL.items() if k != "image_size"},
            max_length=64,
            num_mel_bins=32,
        ),
        batches(lambda: {"input_values": torch.randn(2, 64, 32)}),
    ),
)
