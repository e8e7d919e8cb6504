"""AdamW with a cosine schedule, the recipe to compare with: give it after another config file.

    python train.py config/pretrain.py config/baseline.py --out_dir=out/baseline
"""
optimizer = "adamw"
learning_rate = 6e-4
min_lr = 6e-5
schedule = "cosine"
beta1 = 0.9
weight_decay = 0.1
