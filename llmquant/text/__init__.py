"""Text -> windows of token ids.

A specification such as `c4:0.5,notes.txt:0.5` is split into parts (`mixture`), each part is loaded (`corpus`),
tokenized by the checkpoint's own tokenizer (`tokenizer`) and cut into windows (`windows`). `overlap` then refuses
evaluation text that calibration has seen.
"""
