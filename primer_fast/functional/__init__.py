"""Differentiable functions with torch.nn.functional's names, one file per kernel file."""

from primer_fast.functional.conv2d import conv2d as conv2d
from primer_fast.functional.linear import linear as linear
from primer_fast.functional.max_pool2d import max_pool2d as max_pool2d
