"""A 61M model on top of config/pretrain.py, for one consumer card.

    python train.py config/pretrain.py config/small.py
"""
out_dir = "out/small"

n_layer = 9
n_head = 10
n_kv_head = 5
n_embd = 640

# 131,072 tokens per step, 655M tokens in all
batch_size = 32
gradient_accumulation_steps = 8
epochs = 0
max_iters = 5000
warmup_iters = 150
