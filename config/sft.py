"""Fine-tune the pretrained dense model on Belle's conversations.

    python train.py config/sft.py
    torchrun --standalone --nproc_per_node=8 train.py config/sft.py
"""
out_dir = "out/sft"
data_dir = "data/sft"
init_from = "out/pretrain"

block_size = 512
doc_mask = True                 # several conversations share a row; none sees another

batch_size = 64
gradient_accumulation_steps = 8
epochs = 2
max_iters = 0                   # as many steps as epochs makes

optimizer = "muon"
learning_rate = 0.003           # of the blocks' matrices (by Muon)
embedding_rate = 1.67           # the embedding (by AdamW): 1.67 * learning_rate
vector_rate = 0.067             # norms and routers: 0.067 * learning_rate
beta1 = 0.7                     # of AdamW
weight_decay = 0.12
schedule = "linear"             # constant, then to zero over the last decay_share of the steps
decay_share = 1.0
min_lr = 0
warmup_iters = 200

log_interval = 10
eval_interval = 500
eval_iters = 100
checkpoint_interval = 500
compile = True
