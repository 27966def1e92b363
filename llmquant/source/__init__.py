"""Where weights come from: the demo, a folder or the Hub. Headers are checked first; then tensors are read one by one.

A checkpoint is a stranger's file. `header` and `bounds` refuse what would fill the memory or read outside a file,
`remote_code` decides which of its Python code may run, and `layouts` and `small_floats` unpack quantized weights.
"""
