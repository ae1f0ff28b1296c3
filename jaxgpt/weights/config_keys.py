"""The keys of a Hugging Face config.json. None that changes the language model's mathematics is ignored:

- those of a `GPTConfig`'s fields, which `huggingface.py` lists, are honoured, and two names of one field must agree;
- those in `OFF`, and `auto_map` with a model's own code, are refused by name, unless they leave the model as it is;
- those in `WITHOUT_EFFECT`, the rest of transformers' `GPT2Config`, are ignored, each for a reason;
- unknown ones whose names sound like mathematics (`MATHEMATICS`) are refused, unless they are false, 0, null or empty.
  transformers' own GPT-2 ignores them. But a file gets them from a fork, or from a model of another kind, where they
  had a meaning;
- all others, such as the defaults of generation in old files (`do_sample`, `bad_words_ids`, ...), are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxgpt.checks import short_repr
from jaxgpt.errors import ConfigError

# Keys that change the mathematics in a way that is not implemented, with the value that does not. False, 0, null and
# empty values do not either.
OFF: dict[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "per_layer_config": None,
    "quantization_config": None,
    "compression_config": None,  # an older name of quantization_config
    "position_embedding_type": "absolute",
}
# Reason: keys.
WITHOUT_EFFECT = {
    "the same function, computed in another way": (
        *("reorder_and_upcast_attn", "chunk_size_feed_forward", "use_cache", "gradient_checkpointing", "torchscript"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
    ),
    "the caller chooses the types": ("dtype", "torch_dtype", "use_bfloat16"),
    "for new parameters only": ("initializer_range",),
    "GPT-2 is causal whatever it says, and the others concern cross-attention": (
        *("is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder", "decoder_start_token_id"),
    ),
    "for heads that classify, whose tensors are reported as unexpected": (
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        *("num_labels", "id2label", "label2id", "problem_type", "finetuning_task", "classifier_dropout"),
    ),
    "what transformers returns": (
        *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "tie_last_hidden_states"),
    ),
    "defaults of generation, of which only those that sound like mathematics must be here": (
        *("sequence_bias", "guidance_scale", "dola_layers"),
    ),
    "the tokenizer's": (
        *("tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "prefix"),
        "jaxgpt_tokenizer",
    ),
    "what the file is, and where it comes from": (
        *("model_type", "architectures", "_name_or_path", "name_or_path", "_commit_hash", "transformers_version"),
        *("task_specific_params", "tf_legacy_loss"),
        "n_ctx",  # another name of n_positions, which transformers no longer reads
    ),
}
# A key with one of these words. A rate of dropout does not change the model.
MATHEMATICS = re.compile(
    "(?!.*drop)(.*_)?(attn|attention|(layer|rms)?norm|scale|scaling|activation|act|swiglu|geglu|glu|gated|rope|rotary|"
    "alibi|position|positional|embed|embedding|head|layer|expert|moe|mlp|ffn|bias|window|softcap|residual|parallel|"
    "query|mup)s?(_.*)?"
)


def refuse_other_mathematics(fields: Mapping[str, Any], honoured: Collection[str], source: str) -> None:
    """Raises a ConfigError for the first key that may change the mathematics in a way that is not implemented.

    Args:
        fields: the content of config.json.
        honoured: the keys that the caller reads.
        source: the file, for the error.
    """
    known = {*honoured, *(key for keys in WITHOUT_EFFECT.values() for key in keys)}
    for name, value in fields.items():
        if name in known or not value or value == OFF.get(name):
            continue
        if name in OFF:
            raise ConfigError(
                f"{source}: {name} must be {json.dumps(OFF[name])}, not {short_repr(value)}: not implemented"
            )
        if name == "auto_map" and "AutoModel" in str(value):
            raise ConfigError(f"{source}: auto_map names the model's own code, which is not run: {short_repr(value)}")
        if MATHEMATICS.fullmatch(name):
            raise ConfigError(
                f"{source}: {short_repr(name)} is no key of transformers' GPT-2, and {short_repr(value)} may change "
                "what the model computes: remove the key if it does not"
            )
