"""The demo's SFT as MoE: questions about one half of the town, on top of out/demo_moe_pretrain."""
out_dir = "out/demo_moe_sft"
data_dir = "data/demo/sft"
init_from = "out/demo_moe_pretrain"

epochs = 3
max_iters = 0                   # as many steps as epochs makes
optimizer = "adamw"             # it disturbs the facts in the FFNs less than Muon does
learning_rate = 1e-3
beta1 = 0.9
warmup_iters = 10
eval_interval = 75
checkpoint_interval = 0
log_interval = 25
dtype = "float32"               # on a CPU the grouped matmul is faster than in bfloat16
