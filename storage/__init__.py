"""What outlives the process: documents, sessions, KV blocks. SQLite only; no torch.

Token ids and documents are the truth; KV blocks are a cache of it.
"""
