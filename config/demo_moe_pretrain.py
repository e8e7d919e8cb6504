"""The demo's pretraining as MoE: 2 of 4 experts per token, no more active parameters than dense."""
out_dir = "out/demo_moe_pretrain"
n_expert = 4
n_expert_per_tok = 2
n_inner = 368                   # two experts and the router are a little smaller than the dense FFN
dtype = "float32"               # on a CPU the grouped matmul is faster than in bfloat16
doc_mask = True                 # one name in sight: it learns to find it at any distance
checkpoint_interval = 0
