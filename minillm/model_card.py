"""README.md of an exported model: how to use it, and where it differs from what one may expect."""
import json
import os
import shlex

CARD = """---
{header}pipeline_tag: text-generation
language: zh
tags: [mini-llm]
---
# A {kind} language model of {millions:,.1f}M parameters

Trained with mini-llm, {step:,} steps.

| | |
|---|---|
| layers, width, FFN | {n_layer}, {n_embd}, {n_inner} |
| query heads, key/value heads | {n_head}, {n_kv_head} |
{experts}| context | {block_size:,} tokens |
| vocabulary | {vocab_size:,} tokens |
| weights in this folder | {dtype} |

{usage}
## Know before you use it

{notes}
"""

HEADERS = {"hf": "library_name: transformers\n", "gguf": ""}
USAGES = {"hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({quoted})
tokenizer = AutoTokenizer.from_pretrained({quoted})
messages = [{{"role": "user", "content": "你好"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
""", "gguf": """```
llama-cli -m {gguf}
ollama create my-model -f {modelfile} && ollama run my-model
```
"""}

NOTES = {
    "document": (
        "A document begins after `<|endoftext|>`: to continue a text from its start, put it before "
        "the text. The tokenizer adds nothing by itself."),
    "control": (
        "Text that spells `<|im_start|>`, `<|im_end|>` or `<|endoftext|>` becomes a control token "
        "there (mini-llm encodes it as plain text). Remove these strings from what users type."),
    "raw text": (
        "A chat message that spells `<|im_end|>` stays text, the chat template sees to it. In text "
        "that the tokenizer is given without the template, it becomes a control token."),
    "masks": (
        "It was trained with document masks: attention never crossed `<|endoftext|>`. Programs "
        "that know no such mask score it otherwise where documents are packed into one row. Give "
        "each document a row of its own."),
    "mixtral": (
        "It is stored as Mixtral with `hidden_act=\"sigmoid\"` and w1 = w3, because "
        "sigmoid(x·W1) * (x·W1) is silu(x·W1), the FFN of two matrices that was trained. The "
        "extra matrix takes half as much again for the experts, in memory and in arithmetic. "
        "Fine-tuning moves w1 and w3 apart; such a model can't go back to mini-llm."),
    "llama": (
        "It is stored as Llama, whose FFN has a gate. The up projection is the constant 1 (weight "
        "0, bias 1), so it computes silu(x·W1)W2, the FFN of two matrices that was trained. The "
        "extra matrix takes half as much again for the FFN."),
    "gguf": (
        "The architecture is `llama` with experts that have no gate, so they compute silu(x·W1)W2. "
        "A dense model has one expert. llama.cpp's own converter can't write this file: it takes "
        "the FFN for relu²."),
    "runs": (
        "Its tokenizer cuts long runs of spaces, signs or letters, llama.cpp doesn't: a line that "
        "is indented very deeply may get other tokens there."),
    "arcee": (
        "It is stored as Arcee with `hidden_act=\"silu\"`. Programs that take relu² for every "
        "Arcee model compute something else, without a word. llama.cpp's converter is one: use "
        "the GGUF that mini-llm writes."),
}


def write_card(folder, model, format, name, dtype, notes):
    """Write `folder`/README.md.

    format: hf or gguf; name: what the example opens; dtype: as said; notes: keys of NOTES.
    """
    config = model.config
    total, active = model.n_params()
    experts, per_token = "", config.n_expert_per_tok
    if config.n_expert:
        experts = f"| experts, of these per token | {config.n_expert}, {per_token} |\n"
    text = CARD.format(
        header=HEADERS[format], kind="MoE" if config.n_expert else "dense", millions=total / 1e6,
        step=model.step, n_layer=config.n_layer, n_embd=config.n_embd, n_inner=config.n_inner,
        n_head=config.n_head, n_kv_head=config.n_kv_head, experts=experts, dtype=dtype,
        block_size=config.block_size, vocab_size=model.tokenizer.vocab_size,
        usage=USAGES[format].format(
            quoted=json.dumps(name, ensure_ascii=False),
            gguf=shlex.quote(f"{name}/model.gguf"), modelfile=shlex.quote(f"{name}/Modelfile")),
        notes="\n".join(f"- {NOTES[note]}" for note in notes))
    # a folder's name need not be UTF-8
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8",
              errors="backslashreplace") as file:
        file.write(text)
