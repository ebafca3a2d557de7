"""How a kernel gets onto the GPU with little time on the host."""
