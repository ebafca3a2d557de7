"""A convolution and a layer of attention, worked out number by number."""
