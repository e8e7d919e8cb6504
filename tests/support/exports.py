"""Models that export's tests compare, and running export.py on them."""
import os
import sys

import export
from support.tiny_models import tiny_model

LONG = dict(block_size=256, rope_theta=5e5)


def lively_model(**shape):
    """A tiny model that doesn't repeat itself: of 200 greedy tokens more than 15 are different."""
    model = tiny_model(seed=1, **shape)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:         # norms of 1 and biases of 0 would hide one forgotten
            parameter.uniform_(0.5, 1.5)
        elif "noise" in name:
            parameter.normal_()
        elif name.startswith("blocks") and "router" not in name:
            parameter.mul_(3)
    return model


def export_folder(folder, argv=()):
    """Run export.py on the model in `folder`; returns the folder it wrote."""
    target = os.path.join(folder, "exported")
    old, sys.argv = sys.argv, ["export.py", f"--out_dir={folder}", f"--export_dir={target}", *argv]
    try:
        export.main()
    finally:
        sys.argv = old
    return target
