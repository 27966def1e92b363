"""Where weights come from: the demo, a folder or the Hub -> checked headers, and tensors by plain reads."""
