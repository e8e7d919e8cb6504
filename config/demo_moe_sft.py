"""The demo's SFT of the mixture of experts, on top of out/demo_moe_pretrain."""
out_dir = "out/demo_moe_sft"
data_dir = "data/demo/sft"
init_from = "out/demo_moe_pretrain"
doc_mask = True
epochs = 6
max_iters = 0                   # as many as epochs says
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 20
aux_loss_weight = 0.5           # questions are all alike: what they do to the routing must not undo what pretraining has made of it
eval_interval = 100
checkpoint_interval = 0
log_interval = 20
dtype = "float32"
