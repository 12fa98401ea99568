"""Models of text of transformers, tiny and with random weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from architectures.architecture import Architecture, Data, batches
from architectures.attention import ROUTED

VOCABULARY = 160
# Names that most configurations share.
_USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
_SMALL_LLAMA = {**_USUAL, "num_key_value_heads": 2}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def of(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A model of this class and configuration, random weights of a sensible scale."""

    def build() -> nn.Module:
        import transformers

        network = getattr(transformers, model)(getattr(transformers, config)(**settings))
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() == 2:  # 0.02 leaves so narrow a network almost silent
                    parameter.mul_(4)
        return network

    return build


def text(**more: Any) -> Callable[[], Data]:
    return batches(
        lambda: {
            "input_ids": torch.randint(3, VOCABULARY, (2, 10)),
            "attention_mask": torch.ones(2, 10, dtype=torch.long),
            **more,
        }
    )


def pairs() -> Callable[[], Data]:
    """For an encoder and a decoder."""
    return batches(
        lambda: {
            "input_ids": torch.randint(3, VOCABULARY, (2, 10)),
            "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 6)),
        }
    )


def case(
    name: str,
    build: Callable[[], nn.Module],
    data: Callable[[], Data],
    uneven: str | None = None,
) -> Architecture:
    """In one metric: to choose among several takes minutes more over all of them."""
    return Architecture(name, build, data, uneven=uneven, metric="fisher", package="transformers")


ARCHITECTURES = (
    case("BERT", of("BertForSequenceClassification", "BertConfig", **_USUAL), text()),
    case("BERT, masked words", of("BertForMaskedLM", "BertConfig", **_USUAL), text()),
    case("RoBERTa", of("RobertaForMaskedLM", "RobertaConfig", **_USUAL), text()),
    case(
        "DistilBERT",
        of(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            dim=64,
            n_layers=2,
            n_heads=4,
            hidden_dim=128,
        ),
        text(),
    ),
    case(
        "ALBERT, shared layers",
        of("AlbertForMaskedLM", "AlbertConfig", **_USUAL, embedding_size=32),
        text(),
    ),
    case(
        "DeBERTa",
        of(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **_USUAL,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
        ),
        text(),
    ),
    case(
        "GPT-2, Conv1D",
        of("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4),
        text(use_cache=False),
    ),
    case(
        "GPT-2 with its cache",
        of("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4),
        text(),
    ),
    case(
        "OPT",
        of(
            "OPTForCausalLM",
            "OPTConfig",
            **{k: v for k, v in _USUAL.items() if k != "intermediate_size"},
            ffn_dim=128,
            word_embed_proj_dim=32,
        ),
        text(use_cache=False),
    ),
    case(
        "BLOOM",
        of(
            "BloomForCausalLM",
            "BloomConfig",
            vocab_size=VOCABULARY,
            hidden_size=64,
            n_layer=2,
            n_head=4,
        ),
        text(use_cache=False),
    ),
    case("GPT-NeoX", of("GPTNeoXForCausalLM", "GPTNeoXConfig", **_USUAL), text(use_cache=False)),
    case(
        "Falcon",
        of(
            "FalconForCausalLM",
            "FalconConfig",
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
        text(use_cache=False),
    ),
    case("Phi", of("PhiForCausalLM", "PhiConfig", **_USUAL), text(use_cache=False)),
    case("Llama", of("LlamaForCausalLM", "LlamaConfig", **_SMALL_LLAMA), text(use_cache=False)),
    case(
        "Mistral", of("MistralForCausalLM", "MistralConfig", **_SMALL_LLAMA), text(use_cache=False)
    ),
    case(
        "Mixtral, experts",
        of("MixtralForCausalLM", "MixtralConfig", **_SMALL_LLAMA, num_local_experts=4),
        text(use_cache=False),
        ROUTED,
    ),
    case("Qwen2", of("Qwen2ForCausalLM", "Qwen2Config", **_SMALL_LLAMA), text(use_cache=False)),
    case(
        "Qwen2-MoE, shared expert",
        of(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            **_SMALL_LLAMA,
            num_experts=4,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
        ),
        text(use_cache=False),
        ROUTED,
    ),
    case(
        "Gemma, tied",
        of("GemmaForCausalLM", "GemmaConfig", **_SMALL_LLAMA, head_dim=16),
        text(use_cache=False),
    ),
    case(
        "Gemma 2",
        of("Gemma2ForCausalLM", "Gemma2Config", **_SMALL_LLAMA, head_dim=16),
        text(use_cache=False),
    ),
    case(
        "T5",
        of(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        pairs(),
    ),
    case(
        "BART",
        of(
            "BartForConditionalGeneration",
            "BartConfig",
            **_IDS,
            vocab_size=VOCABULARY,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_position_embeddings=64,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        ),
        pairs(),
    ),
    case(
        "Mamba",
        of(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            state_size=8,
        ),
        batches(lambda: {"input_ids": torch.randint(3, VOCABULARY, (2, 10)), "use_cache": False}),
    ),
    case(
        "RWKV",
        of(
            "RwkvForCausalLM",
            "RwkvConfig",
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            attention_hidden_size=64,
            intermediate_size=128,
            rescale_every=0,  # by mode it rescales weights in place, which no state dict tells
        ),
        batches(lambda: {"input_ids": torch.randint(3, VOCABULARY, (2, 10)), "use_cache": False}),
    ),
)
