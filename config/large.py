"""A 347M model on top of config/pretrain.py, for a card of 16 GB or more.

    python train.py config/pretrain.py config/large.py
"""
out_dir = "out/large"

n_layer = 17
n_head = 20
n_kv_head = 10
n_embd = 1280

# 262,144 tokens per step, as in config/pretrain.py, in smaller micro-steps
batch_size = 16
gradient_accumulation_steps = 32
