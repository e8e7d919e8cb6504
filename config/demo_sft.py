"""The demo's SFT: questions and answers about one half of the town, on top of out/demo_pretrain."""
out_dir = "out/demo_sft"
data_dir = "data/demo/sft"
init_from = "out/demo_pretrain"
doc_mask = True
epochs = 6
max_iters = 0                   # as many as epochs says
learning_rate = 7e-4
min_lr = 7e-5
warmup_iters = 20
eval_interval = 100
checkpoint_interval = 0
log_interval = 20
