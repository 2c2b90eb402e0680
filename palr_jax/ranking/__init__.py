"""Ranking: the LLM's score of every candidate, one pass a user, fused with the retriever's.

`score.py` is the jitted program and its batching, `users.py` runs it over users, `fuse.py` fuses.
"""
