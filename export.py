"""Write a trained model in the format that other programs open, without our code.

    python export.py                                    # the demo, for Hugging Face transformers
    python export.py --out_dir=out/sft --dtype=bfloat16
    python export.py --out_dir=out/sft --stock=llama    # dense, for engines that refuse Arcee
    python train.py --init_from=hf:out/sft/hf           # an exported folder trains on

The folder holds config.json, model.safetensors, the tokenizer and a model card (README.md);
transformers 4.57 and 5 open it with AutoModelForCausalLM and AutoTokenizer. In float32 the logits
are ours up to rounding. Needs the package safetensors.
"""
import os
from dataclasses import dataclass
from typing import Literal

import torch

from minillm import export_hf
from minillm.atomic_folder import replaced_folder
from minillm.run_folder import read_settings
from minillm.configurator import configure
from minillm.errors import UserError, run
from minillm.model_card import write_card
from model import GPT


@dataclass
class Settings:
    out_dir: str = "out/demo_sft"             # folder of the model, as train.py leaves it
    checkpoint: str = "newest"                # which of its checkpoints: newest or best
    export_dir: str = ""                      # where the export goes; empty: out_dir/hf
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"    # of the weights in the file
    stock: Literal["auto", "llama"] = "auto"  # llama: a dense model as LlamaForCausalLM, not Arcee


def main():
    s = configure(Settings)
    folder = s.export_dir or os.path.join(s.out_dir, "hf")
    model = GPT.from_checkpoint(s.out_dir, device="cpu", dtype="float32", which=s.checkpoint)
    kind = export_hf.pick_kind(model.config, s.stock)
    export_hf.import_safetensors()
    document_masks = trained_with_document_masks(s.out_dir)
    with replaced_folder(folder, {*export_hf.FILES, "README.md"}) as new:
        export_hf.write_model(new, model.config, model.state_dict(), model.tokenizer.vocab_size,
                              kind, getattr(torch, s.dtype))
        tokenizer_dir = os.path.join(s.out_dir, "tokenizer")
        export_hf.write_tokenizer(new, tokenizer_dir, model.config.block_size)
        write_card(new, model, kind, document_masks, s.dtype, folder)
    print(f"wrote {folder}: {', '.join(sorted(os.listdir(folder)))}")


def trained_with_document_masks(out_dir):
    """Whether attention was kept inside a document while training; False if nothing says so."""
    if not os.path.exists(os.path.join(out_dir, "config.py")):
        return False
    return read_settings(out_dir, "doc_mask")["doc_mask"]


if __name__ == "__main__":
    run(main)
