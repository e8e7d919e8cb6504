"""A 25M model on top of config/pretrain.py, for a laptop's GPU or a T4.

    python train.py config/pretrain.py config/tiny.py
"""
out_dir = "out/tiny"

n_layer = 8
n_head = 6
n_kv_head = 3
n_embd = 384

# 131,072 tokens per step, 262M tokens in all
batch_size = 32
gradient_accumulation_steps = 8
epochs = 0
max_iters = 2000
warmup_iters = 100
