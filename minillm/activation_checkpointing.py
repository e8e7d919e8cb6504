"""Activation checkpointing: less memory in training for about a third more arithmetic.

    python train.py config/moe_pretrain.py --activation_checkpointing=True

The forward pass keeps the input of every block alone. The backward pass computes a block's other
activations once more, with the same dropout and router noise, before it needs them: the gradients
stay the same. It has nothing to do with checkpoint.py's files.

Paper: arXiv 1604.06174.
"""
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model):
    """Let every block of a GPT recompute its activations. Parameters keep their names.

    Call it before torch.compile.
    """
    block_type = type(model.blocks[0])

    class CheckpointedBlock(block_type):
        def forward(self, x, rope, attend):
            return checkpoint(super().forward, x, rope, attend, use_reentrant=False)
    for block in model.blocks:
        block.__class__ = CheckpointedBlock
