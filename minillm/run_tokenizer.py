"""The tokenizer of a run: where it is found, and its copy in out_dir."""
import os
import shutil

from minillm.errors import UserError
from minillm.token_files import sha256_of


def find_tokenizer(data, s):
    """The folder of the tokenizer that the data were prepared with, known by its hash.

    It is looked for where --tokenizer and meta.json say, beside the data, in init_from, in out_dir.
    Raises UserError that names these places if it is in none of them.
    """
    stated, wanted = data.meta["tokenizer"], data.meta["tokenizer_hash"]
    if s.tokenizer and _hash_of(s.tokenizer) not in (wanted, None):
        raise UserError(f"--tokenizer={s.tokenizer} is not the one that {data.folder} was prepared "
                        "with: prepare the data with it, or leave --tokenizer out")
    beside = os.path.dirname(os.path.abspath(data.folder))
    places = [s.tokenizer, stated, os.path.join(beside, stated),
              os.path.join(beside, os.path.basename(os.path.normpath(stated))),
              os.path.join(beside, "tokenizer"), os.path.join(data.folder, "tokenizer")]
    if s.init_from not in ("scratch", "resume"):
        model = s.init_from.removeprefix("hf:")
        if os.path.isfile(model):
            model = os.path.dirname(model)
        places += [os.path.join(model, "tokenizer"), model]
    places.append(os.path.join(s.out_dir, "tokenizer"))
    places = list(dict.fromkeys(filter(None, places)))
    for place in places:
        if _hash_of(place) == wanted:
            return place
    raise UserError(f"the tokenizer that {data.folder} was prepared with "
                    f"(tokenizer.json of sha256 {wanted[:12]}) is in none of {', '.join(places)}: "
                    "give its folder with --tokenizer=DIR, or prepare the data again")


def _hash_of(folder):
    """sha256 of a folder's tokenizer.json, or None where there is none that can be read."""
    try:
        return sha256_of(os.path.join(folder, "tokenizer.json"))
    except (OSError, ValueError):
        return None


def copy_tokenizer(source, folder):
    """Put the tokenizer's files into folder/tokenizer."""
    target = os.path.join(folder, "tokenizer")
    if os.path.realpath(source) == os.path.realpath(target):
        return
    try:
        os.makedirs(target + ".tmp")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if os.path.exists(os.path.join(source, name)):
                shutil.copy(os.path.join(source, name), target + ".tmp")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(target + ".tmp", target)
    finally:
        shutil.rmtree(target + ".tmp", ignore_errors=True)
