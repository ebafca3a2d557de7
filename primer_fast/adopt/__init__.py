"""Our kernels in models that others wrote: modules are replaced, calls of attention are taken over."""
