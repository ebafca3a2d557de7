"""Layer normalisation of a sum, in one pass over memory, and its gradients.

    s  = x + residual            n = (s - mean) rstd        rstd = 1 / sqrt(variance + eps)
    y  = n w + b                 mean, variance over the N elements of a row, the variance biased
    g  = dy w                    ds = rstd (g - mean(g) - n mean(g n)) + upstream gradient of s
    dw = sum over rows of dy n   db = sum over rows of dy             dx = dresidual = ds

Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), equations 3 and 4.
Shapes: x, residual, s, y (rows, N), elements of a row adjacent; w, b (N,); mean, rstd (rows,) float32.

s is rounded to its dtype first, and y comes from the rounded s, as in PyTorch: what the forward normalises is what it
returns and what the backward reads again, and y does not depend on whether s is kept. Statistics are in float32, the
variance from centred elements. A row too long for the registers is read twice: statistics of its blocks are merged
(Chan, Golub, LeVeque 1979, equation 1.5), then its second read comes from L2.

dw and db are summed by programs that walk over the rows with their sums in registers, and those are added by one
more kernel in a fixed order: two runs are bitwise equal. Rows too long for that have programs for ds, a row each, and
programs for dw and db, a block of columns over a chunk of rows each. Both read dy and s, and run so close after each
other that one of them finds them in L2. The parts:

    layer_norm_rows.py       tiles of rows
    layer_norm_settings.py   how rows are cut up
    layer_norm_forward.py    y, s and what the backward needs
    layer_norm_backward.py   ds, dw, db

FLOPs: about 8 an element forward, 14 backward. Traffic: forward x (and residual) in, y (and s) out; backward dy, s
(and the gradient of s) in, ds out, once each.
"""

from .layer_norm_backward import layer_norm_bwd
from .layer_norm_forward import layer_norm_fwd

__all__ = ["layer_norm_bwd", "layer_norm_fwd"]
