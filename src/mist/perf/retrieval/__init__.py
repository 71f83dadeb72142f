"""Vector search on a CPU: four performance models, registered by importing them here.

`phases` is what they share: a search as phases, priced for batches on the cores and DRAM of a host. Nothing here says
what a search finds: recall is an input at most.
"""

from mist.perf.retrieval import flat, graph, ivf_pq, table

__all__ = ["flat", "graph", "ivf_pq", "table"]
