"""Memory: what a client holds and for whom. `kv_cache.py` is the paged KV cache with its prefix index.

Memories count blocks and know which content they hold; they never decide who gets blocks or who loses them.
"""
