"""Which models the libraries know, as of the versions that `constraints.txt` pins; a test compares.

They are listed so that a dry run need not import them, and the service that checks a job need not have them.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TRANSFORMERS = "transformers 5.12.1"
MEGATRON_BRIDGE = "megatron-bridge 0.6.2"
SGLANG = "SGLang 0.5.21"

TYPES = _names(
    """
afmoe apertus arcee aria_text bamba bart bert bert-generation big_bird bigbird_pegasus biogpt bitnet blenderbot
blenderbot-small bloom blt camembert codegen cohere cohere2 cohere2_moe cpmant ctrl cwm data2vec-text dbrx
deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 electra emu3 ernie ernie4_5 ernie4_5_moe
exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo fuyu gemma gemma2 gemma3 gemma3_text gemma3n
gemma3n_text gemma4 gemma4_assistant gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text git
glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese
gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
hunyuan_v1_moe hy_v3 hyperclovax jais2 jamba jetmoe laguna lfm2 lfm2_moe llama llama4 llama4_text longcat_flash
mamba mamba2 marian mbart megatron-bert mellum minimax minimax_m2 minimax_m3_vl_text ministral ministral3
mistral mixtral mllama modernbert-decoder moshi mpt musicgen musicgen_melody mvp nanochat nemotron nemotron_h
olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi phi3 phi4_multimodal phimoe plbart
prophetnet qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
recurrent_gemma reformer rembert roberta roberta-prelayernorm roc_bert roformer rwkv seed_oss smollm3 solar_open
stablelm starcoder2 trocr vaultgemma whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod youtu zamba
zamba2
    """
)
"""Model types of which transformers has a causal language model."""

OWN_TYPES = _names("mimo")
"""Model types that `miles.weights.hf_folder` makes known to transformers."""

BRIDGED = _names(
    """
DeepseekV2ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM Exaone4ForCausalLM ExaoneMoeForCausalLM
FalconH1ForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma4ForCausalLM
Gemma4ForConditionalGeneration GemmaForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM
GptOssForCausalLM HYV3ForCausalLM LlamaForCausalLM MiniMaxM2ForCausalLM MistralForCausalLM NemotronForCausalLM
NemotronHForCausalLM OlmoeForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM
Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM
    """
)
"""Architectures among those that megatron-bridge converts."""

OWN_ARCHITECTURES = _names("MiMoForCausalLM")
"""Architectures of `OWN_TYPES`, which megatron-bridge converts and SGLang serves."""

SERVED = _names(
    """
AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM CohereForCausalLM
DbrxForCausalLM DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM
Ernie4_5_MoeForCausalLM Exaone4ForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM GPT2LMHeadModel
GPTBigCodeForCausalLM GPTJForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration
Gemma3nForCausalLM Gemma3nForConditionalGeneration Gemma4AssistantForCausalLM Gemma4ForCausalLM
Gemma4ForConditionalGeneration Gemma4UnifiedAssistantForCausalLM Gemma4UnifiedForConditionalGeneration
GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM
GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM
GraniteMoeSharedForCausalLM HYV3ForCausalLM HrmTextForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM
LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM Llama4ForCausalLM LlamaForCausalLM LongcatFlashForCausalLM
Mamba2ForCausalLM MambaForCausalLM MellumForCausalLM MiniMaxM2ForCausalLM Ministral3ForCausalLM
MistralForCausalLM MixtralForCausalLM NemotronHForCausalLM OPTForCausalLM Olmo2ForCausalLM OlmoForCausalLM
OlmoeForCausalLM PersimmonForCausalLM Phi3ForCausalLM PhiForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM
Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM
StableLmForCausalLM Starcoder2ForCausalLM
    """
)
"""Architectures among those that SGLang has an implementation of its own for. It runs others by transformers' own code,
into which weights are not loaded as they are published."""
