"""What torch's own products are given on a CPU: matrices without gaps between their rows.

On processors with AMX, oneDNN multiplies bfloat16 (and on some float16) matrices in blocks of 32
along the summed axis. Where its length is no multiple of 32, the last block of a row reads on into
what lies behind the row, and multiplies it by zero: harmless, unless it is NaN or infinite (oneDNN
issue 5717, fixed in its pull request 5723; torch 2.13 does not have the fix). Behind the row of a
matrix with gaps lies memory that is nobody's, and may hold anything. So every operand that may have
gaps goes through `packed` before a product: a copy, made only there, only on a CPU, and only where
there are gaps or another order.

What this cannot prevent: behind a row without gaps lies the next row, so on such a processor a NaN
may still reach the row before its own (behind the last row oneDNN itself puts zeros). Masked and
padded values are therefore set to 0 before the products, not after them (`layers.keep_seen`).
"""

import torch

HALVES = (torch.bfloat16, torch.float16)


def packed(x):
    """x, or on a CPU in 16 bits a contiguous copy of it, where it is not contiguous."""
    return x.contiguous() if x.device.type == "cpu" and x.dtype in HALVES else x
