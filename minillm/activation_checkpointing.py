"""Activation checkpointing: less memory in training for about a third more arithmetic.

    python train.py config/moe_pretrain.py --activation_checkpointing=True

The forward pass keeps only the input of every block. The backward pass computes a block's other
activations once more, with the same dropout and router noise, before it needs them: the gradients
stay the same. It has nothing to do with checkpoint.py's files.

Paper: arXiv 1604.06174.
"""
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model):
    """Let every block of a GPT recompute its activations. Parameters keep their names.

    Call it before torch.compile.
    """
    for kind in {type(block) for block in model.blocks}:
        class CheckpointedBlock(kind):
            def forward(self, *args):
                return checkpoint(super().forward, *args, use_reentrant=False)
        for block in model.blocks:
            if type(block) is kind:
                block.__class__ = CheckpointedBlock
