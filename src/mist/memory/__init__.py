"""Memory: what a client holds and for whom. `kv_cache.py` is the paged KV cache with its prefix index; `tier.py` is a
memory behind it that many clients may share, `hierarchy.py` the tiers that one client sees, `eviction/` who goes first.

Memories count blocks and bytes and know which content they hold; they never decide who gets blocks or who loses them,
and never move a byte: transfers are the network's.
"""
