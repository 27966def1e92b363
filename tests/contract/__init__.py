"""The contract with every model type of the installed transformers: quantized and proven, or refused in one line.

sizes     what makes a config tiny, by the names of fields
overrides what single types need beside that, and variants
build     a random checkpoint of a type, as real uploads have it
uploads   what real checkpoints have beside their type: MTP heads, other prefixes, odd shards
reference stock transformers, and a dequantized copy that shares no code with llmquant
check     quantizes a checkpoint and judges: passes, refused, or a bug of ours
kinds     what sort of model a type is, for the tables
table     the outcomes that are known, in outcomes.json

`tests/test_model_types.py` runs some types, `pytest -m soak` all; `python eval/model_types.py` measures them anew and
writes the table and docs/models.md.
"""
