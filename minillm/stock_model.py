"""What an exported model computes in transformers, in plain torch: is it what GPT computes?

    check(model)                         # UserError unless export_hf.py can express it, with its
                                         # chat template

llama.cpp computes the same from the file of export_gguf.py. tests/test_export.py compares with
transformers itself; here nothing but torch is needed, so each export checks.
"""
import torch
from torch.nn import functional as F

from minillm.errors import UserError
from minillm.export_hf import pick_kind, to_transformers, transformers_config
from minillm.same_function import VOCAB, copies, in_a_line, one_thread, same, text
from minillm.tokenizer import IM_END, IM_START, ROLES


def check(model):
    """Raise UserError if the code computes what no stock class does, or has another chat template.

    Then the exported weights would be right, and everything made of them wrong.
    """
    if model.tokenizer and not has_stock_template(model.tokenizer):
        raise UserError("the formats hold the chat template of the original encode_chat, and "
                        "minillm/tokenizer.py writes another: change CHAT_TEMPLATE there, the two "
                        "templates in minillm/export_gguf.py, and minillm/stock_model.py as well")
    pick_kind(model.config)                      # raises its own
    try:
        if all(is_stock(copy) for copy in copies(model)):
            return
        why = ""
    except Exception as error:                   # of code that we do not know: other names, sizes
        why = f" ({in_a_line(error)})"
    raise UserError("the formats hold the function of the original model.py and moe.py, and these "
                    f"compute another{why}: change minillm/export_hf.py, export_gguf.py and "
                    "stock_model.py as well, or use the model with chat.py and serve.py")


@one_thread()
@torch.no_grad()
def is_stock(copy):
    """Does a small copy compute what the stock class computes from its exported tensors?"""
    kind = pick_kind(copy.config)
    tensors, _ = to_transformers(copy.config, copy.state_dict(), VOCAB, kind)
    config = transformers_config(copy.config, VOCAB, kind, torch.float64)
    return same(logits(config, tensors, text(copy)[0]), copy(text(copy))[0])


def has_stock_template(tokenizer):
    """Does encode_chat write what tokenizer.CHAT_TEMPLATE and those of export_gguf.py write?"""
    chat = [{"role": role, "content": role} for role in (*ROLES, "user")]
    expected = []
    for message in chat:
        expected += [IM_START, *tokenizer.encode(message["role"] + "\n")]
        expected += [*tokenizer.encode(message["content"]), IM_END, *tokenizer.encode("\n")]
    expected += [IM_START, *tokenizer.encode("assistant\n")]
    return tokenizer.encode_chat(chat, add_generation_prompt=True)[0] == expected


def logits(config, tensors, ids):
    """(T,) → (T, V), by config.json and tensors with transformers' names."""
    x = tensors["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
                 if name.startswith(prefix)}
        x = x + attention(config, layer, norm(config, layer["input_layernorm.weight"], x))
        ffn = experts if config["model_type"] == "mixtral" else mlp
        x = x + ffn(config, layer, norm(config, layer["post_attention_layernorm.weight"], x))
    return norm(config, tensors["model.norm.weight"], x) @ tensors["model.embed_tokens.weight"].t()


def norm(config, weight, x):
    return weight * x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()


def linear(layer, name, x):
    return F.linear(x, layer[f"{name}.weight"], layer.get(f"{name}.bias"))


def attention(config, layer, x):
    """x: (T, D) → (T, D)."""
    heads = []
    for name in "qkv":
        heads.append(linear(layer, f"self_attn.{name}_proj", x)
                     .unflatten(1, (-1, config["head_dim"])).transpose(0, 1))   # (heads, T, hd)
    q, k, v = heads
    q, k = rotated(config, q), rotated(config, k)
    y = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
    return linear(layer, "self_attn.o_proj", y[0].transpose(0, 1).flatten(1))


def rotated(config, x):
    """RoPE: channels i and i + half of x (heads, T, head_dim) as one complex number."""
    half = config["head_dim"] // 2
    frequency = config["rope_theta"] ** -(torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequency
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(angle.new_ones(()), angle)
    return torch.cat((turned.real, turned.imag), -1)


def activation(config, x):
    return {"silu": F.silu, "sigmoid": torch.sigmoid}[config["hidden_act"]](x)


def check_width(config, weight):
    """Raise ValueError for an FFN or expert of another width than config.json can say."""
    if len(weight) != config["intermediate_size"]:
        raise ValueError(f"an FFN is {len(weight)} wide, n_inner is {config['intermediate_size']}")


def mlp(config, layer, x):
    """Arcee's: two matrices. (Llama's export is these with another name and a gate of 1.)"""
    check_width(config, layer["mlp.up_proj.weight"])
    return linear(layer, "mlp.down_proj", activation(config, linear(layer, "mlp.up_proj", x)))


def experts(config, layer, x):
    scores = linear(layer, "block_sparse_moe.gate", x)
    gates, chosen = scores.softmax(-1).topk(config["num_experts_per_tok"])
    gates = gates / gates.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e in range(config["num_local_experts"]):
        w1, w2, w3 = (layer[f"block_sparse_moe.experts.{e}.w{n}.weight"] for n in (1, 2, 3))
        check_width(config, w1)
        gate = (gates * (chosen == e)).sum(-1, keepdim=True)
        y = y + gate * ((activation(config, x @ w1.t()) * (x @ w3.t())) @ w2.t())
    return y
