"""The dropout rule: which elements of x a seed drops. A leaf; csrc/philox.h and backends/triton/language.py hold the
same rule for their languages, and a test compares the masks bit for bit.

Philox4x32-7 (Salmon et al., SC 2011): column 8c+j of row m belongs to counter (c, low half of m, high half of m, 0)
under the key (low, high) half of the 64-bit seed; its lane j is the (j odd ? high : low) half of output word j // 2. An
element is kept where its lane >= round(p * 65536); kept ones are scaled by 1 / (1 - round(p * 65536) / 65536). Integer
arithmetic only, so every backend draws the same mask.
"""

import torch

LANES = 65536
ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def threshold(p):
    """Lanes below this are dropped, out of 65536."""
    return round(p * LANES)


def scale(p):
    """What a kept element is multiplied by: 1 / (1 - threshold / 65536); 0 where nothing is kept."""
    kept = LANES - threshold(p)
    return LANES / kept if kept else 0.0


def draw_seed(device):
    """A fresh int64 seed on the device, from torch's generator: torch.manual_seed and checkpointing govern it."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_mask(seed, rows, columns, p):
    """The kept elements of a (rows, columns) matrix, as a bool tensor on the seed's device."""
    device = seed.device
    row = torch.arange(rows, dtype=torch.int64, device=device)[:, None]
    counter = torch.arange((columns + 7) // 8, dtype=torch.int64, device=device)[None, :]
    words = [counter.expand(rows, -1), (row & _WORD).expand(-1, counter.shape[1]), (row >> 32).expand(-1, counter.shape[1])]
    words.append(torch.zeros_like(words[0]))
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(ROUNDS):
        # a product wraps in int64, which keeps all of its 64 bits; the shift's sign bits are masked away
        product0, product1 = words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _WORD, (product1 >> 32) & _WORD
        words = [high1 ^ words[1] ^ keys[0], product1 & _WORD, high0 ^ words[3] ^ keys[1], product0 & _WORD]
        keys = [(key + step) & _WORD for key, step in zip(keys, KEY_STEPS)]
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (lanes >= threshold(p)).reshape(rows, (columns + 7) // 8 * 8)[:, :columns]
