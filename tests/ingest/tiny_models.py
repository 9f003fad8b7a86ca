"""Tiny random models of many families and a trained tokenizer, for tests: nothing is downloaded.

Weights are far larger than a trained model's, so that attention matters and a wrong mask, position or module shows.
"""

import atexit
import functools
import os
import shutil
import tempfile

FAMILIES = (
    "gpt2",
    "gpt_neox",
    "gpt_neox_serial",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3",
    "olmo2",
    "bert",
)
"""Families whose every hook point is supported."""

MORE_FAMILIES = ("opt", "roberta", "qwen3_moe", "gptj", "bloom", "modernbert", "falcon")
"""Families that differ in one of: positions, module shapes, experts."""

MOE_FAMILIES = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "phimoe",
    "granitemoe",
    "llama4",
)
"""Mixtures of experts: their routers differ."""

OTHER_FAMILIES = (
    *(family for family in MOE_FAMILIES if family != "qwen3_moe"),
    "gpt_neo",
    "gpt_bigcode",
    "phi",
    "phi3",
    "stablelm",
    "stablelm_parallel",
    "cohere",
    "cohere2",
    "glm",
    "glm4",
    "mpt",
    "olmo",
    "olmo3",
    "exaone4",
    "falcon_new",
    "falcon_serial",
    "granite",
    "starcoder2",
    "smollm3",
    "nemotron",
    "persimmon",
    "xglm",
    "opt_post_norm",
    "distilbert",
    "electra",
    "deberta",
    "deberta_v2",
    "xlm_roberta",
    "roberta_prelayernorm",
)
"""Families whose shape is one of those above, seen from elsewhere in the tree."""

ALL_FAMILIES = (*FAMILIES, *MORE_FAMILIES, *OTHER_FAMILIES)

VOCAB_SIZE = 512


def build(
    family: str,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    d_model: int = 32,
    n_layers: int = 3,
    n_heads: int = 4,
    vocab_size: int = VOCAB_SIZE,
    context: int = 64,
    dtype: str = "float32",
    std: float = 0.15,
    tokenizer: bool = True,
) -> None:
    """Save a random model of `family` as safetensors with config and, if asked, the tokenizer, in folder `path`."""
    import torch
    from transformers import AutoModel

    with _quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        config = make_config(
            family,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            vocab_size=vocab_size,
            context=context,
        )
        model = AutoModel.from_config(config)
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                # Norm weights stay near one; everything else is random, biases too.
                is_norm = parameter.ndim == 1 and name.endswith("weight")
                noise = torch.randn(parameter.shape) * (0.1 if is_norm else std)
                parameter.copy_(parameter + noise if is_norm else noise)
        model.to(getattr(torch, dtype)).save_pretrained(path)
        if tokenizer:
            build_tokenizer(path, vocab_size=vocab_size, bert="bert" in family)


def make_config(family: str, *, d_model: int, n_layers: int, n_heads: int, vocab_size: int, context: int):
    """Return the transformers configuration of a tiny model."""
    import transformers as tf

    common = {
        "vocab_size": vocab_size,
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "max_position_embeddings": context,
        "intermediate_size": 3 * d_model,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    grouped = {"num_key_value_heads": n_heads // 2}
    head = {"head_dim": d_model // n_heads}
    gpt2_like = {
        "vocab_size": vocab_size,
        "n_embd": d_model,
        "n_layer": n_layers,
        "n_head": n_heads,
        "n_positions": context,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    few_experts = {"num_experts_per_tok": 2, "moe_intermediate_size": d_model}
    falcon = {
        "vocab_size": vocab_size,
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
    }
    latent_attention = {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 12,
    }
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    # Sliding windows are shorter than the tests' windows, so that they matter.
    sliding = {"sliding_window": 6}
    makers = {
        "gpt2": lambda: tf.GPT2Config(**gpt2_like),
        "gptj": lambda: tf.GPTJConfig(**gpt2_like, rotary_dim=4),
        "gpt_neox": lambda: tf.GPTNeoXConfig(**common, use_parallel_residual=True),
        "gpt_neox_serial": lambda: tf.GPTNeoXConfig(**common, use_parallel_residual=False),
        "llama": lambda: tf.LlamaConfig(**common, **grouped),
        "qwen2": lambda: tf.Qwen2Config(**common, **grouped),
        "qwen3": lambda: tf.Qwen3Config(**common, **grouped, **head),
        "mistral": lambda: tf.MistralConfig(**common, **grouped, **sliding),
        "gemma": lambda: tf.GemmaConfig(**common, **grouped, **head),
        "gemma2": lambda: tf.Gemma2Config(**common, **grouped, **head, **sliding),
        "gemma3": lambda: tf.Gemma3TextConfig(**common, **grouped, **head, **sliding),
        "olmo2": lambda: tf.Olmo2Config(**common, **grouped),
        "bert": lambda: tf.BertConfig(**common | {"pad_token_id": 0}),
        "roberta": lambda: tf.RobertaConfig(
            **common | {"pad_token_id": 1, "max_position_embeddings": context + 2}
        ),
        "modernbert": lambda: tf.ModernBertConfig(
            **common | {"pad_token_id": 0},
            local_attention=8,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        "opt": lambda: tf.OPTConfig(
            **common | {"ffn_dim": 3 * d_model, "pad_token_id": 1}, word_embed_proj_dim=d_model
        ),
        "qwen3_moe": lambda: tf.Qwen3MoeConfig(
            **common, **grouped, **head, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=d_model
        ),
        "bloom": lambda: tf.BloomConfig(
            vocab_size=vocab_size,
            hidden_size=d_model,
            n_layer=n_layers,
            n_head=n_heads,
            bos_token_id=0,
            eos_token_id=0,
        ),
        "falcon": lambda: tf.FalconConfig(**falcon),
        "falcon_new": lambda: tf.FalconConfig(**falcon, new_decoder_architecture=True, num_kv_heads=2),
        "falcon_serial": lambda: tf.FalconConfig(**falcon, parallel_attn=False, multi_query=False),
        "gpt_neo": lambda: tf.GPTNeoConfig(
            vocab_size=vocab_size,
            hidden_size=d_model,
            num_layers=n_layers,
            num_heads=n_heads,
            attention_types=[[["global"], 1], [["local"], n_layers - 1]],
            window_size=6,
            max_position_embeddings=context,
            bos_token_id=0,
            eos_token_id=0,
        ),
        "gpt_bigcode": lambda: tf.GPTBigCodeConfig(**gpt2_like),
        "phi": lambda: tf.PhiConfig(**common, **grouped),
        "phi3": lambda: tf.Phi3Config(**common, **grouped),
        "stablelm": lambda: tf.StableLmConfig(**common, **grouped),
        "stablelm_parallel": lambda: tf.StableLmConfig(**common, **grouped, use_parallel_residual=True),
        "cohere": lambda: tf.CohereConfig(**common, **grouped),
        "cohere2": lambda: tf.Cohere2Config(**common, **grouped, **sliding),
        "glm": lambda: tf.GlmConfig(**common, **grouped, **head),
        "glm4": lambda: tf.Glm4Config(**common, **grouped, **head),
        "mpt": lambda: tf.MptConfig(
            d_model=d_model,
            n_heads=n_heads,
            n_layers=n_layers,
            vocab_size=vocab_size,
            max_seq_len=context,
            expansion_ratio=3,
        ),
        "olmo": lambda: tf.OlmoConfig(**common, **grouped),
        "olmo3": lambda: tf.Olmo3Config(**common, **grouped, **sliding),
        "exaone4": lambda: tf.Exaone4Config(**common, **grouped),
        "granite": lambda: tf.GraniteConfig(**common, **grouped),
        "starcoder2": lambda: tf.Starcoder2Config(**common, **grouped),
        "smollm3": lambda: tf.SmolLM3Config(**common, **grouped),
        "nemotron": lambda: tf.NemotronConfig(**common, **grouped),
        "persimmon": lambda: tf.PersimmonConfig(**common),
        "xglm": lambda: tf.XGLMConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            num_layers=n_layers,
            attention_heads=n_heads,
            ffn_dim=3 * d_model,
            max_position_embeddings=context,
        ),
        "opt_post_norm": lambda: tf.OPTConfig(
            **common | {"ffn_dim": 3 * d_model, "pad_token_id": 1},
            word_embed_proj_dim=d_model,
            do_layer_norm_before=False,
        ),
        "mixtral": lambda: tf.MixtralConfig(**common, **grouped, num_local_experts=4, num_experts_per_tok=2),
        "olmoe": lambda: tf.OlmoeConfig(**common, **grouped, num_experts=4, num_experts_per_tok=2),
        "qwen2_moe": lambda: tf.Qwen2MoeConfig(
            **common, **grouped, **few_experts, num_experts=4, shared_expert_intermediate_size=d_model
        ),
        "deepseek_v3": lambda: tf.DeepseekV3Config(
            **common,
            **few_experts,
            **latent_attention,
            num_key_value_heads=n_heads,
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        "gpt_oss": lambda: tf.GptOssConfig(
            **common,
            **grouped,
            **head,
            **sliding,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        ),
        "phimoe": lambda: tf.PhimoeConfig(**common, **grouped, num_local_experts=4, num_experts_per_tok=2),
        "granitemoe": lambda: tf.GraniteMoeConfig(
            **common, **grouped, num_local_experts=4, num_experts_per_tok=2
        ),
        "llama4": lambda: tf.Llama4TextConfig(
            **common,
            **grouped,
            **head,
            num_local_experts=4,
            intermediate_size_mlp=3 * d_model,
            interleave_moe_layer_step=2,
        ),
        "distilbert": lambda: tf.DistilBertConfig(
            vocab_size=vocab_size,
            dim=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            hidden_dim=3 * d_model,
            max_position_embeddings=context,
        ),
        "electra": lambda: tf.ElectraConfig(**common | {"pad_token_id": 0}, embedding_size=d_model // 2),
        "deberta": lambda: tf.DebertaConfig(**common | {"pad_token_id": 0}, **relative),
        "deberta_v2": lambda: tf.DebertaV2Config(
            **common | {"pad_token_id": 0},
            **relative,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        ),
        "xlm_roberta": lambda: tf.XLMRobertaConfig(
            **common | {"pad_token_id": 1, "max_position_embeddings": context + 2}
        ),
        "roberta_prelayernorm": lambda: tf.RobertaPreLayerNormConfig(
            **common | {"pad_token_id": 1, "max_position_embeddings": context + 2}
        ),
        "t5": lambda: tf.T5Config(
            vocab_size=vocab_size, d_model=d_model, num_layers=n_layers, num_heads=n_heads, d_kv=8
        ),
    }
    return makers[family]()


def build_tokenizer(
    path: str | os.PathLike[str], *, vocab_size: int = VOCAB_SIZE, bert: bool = False
) -> None:
    """Save the tokenizer as `PreTrainedTokenizerFast` does, in folder `path`.

    Args:
        path: Folder.
        vocab_size: Tokens, at least 256 bytes and the special ones.
        bert: Whether a text gets `[CLS]` before and `[SEP]` behind it; without, no special tokens are added.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "<|endoftext|>"} if bert else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json(vocab_size, bert)),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        **special,
    )
    tokenizer.save_pretrained(path)


@functools.cache
def tokenizer_json(vocab_size: int = VOCAB_SIZE, bert: bool = False) -> str:
    """Return a byte-level BPE tokenizer trained on the help texts that come with Python."""
    import pydoc_data.topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "[CLS]", "[SEP]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(pydoc_data.topics.topics.values()), trainer)
    if bert:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer.to_str()


def cached(family: str, **options: object) -> str:
    """Return a folder with such a model, built once per process and removed at its end; do not write to it."""
    return _cached_folder(family, tuple(sorted(options.items())))


@functools.cache
def _cached_folder(family: str, items: tuple[tuple[str, object], ...]) -> str:
    folder = tempfile.mkdtemp(prefix=f"tiny-{family}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build(family, folder, **dict(items))
    return folder


class _quiet:
    """Keeps transformers' progress bars and notices out of the tests' output."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._verbosity, self._bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._verbosity)
        if self._bars:
            logging.enable_progress_bar()
