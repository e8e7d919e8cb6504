"""Our weights under the names of Hugging Face transformers, and back.

    write_model(folder, config, weights, vocab_size, kind)   # config.json, model.safetensors, ...
    start = read_model("out/demo_sft/hf")                    # train.py --init_from=hf:FOLDER

A stock class computes the same function, so nobody runs code of ours (no trust_remote_code):

    dense   ArceeForCausalLM with hidden_act="silu": the same layers under other names.
    llama   LlamaForCausalLM, for engines that know Arcee only with relu². Its FFN has a gate,
            silu(x·gate) * (x·up), so gate = W1 and up is the constant 1: weight 0, bias 1.
    MoE     MixtralForCausalLM with hidden_act="sigmoid" and w1 = w3 = W1. Its experts compute
            sigmoid(x·W1) * (x·W1), which is silu(x·W1). W1 is stored twice.

What transformers has no place for (the router's noise, rows of the embedding that stand for no
token) goes into training.safetensors, so a folder that is read back is the same to the bit.
safetensors is an optional package: `pip install safetensors`.
"""
import json
import os
import shutil
from types import SimpleNamespace

import torch

from minillm.errors import UserError
from minillm.sampling_params import DEFAULTS
from minillm.tokenizer import END_OF_TEXT, IM_END, IM_START, Tokenizer

ARCHITECTURES = {
    "arcee": ("ArceeForCausalLM", "silu"),
    "llama": ("LlamaForCausalLM", "silu"),
    "mixtral": ("MixtralForCausalLM", "sigmoid"),
}
NORM_EPS = 1e-6
FILES = ("config.json", "generation_config.json", "model.safetensors", "training.safetensors",
         "tokenizer.json", "tokenizer_config.json")


def pick_kind(config, stock="auto"):
    """The key of ARCHITECTURES for a model. UserError where `stock` doesn't fit it."""
    if config.n_expert and stock == "llama":
        raise UserError("--stock=llama is for dense models: an MoE model is exported as Mixtral")
    if config.n_expert and config.n_expert_per_tok == 1:
        raise UserError("n_expert_per_tok=1 can't be exported: Mixtral gives a single expert "
                        "the weight 1, GPT its probability")
    if config.n_expert:
        return "mixtral"
    return "llama" if stock == "llama" else "arcee"


def write_model(folder, config, weights, vocab_size, kind, dtype=torch.float32):
    """Write config.json, generation_config.json and the weights into `folder`.

    config: a GPTConfig; weights: the model's state dict; vocab_size: the tokenizer's;
    kind: a key of ARCHITECTURES; dtype: of the weights in the file. OSError if the disk is full.
    """
    safetensors = import_safetensors()
    tensors, training = to_transformers(config, weights, vocab_size, kind)
    # every tensor by itself in memory: safetensors refuses two that share it
    tensors = {name: tensor.to(dtype).clone().contiguous() for name, tensor in tensors.items()}
    training = {name: tensor.clone() for name, tensor in training.items()}
    save_file = safetensors.torch.save_file
    try:
        save_file(tensors, os.path.join(folder, "model.safetensors"), {"format": "pt"})
        if training:
            save_file(training, os.path.join(folder, "training.safetensors"))
    except safetensors.SafetensorError as error:             # a full disk, above all
        raise OSError(str(error)) from None
    _write_json(folder, "config.json", transformers_config(config, vocab_size, kind, dtype))
    _write_json(folder, "generation_config.json", {
        # as chat.py without flags
        "do_sample": True, "temperature": DEFAULTS.temperature, "top_k": DEFAULTS.top_k,
        "max_new_tokens": DEFAULTS.max_new_tokens,
        "eos_token_id": [IM_END, END_OF_TEXT, IM_START], "pad_token_id": END_OF_TEXT,
    })


def write_tokenizer(folder, source, block_size):
    """Copy the tokenizer in the folder `source`; the settings that transformers needs beside it."""
    shutil.copyfile(os.path.join(source, "tokenizer.json"), os.path.join(folder, "tokenizer.json"))
    config = Tokenizer.load(source).transformers_config() | {"model_max_length": block_size}
    _write_json(folder, "tokenizer_config.json", config)


def import_safetensors():
    """The module safetensors. Raises UserError if it isn't installed."""
    try:
        import safetensors.torch             # optional: only export.py and --init_from=hf: need it
    except ImportError:
        raise UserError("the format hf needs safetensors: pip install safetensors") from None
    return safetensors


def transformers_config(config, vocab_size, kind, dtype):
    """config.json of a model, a dict that transformers 4 and 5 read."""
    architecture, activation = ARCHITECTURES[kind]
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    result = {
        "architectures": [architecture], "model_type": kind,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab_size, "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd, "intermediate_size": config.n_inner,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head, "head_dim": config.n_embd // config.n_head,
        "hidden_act": activation, "rms_norm_eps": NORM_EPS, "tie_word_embeddings": True,
        # the first is read by transformers 4, the second by 5
        "rope_theta": config.rope_theta, "rope_parameters": rope,
        "attention_dropout": 0.0, "initializer_range": config.init_std, "use_cache": True,
        "bos_token_id": None, "eos_token_id": IM_END, "pad_token_id": END_OF_TEXT,
    }
    if kind == "mixtral":
        result |= {"num_local_experts": config.n_expert, "sliding_window": None,
                   "num_experts_per_tok": config.n_expert_per_tok}
    else:
        result |= {"attention_bias": config.bias, "mlp_bias": config.bias or kind == "llama"}
    return result


def to_transformers(config, weights, vocab_size, kind):
    """(tensors by transformers' names, tensors that only training needs by ours)."""
    tensors, training = {}, {}
    for name, theirs in shared_names(config, kind):
        parts = split_qkv(config, weights[name]) if len(theirs) == 3 else [weights[name]]
        tensors |= zip(theirs, parts)
    embedding = "model.embed_tokens.weight"
    if vocab_size < config.vocab_size:
        training["wte.weight"] = tensors[embedding][vocab_size:].contiguous()
        tensors[embedding] = tensors[embedding][:vocab_size]
    for i in range(config.n_layer):
        here, there = f"blocks.{i}.ffn.", f"model.layers.{i}."
        if kind == "mixtral":
            moe = there + "block_sparse_moe."
            tensors[moe + "gate.weight"] = weights[here + "router.weight_DE"].t()
            training[here + "router.noise_DE"] = weights[here + "router.noise_DE"].contiguous()
            for e in range(config.n_expert):
                w1, w2 = weights[here + "w1_EDF"][e].t(), weights[here + "w2_EFD"][e].t()
                expert = f"{moe}experts.{e}."
                tensors |= {expert + "w1.weight": w1, expert + "w3.weight": w1}
                tensors[expert + "w2.weight"] = w2
        if kind == "llama":
            gate = tensors[there + "mlp.gate_proj.weight"]
            tensors[there + "mlp.up_proj.weight"] = torch.zeros_like(gate)
            tensors[there + "mlp.up_proj.bias"] = gate.new_ones(config.n_inner)
        if kind == "llama" and not config.bias:
            # its mlp_bias is for all three of its matrices
            tensors[there + "mlp.gate_proj.bias"] = gate.new_zeros(config.n_inner)
            tensors[there + "mlp.down_proj.bias"] = gate.new_zeros(config.n_embd)
    return tensors, training


def from_transformers(config, tensors, training, kind):
    """The inverse of to_transformers: a state dict. UserError if they compute something else."""
    weights = {}
    for name, theirs in shared_names(config, kind):
        weights[name] = torch.cat([tensors[part].float() for part in theirs])
    if "wte.weight" in training:
        weights["wte.weight"] = torch.cat((weights["wte.weight"], training["wte.weight"]))
    for i in range(config.n_layer):
        here, there = f"blocks.{i}.ffn.", f"model.layers.{i}."
        if kind == "mixtral":
            moe = there + "block_sparse_moe."
            router = tensors[moe + "gate.weight"].float().t().contiguous()
            weights[here + "router.weight_DE"] = router
            noise = training.get(here + "router.noise_DE", torch.zeros_like(router))
            weights[here + "router.noise_DE"] = noise
            w1, w2, w3 = (_stack_experts(tensors, config, moe, part) for part in ("w1", "w2", "w3"))
            if not torch.equal(w1, w3):
                raise UserError(f"layer {i}: w1 and w3 of its experts differ: they have a gate")
            weights |= {here + "w1_EDF": w1, here + "w2_EFD": w2}
        if kind == "llama":
            up = tensors[there + "mlp.up_proj.weight"]
            if up.any() or not tensors[there + "mlp.up_proj.bias"].eq(1).all():
                raise UserError(f"layer {i}: mlp.up_proj isn't the constant 1: the FFN has a gate")
            biases = [tensors[f"{there}mlp.{part}_proj.bias"] for part in ("gate", "down")]
            if not config.bias and any(bias.any() for bias in biases):
                raise UserError(f"layer {i}: the FFN has biases and the attention has none")
    return weights


def shared_names(config, kind):
    """[(our name, [transformers' names])] of all tensors that are only renamed or split."""
    up = "gate_proj" if kind == "llama" else "up_proj"
    attention = [("attn.qkv", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
                 ("attn.proj", ["self_attn.o_proj"])]
    ffn = [("ffn.up", [f"mlp.{up}"]), ("ffn.down", ["mlp.down_proj"])]
    linear = attention if kind == "mixtral" else attention + ffn
    norms = [("attn_norm", ["input_layernorm"]), ("ffn_norm", ["post_attention_layernorm"])]
    modules = [(name, theirs, "weight") for name, theirs in norms + linear]
    if config.bias:
        modules += [(name, theirs, "bias") for name, theirs in linear]

    names = [("wte.weight", ["model.embed_tokens.weight"]), ("norm.weight", ["model.norm.weight"])]
    for i in range(config.n_layer):
        for name, theirs, what in modules:
            parts = [f"model.layers.{i}.{part}.{what}" for part in theirs]
            names.append((f"blocks.{i}.{name}.{what}", parts))
    return names


def split_qkv(config, qkv):
    """The rows of q, k and v in the matrix (or bias) that holds all three."""
    head_dim = config.n_embd // config.n_head
    kv_rows = config.n_kv_head * head_dim
    return qkv.split((config.n_embd, kv_rows, kv_rows))


def _stack_experts(tensors, config, moe, part):
    experts = range(config.n_expert)
    return torch.stack([tensors[f"{moe}experts.{e}.{part}.weight"].float().t() for e in experts])


def read_model(folder):
    """The weights in a folder that write_model made, as a checkpoint's dict for train.py.

    Keys: model, model_config, step (0), tokenizer_hash, tokenizer_dir. Other models of these
    classes are taken too, if they compute what GPT computes. UserError says what does not fit.
    """
    safetensors = import_safetensors()
    load_file = safetensors.torch.load_file
    SafetensorError = safetensors.SafetensorError
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8-sig") as file:
            theirs = json.load(file)
        kind = check_config(theirs)
        config = gpt_config(theirs, kind)
        tensors = load_file(os.path.join(folder, "model.safetensors"))
        if config["n_layer"] > len(tensors):
            raise UserError(f"num_hidden_layers is {config['n_layer']}, but model.safetensors "
                            f"holds only {len(tensors)} tensors")
        training = {}
        if os.path.exists(os.path.join(folder, "training.safetensors")):
            training = load_file(os.path.join(folder, "training.safetensors"))
        config["vocab_size"] += len(training.get("wte.weight", ()))
        weights = from_transformers(SimpleNamespace(**config), tensors, training, kind)
    except UserError as error:
        raise UserError(f"{folder} cannot be read back: {error}") from None
    except OSError as error:
        raise UserError(f"no model of export.py in {folder}: {error.strerror or error}") from None
    except KeyError as error:
        raise UserError(f"{folder} lacks {error}: it was not written by export.py") from None
    except (ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{folder} is damaged, or not written by export.py: {reason}") from None
    tokenizer_hash = Tokenizer.load(folder).hash
    return {"model": weights, "model_config": config, "step": 0, "tokenizer_hash": tokenizer_hash,
            "tokenizer_dir": folder}


def check_config(theirs):
    """The kind of model that a config.json describes. UserError if GPT can't compute the same."""
    kind = theirs["model_type"]
    if kind not in ARCHITECTURES:
        raise UserError(f"model_type {kind!r} is none of {', '.join(ARCHITECTURES)}")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    needed = {"hidden_act": ARCHITECTURES[kind][1], "rms_norm_eps": NORM_EPS,
              "tie_word_embeddings": True}
    for key, value in needed.items():
        if theirs[key] != value:
            raise UserError(f"{key} is {theirs[key]!r}, GPT has {value!r}")
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"rope_type is {rope['rope_type']!r}, GPT has 'default'")
    if kind == "arcee" and theirs["attention_bias"] != theirs["mlp_bias"]:
        raise UserError("attention_bias and mlp_bias differ, GPT has one bias for both")
    if kind == "mixtral" and theirs.get("sliding_window") is not None:
        raise UserError("it has a sliding window, GPT sees the whole context")
    return kind


def gpt_config(theirs, kind):
    """The keys of GPTConfig, from transformers' config.json."""
    rope = theirs.get("rope_parameters") or theirs
    config = {
        "block_size": theirs["max_position_embeddings"], "vocab_size": theirs["vocab_size"],
        "n_layer": theirs["num_hidden_layers"], "n_head": theirs["num_attention_heads"],
        "n_kv_head": theirs["num_key_value_heads"], "n_embd": theirs["hidden_size"],
        "n_inner": theirs["intermediate_size"], "rope_theta": float(rope["rope_theta"]),
        "dropout": 0.0, "bias": theirs.get("attention_bias", False), "n_expert": 0,
    }
    if kind == "mixtral":
        config |= {"n_expert": theirs["num_local_experts"],
                   "n_expert_per_tok": theirs["num_experts_per_tok"]}
    return config


def _write_json(folder, name, content):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
