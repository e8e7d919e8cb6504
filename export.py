"""Write a trained model in the format that other programs open, without our code.

    python export.py                                    # the demo, for Hugging Face transformers
    python export.py --out_dir=out/sft --dtype=bfloat16
    python export.py --out_dir=out/sft --stock=llama    # dense, for engines that refuse Arcee
    python export.py --out_dir=out/sft --format=gguf --dtype=q8_0    # llama.cpp and Ollama
    python train.py --init_from=hf:out/sft/hf           # an exported folder trains on

--format=hf writes config.json, model.safetensors and the tokenizer; transformers 4.57 and 5 open
the folder. --format=gguf writes model.gguf and a Modelfile for `ollama create`. Both write a model
card (README.md) with what its users must know. In float32 the logits are the same up to rounding.

Needs `pip install -r requirements-export.txt`. Exit status: 0; 2 after a mistake that you can
correct, with one line on stderr; 130 after Ctrl-C.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import os
from dataclasses import dataclass
from typing import Literal

import torch

from minillm import export_gguf, export_hf, stock_model
from minillm.atomic_folder import replaced_folder
from minillm.configurator import configure
from minillm.errors import UserError, run
from minillm.model_card import write_card
from minillm.run_folder import read_settings
from minillm.tokenizer import CHAT_TEMPLATE
from model import GPT

Dtype = Literal["float32", "float16", "bfloat16", "q8_0", "f32", "f16", "bf16"]
SHORT = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass
class Settings:
    out_dir: str = "out/demo_sft"             # folder of the model, as train.py leaves it
    checkpoint: str = "newest"                # which one to load: newest, best or a step
    format: Literal["hf", "gguf"] = "hf"      # hf: transformers; gguf: llama.cpp, Ollama
    export_dir: str = ""                      # where the export goes; empty: hf or gguf in out_dir
    dtype: Dtype = "float32"                  # of the matrices; q8_0: gguf only
    stock: Literal["auto", "llama"] = "auto"  # hf: llama writes a dense model as Llama, not Arcee


def main():
    s = configure(Settings)
    dtype = SHORT.get(s.dtype, s.dtype)
    if s.format == "hf" and dtype == "q8_0":
        raise UserError("--dtype=q8_0 is for --format=gguf")
    if not os.path.isdir(s.out_dir):
        raise UserError(f"no model in {s.out_dir}: --out_dir is the folder of a run, "
                        "as train.py leaves it")
    folder = s.export_dir or os.path.join(s.out_dir, s.format)
    model = GPT.from_checkpoint(s.out_dir, "cpu", "float32", s.checkpoint, check=True)
    if s.format == "hf":
        to_hf(s, model, folder, getattr(torch, dtype))
    else:
        to_gguf(s, model, folder, dtype)
    print(f"wrote {folder}: {', '.join(sorted(os.listdir(folder)))}")


def to_hf(s, model, folder, dtype):
    kind = export_hf.pick_kind(model.config, s.stock)
    export_hf.import_safetensors()
    stock_model.check(model)
    keeps_text = model.tokenizer.transformers_config()["chat_template"] == CHAT_TEMPLATE
    notes = ["raw text" if keeps_text else "control", "document", kind]
    notes += notes_on_training(s.out_dir)
    with replaced_folder(folder, {*export_hf.FILES, "README.md"}, "--export_dir") as new:
        vocab_size = model.tokenizer.vocab_size
        export_hf.write_model(new, model.config, model.state_dict(), vocab_size, kind, dtype)
        tokenizer_dir = os.path.join(s.out_dir, "tokenizer")
        export_hf.write_tokenizer(new, tokenizer_dir, model.config.block_size)
        write_card(new, model, "hf", folder, s.dtype, notes)


def to_gguf(s, model, folder, dtype):
    if s.stock != "auto":
        raise UserError("--stock is for --format=hf")
    export_gguf.check(model.config)
    stock_model.check(model)
    tokenizer_json = export_gguf.read_tokenizer(os.path.join(s.out_dir, "tokenizer"))
    notes = ["control", "document", "gguf", *notes_on_training(s.out_dir)]
    if export_gguf.shortest_cap(tokenizer_json) < export_gguf.LONG_RUN:
        notes.append("runs")
    with replaced_folder(folder, {*export_gguf.FILES, "README.md"}, "--export_dir") as new:
        name = os.path.basename(os.path.abspath(s.out_dir))
        export_gguf.write_model(new, model.config, model.state_dict(), tokenizer_json, dtype, name)
        write_card(new, model, "gguf", folder, s.dtype, notes)


def notes_on_training(out_dir):
    """The notes for the model card that follow from how the model was trained."""
    if not os.path.exists(os.path.join(out_dir, "config.py")):
        return []
    return ["masks"] if read_settings(out_dir, doc_mask=bool)["doc_mask"] else []


if __name__ == "__main__":
    run(main)
