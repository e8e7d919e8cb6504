"""The demo's pretraining with a mixture of experts: two of four experts a token, no more parameters active than the dense demo has."""
out_dir = "out/demo_moe_pretrain"
n_expert = 4
n_expert_per_tok = 2
n_inner = 368                   # two experts and the router are a little less than the dense FFN's 768
dtype = "float32"               # on a CPU the grouped product is quicker so than in bfloat16
learning_rate = 1.2e-2          # at the dense model's 4e-3 it learns the facts as well, but SFT unlocks them or not, as the seed has it
max_iters = 3000
eval_interval = 750
checkpoint_interval = 0
