"""The ops as operators of torch.library, which torch.compile, torch.export and fake tensors can see whole.

Importing the package registers ``torch.ops.primer_fast.<op>`` and ``<op>_backward``, one file per op: the kernels'
launchers behind a schema, the shapes, dtypes and strides of the results, and the gradient of the one by the other.
Arguments come as primer_fast.functional passes them, after its checks; the operators check nothing themselves. What a
forward keeps for its backward is a second output, empty where there is nothing; ``keep`` says whether to keep it. A
backward returns the gradients that ``needed`` asks for. The float32 matmul precision is read when a kernel is launched,
not when the graph is made, as torch's own products do.
"""

from primer_fast.library import conv2d as conv2d
from primer_fast.library import embedding as embedding
from primer_fast.library import layer_norm as layer_norm
from primer_fast.library import linear_cross_entropy as linear_cross_entropy
from primer_fast.library import linear_log_prob as linear_log_prob
from primer_fast.library import max_pool2d as max_pool2d
from primer_fast.library import mlp as mlp
from primer_fast.library import scaled_dot_product_attention as scaled_dot_product_attention
