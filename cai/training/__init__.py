"""Parts of training: rows, verified checkpoints, the reference cache, the loss, the trainer.

`cai.training.train` is the one entrance; nothing above it imports from here. Only modules named in
`cai.training.train`'s late imports (`trainer`, `loss`, `packed`, `probe`) import torch.
"""
