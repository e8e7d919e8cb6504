"""The demo's pretraining as MoE: two of four experts per token.

No more parameters are active than in the dense demo.
"""
out_dir = "out/demo_moe_pretrain"
n_expert = 4
n_expert_per_tok = 2
n_inner = 368                   # two experts and the router: a little less than the dense 768
dtype = "float32"               # on a CPU the grouped matmul is faster than in bfloat16
checkpoint_interval = 0
