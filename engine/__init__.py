"""Token ids -> KV -> token ids. Knows torch and transformers; no SQLite, no terminal, no network.

The engine stands on its own: `load_model`, `ModelRunner`, `Context` and `Sequence` drive any Hugging Face decoder
with full attention, in token ids only.
"""

import os

# Large pages for torch's large buffers (Linux, where the system leaves the choice to programs): fewer page faults while
# a cache fills, fewer misses while it is read. Must be set before torch allocates; the user's own choice stands.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
