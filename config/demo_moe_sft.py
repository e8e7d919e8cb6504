"""The demo's SFT of the mixture of experts, on top of out/demo_moe_pretrain."""
out_dir = "out/demo_moe_sft"
data_dir = "data/demo/sft"
init_from = "out/demo_moe_pretrain"
doc_mask = True
epochs = 12                     # in 6 it reaches the facts or not, as a rounding elsewhere has it
max_iters = 0                   # as many as epochs says
learning_rate = 1e-3            # at 2e-3 it learns the answers by heart instead
min_lr = 1e-4
warmup_iters = 20
# questions are all alike: balancing them would move the routing away from the facts
aux_loss_weight = 0.0
eval_interval = 100
checkpoint_interval = 0
log_interval = 20
dtype = "float32"
