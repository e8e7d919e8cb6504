"""Pretrain the MoE model on seq-monkey: 876M parameters, 473M active per token.

    python train.py config/moe_pretrain.py                                     # one GPU
    torchrun --standalone --nproc_per_node=8 train.py config/moe_pretrain.py   # eight GPUs
"""
out_dir = "out/moe_pretrain"
data_dir = "data/pretrain"

n_layer = 12
n_head = 16
n_kv_head = 8
n_embd = 1024
n_expert = 8
n_expert_per_tok = 4
block_size = 512

# 8 micro-steps of 64 windows: 262,144 tokens per step, on one GPU or shared by up to eight
batch_size = 64
gradient_accumulation_steps = 8
epochs = 1
max_iters = 0                   # as many steps as epochs makes

optimizer = "muon"
learning_rate = 0.03            # of the blocks' matrices (by Muon)
embedding_rate = 1.67           # the embedding (by AdamW): 1.67 * learning_rate
vector_rate = 0.067             # norms and routers: 0.067 * learning_rate
beta1 = 0.7                     # of AdamW
weight_decay = 0.06
schedule = "linear"             # constant, then to zero over the last decay_share of the steps
decay_share = 0.5
min_lr = 0
warmup_iters = 500

log_interval = 10
eval_interval = 1000
eval_iters = 100
checkpoint_interval = 1000
compile = True
