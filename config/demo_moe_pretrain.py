"""The demo's pretraining as MoE: two of four experts per token.

No more parameters are active than in the dense demo.
"""
out_dir = "out/demo_moe_pretrain"
n_expert = 4
n_expert_per_tok = 2
n_inner = 368                   # two experts and the router: a little less than the dense 768
dtype = "float32"               # on a CPU the grouped product is quicker so than in bfloat16
# at the dense model's 4e-3 it learns the facts too, but SFT unlocks them or not, by the seed
learning_rate = 1.2e-2
max_iters = 3000
eval_interval = 750
checkpoint_interval = 0
