"""Our weights as one GGUF file, which llama.cpp, Ollama and LM Studio open, and a Modelfile.

    write_model(folder, config, weights, tokenizer_json, "q8_0", name="town")

The architecture is `llama`. In llama.cpp its experts may lack the gate matrix, and then they
compute silu(x·W1)W2 with a softmax over the chosen experts, which is our MoE. A dense model is the
same with one expert and a router of zeros, at no cost in size. A dense model with biases (experts
have none) takes llama's gated FFN instead: gate = W1, up = the constant 1.

llama.cpp has an architecture `arcee` too, but computes relu² in it whatever the file says.

Its tokenizer splits text by one of its own rules; `qwen2` is the one that agrees with ours. The
package gguf is optional: `pip install gguf`.
"""
import json
import os
import re

import torch

from minillm.errors import UserError
from minillm.export_hf import NORM_EPS, split_qkv
from minillm.sampling_params import DEFAULTS
from minillm.tokenizer import END_OF_TEXT, IM_END

FILES = ("model.gguf", "Modelfile")
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16",
              "q8_0": "MOSTLY_Q8_0"}
LONG_RUN = 1024              # characters; llama.cpp's pre-tokens have no longest

# as minillm.tokenizer.CHAT_TEMPLATE, without the marks that only transformers knows
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# As chat.py without flags; Ollama's own defaults are others
MODELFILE = '''FROM ./model.gguf
TEMPLATE """{{{{- range .Messages }}}}<|im_start|>{{{{ .Role }}}}
{{{{ .Content }}}}<|im_end|>
{{{{ end }}}}<|im_start|>assistant
"""
PARAMETER stop "<|im_end|>"
PARAMETER num_ctx {block_size}
PARAMETER temperature {d.temperature}
PARAMETER top_k {d.top_k}
PARAMETER top_p {d.top_p}
PARAMETER min_p 0.0
PARAMETER repeat_penalty {d.repetition_penalty}
'''


def import_gguf():
    """The module gguf. Raises UserError if it isn't installed."""
    try:
        import gguf                              # optional: only --format=gguf needs it
        gguf.GGUFWriter                          # a folder of that name is imported as well
    except (ImportError, AttributeError):
        raise UserError("--format=gguf needs the package gguf: pip install gguf") from None
    return gguf


def check(config):
    """Raise UserError if llama.cpp can't compute the model, or the package gguf is missing."""
    if config.n_expert and config.n_expert_per_tok == 1:
        raise UserError("n_expert_per_tok=1 can't be exported: llama.cpp gives a single expert "
                        "the weight 1, GPT its probability")
    import_gguf()


def write_model(folder, config, weights, tokenizer_json, dtype, name):
    """Write model.gguf and Modelfile into `folder`.

    config: a GPTConfig; weights: the model's state dict, float32; tokenizer_json: read_tokenizer's;
    dtype: a key of TYPES, of the matrices. Norms, biases and routers stay float32. OSError if the
    disk is full.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(os.path.join(folder, "model.gguf"), "llama")
    writer.add_name(name.encode("utf-8", "backslashreplace").decode())   # it need not be UTF-8
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    add_shape(writer, config)
    vocab_size = add_tokenizer(writer, gguf, tokenizer_json)
    for tensor_name, tensor in to_llama_cpp(config, weights, vocab_size).items():
        kind = tensor_type(gguf, tensor_name, tensor, dtype)
        data = gguf.quants.quantize(tensor.contiguous().numpy(), kind)
        writer.add_tensor(tensor_name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    try:
        writer.write_tensors_to_file()
    except OSError as error:
        # numpy says how much it has written, and not why it stopped
        reason = error.strerror or "No space left on device, or a limit on the size of a file"
        raise OSError(error.errno, reason) from None
    writer.close()
    with open(os.path.join(folder, "Modelfile"), "w", encoding="utf-8") as file:
        file.write(MODELFILE.format(block_size=config.block_size, d=DEFAULTS))


def tensor_type(gguf, name, tensor, dtype):
    """The GGMLQuantizationType that a tensor is written in."""
    if tensor.dim() == 1 or "ffn_gate_inp" in name:
        return gguf.GGMLQuantizationType.F32
    if dtype == "q8_0" and tensor.shape[-1] % 32:        # it packs 32 numbers of a row together
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[TYPES[dtype]]


def add_shape(writer, config):
    """The sizes of the model, by llama.cpp's keys."""
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_dimension_count(config.n_embd // config.n_head)
    writer.add_rope_freq_base(config.rope_theta)
    if not config.bias:
        writer.add_expert_count(config.n_expert or 1)
        writer.add_expert_used_count(config.n_expert_per_tok if config.n_expert else 1)


def add_tokenizer(writer, gguf, tokenizer_json):
    """Vocabulary, merges and special tokens; returns the number of tokens."""
    vocab, merges = tokenizer_json["model"]["vocab"], tokenizer_json["model"]["merges"]
    added = {token["content"]: token for token in tokenizer_json["added_tokens"]}
    ids = vocab | {text: token["id"] for text, token in added.items()}
    tokens = sorted(ids, key=ids.get)
    writer.add_tokenizer_model("gpt2")           # byte-level BPE
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([token_type(gguf, added.get(token)) for token in tokens])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(IM_END)
    writer.add_eot_token_id(IM_END)
    writer.add_pad_token_id(END_OF_TEXT)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_vocab_size(len(tokens))
    writer.add_chat_template(CHAT_TEMPLATE)
    return len(tokens)


def token_type(gguf, added):
    """Whether llama.cpp finds a token in any text, where it is told to, or by merges alone.

    added: what tokenizer.json's added_tokens say of it, or None.
    """
    if added is None:
        return gguf.TokenType.NORMAL             # written in byte-level BPE
    if added["special"]:
        return gguf.TokenType.CONTROL
    return gguf.TokenType.USER_DEFINED           # written as it is


def read_tokenizer(folder):
    """tokenizer.json of `folder`, a dict. UserError if llama.cpp can't split text as it does."""
    with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as file:
        tokenizer_json = json.load(file)
    if "NFKC" in json.dumps(tokenizer_json["normalizer"]):
        raise UserError(f"the tokenizer in {folder} folds characters (nfkc=True), llama.cpp can't: "
                        "--format=hf keeps it")
    return tokenizer_json


def shortest_cap(tokenizer_json):
    """The longest run of letters, signs or spaces that the tokenizer keeps whole, in characters."""
    pattern = json.dumps(tokenizer_json["pre_tokenizer"])
    return min((int(cap) for cap in re.findall(r"\{1,(\d+)\}", pattern)), default=LONG_RUN)


def to_llama_cpp(config, weights, vocab_size):
    """The tensors by llama.cpp's names, float32."""
    tensors = {"token_embd.weight": weights["wte.weight"][:vocab_size],
               "output_norm.weight": weights["norm.weight"]}
    for i in range(config.n_layer):
        here, there = f"blocks.{i}.", f"blk.{i}."
        tensors[there + "attn_norm.weight"] = weights[here + "attn_norm.weight"]
        tensors[there + "ffn_norm.weight"] = weights[here + "ffn_norm.weight"]
        for what in ("weight", "bias")[: 1 + config.bias]:
            q, k, v = split_qkv(config, weights[here + f"attn.qkv.{what}"])
            tensors[there + f"attn_q.{what}"] = interleave(q, config.n_head)
            tensors[there + f"attn_k.{what}"] = interleave(k, config.n_kv_head)
            tensors[there + f"attn_v.{what}"] = v
            tensors[there + f"attn_output.{what}"] = weights[here + f"attn.proj.{what}"]
        if config.n_expert:
            ffn = moe_tensors(weights, here + "ffn.")
        elif config.bias:
            ffn = gated_tensors(config, weights, here + "ffn.")
        else:
            ffn = one_expert_tensors(config, weights, here + "ffn.")
        tensors |= {there + name: tensor for name, tensor in ffn.items()}
    return tensors


def interleave(rows, n_head):
    """Reorder the rows of q or k: RoPE in `llama` turns neighbours, ours turns i and i + half."""
    first_halves = rows.unflatten(0, (n_head, 2, -1))    # (head, half, pair, ...)
    return first_halves.transpose(1, 2).flatten(0, 2)


def moe_tensors(weights, ffn):
    return {"ffn_gate_inp.weight": weights[ffn + "router.weight_DE"].t(),
            "ffn_up_exps.weight": weights[ffn + "w1_EDF"].transpose(1, 2),
            "ffn_down_exps.weight": weights[ffn + "w2_EFD"].transpose(1, 2)}


def one_expert_tensors(config, weights, ffn):
    """A dense FFN as the only expert."""
    return {"ffn_gate_inp.weight": torch.zeros(1, config.n_embd),
            "ffn_up_exps.weight": weights[ffn + "up.weight"][None],
            "ffn_down_exps.weight": weights[ffn + "down.weight"][None]}


def gated_tensors(config, weights, ffn):
    """A dense FFN with biases as silu(gate) * up, where up is the constant 1."""
    up = weights[ffn + "up.weight"]
    return {"ffn_gate.weight": up, "ffn_gate.bias": weights[ffn + "up.bias"],
            "ffn_up.weight": torch.zeros_like(up), "ffn_up.bias": torch.ones(config.n_inner),
            "ffn_down.weight": weights[ffn + "down.weight"],
            "ffn_down.bias": weights[ffn + "down.bias"]}
