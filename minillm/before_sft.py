"""Tells who chats with a model before its SFT why the answers make no sense.

    warn_before_sft("out/small")                 # one line on stderr, or nothing
"""
import os

from minillm.distributed import warn0
from minillm.errors import UserError
from minillm.run_folder import read_settings
from minillm.token_files import read_meta


def warn_before_sft(out_dir):
    """Say so on stderr if the run in `out_dir` (or of this .pt file) was trained on text.

    Its config.py names the data. Where that has moved, or another program has made the model,
    nothing is known, so nothing is said.
    """
    folder = os.path.dirname(out_dir) if os.path.isfile(out_dir) else out_dir
    try:
        meta = read_meta(read_settings(folder, data_dir=str)["data_dir"])
    except UserError:
        return
    if meta["kind"] == "pretrain":
        warn0(f"{out_dir} was trained on text, not on chats: it continues what you write. "
              f"It answers after SFT: train.py config/sft.py --init_from={out_dir}")
