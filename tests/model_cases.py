"""A batch by hand, for tests of the whole model."""
import torch

from vlmamba_lite.data.batches import Batch

# fields of `MambaConfig`: two layers, of which the second is of attention and has a convolution of its own
HYBRID = dict(mixer=["mamba2", "attention"], mixer_args=dict(mamba2=dict(d_state=8, headdim=8, chunk_size=32), attention=dict(headdim=8, rope_dim=4, d_conv=3)))


def batch_of(images, ids, labels=None, mask=None):
    "A plain `Batch`: rows of text about pictures, as many for each, in the pictures' order."
    n, q = len(images), len(ids) // len(images)
    starts = torch.full_like(ids, -1)
    starts[:, 0] = torch.arange(len(ids))
    return Batch(images=images, prefixes=torch.arange(n)[:, None], prefix_of=torch.arange(n).repeat_interleave(q), starts=starts, input_ids=ids,
                 labels=labels, mask=torch.ones_like(ids, dtype=torch.bool) if mask is None else mask, names=[])
