"""Fine-tune the pretrained mixture of experts on Belle's conversations.

    python train.py config/moe_sft.py
    torchrun --standalone --nproc_per_node=8 train.py config/moe_sft.py
"""
out_dir = "out/moe_sft"
data_dir = "data/sft"
init_from = "out/moe_pretrain"

block_size = 512
doc_mask = True                 # several conversations share a row; none sees another

batch_size = 64
gradient_accumulation_steps = 8
epochs = 2
max_iters = 0                   # as many as epochs says
learning_rate = 2e-4
min_lr = 2e-5
warmup_iters = 200
weight_decay = 0.1

log_interval = 10
eval_interval = 500
eval_iters = 100
checkpoint_interval = 500
compile = True
