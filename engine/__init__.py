"""Token ids -> KV -> token ids. Knows torch and transformers; no SQLite, no terminal, no network.

The engine stands on its own: `load_model`, `ModelRunner`, `Context` and `Sequence` drive any Hugging Face decoder
with full attention, in token ids only.
"""
